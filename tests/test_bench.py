"""Bench and show: what is reported follows from what was measured, and a process that dies is one sentence."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from edgerazor import kernels, pipeline, recipe
from edgerazor.cli import app
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.stages import bench, show
from edgerazor.workdir import WorkDir


@pytest.fixture(scope="module")
def job(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[recipe.Recipe, WorkDir]:
    """A job with a rounded model, measured and benchmarked."""
    work = WorkDir(tmp_path_factory.mktemp("bench") / "work")
    asked = recipe.build(
        {
            "model": str(llama),
            "threads": 1,
            "data": {"held_out": [{"file": str(text_file)}], "sequence_length": 32},
            "calibrate": {"bits": 4.0, "group_size": 40},
            "pack": {"source": "teacher"},
            "eval": {"text_sequences": 4},
            "bench": {"prefill_tokens": 16, "decode_tokens": 4, "contexts": [0, 8, 4000], "rounds": 2},
        }
    )
    for name in ("pack", "eval", "bench"):
        pipeline.run(name, asked, work, Console(quiet=True))
    return asked, work


def result_of(work: WorkDir) -> bench.BenchResult:
    return bench.BenchResult.model_validate_json(work.result_file("bench").read_text())


def test_sizes_are_those_of_the_files(job, llama):
    _, work = job
    result = result_of(work)
    assert [engine.name for engine in result.engines] == ["packed", "teacher"]
    assert result.bytes == sum(f.stat().st_size for f in work.folder("pack").glob("*.safetensors"))
    assert result.engines[1].weight_bytes == (llama / "model.safetensors").stat().st_size
    assert result.engines[0].kernel == kernels.name()
    assert result.notes == ([] if kernels.is_native() else [kernels.note("reference")])
    assert result.peak_memory_bytes == result.engines[0].peak_memory_bytes >= result.engines[0].start_memory_bytes


def test_the_share_of_bandwidth_is_bytes_times_rate(job):
    _, work = job
    result = result_of(work)
    per_token = {engine.name: engine.bytes_per_token for engine in result.engines}
    decodes = [run for run in result.runs if run.phase == "decode"]
    # 4000 tokens do not fit into 128 positions, so that context is left out
    assert [(run.engine, run.context) for run in decodes] == [
        ("packed", 0),
        ("packed", 8),
        ("teacher", 0),
        ("teacher", 8),
    ]
    for run in decodes:
        expected = run.tokens_per_second * per_token[run.engine] / result.bandwidth_bytes_per_second
        assert run.bandwidth_share == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_an_untied_embedding_is_not_read_while_decoding(job):
    """The tiny Llama has a head of its own: a token reads one row of the embedding."""
    _, work = job
    engine = result_of(work).engines[1]
    embedding = 300 * 96 * 4
    assert engine.weight_bytes - engine.bytes_per_token == embedding


def test_peak_memory_is_the_engines_own(llama):
    """And not what this process held before it started the engine's."""
    ballast = bytearray(1_500_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    with bench.worker(llama, 1) as link:
        assert bench.ask(link, "about")["start_memory_bytes"] < 1_000_000_000
    assert bench.peak_memory() > 1_500_000_000


def test_a_process_that_dies_is_one_sentence(llama):
    with bench.worker(llama, 1) as link:
        link.send(("not a request",))
        assert isinstance(link.recv(), Exception)
        for child in bench.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="ended by itself"):
            bench.ask(link, "about")


def test_a_folder_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"), bench.worker(tmp_path, 1):
        pass


def test_show_collects_what_the_stages_found(job, llama):
    _, work = job
    summary = show.summarize(work)
    assert [row.name for row in summary.models] == ["teacher", "packed"]
    teacher, packed = summary.models
    assert teacher.real_bits == pytest.approx(32, rel=0.02)
    with safe_open(llama / "model.safetensors", framework="pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert packed.real_bits == pytest.approx(8 * packed.bytes / weights, rel=1e-3)
    assert packed.decode_tokens_per_second == result_of(work).runs[1].tokens_per_second
    assert packed.perplexity > 0
    assert packed.kl > 0


def test_show_prints_a_job_a_packed_folder_the_recipe_and_the_schema(job):
    _, work = job
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["show", str(work.path), "--json"]).stdout)
    assert found["notation"] == "W4-A8-KV8"
    packed = json.loads(runner.invoke(app, ["show", str(work.folder("pack")), "--json"]).stdout)
    assert packed["settings"] == {
        "activation_bits": 8,
        "kv_bits": 8,
        "group_size": 40,
        "query_bits": 16,
        "probability_bits": 16,
        "adaptive_tokens": "off",
        "thresholds": [],
    }
    schema = json.loads(runner.invoke(app, ["show", "schema"]).stdout)
    assert set(show.RESULTS) < set(schema)
    assert "calibrate:" in runner.invoke(app, ["show", "recipe"]).stdout


def test_show_refuses_what_is_neither(tmp_path):
    with pytest.raises(UserError, match="neither a working directory"):
        show.inspect(tmp_path, Console(quiet=True))

"""Bench and show: what is reported follows from what was measured, and a process that dies is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import edgerazor
from edgerazor import kernels, models, pipeline, recipe
from edgerazor.benchmark import bandwidth as bandwidth_
from edgerazor.benchmark import engines as engines_
from edgerazor.benchmark import peers
from edgerazor.benchmark import rounds as rounds_
from edgerazor.benchmark.bench_result import BenchResult
from edgerazor.benchmark.engines import EngineConfig, Round, Speed
from edgerazor.cli.app import app
from edgerazor.console import Console, Tracker
from edgerazor.errors import UserError
from edgerazor.job import JobContext
from edgerazor.kernels import native
from edgerazor.stages import bench, show
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, spawn
from helpers.tiny_models import ModelMaker


@pytest.fixture(scope="module")
def job(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[recipe.Recipe, WorkDir]:
    """A job with a rounded model, measured and benchmarked."""
    work = WorkDir(tmp_path_factory.mktemp("bench") / "work")
    asked = recipe.build(
        {
            "model": str(llama),
            "threads": 1,
            "data": {"held_out": [{"file": str(text_file)}], "sequence_length": 32},
            "calibrate": {"bits": 4.0, "group_size": 40, "sensitivity_tokens": 64},
            "pack": {"source": "teacher"},
            "eval": {"text_sequences": 4},
            "bench": {
                "prefill_tokens": 16,
                "decode_tokens": 4,
                "contexts": [0, 8, 4000],
                "rounds": 2,
                "threads": [2, 1],
            },
        }
    )
    for name in ("pack", "eval", "bench"):
        pipeline.run(name, asked, work, Console(quiet=True))
    return asked, work


def result_of(work: WorkDir) -> BenchResult:
    return BenchResult.model_validate_json(work.result_file("bench").read_text())


@pytest.mark.slow
def test_sizes_are_those_of_the_files(job, llama):
    _, work = job
    result = result_of(work)
    assert [(engine.name, engine.threads) for engine in result.engines] == [
        ("packed", 1),
        ("packed", 2),
        ("teacher", 2),
    ]
    assert result.threads == [each.threads for each in result.bandwidths] == [1, 2]
    assert result.bandwidth_bytes_per_second == result.bandwidths[1].bytes_per_second
    assert result.bytes == sum(f.stat().st_size for f in work.folder("pack").glob("*.safetensors"))
    assert result.engines[2].weight_bytes == (llama / "model.safetensors").stat().st_size
    assert result.engines[0].kernel == kernels.name()
    assert result.notes == ([] if kernels.is_native() else [kernels.note("reference")])
    packed = result.engines[1]  # with the most threads
    assert result.load_seconds == packed.load_seconds > 0
    assert result.peak_memory_bytes == packed.peak_memory_bytes >= packed.start_memory_bytes


@pytest.mark.slow
def test_the_share_of_bandwidth_is_bytes_times_rate(job):
    _, work = job
    result = result_of(work)
    engines = {engine.name: engine for engine in result.engines}
    bandwidths = {each.threads: each.bytes_per_second for each in result.bandwidths}
    decodes = [run for run in result.runs if run.phase == "decode"]
    # 4000 tokens do not fit into 128 positions, so that context is left out
    expected = [(engine, threads, context) for threads in (1, 2) for engine in engines for context in (0, 8)]
    assert [(run.engine, run.threads, run.context) for run in decodes] == expected
    for run in decodes:
        engine = engines[run.engine]
        moved = engine.bytes_per_token + run.context * engine.cache_bytes_per_token
        assert run.bytes_per_token == moved
        share = run.tokens_per_second * moved / bandwidths[run.threads]
        assert run.bandwidth_share == pytest.approx(share, rel=0.01, abs=1e-4)
    assert engines["teacher"].cache_bytes_per_token == 2 * 2 * 2 * 16 * 4  # k and v, 2 layers, 2 heads of 16, float32
    assert all(run.bytes_per_token is run.bandwidth_share is None for run in result.runs if run.phase == "prefill")


@pytest.mark.slow
def test_an_untied_embedding_is_not_read_while_decoding(job):
    """The tiny Llama has a head of its own: a token reads one row of the embedding."""
    _, work = job
    engine = result_of(work).engines[2]
    embedding = 300 * 96 * 4
    assert engine.weight_bytes - engine.bytes_per_token == embedding


@pytest.mark.slow
def test_peak_memory_is_the_engines_own(llama):
    """And not what this process held before it started the engine's."""
    ballast = bytearray(1_500_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    with engines_.worker(EngineConfig(llama, 1)) as link:
        assert engines_.ask(link, "describe")["start_memory_bytes"] < 1_000_000_000
    assert engines_.peak_memory() > 1_500_000_000


def test_a_process_that_dies_is_one_sentence(llama):
    with engines_.worker(EngineConfig(llama, 1)) as link:
        link.send(("not a request",))
        assert isinstance(link.recv(), Exception)
        for child in engines_.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="ended by itself"):
            engines_.ask(link, "describe")


def test_a_folder_that_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"), engines_.worker(EngineConfig(tmp_path, 1)):
        pass


def test_decoding_begins_behind_its_context_and_counts_tokens_that_were_computed(llama, monkeypatch):
    """In every round: what was decoded in the one before is forgotten."""
    served = engines_.Served(EngineConfig(llama, 1))
    seen: list[tuple[int, int]] = []
    forward = served.model.forward

    def spy(tokens: torch.Tensor, **options: Any) -> Any:
        cache = options.get(models.cache_name(served.model.model))
        seen.append((cache.get_seq_length() if cache is not None else 0, tokens.shape[1]))
        return forward(tokens, **options)

    monkeypatch.setattr(served.model, "forward", spy)
    asked = Round(threads=1, prefill=5, decode=2, contexts=(0, 8))
    assert [speed[:2] for speed in served.measure(asked)] == [("prefill", 0), ("decode", 0), ("decode", 8)]
    first = [(0, 5), (0, 1), (1, 1), (2, 1), (0, 8), (8, 1), (9, 1)]
    assert seen == [(0, 5), *first]  # once to warm up
    seen.clear()
    served.measure(asked)
    assert seen == [(0, 5), (0, 1), (1, 1), (2, 1), (6, 2), (8, 1), (9, 1)]  # the last one again


@pytest.mark.parametrize(("limit", "prefill", "contexts"), [(10, 6, (0,)), (9, 6, ()), (4, 4, ()), (100, 6, (0, 20))])
def test_nothing_is_measured_beyond_the_positions(limit, prefill, contexts):
    """Behind no token there is one, all the same; then the decoded ones."""
    asked = recipe.Bench(prefill_tokens=6, decode_tokens=8, contexts=(0, 20))
    assert Round.of(asked, 1, limit) == Round(1, prefill, 8, contexts)


def test_bandwidth_is_read_with_the_library_where_it_is_built(monkeypatch):
    monkeypatch.setattr(bandwidth_, "BYTES", 1 << 22)
    for library, how in ((native.library, "the native library" if native.library() else "torch.sum"), (None, "torch")):
        monkeypatch.setattr(native, "library", library or (lambda: None))
        bandwidth = bandwidth_.Bandwidth()
        assert bandwidth.how.startswith(how)
        assert bandwidth.memory.data_ptr() % (1 << 21) == 0
        before = torch.get_num_threads()
        assert all(bandwidth.measure(threads) > 0 for threads in (1, 2, 3))
        assert torch.get_num_threads() == before


@pytest.mark.slow
def test_without_the_library_bench_says_how_to_build_it(llama, tmp_path, monkeypatch):
    """As after an installation without a compiler."""
    package = Path(edgerazor.__file__).parent
    shutil.copytree(package, tmp_path / "edgerazor", ignore=shutil.ignore_patterns("*.so", "*.dylib", "__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    work = tmp_path / "work"
    assert spawn("pack", llama, "--bits", 4, "--group-size", 40, "--work", work, cwd=tmp_path).code == 0
    small = ("--rounds", 1, "--prefill-tokens", 4, "--decode-tokens", 1, "--contexts", 0, "--threads", 1)
    done = spawn("bench", "--work", work, *small, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = done.json()
    assert found["engines"][0]["kernel"] == "reference"
    assert found["bandwidth_of"].startswith("torch.sum")
    (note,) = [note for note in found["notes"] if "Reference kernels were used" in note]
    assert "`python -m edgerazor.kernels.build`; that needs a C++ compiler" in note


# --- programs of others ------------------------------------------------------------------------

#: Prints what llama-bench would of a machine that computes 10 tokens a second, and notes its arguments.
FAKE = """#!{python}
import json, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(pathlib.Path(__file__).with_suffix(".log"), "a") as log:
    print(json.dumps([str(pathlib.Path(sys.argv[2]).absolute()), *sys.argv[3:]]), file=log)
prompt, gen = int(words["-p"]), int(words["-n"])
tests = [dict(n_prompt=prompt, n_gen=0, n_depth=0, avg_ns=10**8 * prompt)] if prompt else []
depths = [int(each) for each in words.get("-d", "0").split(",")]
tests += [dict(n_prompt=0, n_gen=gen, n_depth=depth, avg_ns=10**8 * gen) for depth in depths if gen]
pairs = [sys.argv[i + 1].split(",") for i, word in enumerate(sys.argv) if word == "-gp"]
tests += [dict(n_prompt=int(p), n_gen=int(g), avg_ns=10**8 * int(g)) for p, g in pairs]
print(json.dumps(tests))
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text.replace("{python}", sys.executable), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.with_suffix(".log").read_text().splitlines()]


@pytest.fixture(scope="module")
def ternary(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> WorkDir:
    """A packed model whose linear layers are all ternary, in the groups that TQ1_0 has."""
    folder = tmp_path_factory.mktemp("ternary")
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    make_model(folder / "model", "llama", tie_word_embeddings=True, **shape)
    asked = {"model": str(folder / "model"), "calibrate": {"bits": 1.58}, "pack": {"source": "teacher"}}
    pipeline.run("pack", recipe.build(asked), WorkDir(folder / "work"), Console(quiet=True))
    return WorkDir(folder / "work")


@pytest.mark.slow
def test_programs_of_others_take_turns_on_files_of_the_same_model(ternary, run: Run, tmp_path):
    llama, ik = program(tmp_path / "llama-bench", FAKE), program(tmp_path / "ik-bench", FAKE)
    small = ("--rounds", 2, "--prefill-tokens", 16, "--decode-tokens", 4, "--contexts", "0,8,16", "--threads", 1)
    words = ("bench", "--work", ternary.path, *small, "--llama-bench", llama, "--ik-llama-bench", ik, "--json")
    done = run(*words)
    assert done.code == 0, done.err
    result = BenchResult.model_validate(done.json())
    names = ["packed", "teacher", "llama.cpp TQ1_0", "llama.cpp TQ2_0", "ik_llama.cpp TQ1_0", "ik_llama.cpp TQ2_0"]
    assert [engine.name for engine in result.engines] == names
    for engine in result.engines[2:]:
        runs = [(run.phase, run.context, run.tokens_per_second) for run in result.runs if run.engine == engine.name]
        assert runs == [("prefill", 0, 10.0), *(("decode", context, 10.0) for context in (0, 8, 16))]
        assert engine.load_seconds is engine.peak_memory_bytes is None
        assert engine.cache_bytes_per_token == 2 * 2 * 2 * 64 * 2  # of float16
    always = ["-t", "1", "-ngl", "0", "-r", "1", "-o", "json"]
    assert [words[1:] for words in calls(llama)[:2]] == [
        [*always, "-p", "16", "-n", "4"],
        [*always, "-p", "0", "-n", "4", "-d", "8,16"],
    ]
    assert calls(ik)[1][1:] == [*always, "-p", "0", "-n", "0", "-gp", "8,4", "-gp", "16,4"]
    assert len(calls(llama)) == len(calls(ik)) == 2 * 2 * 2  # rounds, files, calls
    one, two = result.engines[2:4]
    assert Path(calls(llama)[0][0]).stat().st_size == one.weight_bytes > one.bytes_per_token
    weights = sum(each.numel() for name, each in linear_weights(ternary.path.parent / "model"))
    assert two.bytes_per_token - one.bytes_per_token == weights // 256 * (66 - 54)  # bytes of their blocks
    file = Path(calls(llama)[0][0])
    before, manifest = file.stat().st_mtime_ns, ternary.manifest("pack")
    kept = peers.files(ternary.folder("pack"), file.parent.parent, manifest.fingerprint())
    assert [each.path for each in kept] == [file, Path(calls(llama)[2][0])]
    assert file.stat().st_mtime_ns == before
    peers.files(ternary.folder("pack"), file.parent.parent, "another packed model")
    assert file.stat().st_mtime_ns > before


def linear_weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    model, _ = models.load(folder)
    sites = {site.name for site in models.structure(model).linears}
    return [(name, module.weight) for name, module in model.named_modules() if name in sites]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("#!/bin/sh\necho one >&2\necho 'the model is odd.' >&2\nexit 7\n", "code 7 on Q4_0: the model is odd."),
        ("#!/bin/sh\nkill -4 $$\n", "signal 4 on Q4_0: it says nothing."),
        ("#!/bin/sh\necho hello\n", "llama.cpp printed no JSON on Q4_0."),
        ("#!/bin/sh\necho '[{}]'\n", "other JSON than llama-bench does."),
        ("no program", "llama.cpp does not start: Exec format error."),
    ],
)
def test_a_program_that_fails_is_one_sentence(text, why, tmp_path):
    path = program(tmp_path / "llama-bench", text)
    file = peers.GgufFile(path=path, type="Q4_0", bytes=1, bytes_per_token=1, cache_bytes_per_token=1)
    with pytest.raises(UserError) as raised:
        peers.measure(peers.Program(name="llama.cpp", path=path), file, Round(1, 4, 1, (0,)))
    assert why in str(raised.value)


def test_a_program_that_fails_is_a_note_and_left_out_and_ours_a_failure(monkeypatch):
    monkeypatch.setattr(bandwidth_, "BYTES", 1 << 22)

    def fail(_: Round) -> list[Speed]:
        raise UserError("It fails.")

    fine = rounds_.MeasuredEngine("packed", (1, 2), lambda _: [Speed("prefill", 0, 8.0)], dict)
    engines = [rounds_.MeasuredEngine("theirs", (1, 2), fail, dict, foreign=True), fine]
    measurements, bandwidth = rounds_.Measurements(), bandwidth_.Bandwidth()
    workloads = [Round(1, 4, 1, ()), Round(2, 4, 1, ())]
    for _ in range(2):
        rounds_.measure_round(engines, workloads, bandwidth, measurements, Tracker())
    assert measurements.notes == ["It fails."]
    assert engines == [fine]
    assert measurements.rates == {("packed", threads, "prefill", 0): [8.0, 8.0] for threads in (1, 2)}
    assert {threads: len(values) for threads, values in measurements.bandwidth.items()} == {1: 2, 2: 2}
    ours = [rounds_.MeasuredEngine("packed", (1,), fail, dict)]
    with pytest.raises(UserError, match="It fails"):
        rounds_.measure_round(ours, workloads, bandwidth, measurements, Tracker())


def test_a_program_is_where_it_is_said_or_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peers.programs(recipe.Bench()) == []
    path = program(tmp_path / "llama-bench", FAKE)
    assert peers.programs(recipe.Bench()) == [peers.Program(name="llama.cpp", path=path)]
    assert peers.programs(recipe.Bench(llama_bench="none")) == []
    ik = recipe.Bench(llama_bench="none", ik_llama_bench=str(path))
    assert [each.name for each in peers.programs(ik)] == ["ik_llama.cpp"]
    with pytest.raises(UserError, match=r"no bench program of ik_llama\.cpp at /nowhere"):
        peers.programs(recipe.Bench(ik_llama_bench="/nowhere"))


@pytest.mark.slow
def test_a_model_that_llama_cpp_does_not_know_is_a_note(job, tmp_path, monkeypatch):
    asked, work = job

    def refuse(*_: Any) -> None:
        raise UserError("llama.cpp knows no such model.")

    monkeypatch.setattr(peers, "files", refuse)
    section = asked.bench.model_copy(update={"llama_bench": str(program(tmp_path / "llama-bench", FAKE))})
    notes: list[str] = []
    context = JobContext(asked.model_copy(update={"bench": section}), work, Console(quiet=True))
    assert list(bench.peer_engines(context, notes)) == []
    assert notes == ["Not beside llama.cpp: llama.cpp knows no such model."]


def test_speeds_are_tokens_by_nanoseconds():
    printed = [
        {"n_prompt": 256, "n_gen": 0, "n_depth": 0, "avg_ns": 2 * 10**9, "other": "x"},
        {"n_prompt": 0, "n_gen": 32, "n_depth": 1024, "avg_ns": 10**9},
        {"n_prompt": 4096, "n_gen": 16, "avg_ns": 10**9},  # -gp of ik_llama.cpp: the prompt is not timed
    ]
    expected = [Speed("prefill", 0, 128.0), Speed("decode", 1024, 32.0), Speed("decode", 4096, 16.0)]
    assert peers.speeds_of(printed) == expected


@pytest.mark.slow
def test_show_collects_what_the_stages_found(job, llama):
    _, work = job
    summary = show.summarize(work)
    assert [row.name for row in summary.models] == ["teacher", "packed"]
    teacher, packed = summary.models
    assert teacher.real_bits == pytest.approx(32, rel=0.02)
    with safe_open(llama / "model.safetensors", framework="pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert packed.real_bits == pytest.approx(8 * packed.bytes / weights, rel=1e-3)
    runs = [run for run in result_of(work).runs if (run.engine, run.threads) == ("packed", 2)]
    assert packed.prefill_tokens_per_second == runs[0].tokens_per_second
    assert packed.decode_tokens_per_second == runs[1].tokens_per_second
    assert packed.perplexity > 0
    assert packed.kl > 0


@pytest.mark.slow
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
    assert set(show.INTERFACES) < set(schema)
    assert "calibrate:" in runner.invoke(app, ["show", "recipe"]).stdout


def test_show_refuses_what_is_neither(tmp_path):
    with pytest.raises(UserError, match="neither a working directory"):
        show.inspect(tmp_path, Console(quiet=True))

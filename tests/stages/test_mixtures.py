"""Mixtures of experts through all stages: the plan, training, the packed folder, and what is measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import edgerazor
from edgerazor import transformers_plugin
from edgerazor.allocate import MatrixPlan
from edgerazor.models.experts import Experts
from edgerazor.packed import PackedModel, size_table
from helpers.tiny_experts import CHOSEN, EXPERTS, MIXTURES, write_mixture
from helpers.tiny_job import call, write_recipe
from helpers.tiny_models import mostly_slow

#: Whole jobs: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

IDS = torch.randint(2, 300, (2, 23), generator=torch.Generator().manual_seed(7))
NEVER = 2
UNREACHED = f"model.layers.1.mlp.experts.{NEVER}"
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module")
def olmoe(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE, one of whose experts is never chosen."""
    folder = tmp_path_factory.mktemp("olmoe")
    write_mixture(tokenizer, folder, "olmoe", never=NEVER)
    return folder


@pytest.fixture(scope="module")
def job(olmoe: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole chain at 2.4 bits by sensitivity, and what it said."""
    folder = tmp_path_factory.mktemp("mixture")
    recipe = write_recipe(
        folder / "r.yaml",
        olmoe,
        text_file,
        calibrate={
            "bits": 2.4,
            "plan": "sensitivity",
            "sensitivity": "fisher",
            "group_size": 16,
            "sensitivity_tokens": 512,
            "activation_bits": 8,
        },
        distill={
            "steps": 24,
            "batch_size": 4,
            "learning_rate": 1e-4,
            "evaluate_every": 8,
            "evaluate_sequences": 8,
            "losses": [
                {"name": "forward_kl", "weight": 20},
                {"name": "router_balance", "weight": 0.01},
                {"name": "router_z", "weight": 0.001},
                {"name": "router_kl", "weight": 1},
            ],
        },
    )
    done = call("run", recipe, "--work", folder / "job")
    assert done.code == 0, done.err
    return folder / "job", done.err


def test_the_unreached_expert_is_named_and_gets_the_average(job: tuple[Path, str]) -> None:
    folder, said = job
    assert f"Calibration never reached the expert {UNREACHED}; it gets the plan's average bits." in said
    plan = json.loads((folder / "calibrate" / "plan.json").read_text())
    bits = {m["name"]: m for m in plan["matrices"]}

    def nominal(names: list[str]) -> float:
        chosen = [MatrixPlan(**bits[name]) for name in names]
        weights = [m.rows * m.columns for m in chosen]
        return sum(w * m.spec().nominal_bits(m.shape) for w, m in zip(weights, chosen, strict=True)) / sum(weights)

    of_expert = [name for name in bits if name.startswith(f"{UNREACHED}.")]
    others = [name for name, m in bits.items() if m["kind"] == "linear" and name not in of_expert]
    assert len(of_expert) == 3
    assert nominal(of_expert) == pytest.approx(nominal(others), abs=0.4)
    statistics = load_file(folder / "calibrate" / "stats.safetensors")
    counts = statistics["expert_tokens/model.layers.1.mlp.experts"]
    assert counts[NEVER] == 0
    assert (counts.sum() == statistics["expert_tokens/model.layers.0.mlp.experts"].sum()).item()
    sensitive = statistics[f"damage/fisher/{UNREACHED}.up_proj"]
    assert not sensitive.any()


def test_cold_experts_get_fewer_bits_under_a_target_size(
    job: tuple[Path, str], olmoe: Path, text_file: Path, tmp_path: Path
) -> None:
    size = sum(file.stat().st_size for file in (job[0] / "packed").glob("*.safetensors"))
    settings = {"plan": "sensitivity", "sensitivity": "fisher", "group_size": 16, "sensitivity_tokens": 512}
    recipe = write_recipe(tmp_path / "r.yaml", olmoe, text_file, calibrate=settings)
    values = yaml.safe_load(recipe.read_text())
    del values["calibrate"]["bits"]
    values["calibrate"]["target_size"] = size
    recipe.write_text(yaml.safe_dump(values))
    done = call("calibrate", "--recipe", recipe, "--work", tmp_path / "job")
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "job" / "calibrate" / "plan.json").read_text())
    matrices = {m["name"]: MatrixPlan(**m) for m in plan["matrices"]}
    tokens = load_file(tmp_path / "job" / "calibrate" / "stats.safetensors")["expert_tokens/model.layers.0.mlp.experts"]

    def bits(number: int) -> float:
        parts = [m for name, m in matrices.items() if name.startswith(f"model.layers.0.mlp.experts.{number}.")]
        return sum(m.spec().nominal_bits(m.shape) * m.rows * m.columns for m in parts)

    by_tokens = [bits(number) for number in tokens.argsort().tolist()]
    third = EXPERTS // 3
    assert sum(by_tokens[:third]) < sum(by_tokens[-third:])


def test_training_brings_the_student_nearer(job: tuple[Path, str]) -> None:
    lines = [json.loads(line) for line in (job[0] / "distill" / "metrics.jsonl").read_text().splitlines()]
    divergences = [line["kl"] for line in lines if "kl" in line]
    assert divergences[-1] < divergences[0]


def test_the_packed_folder(job: tuple[Path, str], olmoe: Path) -> None:
    packed = PackedModel.open(job[0] / "packed")
    names = set(packed.header.matrices)
    assert {f"model.layers.1.mlp.experts.{number}.down_proj" for number in range(EXPERTS)} <= names
    assert "model.layers.0.mlp.gate.weight" in packed.others()
    model: Any = edgerazor.load(job[0] / "packed")
    logits = model.logits(IDS.tolist())
    assert torch.isfinite(logits).all()
    loaded, _ = transformers_plugin.load(job[0] / "packed")
    assert sum(isinstance(module, Experts) for module in loaded.modules()) == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-3, atol=1e-3)
    written = call("generate", "Nora took", "--model", job[0] / "packed", "--max-tokens", 4)
    assert written.code == 0, written.err


def test_bytes_per_token_are_those_of_the_chosen_experts(job: tuple[Path, str]) -> None:
    bench = json.loads((job[0] / "bench" / "result.json").read_text())
    of = {engine["name"]: engine for engine in bench["engines"]}
    stored = PackedModel.open(job[0] / "packed")
    entries = stored.header.matrices
    experts = sum(stored.spec(name).packed_bytes(entries[name].shape) for name in entries if ".experts." in name)
    table = stored.spec(EMBEDDING).packed_bytes(entries[EMBEDDING].shape)
    weights = sum(size.bytes for size in size_table(stored).classes)
    expected = weights - table - experts * (1 - CHOSEN / EXPERTS)
    assert of["packed"]["bytes_per_token"] == pytest.approx(expected, rel=0.05)
    stacked = 2 * EXPERTS * 3 * 32 * 48 * 4
    unread = of["teacher"]["weight_bytes"] - of["teacher"]["bytes_per_token"]
    assert unread == pytest.approx(300 * 48 * 4 + stacked * (1 - CHOSEN / EXPERTS))


@pytest.mark.parametrize("case", mostly_slow([*(f"{name} gptq" for name in MIXTURES), "olmoe clip"], "qwen3_moe gptq"))
def test_every_mixture_is_rounded_and_loaded(
    case: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    model_type, init = case.split()
    teacher = write_mixture(tokenizer, tmp_path / "teacher", model_type, never=NEVER)
    settings = {"bits": 4, "init": init, "group_size": 16}
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path / "teacher", text_file, calibrate=settings, pack={"source": "teacher"}
    )
    words = ("--recipe", recipe, "--work", tmp_path / "job")
    done = call("calibrate", *words)
    assert done.code == 0, done.err
    done = call("pack", *words)
    assert done.code == 0, done.err
    model, _ = transformers_plugin.load(tmp_path / "job" / "packed")
    with torch.no_grad():
        ours, theirs = model(IDS).logits, teacher(IDS).logits
    assert torch.isfinite(ours).all()
    correlation = torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]
    assert correlation > 0.85  # a token whose router is rounded to another expert is another one
    evaluated = call("eval", "--recipe", recipe, "--work", tmp_path / "job")
    assert evaluated.code == 0, evaluated.err

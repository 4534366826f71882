"""The recipes for models that see: the published one says what was published, and the others run a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from edgerazor import recipe as recipes
from edgerazor.training import objective
from helpers.places import ROOT
from helpers.seeing_teachers import write_seeing_data, write_seeing_teacher
from helpers.tiny_job import call

FOLDER = ROOT / "recipes"
#: Real widths, with fewer layers and a small vocabulary: recipe -> family, and what is another than in the tiny model.
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smolvlm-256m": (
        "idefics3",
        {
            **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9},
            **{"num_key_value_heads": 3, "head_dim": 64},
        },
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
    "qwen3-vl-2b": (
        "qwen3_vl",
        {
            **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2, "num_attention_heads": 16},
            **{"num_key_value_heads": 8, "head_dim": 128},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        },
        {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048},
    ),
    "gemma-3-4b": (
        "gemma3",
        {
            **{"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 2, "num_attention_heads": 8},
            **{"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
        },
        {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16},
    ),
    "lfm2-vl-450m": (
        "lfm2_vl",
        {
            **{"hidden_size": 1024, "intermediate_size": 4608, "num_hidden_layers": 2, "num_attention_heads": 16},
            **{"num_key_value_heads": 8, "head_dim": 64},
        },
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
}
#: Families of `SHAPES` without a recipe of their own -> the one that they run.
RECIPES = {"gemma-3-4b": "smolvlm-256m", "lfm2-vl-450m": "smolvlm-256m"}


def load(name: str) -> recipes.Recipe:
    return recipes.build(recipes.load(FOLDER / f"{name}.yaml"))


def test_the_published_settings() -> None:
    """EdgeRazor on Qwen2.5-Omni-7B, arXiv 2605.04062."""
    recipe = load("qwen2.5-omni-7b")
    losses = {term.name: (term.weight, dict(term.options)) for term in recipe.distill.losses}
    assert losses == {"ce": (0.1, {}), "eakld": (2.0, {"temperature": 1.0, "k": 16}), "lafd": (0.2, {})}
    assert (recipe.calibrate.bits, recipe.calibrate.group_size, recipe.calibrate.init) == (4, 32, "rtn")
    assert recipe.distill.batch_size * recipe.distill.accumulation == 64
    assert 64 * (recipe.distill.steps or 0) == pytest.approx(2 * 10_000, rel=0.01)  # two epochs
    assert (recipe.distill.learning_rate, recipe.distill.schedule) == (5e-6, "cosine")
    assert (recipe.data.sequence_length, recipe.data.packing) == (1024, "document")
    objective.active_terms(recipe.distill.losses, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_few_steps_in_the_real_widths(name: str, tmp_path: Path) -> None:
    family, text, vision = SHAPES[name]
    if family == "lfm2_vl":
        pytest.importorskip("torchvision", reason="its processor needs torchvision", exc_type=ImportError)
    write_seeing_teacher(tmp_path / "teacher", family, text, vision)
    write_seeing_data(tmp_path)
    values = recipes.merge(
        recipes.load(FOLDER / f"{RECIPES.get(name, name)}.yaml"),
        {
            "model": str(tmp_path / "teacher"),
            "data": {"train": [{"file": str(tmp_path / "talks.jsonl")}], "sequence_length": 64},
            "calibrate": {"sequences": 2, "sensitivity_tokens": 32},
            "distill": {"steps": 2, "accumulation": 1, "evaluate_sequences": 2, "evaluate_every": 2},
            "eval": {"pictures": [str(tmp_path / "colors.jsonl")], "text_sequences": 2},
            "bench": {"rounds": 1, "prefill_tokens": 8, "decode_tokens": 2, "contexts": [0]},
        },
    )
    values["data"]["held_out_fraction"] = 0.25
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = call("run", tmp_path / "r.yaml", "--work", tmp_path / "job")
    assert done.code in (0, 3), done.err

"""Real bits mean one thing: what calibrate and dry runs foretell is what pack writes, to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgerazor import recipe as recipes
from edgerazor import student_plan
from edgerazor.console import Console
from edgerazor.job import JobContext
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import GROUP_SIZE, ModelMaker, mostly_slow


def written(folder: Path) -> int:
    """Bytes of the weight files and their index."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors*"))


#: family, and sections of the recipe; rows of 96 and 101 weights end in shorter groups of 40.
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("llama", {}),
    "blocks, tied head": ("smollm2", {"calibrate": {"granularity": "block"}}),
    "columns, biases": ("phi", {"calibrate": {"granularity": "column", "plan": "first", "bits": 2.3}}),
    "one format, several files": ("qwen3", {"calibrate": {"bits": 4.0}, "pack": {"shard_bytes": 20_000}}),
    "trained scales": ("gemma", {"calibrate": {"scales": "learned", "activation_scales": "learned"}}),
    "zero points": ("llama", {"calibrate": {"adaptive_tokens": "causal", "activation_scales": "asymmetric"}}),
    "scales only": ("llama", {"distill": {"train": "scales"}, "pack": {"shard_bytes": 1}}),
    "stored input scales": ("qwen2", {"calibrate": {"activation_scales": "static", "head_format": "int8"}}),
    "adaptive tokens": ("llama", {"calibrate": {"adaptive_tokens": "causal", "activation_scales": "static"}}),
}


@pytest.mark.parametrize("case", mostly_slow(STUDENTS, *list(STUDENTS)[:3]))
def test_calibrate_foretells_a_student_to_the_byte(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path, case: str
) -> None:
    family, sections = STUDENTS[case]
    make_model(tmp_path / "model", family, torch.bfloat16)
    training = {"steps": 1, **sections.get("distill", {})}
    sections = {**sections, "distill": training}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", text_file, **sections)
    work = tmp_path / "job"
    for name in ("distill", "pack"):
        done = run(name, "--recipe", recipe, "--work", work)
        assert done.code == 0, done.err
    results = {name: json.loads((work / name / "result.json").read_text()) for name in ("calibrate", "packed")}
    assert results["calibrate"]["bytes"] == results["packed"]["bytes"] == written(work / "packed")
    assert results["calibrate"]["real_bits"] == results["packed"]["real_bits"]
    assert results["calibrate"]["real_bits"] == round(8 * written(work / "packed") / results["packed"]["parameters"], 4)
    foretold = run("pack", "--recipe", recipe, "--work", work, "--dry-run", "--json").json()
    assert (foretold["bytes"], foretold["real_bits"]) == (results["packed"]["bytes"], results["packed"]["real_bits"])
    early = run("calibrate", "--recipe", recipe, "--work", tmp_path / "other", "--dry-run", "--json").json()
    assert 0 <= early["bytes"] - written(work / "packed") <= (200 if case == "adaptive tokens" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "smollm2", "phi"])
def test_a_rounded_teacher_is_foretold_to_the_byte(
    run: Run, tmp_path: Path, make_model: ModelMaker, family: str, dtype: torch.dtype
) -> None:
    make_model(tmp_path / "model", family, dtype)
    words = (
        "pack",
        tmp_path / "model",
        "--bits",
        2.5,
        "--group-size",
        GROUP_SIZE,
        "--work",
        tmp_path / "job",
        "--json",
    )
    foretold, done = run(*words, "--dry-run").json(), run(*words).json()
    assert foretold["bytes"] == done["bytes"] == written(tmp_path / "job" / "packed")
    assert foretold["real_bits"] == done["real_bits"]


def test_unknown_thresholds_are_counted_at_their_longest(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    path = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={"adaptive_tokens": "causal"})
    assert run("calibrate", "--recipe", path, "--work", tmp_path / "job").code == 0
    recipe, work = recipes.build(recipes.load(path)), WorkDir(tmp_path / "job")
    context = JobContext(recipe, work, Console(quiet=True))
    teacher, plan = context.load_teacher(torch.device("cpu")), context.plan()
    before = context.packed_size(teacher)(plan).bytes
    after = context.packed_size(teacher, measured=True)(plan).bytes
    assert 0 <= before - after <= 64
    draws = torch.rand(2000) ** torch.randint(1, 30, (2000,))
    assert max(len(json.dumps(float(each))) for each in draws) <= len(json.dumps(student_plan.LONGEST_NUMBER))

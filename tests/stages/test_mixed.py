"""Every way to mix formats through calibrate, distill, pack and eval: what is packed is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgerazor import formats, models
from edgerazor.allocate import Plan
from edgerazor.packed import PackedModel
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import ModelMaker, mostly_slow


def razored(run: Run, folder: Path, model: Path, text: Path, *options: str, **calibrate: Any) -> Plan:
    """All stages in a working directory `job`; checks what holds for every plan, and returns it."""
    recipe = write_recipe(folder / "r.yaml", model, text, calibrate=calibrate, distill={"steps": 2})
    work = folder / "job"
    for words in (["distill", "--recipe", recipe, *options], ["pack"], ["eval"]):
        done = run(*words, "--work", work, "--json")
        assert done.code == 0, done.err
    assert done.json()["text"]["perplexity"] > 1
    plan = Plan.model_validate_json((work / "calibrate" / "plan.json").read_text())
    packed = PackedModel.open(work / "packed")
    packed.verify()
    digests = json.loads((work / "distill" / "best" / "digests.json").read_text())
    assert {name: entry.digest for name, entry in packed.header.matrices.items()} == digests
    masters = load_file(work / "distill" / "best" / "model.safetensors")
    for matrix in plan.matrices:
        stored = packed.matrix(matrix.name)
        trained = formats.quantize_dequantize(masters[f"{matrix.name}.weight"], matrix.spec())
        assert torch.equal(formats.decode_matrix(stored.encoded, stored.spec), trained)
    result = json.loads((work / "calibrate" / "manifest.json").read_text())["result"]
    linears = [matrix for matrix in plan.matrices if matrix.kind == "linear"]
    assert sum(result["formats"].values()) == sum(matrix.rows * matrix.columns for matrix in linears)
    nominal = sum(formats.get(name).nominal_bits * count for name, count in result["formats"].items())
    assert nominal / sum(result["formats"].values()) == pytest.approx(plan.nominal_bits())
    return plan


@pytest.mark.parametrize("plan", mostly_slow(["interleave", "variance", "first"], "interleave"))
@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_every_strategy_goes_through_all_stages(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, plan: str, granularity: str
) -> None:
    options = ("--plan", plan, "--granularity", granularity, "--formats", "int2,int5", "--bits", "2.7")
    made = razored(run, tmp_path, llama, text_file, *options, group_size=16)
    linears = [matrix for matrix in made.matrices if matrix.kind == "linear"]
    assert (made.strategy, made.granularity) == (plan, granularity)
    assert all(matrix.formats == ("int2", "int5") for matrix in linears)
    assert all(bool(matrix.row_formats) == (granularity == "row") for matrix in linears)
    rows = min(matrix.rows for matrix in linears)
    assert 2.7 - 3 / rows < made.nominal_bits() <= 2.7


@pytest.mark.parametrize("size", mostly_slow(["32", "64", "256", "row"], "32", "row"))
def test_every_group_size_goes_through_all_stages(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, size: str
) -> None:
    plan = razored(run, tmp_path, llama, text_file, "--group-size", size)
    columns = {matrix.columns for matrix in plan.matrices}
    assert any(each % 32 for each in columns)  # some rows end in a shorter group
    groups = {matrix.name: formats.group_count(matrix.columns, matrix.group_size) for matrix in plan.matrices}
    if size == "row":
        assert set(groups.values()) == {1}
    else:
        assert {matrix.group_size for matrix in plan.matrices} == {int(size)}


def test_a_head_with_its_own_format_goes_through_all_stages(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path
) -> None:
    make_model(tmp_path / "untied", "llama", tie_word_embeddings=False)
    plan = razored(run, tmp_path, tmp_path / "untied", text_file, embedding_format="int3", head_format="int2")
    assert (plan["model.embed_tokens"].formats, plan["lm_head"].formats) == (("int3",), ("int2",))


def test_a_format_for_a_head_that_is_tied_stops_the_run(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path
) -> None:
    make_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "tied", text_file, calibrate={"head_format": "int2"})
    done = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job")
    assert done.code == 2
    assert "the model's head is tied to its embedding" in " ".join(done.err.split())


def test_overrides_and_the_ends_formats_go_through_all_stages(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    overrides = [{"match": "*.0.*.down_proj", "format": "int8"}, {"match": "*.down_proj", "format": "int3"}]
    plan = razored(run, tmp_path, llama, text_file, embedding_format="int5", overrides=overrides)
    kinds = {matrix.name: matrix.formats for matrix in plan.matrices if len(matrix.formats) == 1}
    down = {name: chosen for name, chosen in kinds.items() if name.endswith("down_proj")}
    assert down.pop("model.layers.0.mlp.down_proj") == ("int8",)
    assert down
    assert set(down.values()) == {("int3",)}
    assert kinds["model.embed_tokens"] == ("int5",)
    assert plan.nominal_bits() > 2.2  # 1.88 is the average of the others


def test_an_override_that_matches_nothing_stops_the_run(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    overrides = [{"match": "*.down_prj", "format": "int8"}]
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file, calibrate={"overrides": overrides})
    for words in (["calibrate"], ["distill"], ["distill", "--dry-run"]):
        done = run(*words, "--recipe", recipe, "--work", tmp_path / "job")
        assert done.code == 2
        assert "the closest are model.layers.0.mlp.down_proj" in " ".join(done.err.split())
    assert not (tmp_path / "job" / "calibrate" / "plan.json").exists()


def test_rounding_without_training_plans_in_the_same_way(
    run: Run, tmp_path: Path, llama: Path, text_file: Path
) -> None:
    options = ("--plan", "variance", "--granularity", "block", "--bits", "2.5")
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    for words in (["calibrate"], ["distill", "--dry-run"]):
        assert run(*words, "--recipe", recipe, "--work", tmp_path / "a", *options).code == 0
    assert run("pack", llama, "--recipe", recipe, "--work", tmp_path / "b", *options).code == 0
    plan = Plan.model_validate_json((tmp_path / "a" / "calibrate" / "plan.json").read_text())
    packed = PackedModel.open(tmp_path / "b" / "packed")
    teacher, _ = models.load(str(llama), dtype=torch.float32)
    for matrix in plan.matrices:
        weight = teacher.get_submodule(matrix.name).weight
        stored = packed.matrix(matrix.name)
        expected = formats.quantize_dequantize(weight, matrix.spec())
        assert torch.equal(formats.decode_matrix(stored.encoded, stored.spec), expected)

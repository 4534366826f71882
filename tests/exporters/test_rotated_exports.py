"""Rotated models leave as plain weights, rotated back, or not at all; `show` tells of the rotation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgerazor import exporters, formats, packed, transformers_plugin
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.packed import PackedMatrix, PackedModel
from helpers.packed_folders import decoded_model, mixed, suitable_model, write_packed
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import VOCABULARY, ModelMaker

#: Models are loaded and exported: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def rotated(path: str, rows: int, columns: int) -> MatrixSpec:
    return replace(mixed()(path, rows, columns), rotation=formats.hadamard(columns))


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return suitable_model(make_model, tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def opened(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return write_packed(tmp_path_factory.mktemp("packed") / "rotated", model, rotated)


def test_hf_has_the_weights_rotated_back(model: Path, opened: PackedModel, tmp_path: Path) -> None:
    [result] = exporters.write_all(opened.folder, ["hf-f32"], tmp_path, False, Console(quiet=True))
    assert "rotated back" in result.notes[0]
    tensors = load_file(Path(result.file) / "model.safetensors")
    teacher = load_file(model / "model.safetensors")
    ours, _ = transformers_plugin.load(opened.folder)
    for name in opened.header.matrices:
        assert torch.equal(tensors[f"{name}.weight"], ours.get_submodule(name).weight), name
    embedding = "model.embed_tokens.weight"  # in four bits
    assert float((tensors[embedding] - teacher[embedding]).norm() / teacher[embedding].norm()) < 0.15
    theirs = AutoModelForCausalLM.from_pretrained(result.file, dtype=torch.float32).eval()
    expected = decoded_model(model, opened)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_other_formats_refuse_rotated_models(opened: PackedModel, tmp_path: Path) -> None:
    names = sorted(exporters.available().keys() - {"hf", "hf-f32"})
    assert len(names) >= 4
    for name in names:
        with pytest.raises(UserError, match=f"has rotated matrices, and programs that read {name} do not rotate"):
            exporters.plan_all(opened.folder, [name], True, Console(quiet=True))
    exporters.plan_all(opened.folder, ["hf"], True, Console(quiet=True))


def test_a_recipe_that_cannot_be_exported_is_refused_at_once(
    run: Run, model: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        model,
        text_file,
        calibrate={"rotation": "hadamard"},
        pack={"export": ["compressed-tensors"]},
    )
    done = run("run", recipe, "--work", tmp_path / "job")
    assert done.code != 0
    assert "`calibrate.rotation: hadamard` has rotated matrices" in done.err
    assert not (tmp_path / "job" / "calibrate").exists()


def test_show_tells_of_the_rotation(opened: PackedModel, model: Path, tmp_path: Path, run: Run) -> None:
    text = " ".join(run("show", opened.folder, "--verify").out.split())
    assert "rotated by a signed Hadamard matrix: 96 columns in blocks of 32, 160 columns in blocks of 32" in text
    assert run("show", opened.folder, "--json").json()["rotations"] == {"96": 32, "160": 32}
    write_packed(tmp_path / "plain", model, mixed())
    done = run("show", opened.folder, "--against", tmp_path / "plain", "--json").json()
    assert not done["same"]
    assert done["rotations"].keys() == {"96", "160"}
    assert done["rotations"]["96"][1] is None
    assert all(0 < each["weights"] < 1.5 for each in done["matrices"])  # of the model's own weights
    shown = run("show", opened.folder, "--against", tmp_path / "plain").out
    assert "rotation of 96 columns: in blocks of 32, signs" in shown


def test_other_signs_are_a_difference(opened: PackedModel, tmp_path: Path, run: Run) -> None:
    """The same codes in another basis are other weights."""
    other = tmp_path / "other"
    shutil.copytree(opened.folder, other)
    (other / "model.safetensors").unlink()
    sources = []
    for name in opened.header.matrices:
        matrix = opened.matrix(name)
        rotation = matrix.spec.rotation
        assert rotation is not None
        spec = replace(matrix.spec, rotation=formats.Rotation(rotation.block, torch.ones_like(rotation.signs)))
        sources.append(PackedMatrix(name, matrix.kind, matrix.encoded, spec).source())
    header = opened.header
    packed.write(
        other,
        sources,
        opened.others(),
        tied=header.tied,
        settings=header.settings,
        provenance=header.provenance,
    )
    done = run("show", opened.folder, "--against", other, "--json").json()
    assert not done["same"]
    assert len(done["matrices"]) == len(header.matrices)
    assert all(each["codes"] == 0 and each["weights"] > 0.5 for each in done["matrices"])

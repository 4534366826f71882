"""`show` of packed models, and `pack FOLDER --compress`: through the command line, on tiny models of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from edgerazor import formats, packed, transformers_plugin
from edgerazor.packed import PackedModel
from helpers.packed_folders import all_of, decoded_model, mixed, suitable_model, write_packed
from helpers.tiny_job import Run
from helpers.tiny_models import ModelMaker


@pytest.fixture(scope="module")
def folders(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, packed twice: `mixed`, and `int4` with other shapes of groups."""
    place = tmp_path_factory.mktemp("packed")
    model = suitable_model(make_model, place / "model")
    write_packed(place / "mixed", model, mixed())
    write_packed(place / "int4", model, all_of("int4", 64))
    return place


@pytest.fixture
def small(folders: Path, tmp_path: Path, run: Run) -> Path:
    """The mixed one, compressed, with a file and a folder beside the weights that are nobody's business."""
    shutil.copytree(folders / "mixed", tmp_path / "small")
    (tmp_path / "small" / "NOTICE").write_text("ours")
    (tmp_path / "small" / "more").mkdir()
    (tmp_path / "small" / "more" / "file").write_text("x")
    assert run("pack", tmp_path / "small", "--compress").code == 0
    return tmp_path / "small"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Compression ------------------------------------------------------------------------------------------------------


def test_compressing_and_back_gives_the_same_files(folders: Path, small: Path, run: Run) -> None:
    assert (small / "model.safetensors").stat().st_size < (folders / "mixed" / "model.safetensors").stat().st_size
    again = run("pack", small, "--compress", "--json").json()
    assert (again["compressed"], again["changed"], again["bytes"]) == (True, False, again["bytes_before"])
    back = run("pack", small, "--no-compress", "--json").json()
    assert (back["compressed"], back["changed"]) == (False, True)
    restored = contents(small)
    assert restored.pop("NOTICE") == b"ours"
    assert restored.pop("more/file") == b"x"
    assert restored == contents(folders / "mixed")
    assert sorted(each.name for each in small.parent.iterdir()) == ["small"]  # nothing is left beside it


def test_a_job_compresses_what_it_packs(llama: Path, tmp_path: Path, run: Run) -> None:
    words = ["pack", llama, "--bits", "1.88", "--group-size", "16", "--json"]
    plain = run(*words, "--work", tmp_path / "plain").json()
    small = run(*words, "--work", tmp_path / "small", "--compress").json()
    assert small["bytes"] < plain["bytes"]
    assert small["nominal_bits"] == plain["nominal_bits"]
    shutil.copytree(tmp_path / "plain" / "packed", tmp_path / "copy")
    assert run("pack", tmp_path / "copy", "--compress").code == 0
    files = [folder / "model.safetensors" for folder in (tmp_path / "copy", tmp_path / "small" / "packed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert run("pack", "--work", tmp_path / "small", "--no-compress").code == 0
    files = [tmp_path / name / "packed" / "model.safetensors" for name in ("plain", "small")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_compressed_model_computes_the_same(folders: Path, small: Path) -> None:
    tokens = torch.arange(12)[None]
    plain, _ = transformers_plugin.load(folders / "mixed")
    model, _ = transformers_plugin.load(small)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_what_cannot_be_compressed_is_refused(folders: Path, tmp_path: Path, run: Run) -> None:
    job = tmp_path / "job"
    shutil.copytree(folders / "int4", job / "packed")
    (job / "recipe.yaml").write_text("model: x\n")
    done = run("pack", job / "packed", "--compress")
    assert done.code == 2
    assert f"edgerazor pack --compress --work {job}" in done.err
    for words in (["--compress", "--export", "gguf"], ["--no-compress", "--bits", "4"], ["--compress", "--dry-run"]):
        assert run("pack", folders / "int4", *words).code == 2
    broken = tmp_path / "broken"
    shutil.copytree(folders / "int4", broken)
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-5000] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    before = contents(broken)
    done = run("pack", broken, "--compress")
    assert done.code == 1
    assert "is damaged or no packed model" in done.err
    assert contents(broken) == before


# show -------------------------------------------------------------------------------------------------------------


def test_the_table_has_the_bits_of_every_class(folders: Path, small: Path, run: Run) -> None:
    plain = run("show", folders / "mixed", "--json").json()
    found = run("show", small / "model.safetensors", "--verify", "--json").json()
    assert (plain["verified"], found["verified"], plain["compressed"], found["compressed"]) == (
        False,
        True,
        False,
        True,
    )
    model = PackedModel.open(small)
    entropy = dict.fromkeys(("linear", "embedding", "head"), 0.0)
    weights = dict.fromkeys(entropy, 0)
    for name, entry in model.header.matrices.items():
        matrix = model.matrix(name)
        entropy[entry.kind] += packed.matrix_entropy_bytes(matrix.encoded, matrix.spec)
        weights[entry.kind] += matrix.encoded.codes.numel()
    for before, after in zip(plain["bits"], found["bits"], strict=True):
        assert before["packed_bits"] == after["packed_bits"] == before["stored_bits"]
        assert before["entropy_bits"] == after["entropy_bits"]
        if after["kind"] in entropy:
            assert after["weights"] == weights[after["kind"]]
            assert after["entropy_bits"] == pytest.approx(8 * entropy[after["kind"]] / weights[after["kind"]])
            assert after["stored_bits"] < after["packed_bits"]
    assert [each["kind"] for each in found["bits"]] == ["linear", "embedding", "head", "other", None]
    assert found["bits"][-1]["weights"] == found["sizes"]["parameters"]
    assert found["sizes"]["bytes"] == (small / "model.safetensors").stat().st_size
    text = run("show", small, "--verify").out
    assert "entropy bound" in text
    assert "verified: every checksum, code and digest" in text
    assert "source: teacher" in text


def test_damage_is_found(small: Path, run: Run) -> None:
    content = bytearray((small / "model.safetensors").read_bytes())
    content[-40] ^= 1
    (small / "model.safetensors").write_bytes(content)
    done = run("show", small, "--verify")
    assert done.code == 1
    assert "is damaged or no packed model" in done.err


def test_models_that_compute_the_same_have_no_difference(folders: Path, small: Path, run: Run) -> None:
    done = run("show", small, "--against", folders / "mixed")
    assert done.code == 0
    assert "no difference: 16 matrices" in " ".join(done.out.split())
    assert "compressed: yes | no" in done.out
    found = run("show", folders / "mixed", "--against", small, "--verify", "--json").json()
    assert found["same"]
    assert (found["equal_matrices"], found["matrices"], found["compressed"]) == (16, [], [False, True])


def test_differences_are_told_in_numbers(folders: Path, tmp_path: Path, run: Run) -> None:
    model = PackedModel.open(folders / "int4")
    name, gone = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    encoded = model.matrix(name).encoded
    codes, scales = encoded.codes.clone(), encoded.scales.clone()
    codes[0, :3] += torch.where(codes[0, :3] > 0, -1, 1).to(torch.int8)
    scales[1, 0] *= 2
    changed = formats.Encoded(codes, scales)
    sources = []
    for key in model.header.matrices.keys() - {gone}:
        matrix = model.matrix(key)
        matrix.encoded = changed if key == name else matrix.encoded
        sources.append(matrix.source())
    other = tmp_path / "other"
    shutil.copytree(folders / "int4", other)
    (other / "model.safetensors").unlink()
    others = {**model.others(), "model.norm.weight": torch.full((96,), 2.0)}
    settings: dict[str, Any] = {**model.header.settings, "kv_bits": 4}
    packed.write(
        other,
        sources,
        others,
        tied=model.header.tied,
        settings=settings,
        provenance={"source": "teacher", "recipe": {"seed": 1}},
    )
    done = run("show", folders / "int4", "--against", other, "--json")
    assert done.code == 0
    found = done.json()
    assert not found["same"]
    assert found["settings"] == {"kv_bits": [8, 4]}
    assert found["provenance"] == {"recipe.seed": [None, 1]}
    assert found["others"] == {"model.norm.weight": "other numbers"}
    assert (found["only_in_folder"], found["only_in_against"]) == ([gone], [])
    (matrix,) = found["matrices"]
    assert (matrix["name"], matrix["about"], matrix["formats"]) == (name, {}, 0)
    assert matrix["codes"] == 3 / codes.numel()
    assert matrix["scales"] == 1 / scales.numel()
    spec = model.spec(name)
    w, v = (formats.decode_matrix(each, spec).double() for each in (encoded, changed))
    assert matrix["weights"] == pytest.approx(float((w - v).norm() / w.norm()), rel=1e-12)
    text = run("show", folders / "int4", "--against", other).out
    assert f"only in {folders / 'int4'}: {gone}" in text
    assert "no difference" not in text


def test_other_formats_and_groups_are_told(folders: Path, run: Run) -> None:
    found = run("show", folders / "mixed", "--against", folders / "int4", "--json").json()
    differs = {each["name"]: each for each in found["matrices"]}
    rows = differs["model.layers.0.self_attn.q_proj"]["about"]
    assert rows["group size"] == [32, 64]
    assert rows["formats"] == [{"ternary": 84 * 96, "int4": 12 * 96}, {"int4": 96 * 96}]
    assert all(each["scales"] is None and each["formats"] is None for each in differs.values())
    assert all(0 < each["weights"] < 1.5 for each in differs.values())


def test_errors_of_show(folders: Path, tmp_path: Path, run: Run) -> None:
    for words, said in (
        ([folders / "model", "--verify"], "is not a packed model, and --verify"),
        ([folders / "model", "--against", folders / "int4"], "is not a packed model, and --against"),
        ([folders / "int4", "--against", folders / "model"], "is not a packed model to compare with"),
        (["recipe", "--verify"], "--verify is for packed models"),
    ):
        done = run("show", *words)
        assert done.code == 2
        assert said in done.err


def test_the_specification_is_printed(run: Run) -> None:
    done = run("show", "format")
    assert done.code == 0
    text = " ".join(done.out.split())
    for words in (
        "The packed model folder, format versions 1 to 4",
        "A quantized weight matrix [rows, cols] of the module P is stored as several tensors of dtype U8",
        "The tensor edgerazor.sha256, U8 [n, 32]",
        "one zstd frame (RFC 8878)",
    ):
        assert words in text
    assert "**" not in text
    assert {"show PACKED", "show PACKED --against"} <= json.loads(run("show", "schema").out).keys()


def test_the_decoded_model_is_that_of_the_codes(folders: Path, small: Path) -> None:
    a = decoded_model(folders / "model", PackedModel.open(small))
    b = decoded_model(folders / "model", PackedModel.open(folders / "mixed"))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

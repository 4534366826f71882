"""GGUF exports of models that see: a file of the decoder, one of the tower, and what llama.cpp would do otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from PIL import Image

from edgerazor import exporters, formats, models
from edgerazor.errors import UserError
from edgerazor.exporters.core.gguf_tower import PREFIX
from edgerazor.packed import PackedModel, decoder_of, tower_tensors
from helpers.seeing_teachers import write_seeing_teacher
from helpers.tiny_job import call
from recipes.benchmarks import picture_interop as interop


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed random model that sees, with a processor that cuts pictures into tiles."""
    folder = tmp_path_factory.mktemp("seeing")
    interop.write_model(folder / "model")
    words = ("--bits", 4, "--plan", "interleave", "--work", folder / "job", "--export", "gguf-f32,gguf")
    done = call("pack", folder / "model", *words)
    assert done.code == 0, done.err
    assert "mmproj-" in done.out
    return folder / "job" / "packed"


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and tensors of a file, tensors with the last dimension last."""
    reader = gguf.GGUFReader(file)
    tensors = {
        each.name: gguf.quants.dequantize(each.data, each.tensor_type).reshape(*reversed(each.shape.tolist()))
        for each in reader.tensors
    }
    return {name: value.contents() for name, value in reader.fields.items()}, tensors


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Qwen 2.5 VL's architecture."""
    folder = tmp_path_factory.mktemp("qwen")
    interop.write_qwen(folder / "model")
    words = ("--bits", 4, "--plan", "interleave", "--work", folder / "job", "--export", "gguf-f32")
    done = call("pack", folder / "model", *words)
    assert done.code == 0, done.err
    assert "another bicubic filter" in done.err + done.out
    return folder / "job" / "packed"


def test_both_files_of_qwen(qwen: Path) -> None:
    """Queries, keys and values apart; a kernel of patches for each frame; dimensions of positions."""
    fields, tensors = read(qwen.parent / "exports" / "gguf-f32" / f"{PREFIX}model.gguf")
    assert fields["clip.projector_type"] == "qwen2.5vl_merger"
    assert fields["clip.vision.n_wa_pattern"] == 2
    assert fields["clip.use_silu"]
    tower = {
        name.removeprefix("model.visual."): value.float()
        for name, value in tower_tensors(PackedModel.open(qwen)).items()
    }
    parts = [tensors[f"v.blk.1.attn_{part}.weight"] for part in "qkv"]
    assert (np.concatenate(parts) == tower["blocks.1.attn.qkv.weight"].numpy()).all()
    kernel = tower["patch_embed.proj.weight"].numpy()
    assert (tensors["v.patch_embd.weight"] == kernel[:, :, 0]).all()
    assert (tensors["v.patch_embd.weight.1"] == kernel[:, :, 1]).all()
    assert (tensors["mm.2.bias"] == tower["merger.mlp.2.bias"].numpy()).all()
    divided = sum(".qkv." in name for name in tower)
    assert len(tensors) == len(tower) + 2 * divided + 1
    fields, _ = read(qwen.parent / "exports" / "gguf-f32" / "model.gguf")
    assert fields["general.architecture"] == "qwen2vl"
    assert fields["qwen2vl.rope.dimension_sections"] == [8, 12, 12, 0]


def test_what_llama_cpp_would_do_otherwise_with_qwen(qwen: Path, tmp_path: Path) -> None:
    export = exporters.find("gguf")
    for name, value, reason in (
        ("window_size", 56, "windows are 56 pixels"),
        ("fullatt_block_indexes", [1, 2], "not every so many layers"),
        ("spatial_merge_size", 4, "merges 4 x 4"),
        ("hidden_act", "gelu", "activation 'gelu'"),
    ):
        folder = tmp_path / name
        shutil.copytree(qwen, folder)
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"][name] = value
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=reason):
            export.check(folder)


def test_a_quantized_tower_of_qwen_is_refused(qwen: Path, tmp_path: Path) -> None:
    values = {"calibrate": {"bits": 4, "plan": "interleave", "towers": "int8"}, "pack": {"source": "teacher"}}
    values |= {"model": str(qwen.parent.parent / "model")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    failed = call("pack", "--recipe", tmp_path / "r.yaml", "--work", tmp_path / "job", "--export", "gguf")
    assert failed.code == 1
    assert "written in floating types alone" in failed.err


@pytest.mark.parametrize("export", ["gguf", "gguf-f32"])
def test_both_files_hold_every_tensor(packed: Path, export: str) -> None:
    model = PackedModel.open(packed)
    folder = packed.parent / "exports" / export
    assert sorted(path.name for path in folder.iterdir()) == [f"{PREFIX}model.gguf", "model.gguf"]
    fields, tensors = read(folder / f"{PREFIX}model.gguf")
    tower = tower_tensors(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 4)
    assert len(tensors) == len(tower) > 0
    for name, expected in tower.items():
        assert (tensors[names.get_name(name, (".weight", ".bias"))] == expected.float().numpy()).all(), name
    assert fields["general.architecture"] == "clip"
    assert fields["clip.projector_type"] == "idefics3"
    assert fields["clip.vision.projection_dim"] == 256
    assert fields["clip.vision.preproc_image_size"] == interop.EDGE
    fields, tensors = read(folder / "model.gguf")
    decoder = decoder_of(model)
    assert fields["general.architecture"] == "llama"
    assert len(tensors) == len(decoder.header.matrices) + len(decoder.others())
    result = exporters.find(export).plan(model)
    assert result.bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_both_sides_read_the_same_prompt(packed: Path, tmp_path: Path) -> None:
    """llama.cpp puts these very tokens around tiles."""
    Image.new("RGB", (interop.EDGE, interop.EDGE)).save(tmp_path / "p.png")
    prompt = interop.prompts(packed, [tmp_path / "p.png"] * len(interop.QUESTIONS))[0]
    tokens = models.load_tokenizer(packed).convert_ids_to_tokens(prompt.inputs["input_ids"][0])
    marks = [token for token in tokens if token.startswith("<") and token != "<image>"]
    around, tile = "<fake_token_around_image>", "<row_{}_col_{}>"
    tiles = [mark for row in (1, 2) for column in (1, 2) for mark in (around, tile.format(row, column))]
    assert marks == ["<|im_start|>", *tiles, around, "<global-img>", around, "<end_of_utterance>"]
    assert "ĊĊ" in tokens


def test_what_llama_cpp_would_do_otherwise_is_refused(packed: Path, tmp_path: Path) -> None:
    export = exporters.find("gguf")
    for name, value, reason in (
        ("do_image_splitting", False, "does not cut pictures into tiles"),
        ("max_image_size", {"longest_edge": 16}, "tiles of 16 pixels"),
        ("resample", 2, "Lanczos"),
        ("rescale_factor", 1.0, "divide pixels by 255"),
    ):
        folder = tmp_path / name
        shutil.copytree(packed, folder)
        settings = json.loads((folder / "processor_config.json").read_text())
        settings["image_processor"][name] = value
        (folder / "processor_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=reason):
            export.check(folder)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    sliding = [*["sliding_attention"] * 5, "full_attention"]
    layers = {"num_hidden_layers": 6, "query_pre_attn_scalar": 16, "layer_types": sliding}
    for family, text, reason in (("qwen3_vl", {}, "family 'qwen3_vl_text'"), ("gemma3", layers, "towers of gemma3")):
        write_seeing_teacher(tmp_path / family, family, text)
        with pytest.raises(UserError, match=reason):
            exporters.find("gguf").check(tmp_path / family)


def test_a_quantized_tower_keeps_its_codes(packed: Path, tmp_path: Path) -> None:
    """In blocks of the smallest type that holds them, as the decoder's matrices do."""
    values = {"calibrate": {"bits": 4, "plan": "interleave", "towers": "int8"}, "pack": {"source": "teacher"}}
    values |= {"model": str(packed.parent.parent / "model")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    done = call("pack", "--recipe", tmp_path / "r.yaml", "--work", tmp_path / "job", "--export", "gguf")
    assert done.code == 0, done.err
    model = PackedModel.open(tmp_path / "job" / "packed")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 4)
    _, tensors = read(tmp_path / "job" / "exports" / "gguf" / f"{PREFIX}model.gguf")
    matrices = [name for name, entry in model.header.matrices.items() if entry.kind == "tower"]
    assert len(tensors) == len(matrices) + len(tower_tensors(model))
    for name in matrices:
        matrix = model.matrix(name)
        expected = formats.decode_matrix(matrix.encoded, matrix.spec).numpy()
        assert (tensors[f"{names.get_name(name)}.weight"] == expected).all()
    plan = exporters.find("gguf").plan(model)
    assert {tensor.type for tensor in plan.tensors if tensor.kind == "tower"} == {"Q8_0"}

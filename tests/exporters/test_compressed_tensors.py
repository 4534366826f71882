"""compressed-tensors folders, decoded by the package of that name: every width and group, and inputs in 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgerazor import exporters, formats
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.exporters.compressed_tensors import EIGHT_BIT_INPUTS, EXPORTER, _arguments
from edgerazor.exporters.core.grouped import GroupedPlan, Layout
from edgerazor.exporters.core.integers import Integers
from edgerazor.formats import MatrixSpec
from edgerazor.packed import PackedModel
from helpers.packed_folders import SETTINGS, Choose, all_of, decoded_model, mixed, suitable_model, write_packed
from helpers.tiny_models import VOCABULARY, ModelMaker

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.job

IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
#: Rows that groups of 256 divide.
WIDE = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "head_dim": 64}


@pytest.fixture(scope="module")
def wide(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return suitable_model(make_model, tmp_path_factory.mktemp("model") / "wide", "llama", **WIDE)


def export(opened: PackedModel, name: str, target: Path) -> Path:
    [result] = exporters.write_all(opened.folder, [name], target, False, Console(quiet=True))
    return Path(result.file)


def settings_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return values


def decompressed(state: dict[str, Tensor], arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """One layer's tensors as the package decodes them, with scales in a dtype."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    state = {**state, "weight_scale": state["weight_scale"].to(dtype)}
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"]


# Every width and group --------------------------------------------------------------------------------------------

#: Columns and groups that fill them; None for whole rows.
GEOMETRIES = [(512, 32), (512, 64), (512, 128), (512, 256), (96, 32), (512, None), (96, None), (172, None), (1, None)]


@pytest.mark.parametrize(("columns", "group"), GEOMETRIES)
@pytest.mark.parametrize("bits", EXPORTER.widths)
def test_every_width_and_group_of_the_package(bits: int, group: int | None, columns: int) -> None:
    """Every integer of a width, scales of every size: as many words as the package packs, and the same weights."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    draw = torch.Generator().manual_seed(bits)
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, columns), generator=draw, dtype=torch.int8)
    values[0], values[1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    size = columns if group is None else group
    scales = (torch.rand(7, columns // size, generator=draw) * 0.1).half()
    scales[2, 0], scales[3, 0], scales[4, 0] = 2.0**-24, 0.0, 1.0
    layer = Integers(values, scales, size)
    layout = Layout(bits=bits, group_size=size)
    tensors = EXPORTER.tensors("layer", layer, layout)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, (_, shape) in EXPORTER.specs("layer", (7, columns), layout).items()
    }
    assert torch.equal(tensors["layer.weight_packed"], pack_to_int32(values, bits))
    state = {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}
    arguments = _arguments(bits, "channel" if group is None else "group", group)
    assert torch.equal(decompressed(state, arguments, torch.float32), layer.decoded())
    # In float16 the product is rounded once, as the exact one is.
    assert torch.equal(decompressed(state, arguments, torch.float16), layer.decoded().half())


#: name of the format, group size -> bits and group size of every layer of 512 or 768 columns
LAYOUTS = {
    ("ternary", 256): (2, 256),
    ("ternary", 128): (2, 128),
    ("ternary", 1000): (2, None),
    ("int2", 256): (3, 256),
    ("int3", 512): (3, 256),
    ("int5", 256): (5, 256),
    ("int4", 256): (4, 128),  # Marlin takes no groups of 256
    ("int4", 64): (4, 64),
    ("int8", 256): (8, 128),
}


@pytest.mark.parametrize(("name", "group"), LAYOUTS)
def test_groups_that_kernels_take(wide: Path, tmp_path: Path, name: str, group: int) -> None:
    opened = write_packed(tmp_path / "packed", wide, all_of(name, group))
    folder = export(opened, "compressed-tensors", tmp_path / "out")
    [scheme] = settings_of(folder)["config_groups"].values()
    arguments = scheme["weights"]
    assert (arguments["num_bits"], arguments["group_size"]) == LAYOUTS[name, group]
    assert scheme["input_activations"] is None
    tensors = load_file(folder / "model.safetensors")
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        state = {part: tensors[f"{path}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
        assert state["weight_scale"].dtype == torch.float16
        matrix = opened.matrix(path)
        expected = formats.decode_matrix(matrix.encoded, matrix.spec)
        assert torch.equal(decompressed(state, arguments, torch.float32), expected)


def test_layers_of_other_widths_share_the_smaller_group(wide: Path, tmp_path: Path) -> None:
    """gate and up in 2 bits alone would have groups of 256; beside int4 all have 128, as not all readers mix them."""

    def choose(path: str, rows: int, columns: int) -> MatrixSpec:
        return MatrixSpec(("ternary" if "gate" in path or "up_proj" in path else "int4",), 256)

    opened = write_packed(tmp_path / "packed", wide, choose)
    plan = EXPORTER.plan(opened)
    assert {(layout.bits, layout.group_size) for layout in plan.layouts.values()} == {(2, 128), (4, 128)}


# Inputs in 8 bits -------------------------------------------------------------------------------------------------


def packed(folder: Path, model: Path, choose: Choose, **settings: Any) -> PackedModel:
    return write_packed(folder, model, choose, settings={**SETTINGS, **settings}, input_scale=False)


def of_package(x: Tensor, group: int) -> Tensor:
    """Inputs [..., features] as the package rounds them: the largest of a group over 127.5 is a step."""
    groups = x.unflatten(-1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True) / 127.5
    return ((groups / scales).round().clamp(-128, 127) * scales).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize(("size", "groups"), [(32, {32: 32}), (64, {96: 32, 160: 32}), (1000, {96: 96, 160: 160})])
def test_transformers_rounds_inputs_as_the_folder_asks(
    make_model: ModelMaker, tmp_path: Path, size: int, groups: dict[int, int]
) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama")
    opened = packed(tmp_path / "packed", model, mixed(), group_size=size)
    folder = export(opened, "compressed-tensors-a8", tmp_path / "out")
    for scheme in settings_of(folder)["config_groups"].values():
        inputs = scheme["input_activations"]
        assert (inputs["num_bits"], inputs["symmetric"], inputs["dynamic"]) == (8, True, True)
        assert (inputs["strategy"], inputs["group_size"]) == (("token", None) if size == 1000 else ("group", 32))
    weights = decoded_model(model, opened)
    plain = weights(input_ids=IDS).logits
    for name, entry in opened.header.matrices.items():
        if entry.kind == "linear":
            group = groups.get(entry.shape[1], 32)
            weights.get_submodule(name).register_forward_pre_hook(
                lambda module, inputs, group=group: of_package(inputs[0], group)
            )
    expected = weights(input_ids=IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = loaded(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3  # inputs are rounded indeed
    tensors, weights_only = (
        load_file(export(opened, name, tmp_path / "both") / "model.safetensors")
        for name in ("compressed-tensors-a8", "compressed-tensors")
    )
    assert tensors.keys() == weights_only.keys()
    assert all(torch.equal(tensors[name], weights_only[name]) for name in tensors)


def test_what_the_folder_says_of_inputs(make_model: ModelMaker, tmp_path: Path) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama")
    opened = packed(tmp_path / "packed", model, all_of("int4"))
    plain, rounded = (exporters.find(name).plan(opened) for name in ("compressed-tensors", "compressed-tensors-a8"))
    assert "rounds inputs of linear layers to 8 bits and keys and values to 8 bits" in plain.notes[0]
    assert "rule of the program" in rounded.notes[0]
    assert "rounds keys and values to 8 bits" in rounded.notes[1]
    assert isinstance(rounded, GroupedPlan)
    assert rounded.tensors == plain.tensors


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"activation_bits": 16}, "the packed model does not round inputs"),
        ({"activation_bits": 4}, "rounds inputs to 4 bits, not to 8"),
        ({"adaptive_tokens": "ranked"}, "gives some tokens fewer bits"),
        ({"group_size": 40}, "96 inputs of model.layers.0.mlp.gate_proj are no whole groups of 40"),
    ],
)
def test_other_inputs_are_refused(
    make_model: ModelMaker, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama")
    opened = packed(tmp_path / "packed", model, all_of("int4"), **settings)
    with pytest.raises(UserError, match=sentence) as refused:
        export(opened, "compressed-tensors-a8", tmp_path / "out")
    assert "--export compressed-tensors" in refused.value.hint
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    export(opened, "compressed-tensors", tmp_path / "out")


def test_stored_scales_and_small_groups_are_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama")
    opened = write_packed(tmp_path / "stored", model, all_of("int4"))
    with pytest.raises(UserError, match=r"stored scales of inputs \(model.layers.0.mlp.down_proj.input_scale\)"):
        EIGHT_BIT_INPUTS.plan(opened)
    opened = packed(tmp_path / "small", model, all_of("int4", 16))
    with pytest.raises(UserError, match="groups of 16 weights are smaller than the 32"):
        EIGHT_BIT_INPUTS.plan(opened)
    assert EXPORTER.plan(opened).layouts

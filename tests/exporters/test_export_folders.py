"""Hugging Face, compressed-tensors and GPTQ folders: every weight as it was packed, read by other people's code."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgerazor import exporters, formats, packed
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.exporters.core import grouped, hf_folder
from edgerazor.exporters.core.grouped import Layout
from edgerazor.exporters.core.hf_folder import Piece
from edgerazor.packed import PackedMatrix, PackedModel
from helpers.packed_folders import all_of, decoded_model, mixed, suitable_model, write_packed
from helpers.places import ROOT
from helpers.tiny_models import VOCABULARY, ModelMaker

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

ALL = formats.names()
GROUPED = ("compressed-tensors", "gptq")
FOLDERS = ("hf-f32", *GROUPED)
IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
#: The environment of `make peers`, which has GPTQModel.
PEERS = ROOT / "build" / "peers" / "bin" / "python"


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return suitable_model(make_model, tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def opened(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """Mixed formats of every kind, biases, an untied head."""
    return write_packed(tmp_path_factory.mktemp("packed") / "mixed", model, mixed())


def export(opened: PackedModel, name: str, target: Path, allow_lossy: bool = False) -> Path:
    """Where the export is."""
    [result] = exporters.write_all(opened.folder, [name], target, allow_lossy, Console(quiet=True))
    folder = Path(result.file)
    assert folder == target / name
    assert result.bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors*"))
    return folder


def weight(opened: PackedModel, name: str) -> Tensor:
    matrix = opened.matrix(name)
    return formats.decode_matrix(matrix.encoded, matrix.spec)


def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


# Hugging Face -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_hf_f32_is_the_decoded_model(make_model: ModelMaker, tmp_path: Path, family: str, tied: bool) -> None:
    model = suitable_model(make_model, tmp_path / "model", family, tie_word_embeddings=tied)
    opened = write_packed(tmp_path / "packed", model, mixed())
    folder = export(opened, "hf-f32", tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(input_ids=IDS).logits, decoded_model(model, opened)(input_ids=IDS).logits)
    assert "quantization_config" not in config(folder)
    assert AutoTokenizer.from_pretrained(folder).decode([5, 9]) == AutoTokenizer.from_pretrained(model).decode([5, 9])


def test_hf_is_exact_where_float16_holds_everything(model: Path, tmp_path: Path) -> None:
    opened = write_packed(tmp_path / "packed", model, all_of("ternary"), torch.float16)
    folder = export(opened, "hf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float16
    for name in opened.header.matrices:
        assert torch.equal(loaded.get_submodule(name).weight.float(), weight(opened, name))
    state = loaded.state_dict()
    assert all(torch.equal(state[name], opened.others()[name]) for name in hf_folder.others(opened))


def test_hf_takes_bfloat16_where_only_that_is_exact(model: Path, tmp_path: Path) -> None:
    """Ternary weights whose scales are powers of two are exact in both, norms below float16's range in one."""
    opened = write_packed(tmp_path / "packed", model, all_of("ternary"), torch.bfloat16)
    matrices = []
    for name, entry in opened.header.matrices.items():
        encoded, spec = opened.matrix(name).encoded, opened.matrix(name).spec
        powers = torch.exp2(encoded.scales.float().log2().round()).half()
        matrices.append(PackedMatrix(name, entry.kind, formats.Encoded(encoded.codes, powers), spec))
    found = {}
    for small in (1.0, 2.0**-30):
        folder = tmp_path / f"{small}"
        folder.mkdir()
        others = {name: tensor * small for name, tensor in opened.others().items()}
        packed.write(
            folder,
            [each.source() for each in matrices],
            others,
            tied={},
            settings=opened.header.settings,
            provenance={},
        )
        plan = exporters.find("hf").plan(PackedModel.open(folder))
        assert not plan.lossy
        found[small] = {tensor.type for tensor in plan.tensors}
    assert found == {1.0: {"F16"}, 2.0**-30: {"BF16"}}


def test_hf_refuses_by_name_what_16_bits_round(opened: PackedModel, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UserError, match=r"hf would change weights of \d+ of \d+ tensors \(.*lm_head") as refused:
        export(opened, "hf", target)
    assert "hf-f32" in refused.value.message
    assert "--allow-lossy" in refused.value.hint
    assert not target.exists() or not list(target.iterdir())
    folder = export(opened, "hf", target, allow_lossy=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(loaded.get_submodule(name).weight, weight(opened, name).half())


# compressed-tensors -----------------------------------------------------------------------------------------------


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Every quantized weight as the compressed-tensors package decodes it, with scales as float32."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    described = config(folder)["quantization_config"]
    groups = QuantizationConfig(**described).config_groups.values()
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for key in tensors:
        if not key.endswith(".weight_packed"):
            continue
        name = key.removesuffix(".weight_packed")
        assert name not in described["ignore"]
        [scheme] = [each for each in groups if name in each.targets or each.targets == ["Linear"]]
        state = {part: tensors[f"{name}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
        assert state["weight_scale"].dtype == torch.float16
        state["weight_scale"] = state["weight_scale"].float()
        found[name] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return found


@pytest.mark.parametrize("group", [32, 64, 128, 1000])
@pytest.mark.parametrize("number_format", ALL)
def test_the_package_decodes_every_format(model: Path, tmp_path: Path, number_format: str, group: int) -> None:
    pytest.importorskip("compressed_tensors")
    opened = write_packed(tmp_path / "packed", model, all_of(number_format, group))
    folder = export(opened, "compressed-tensors", tmp_path / "out")
    found = decompressed(folder)
    assert found.keys() == {name for name, entry in opened.header.matrices.items() if entry.kind == "linear"}
    for name, decoded in found.items():
        assert torch.equal(decoded, weight(opened, name)), name
    groups = config(folder)["quantization_config"]["config_groups"]
    bits = {"ternary": 2, "int2z": 2, "int2": 3, "int3": 3, "int4": 4, "int5": 5, "int8": 8}
    assert {each["weights"]["num_bits"] for each in groups.values()} == {bits[number_format]}
    sizes = {each["weights"]["group_size"] for each in groups.values()}
    assert sizes == {32: {32}, 64: {32}, 128: {32}, 1000: {None}}[group]  # of rows of 96 and of 160


@pytest.mark.parametrize("name", FOLDERS)
def test_an_untied_head_is_not_said_to_be_tied(model: Path, tmp_path: Path, name: str) -> None:
    """A packed folder that still says so, as those of before did."""
    opened = write_packed(tmp_path / "packed", model, all_of("int4"))
    assert "lm_head" in opened.header.matrices
    values = config(opened.folder) | {"tie_word_embeddings": True}
    (opened.folder / "config.json").write_text(json.dumps(values))
    folder = export(opened, name, tmp_path / "out")
    assert config(folder)["tie_word_embeddings"] is False


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_compressed_tensors(make_model: ModelMaker, tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("compressed_tensors")
    model = suitable_model(make_model, tmp_path / "model", "llama", tie_word_embeddings=tied)
    opened = write_packed(tmp_path / "packed", model, mixed())
    folder = export(opened, "compressed-tensors", tmp_path / "out")
    expected = decoded_model(model, opened)(input_ids=IDS).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    half = AutoModelForCausalLM.from_pretrained(folder)
    assert half.dtype == torch.float16
    assert (half(input_ids=IDS).logits.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_fused_layers_have_one_layout(opened: PackedModel, tmp_path: Path) -> None:
    """v is int8, so q and k, which fewer bits would hold, are stored as int8 too; each other in its fewest."""
    folder = export(opened, "compressed-tensors", tmp_path)
    described = config(folder)["quantization_config"]
    bits = {}
    for group in described["config_groups"].values():
        assert group["weights"]["group_size"] == 32
        bits |= {name.rpartition(".")[2]: group["weights"]["num_bits"] for name in group["targets"]}
    assert bits == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), 8),
        **{"o_proj": 5, "gate_proj": 2, "up_proj": 2, "down_proj": 3},
    }
    assert described["ignore"] == ["lm_head"]


# GPTQ -------------------------------------------------------------------------------------------------------------


def gptq_weight(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """One layer from the definition of the layout, with Python's integers: [rows, columns]."""

    def stream(words: Tensor, count: int) -> list[int]:
        whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))
        return [whole >> (bits * i) & (2**bits - 1) for i in range(count)]

    qweight, qzeros, scales, groups = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    columns, rows = len(groups), scales.shape[1]
    q = torch.tensor([stream(qweight[:, row], columns) for row in range(rows)])
    zeros = torch.tensor([stream(words, rows) for words in qzeros]) + 1  # version 1 stores one less
    return (q - zeros[groups.long()].T) * scales.float()[groups.long()].T


@pytest.mark.parametrize("group", [32, 1000])
@pytest.mark.parametrize("number_format", ALL)
def test_gptq_decodes_to_every_format(model: Path, tmp_path: Path, number_format: str, group: int) -> None:
    opened = write_packed(tmp_path / "packed", model, all_of(number_format, group))
    folder = export(opened, "gptq", tmp_path / "out")
    described = config(folder)["quantization_config"]
    assert described == json.loads((folder / "quantize_config.json").read_text())
    expected = {"ternary": 2, "int2z": 2, "int2": 3, "int3": 3, "int4": 4, "int5": 8, "int8": 8}
    assert described["bits"] == expected[number_format]
    assert described["group_size"] == (-1 if group == 1000 else 32)
    assert "dynamic" not in described
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(gptq_weight(tensors, name, described["bits"]), weight(opened, name))


def test_gptq_names_layers_that_differ(opened: PackedModel, tmp_path: Path) -> None:
    folder = export(opened, "gptq", tmp_path)
    described = config(folder)["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    bits = {}
    for name, entry in opened.header.matrices.items():
        if entry.kind != "linear":
            continue
        rules = [rule for key, rule in described["dynamic"].items() if re.match(key.removeprefix("+:"), name)]
        assert len(rules) <= 1
        bits[name.rpartition(".")[2]] = width = (rules or [described])[0]["bits"]
        if ".0." in name:
            assert torch.equal(gptq_weight(tensors, name, width), weight(opened, name)), name
    assert bits == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 8),
        **dict.fromkeys(("gate_proj", "up_proj"), 2),
        "down_proj": 3,
    }


READ = """
import sys, torch
from gptqmodel import GPTQModel, BACKEND
from safetensors.torch import save_file
model = GPTQModel.load(sys.argv[1], device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
found = {}
for name, module in model.model.named_modules():
    if hasattr(module, "qweight"):
        found[name] = module.dequantize_weight().T.contiguous().cpu()
save_file(found, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="no build/peers with GPTQModel; `make peers` makes it")
def test_gptqmodel_reads_it(opened: PackedModel, tmp_path: Path) -> None:
    folder = export(opened, "gptq", tmp_path / "out")
    ran = subprocess.run(
        [PEERS, "-c", READ, folder, tmp_path / "found.safetensors"],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == {name for name, entry in opened.header.matrices.items() if entry.kind == "linear"}
    for name, tensor in found.items():  # it multiplies in float16
        assert torch.equal(tensor, weight(opened, name).half()), name


# What both do -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_not_quantized_is_kept(opened: PackedModel, tmp_path: Path, name: str) -> None:
    folder = export(opened, name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert not [key for key in tensors if key.endswith("input_scale")]
    for key, tensor in opened.others().items():
        assert key.endswith("input_scale") or torch.equal(tensors[key], tensor)
    for key in ("model.embed_tokens", "lm_head"):
        assert tensors[f"{key}.weight"].dtype == torch.float32  # int4 times a float16 scale needs it
        assert torch.equal(tensors[f"{key}.weight"], weight(opened, key))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(opened.folder).get_vocab()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", GROUPED)
def test_what_does_not_fit_stays_floating_with_its_reason(model: Path, tmp_path: Path, name: str) -> None:
    """Groups of 40 divide the 160 columns of down_proj, but not the others' 96."""
    opened = write_packed(tmp_path / "packed", model, all_of("ternary", 40))
    plan = exporters.find(name).plan(opened)
    assert isinstance(plan, grouped.GroupedPlan)
    assert {each.rpartition(".")[2] for each in plan.layouts} == {"down_proj"}
    assert any("rows of 96 weights are no whole groups of 40" in cause for cause in plan.causes)
    assert not plan.lossy
    folder = export(opened, name, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{path}.weight"].dtype == torch.float16  # ternary: exact
    assert torch.equal(tensors[f"{path}.weight"].float(), weight(opened, path))
    described = config(folder)["quantization_config"]
    assert (
        path in described["ignore"]
        if name != "gptq"
        else f"-:^{path.replace('.', chr(92) + '.')}$" in described["dynamic"]
    )


@pytest.mark.parametrize("name", GROUPED)
def test_a_model_that_fits_nowhere_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    opened = write_packed(tmp_path / "packed", model, all_of("ternary", 7))
    with pytest.raises(UserError, match=f"{name} can hold none of the linear layers: .* no whole groups of 7") as no:
        export(opened, name, tmp_path / "out")
    assert "--group-size" in no.value.hint


def test_plans_tell_the_bytes(opened: PackedModel, tmp_path: Path) -> None:
    for name in FOLDERS:
        plan = exporters.find(name).plan(opened)
        folder = export(opened, name, tmp_path)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            data = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
        assert plan.bytes == data
        assert plan.weights == 1 + sum(tensor.weights for tensor in plan.tensors)  # the scale of an input is left out


def test_fused_sets() -> None:
    names = [f"a.{n}.attn.{each}_proj" for n in (0, 1) for each in "qkvo"] + ["a.0.mlp.up_proj", "a.0.mlp.gate_proj"]
    sets = [{name.rpartition(".")[2] for name in each} for each in grouped.fused_sets(names)]
    assert sets == [{"q_proj", "k_proj", "v_proj"}] * 2 + [{"up_proj", "gate_proj"}]
    assert Layout(bits=4, group_size=96).known_group(96) is None
    assert Layout(bits=4, group_size=32).known_group(32) == 32


def test_layers_agree_on_a_group_size() -> None:
    """Whole rows of 256 and groups of 64 of 960 columns become groups of 64, rows of 144 do not."""
    columns = {"a": 256, "b": 960, "c": 512, "d": 144}
    layouts = {"a": Layout(bits=4, group_size=256), "b": Layout(bits=2, group_size=64)}
    layouts |= {"c": Layout(bits=4, group_size=128), "d": Layout(bits=4, group_size=144)}
    grouped._unify_groups(layouts, columns)
    assert {name: layout.group_size for name, layout in layouts.items()} == {"a": 64, "b": 64, "c": 64, "d": 144}
    assert layouts["b"].bits == 2
    whole = {"a": Layout(bits=4, group_size=256), "d": Layout(bits=4, group_size=144)}
    grouped._unify_groups(whole, columns)
    assert [layout.group_size for layout in whole.values()] == [256, 144]


@pytest.mark.parametrize("shard_bytes", [1, 200, 10**6])
def test_shards_are_those_of_transformers(tmp_path: Path, shard_bytes: int) -> None:
    tensors = {f"t{i}": torch.arange(10 * i, 10 * i + 10, dtype=torch.float32) for i in range(10)}
    pieces = [Piece({name: ("F32", (10,))}, lambda name=name: {name: tensors[name]}) for name in tensors]
    hf_folder.write_weights(tmp_path, pieces, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 10, 200: 2, 10**6: 1}[shard_bytes]
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": 400}
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    with pytest.raises(ValueError, match="two tensors are called t0"):
        hf_folder.write_weights(tmp_path, pieces + pieces[:1])
    with pytest.raises(ValueError, match="should be"):
        hf_folder.write_weights(tmp_path, [Piece({"x": ("F16", (1,))}, lambda: {"x": torch.zeros(1)})])

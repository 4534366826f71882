"""GGUF exports: every tensor bit for bit through gguf's own dequantizer, metadata, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgerazor import exporters, families, formats, models
from edgerazor.errors import USAGE, UserError
from edgerazor.exporters import gguf as exporter
from edgerazor.exporters.core import gguf_blocks as blocks
from edgerazor.exporters.core.gguf_metadata import gguf_architecture, rope_factors
from edgerazor.exporters.core.gguf_names import gguf_name, half_names
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.importers.core.gguf_source import GgufSource
from edgerazor.models.gguf_values import row_order
from edgerazor.packed import PackedModel
from edgerazor.untrusted.gguf_file import TYPES as TYPES_READ
from edgerazor.untrusted.gguf_file import GgufFile
from helpers.tiny_job import Run, sha256, snapshot, with_template
from helpers.tiny_models import ModelMaker, family_config, mostly_slow

GROUPS = (16, 32, 40, 64, 128, 256, 512, 65536)
COLUMNS = (32, 40, 96, 256, 300, 352, 768)
TYPES = {block.type.name: block for block in blocks.BLOCKS}


def smallest(matrix: blocks.BlockMatrix, variant: exporter.Gguf = exporter.EXPORTER) -> str:
    """The type that an exporter chooses."""
    tests: exporter.Tests = [
        (each.type, lambda each=each: blocks.check_blocks(each, matrix))  # type: ignore[misc]
        for each in variant.blocks
    ]
    tests += [
        (each, lambda each=each: blocks.check_floats(each, matrix))  # type: ignore[misc]
        for each in variant.floats
    ]
    chosen, reason = exporter._smallest(tests)
    assert reason == ""
    return chosen.name


def dequantized(name: str, matrix: blocks.BlockMatrix) -> np.ndarray:
    """What gguf reads from what we write; Q2_0, which it does not know, from its definition."""
    kind = blocks.ggml_type(name)
    written = (
        blocks.write_blocks(TYPES[name], matrix) if name in TYPES else blocks.write_floats(kind, matrix, lossy=False)
    )
    size, width = blocks.SIZES[kind]
    assert written.shape == (matrix.shape[0], matrix.shape[1] // size * width)
    if name == "Q2_0":
        return q2_0_weights(written)
    return gguf.quants.dequantize(written, gguf.GGMLQuantizationType(kind))


def q2_0_weights(rows: np.ndarray) -> np.ndarray:
    """Weights float32 [rows, cols] by `dequantize_row_q2_0` of ggml-quants.c, with Python's integers."""
    decoded = []
    for row in rows:
        weights: list[float] = []
        for block in row.reshape(-1, 18):
            scale = float(block[:2].view("<f2")[0])
            weights += [((int(block[2 + i // 4]) >> 2 * (i % 4) & 3) - 1) * scale for i in range(64)]
        decoded.append(weights)
    return np.array(decoded, dtype=np.float32)


def random_encoded(spec: MatrixSpec, rows: int, cols: int, seed: int) -> Encoded:
    """Every code that the formats can store, and scales that follow no rule, zero among them."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.rand(rows, formats.group_count(cols, spec.group_size), generator=draw) * 0.1 + 1e-3
    scales[rows // 2, 0] = 0
    weights = torch.randn(rows, cols, generator=draw) * 0.2
    return formats.encode_matrix(weights, spec, scales)


# Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.names())
def test_every_format_and_geometry_is_exact(name: str) -> None:
    """Whatever type is chosen, and each other type that takes the matrix, decodes to our float32 weights."""
    for seed, (group, cols) in enumerate(itertools.product(GROUPS, COLUMNS)):
        spec = MatrixSpec((name,), group)
        for encoded in (
            random_encoded(spec, 5, cols, seed),
            formats.encode_matrix(torch.randn(5, cols, generator=torch.Generator().manual_seed(seed)), spec),
        ):
            matrix = blocks.BlockMatrix(encoded, spec)
            expected = formats.decode_matrix(encoded, spec).numpy()
            assert (dequantized(smallest(matrix), matrix) == expected).all(), (group, cols)
            for kind, block in TYPES.items():
                try:
                    blocks.check_blocks(block, matrix)
                except blocks.InexactError:
                    continue
                assert (dequantized(kind, matrix) == expected).all(), (group, cols, kind)


#: format, group size, columns -> the smallest type of `gguf` that is exact
CHOSEN = {
    ("ternary", 256, 768): "TQ1_0",
    ("ternary", 512, 1024): "TQ1_0",
    ("ternary", 65536, 768): "TQ1_0",
    ("ternary", 128, 768): "Q4_0",
    ("ternary", 64, 768): "Q4_0",
    ("ternary", 256, 800): "Q4_0",  # rows are no multiple of 256
    ("ternary", 40, 320): "F16",  # a block of 32 would have two scales
    ("ternary", 32, 300): "F16",  # rows are no multiple of 32
    ("int2", 256, 768): "Q2_K",
    ("int2", 64, 768): "Q4_0",
    ("int2z", 256, 768): "Q2_K",
    ("int3", 256, 768): "Q3_K",
    ("int3", 32, 768): "Q4_0",
    ("int4", 256, 768): "Q4_0",
    ("int4", 32, 96): "Q4_0",
    ("int4", 16, 96): "F32",  # an int4 times fp16 has more bits than fp16
    ("int5", 64, 768): "Q5_0",
    ("int8", 256, 768): "Q8_0",
    ("int8", 32, 300): "F32",
}


@pytest.mark.parametrize(("name", "group", "cols"), CHOSEN)
def test_the_smallest_exact_type(name: str, group: int, cols: int) -> None:
    spec = MatrixSpec((name,), group)
    encoded = formats.encode_matrix(torch.randn(40, cols, generator=torch.Generator().manual_seed(3)), spec)
    assert smallest(blocks.BlockMatrix(encoded, spec)) == CHOSEN[name, group, cols]


#: The same of `gguf-q2`.
CHOSEN_BY_Q2 = {
    ("ternary", 64, 768): "Q2_0",
    ("ternary", 128, 192): "Q2_0",
    ("ternary", 65536, 320): "Q2_0",
    ("ternary", 32, 768): "Q4_0",  # a block of 64 would have two scales
    ("ternary", 64, 352): "Q4_0",  # rows are no multiple of 64
    ("int2z", 64, 768): "Q2_0",
    ("int2", 64, 768): "Q4_0",  # -3, -1, 1 and 3 halves are no neighbours
    ("int2", 256, 768): "Q2_K",
    ("int3", 256, 768): "Q3_K",
}


@pytest.mark.parametrize(("name", "group", "cols"), CHOSEN_BY_Q2)
def test_q2_0_where_codes_fit(name: str, group: int, cols: int) -> None:
    spec = MatrixSpec((name,), group)
    encoded = formats.encode_matrix(torch.randn(40, cols, generator=torch.Generator().manual_seed(3)), spec)
    matrix = blocks.BlockMatrix(encoded, spec)
    assert smallest(matrix, exporter.Q2) == CHOSEN_BY_Q2[name, group, cols]


def test_a_block_of_q2_0_has_one_end() -> None:
    """-2 needs a negative unit, 2 a positive one: both in one block are refused, in neighbours they are not."""
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, 3], codes[0, 70] = -2, 2
    spec = MatrixSpec(("int8",), 128)
    scales = torch.tensor([[0.25]], dtype=torch.float16)
    matrix = blocks.BlockMatrix(Encoded(codes, scales), spec)
    assert (dequantized("Q2_0", matrix) == codes.numpy() * 0.25).all()
    codes[0, 63] = 2
    with pytest.raises(blocks.InexactError, match="levels of -2 and of 2"):
        blocks.check_blocks(TYPES["Q2_0"], blocks.BlockMatrix(Encoded(codes, scales), spec))


def test_types_follow_what_is_there_and_not_its_name() -> None:
    """Equal scales of small groups are one scale; codes that int4 has but a matrix does not use cost nothing."""
    spec = MatrixSpec(("ternary",), 64)
    codes = torch.randint(-1, 2, (4, 256), dtype=torch.int8)
    matrix = blocks.BlockMatrix(Encoded(codes, torch.full((4, 4), 0.25, dtype=torch.float16)), spec)
    assert smallest(matrix) == "TQ1_0"
    zeros = torch.tensor([[0.25, 0.0, 0.25, 0.25]], dtype=torch.float16).expand(4, 4)
    silent = codes.clone()
    silent[:, 64:128] = 0
    assert smallest(blocks.BlockMatrix(Encoded(silent, zeros), spec)) == "TQ1_0"
    assert smallest(blocks.BlockMatrix(Encoded(codes, torch.rand(4, 1).half()), MatrixSpec(("int8",), 256))) == "TQ1_0"
    assert (
        smallest(blocks.BlockMatrix(Encoded(codes - 1, torch.rand(4, 1).half()), MatrixSpec(("int8",), 256))) == "Q2_K"
    )


def test_half_of_the_smallest_scale_is_no_fp16_number() -> None:
    """int2 in units of half a scale: an odd subnormal scale has none, so its matrix is written as numbers."""
    spec = MatrixSpec(("int2",), 256)
    scales = torch.tensor([[2.0**-14], [2.0**-23], [3 * 2.0**-24]], dtype=torch.float16)
    encoded = Encoded(torch.randint(-2, 2, (3, 256), dtype=torch.int8), scales)
    matrix = blocks.BlockMatrix(encoded, spec)
    assert smallest(blocks.BlockMatrix(Encoded(encoded.codes[:2], scales[:2]), spec)) == "Q2_K"
    kind = smallest(matrix)
    assert kind in ("BF16", "F32")
    assert (dequantized(kind, matrix) == formats.decode_matrix(encoded, spec).numpy()).all()


@pytest.mark.parametrize("pair", list(itertools.combinations(formats.names(), 2)), ids="-".join)
def test_rows_and_blocks_of_two_formats(pair: tuple[str, str]) -> None:
    draw = torch.Generator().manual_seed(4)
    for group, cols in ((64, 256), (256, 512), (65536, 256)):
        groups = formats.group_count(cols, group)
        for spec in (
            MatrixSpec(pair, group, row_formats=torch.randint(0, 2, (6,), dtype=torch.uint8, generator=draw)),
            MatrixSpec(pair, group, block_formats=torch.randint(0, 2, (6, groups), dtype=torch.uint8, generator=draw)),
            MatrixSpec(pair, group, block_formats=torch.randint(0, 2, (1, groups), dtype=torch.uint8, generator=draw)),
        ):
            encoded = formats.encode_matrix(torch.randn(6, cols, generator=draw), spec)
            order = torch.randperm(6, generator=draw)
            matrix = blocks.BlockMatrix(encoded, spec, order)
            expected = formats.decode_matrix(encoded, spec)[order].numpy()
            kind = smallest(matrix)
            assert (dequantized(kind, matrix) == expected).all()
            if group == 256 and set(pair) == {"ternary", "int4"}:
                assert kind == "Q4_0"


def test_large_matrices_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MatrixSpec(("ternary",), 256)
    encoded = formats.encode_matrix(torch.randn(33, 512, generator=torch.Generator().manual_seed(1)), spec)
    matrix = blocks.BlockMatrix(encoded, spec, torch.arange(33).flip(0))
    whole = blocks.write_blocks(TYPES["TQ1_0"], matrix)
    monkeypatch.setattr(blocks, "CHUNK", 2048)
    assert len(list(matrix.rows())) == 9
    assert (blocks.write_blocks(TYPES["TQ1_0"], matrix) == whole).all()


# Whole models -----------------------------------------------------------------------------------------------------

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "smollm2", "smollm3", "gemma", "gemma2", "gemma3", "granite", "olmo2"),
    *("olmo3", "phi3", "hunyuan", "ministral3", "lfm2", "qwen3.5", "gemma4", "granite-hybrid", "exaone4"),
)
#: Of these, those that are read as teachers, too.
READ = tuple(family for family in FAMILIES if family != "granite-hybrid")
#: What llama.cpp's code takes for granted of a family's layers.
GRANTED: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 1]},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 32},
    "gemma4": {
        **{"hidden_size_per_layer_input": 64, "global_head_dim": 64},
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")],
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "olmo3": {"layer_types": ["sliding_attention"] * 2},
    "granite-hybrid": {"mamba_n_groups": 1, "mamba_n_heads": 8, "mamba_d_head": 32, "shared_intermediate_size": 256},
    "lfm2": {"num_key_value_heads": 2, "intermediate_size": 384, "block_multiple_of": 128},
    "qwen3.5": {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
#: llama.cpp's name of an architecture -> the number of it.
NUMBERS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
#: Families whose head is, or is not, the embedding in llama.cpp's code.
TIED, UNTIED = ("gemma", "gemma2", "smollm2"), ("olmo2", "olmo3")
#: Rows that GGML's blocks divide.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}


@pytest.fixture(scope="module")
def packed(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a packed folder, rounded from a random model."""
    made: dict[Any, Path] = {}

    def make(run: Run, family: str, options: tuple[Any, ...] = ("--bits", 1.58), **overrides: Any) -> Path:
        key = (family, options, json.dumps(overrides, sort_keys=True))
        if key not in made:
            folder = tmp_path_factory.mktemp("packed")
            granted = GRANTED.get(family, {})
            make_model(folder / "model", family_config(family, **{**SHAPE, **granted, **overrides}))
            plain = ("--plan", "interleave", "--group-size", 64)
            done = run("pack", folder / "model", "--work", folder / "job", *plain, *options, "--json")
            assert done.code == 0, done.err
            made[key] = folder / "job" / "packed"
        return made[key]

    return make


def read(file: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(file)


def values(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Metadata without the long lists."""
    return {name: each.contents() for name, each in reader.fields.items() if "tokenizer.ggml.t" not in name}


def decoded(folder: Path) -> dict[str, Tensor]:
    """The weights of a packed model by their names."""
    model = PackedModel.open(folder)
    found = {}
    for name in model.header.matrices:
        matrix = model.matrix(name)
        found[f"{name}.weight"] = formats.decode_matrix(matrix.encoded, matrix.spec)
    return found | {name: each.float() for name, each in model.others().items()}


def gguf_architecture_of(model_type: str) -> families.GgufArchitecture:
    """A family's facts for GGUF."""
    family = families.find(model_type)
    assert family is not None
    assert family.gguf is not None
    return family.gguf


def rotated_pairs(heads: int, size: int) -> list[int]:
    """Row of transformers at each place of llama.cpp's `llama`, by hand: a pair is i and i + size / 2 of a head."""
    return [
        head * size + pair + half * size // 2 for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]


CASES = [
    *((family, variant, family in TIED) for family in FAMILIES for variant in ("gguf", "gguf-tq2", "gguf-f32")),
    *((family, "gguf", True) for family in FAMILIES if family not in TIED + UNTIED),
]


@pytest.mark.parametrize(("family", "variant", "tied"), CASES)
def test_every_tensor_of_every_family(
    family: str, variant: str, tied: bool, run: Run, packed: Any, tmp_path: Path
) -> None:
    folder = packed(run, family, tie_word_embeddings=tied)
    export = exporters.find(variant)
    model = PackedModel.open(folder)
    plan = export.plan(model)
    result = export.write(model, tmp_path, plan)
    assert Path(result.file).stat().st_size == plan.bytes == result.bytes
    config = models.complete_config(folder)
    architecture = gguf_architecture(config)
    weights = decoded(folder)
    reader = read(Path(result.file))
    joined = sum(half_names(architecture, name) is not None for name in weights)  # each is two tensors
    assert len(reader.tensors) == len(weights) + joined + len(architecture.rope_factors(config))
    official = gguf.get_tensor_name_map(NUMBERS[architecture.name], config["num_hidden_layers"])
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for name, expected in weights.items():
        if halves := half_names(architecture, name):
            both = [gguf.quants.dequantize(by_name[half].data, by_name[half].tensor_type) for half in halves]
            assert (np.concatenate(both) == expected.numpy()).all(), name
            continue
        tensor = by_name[gguf_name(architecture, name)]
        if name.endswith((".weight", ".bias")) and ".shared_mlp." not in name:  # which the converter names otherwise
            assert tensor.name.rpartition(".")[0] == official.get_name(name.rpartition(".")[0])
        if architecture.interleaved_rope and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads"] if ".q_proj." in name else config["num_key_value_heads"]
            expected = expected[rotated_pairs(heads, 32)]
        if family == "qwen3.5" and "linear_attn" in name:
            expected = converted(name, expected, config)
        elif name.endswith("norm.weight"):
            expected = expected + architecture.norm_offset
        elif name.endswith("mamba.A_log"):
            expected = -expected.exp()[:, None]
        elif name.endswith("mamba.D"):
            expected = expected[:, None]
        elif name.endswith(("conv.conv.weight", "mamba.conv1d.weight")):
            expected = expected.squeeze(1)
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        assert (got == expected.numpy()).all(), name
        assert list(reversed(tensor.shape.tolist())) == list(expected.shape)
    assert ("output.weight" in by_name) == (not config["tie_word_embeddings"])
    linear = result.types["linear"]
    assert linear == {"F32" if variant == "gguf-f32" else "Q4_0": sum(linear.values())}


@pytest.mark.parametrize("family", mostly_slow(READ, "lfm2", "qwen3.5", "olmo3", "gemma2"))
def test_a_file_of_ours_is_a_teacher(family: str, run: Run, packed: Any, tmp_path: Path) -> None:
    """Configuration, names, places and numbers are found again: the teacher computes what the packed weights do."""
    folder = packed(run, family, tie_word_embeddings=family in TIED)
    export = exporters.find("gguf-f32")
    model = PackedModel.open(folder)
    file = Path(export.write(model, tmp_path, export.plan(model)).file)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ours.load_state_dict(decoded(folder), strict=False)
    ours.tie_weights()
    teacher, _ = models.load(file)
    ids = torch.arange(3, 3 + min(97, teacher.config.max_position_embeddings)).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(teacher(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
    again = GgufSource(GgufFile(file.rename(folder / "model.gguf")))  # beside the configuration
    weights = decoded(folder)
    assert again.names() == weights.keys()
    for name in weights:
        if isinstance(tensor := again.read(name), Tensor):
            torch.testing.assert_close(tensor.float(), weights[name], rtol=1e-6, atol=1e-6)
    (folder / "model.gguf").unlink()


def converted(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """A tensor of the gated delta rule as `conversion/qwen.py` of llama.cpp has it."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    width = config["linear_value_head_dim"]

    def tiled(part: Tensor, head: int) -> Tensor:
        """`_reorder_v_heads` of rows."""
        shape = part.shape[1:]
        return part.reshape(keys, values // keys, head, *shape).transpose(0, 1).reshape(-1, *shape)

    if name.endswith("A_log"):
        return tiled(-tensor.exp(), 1)
    if name.endswith(("dt_bias", "in_proj_a.weight", "in_proj_b.weight")):
        return tiled(tensor, 1)
    if name.endswith("out_proj.weight"):
        return tiled(tensor.T, width).T
    if name.endswith("in_proj_z.weight"):
        return tiled(tensor, width)
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        others = 2 * keys * config["linear_key_head_dim"]
        return torch.cat([tensor[:others], tiled(tensor[others:], width)]).squeeze(1)
    return tensor


def test_ternary_of_whole_blocks(run: Run, packed: Any, tmp_path: Path) -> None:
    """At group size 256 ternary takes 1.69 or 2.06 bits and int4 4.5: nothing is said about size but the metadata."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    folder = packed(run, "llama", ("--bits", 1.58, "--group-size", 256), **shape)
    model = PackedModel.open(folder)
    for variant, kind, bits in (("gguf", "TQ1_0", 1.6875), ("gguf-tq2", "TQ2_0", 2.0625)):
        plan = exporters.find(variant).plan(model)
        assert {tensor.type for tensor in plan.tensors if tensor.kind == "linear"} == {kind}
        assert {tensor.type for tensor in plan.tensors if tensor.kind in ("embedding", "head")} == {"Q4_0"}
        linear = [tensor for tensor in plan.tensors if tensor.kind == "linear"]
        assert 8 * sum(tensor.bytes for tensor in linear) == bits * sum(tensor.weights for tensor in linear)
        assert all("metadata" in cause for cause in plan.causes)
        reader = read(Path(exporters.find(variant).write(model, tmp_path / variant, plan).file))
        assert values(reader)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


def test_ternary_of_groups_of_64(run: Run, packed: Any, tmp_path: Path) -> None:
    """Where `gguf` needs Q4_0, `gguf-q2` takes half of that, and `gguf` says so."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = PackedModel.open(packed(run, "llama", ("--bits", 1.58, "--group-size", 64), **shape))
    plain, small = (exporters.find(name).plan(model) for name in ("gguf", "gguf-q2"))
    assert {tensor.type for tensor in small.tensors if tensor.kind == "linear"} == {"Q2_0"}
    linear = [sum(tensor.bytes for tensor in plan.tensors if tensor.kind == "linear") for plan in (plain, small)]
    assert linear[0] == 2 * linear[1]
    assert any("--group-size 256 helps, and --export gguf-q2" in cause for cause in plain.causes)
    assert not any("Q2_0" in cause for cause in small.causes)
    result = exporters.find("gguf-q2").write(model, tmp_path, small)
    assert Path(result.file).stat().st_size == small.bytes
    again = GgufFile(Path(result.file))
    assert again.metadata["general.file_type"] == 41
    assert {TYPES_READ[again.tensors["blk.0.ffn_up.weight"].type][0]} == {"Q2_0"}
    assert again.tensors["blk.0.ffn_up.weight"].shape == (512, 256)


def test_rotation_of_neighbours_is_rotation_of_halves() -> None:
    """Scores of q and k are the same when rows are sorted and neighbours rotate as the halves did."""
    config = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16, "model_type": "llama"}
    order = row_order(gguf_architecture_of("llama"), config, "blk.0.attn_q.weight")
    assert order is not None
    assert order.tolist() == rotated_pairs(2, 8)
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 8, generator=draw, dtype=torch.float64)
    angles = torch.rand(4, generator=draw, dtype=torch.float64)

    def halves(x: Tensor, turn: float) -> Tensor:
        a, b = x[:, :4], x[:, 4:]
        cos, sin = (angles * turn).cos(), (angles * turn).sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)

    def neighbours(x: Tensor, turn: float) -> Tensor:
        a, b = x[:, ::2], x[:, 1::2]
        cos, sin = (angles * turn).cos(), (angles * turn).sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=2).reshape(2, 8)

    def scores(rotate: Any, q: Tensor, k: Tensor) -> Tensor:
        return (rotate(q, 3.0) * rotate(k, 7.0)).sum(dim=1)

    def sorted_rows(x: Tensor) -> Tensor:
        return x.reshape(16)[order].reshape(2, 8)

    torch.testing.assert_close(scores(halves, q, k), scores(neighbours, sorted_rows(q), sorted_rows(k)))


def test_metadata(run: Run, packed: Any, tmp_path: Path) -> None:
    folder = packed(run, "qwen3", rms_norm_eps=1e-5)
    result = exporter.export(folder, tmp_path / "m.gguf")
    found = values(read(tmp_path / "m.gguf"))
    assert {name: found[f"qwen3.{name}"] for name in SAID} == pytest.approx(SAID)
    assert found["general.architecture"] == "qwen3"
    assert found["general.name"] == "model"
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert "activation bits 8, kv bits 8" in result.notes[0]
    assert result.lossy == []


SAID = {
    "context_length": 128,
    "embedding_length": 128,
    "block_count": 2,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 32,
    "rope.freq_base": 10000.0,
    "vocab_size": 300,
}


def test_metadata_of_factors_and_windows(run: Run, packed: Any, tmp_path: Path) -> None:
    exporter.export(packed(run, "granite"), tmp_path / "granite.gguf")
    found = values(read(tmp_path / "granite.gguf"))
    keys = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    assert [found[f"granite.{key}"] for key in keys] == pytest.approx([0.2, 3.0, 0.5, 4.0])
    exporter.export(packed(run, "gemma3"), tmp_path / "gemma3.gguf")
    found = values(read(tmp_path / "gemma3.gguf"))
    assert found["gemma3.context_length"] == 128
    assert found["gemma3.attention.sliding_window"] == 8
    assert found["gemma3.rope.freq_base"] == 1e6
    assert found["gemma3.rope.freq_base_swa"] == 1e4
    exporter.export(packed(run, "gemma4"), tmp_path / "gemma4.gguf")
    found = values(read(tmp_path / "gemma4.gguf"))
    said = {
        **{"attention.key_length": 64, "attention.key_length_swa": 32, "attention.shared_kv_layers": 2},
        **{"attention.sliding_window_pattern": [True, True, False, True, False], "attention.head_count_kv": 2},
        **{"feed_forward_length": [256, 256, 256, 512, 512], "embedding_length_per_layer_input": 64},
        **{"rope.dimension_count": 64, "rope.dimension_count_swa": 32, "final_logit_softcapping": 3.0},
        **{"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
    }
    assert {key: found[f"gemma4.{key}"] for key in said} == said
    [factors] = [each.data for each in read(tmp_path / "gemma4.gguf").tensors if each.name == "rope_freqs.weight"]
    assert factors.tolist() == pytest.approx([1.0] * 8 + [1e30] * 24)


#: family, settings that llama.cpp's code does not have -> words of the sentence that refuses them.
REFUSED: dict[tuple[str, str], dict[str, Any]] = {
    ("gemma3", "every sixth"): {"layer_types": ["sliding_attention", "full_attention"]},
    ("gemma3", "a scale of their own"): {"query_pre_attn_scalar": 16},
    ("gemma3", "capped"): {"final_logit_softcapping": 30.0},
    ("gemma3", "activation 'silu' is not gelu_pytorch_tanh"): {"hidden_activation": "silu"},
    ("gemma4", "experts beside an MLP"): {"enable_moe_block": True},
    ("gemma4", "its positions are scaled"): {
        "rope_parameters": {
            kind: {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    ("gemma4", "not those of a layer with a window and one without"): {
        "layer_types": [f"{kind}_attention" for kind in ("full", "full", "sliding", "sliding", "full")]
    },
    ("gemma4", "are not there or differ in their heads"): {"layer_types": ["full_attention"] * 5},
    ("gemma2", "every second"): {"layer_types": ["full_attention", "sliding_attention"]},
    ("gemma2", "not capped"): {"final_logit_softcapping": None},
    ("gemma2", "its attention scores have a scale"): {"query_pre_attn_scalar": 16},
    ("gemma2", "takes the embedding for the head"): {"tie_word_embeddings": False},
    ("gemma", "attends to later tokens"): {"use_bidirectional_attention": True},
    ("olmo2", "wants a head of its own"): {"tie_word_embeddings": True},
    ("olmo2", "not as wide as the model"): {"head_dim": 64},
    ("olmo3", "every fourth"): {"layer_types": ["sliding_attention", "full_attention"]},
    ("olmo3", "a base of their own"): {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        }
    },
    ("exaone4", "windows where it has 64 layers"): {"sliding_window": 6, "layer_types": ["sliding_attention"] * 2},
    ("exaone4", "windows where it has 64 layers, and"): {"num_hidden_layers": 64},
    ("exaone4", "every fourth"): {
        **{"num_hidden_layers": 64, "sliding_window": 6, "layer_types": ["sliding_attention"] * 64}
    },
    ("phi3", "not as wide as the model"): {"head_dim": 64},
    ("phi3", "in the way 'linear'"): {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ("hunyuan", "in the way 'dynamic'"): {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
    ("ministral3", "queries without llama_4_scaling_beta"): {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
    },
    ("ministral3", "an mscale that is not 1"): {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "mscale": 0.7}
    },
    ("lfm2", "convolutions have biases"): {"conv_bias": True},
    ("qwen3.5", "not as wide as its key heads"): {"linear_value_head_dim": 64},
}


@pytest.mark.parametrize(("family", "words"), REFUSED)
def test_what_code_of_llama_cpp_takes_for_granted(family: str, words: str) -> None:
    usual = {**SHAPE, **GRANTED.get(family, {}), "tie_word_embeddings": family in TIED}
    complete = family_config(family).to_dict() | usual
    assert gguf_architecture(complete)
    with pytest.raises(UserError, match=words):
        gguf_architecture(complete | REFUSED[family, words])


def test_metadata_of_layers_that_differ(run: Run, packed: Any, tmp_path: Path) -> None:
    exporter.export(packed(run, "lfm2"), tmp_path / "lfm2.gguf")
    found = values(read(tmp_path / "lfm2.gguf"))
    assert found["lfm2.attention.head_count_kv"] == [0, 2, 0]
    assert found["lfm2.feed_forward_length"] == 256
    assert found["lfm2.shortconv.l_cache"] == 3
    exporter.export(packed(run, "qwen3.5"), tmp_path / "qwen.gguf")
    found = values(read(tmp_path / "qwen.gguf"))
    assert found["qwen35.attention.recurrent_layers"] == [True, False, True]
    assert found["qwen35.full_attention_interval"] == 2
    assert found["qwen35.rope.dimension_count"] == 16
    keys = ("conv_kernel", "state_size", "group_count", "time_step_rank", "inner_size")
    assert [found[f"qwen35.ssm.{key}"] for key in keys] == [4, 32, 2, 4, 128]
    exporter.export(packed(run, "olmo3"), tmp_path / "olmo3.gguf")
    found = values(read(tmp_path / "olmo3.gguf"))
    assert found["olmo2.attention.sliding_window_pattern"] == [True, True]
    assert found["olmo2.context_length"] == 128


def test_metadata_of_positions(run: Run, packed: Any, tmp_path: Path) -> None:
    exporter.export(packed(run, "ministral3"), tmp_path / "m.gguf")
    found = values(read(tmp_path / "m.gguf"))
    assert found["mistral3.attention.temperature_scale"] == 0.5
    assert found["mistral3.rope.scaling.original_context_length"] == 8
    assert found["mistral3.rope.scaling.yarn_log_multiplier"] == 1.0
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}
    exporter.export(packed(run, "hunyuan", rope_parameters=dynamic), tmp_path / "h.gguf")
    found = values(read(tmp_path / "h.gguf"))
    assert found["hunyuan-dense.rope.freq_base"] == pytest.approx(1e4 * 1000 ** (32 / 30))
    long = {"rope_type": "longrope", "rope_theta": 1e4}
    long |= {"partial_rotary_factor": 0.5, "short_factor": [1.1] * 8, "long_factor": [2.5] * 8}
    shape = {"original_max_position_embeddings": 16, "sliding_window": 100}
    result = exporter.export(packed(run, "phi3", rope_parameters=long, **shape), tmp_path / "p.gguf")
    found, tensors = values(read(tmp_path / "p.gguf")), {each.name: each for each in read(tmp_path / "p.gguf").tensors}
    assert found["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(8) / math.log(16)))
    assert found["phi3.rope.dimension_count"] == 16
    assert found["phi3.context_length"] == 100
    assert tensors["rope_factors_long.weight"].data.tolist() == [2.5] * 8
    assert any("longer than 16 tokens" in note for note in result.notes)


def test_columns_in_another_order_keep_their_scales() -> None:
    """Groups move whole, or in the parts that stay together."""
    draw = torch.Generator().manual_seed(2)
    order = torch.arange(256).reshape(2, 2, 64).transpose(0, 1).reshape(-1)
    for name, group in (("int4", 32), ("int4", 64), ("ternary", 256), ("int2", 64), ("int8", 128)):
        spec = MatrixSpec((name,), group)
        encoded = random_encoded(spec, 6, 256, 3)
        matrix = blocks.BlockMatrix(encoded, spec, torch.randperm(6, generator=draw), order)
        expected = formats.decode_matrix(encoded, spec)[matrix.order][:, order].numpy()
        assert matrix.group == min(group, 64)
        kind = smallest(matrix)
        assert (dequantized(kind, matrix) == expected).all(), (name, group, kind)
        assert (dequantized("F32", matrix) == expected).all()


def test_a_sliding_window_bounds_the_context(run: Run, packed: Any, tmp_path: Path) -> None:
    """llama.cpp sees all of the context, so it is given no more than the window."""
    result = exporter.export(packed(run, "mistral"), tmp_path / "m.gguf")
    assert values(read(tmp_path / "m.gguf"))["llama.context_length"] == 8
    assert any("8 tokens" in note and "instead of 128" in note for note in result.notes)


def test_equal_exports_are_equal_files(run: Run, packed: Any, tmp_path: Path) -> None:
    folder = packed(run, "llama")
    for name in ("a", "b"):
        exporter.export(folder, tmp_path / name)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


# Positions --------------------------------------------------------------------------------------------------------


def test_rope_factors_of_llama_3() -> None:
    """The frequencies that transformers computes, which llama.cpp divides by our factors."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=64, rope_parameters=scaling)
    expected, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = rope_factors(gguf_architecture_of("llama"), config.to_dict())["rope_freqs.weight"]
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    assert attention == 1.0
    assert (factors.min(), factors.max()) == (1, 32)
    torch.testing.assert_close((plain / factors).float(), expected, rtol=1e-6, atol=0)


def test_scaled_positions(run: Run, packed: Any, tmp_path: Path) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    for kind, more in (("linear", {"factor": 2.0}), ("llama3", llama3)):
        parameters = {"rope_type": kind, "rope_theta": 1e4, **more}
        exporter.export(packed(run, "llama", rope_parameters=parameters), tmp_path / kind)
    found = values(read(tmp_path / "linear"))
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 2.0)
    tensor = next(each for each in read(tmp_path / "llama3").tensors if each.name == "rope_freqs.weight")
    parameters = {"rope_type": "llama3", "rope_theta": 1e4, **llama3}
    [expected] = rope_factors(gguf_architecture_of("llama"), {"rope_parameters": parameters, **SHAPE}).values()
    assert tensor.data.tolist() == expected.tolist()


# What is refused --------------------------------------------------------------------------------------------------


def refusal(**config: Any) -> str:
    complete = family_config("llama").to_dict() | config
    with pytest.raises(UserError) as refused:
        gguf_architecture(complete)
    return refused.value.message


def test_a_number_that_gguf_cannot_hold(run: Run, packed: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packed(run, "llama"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e300}))
    refused = run("pack", copy, "--export", "gguf", "--dry-run")
    assert refused.code == 1
    assert "layer_norm_rms_epsilon, which GGUF cannot hold" in " ".join(refused.err.split())


def test_what_llama_cpp_would_leave_out_is_refused() -> None:
    assert "its family 'lfm3' is not among exaone4, gemma, gemma2, gemma3_text, gemma4_text" in refusal(
        model_type="lfm3"
    )
    assert "activation 'gelu'" in refusal(hidden_act="gelu")
    assert "every fourth" in refusal(model_type="smollm3", no_rope_layers=[1, 0])
    assert "as wide as the model" in refusal(model_type="qwen2", head_dim=64)
    assert "no biases as attention_bias asks" in refusal(model_type="qwen3", attention_bias=True)
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}
    assert "'llama3', which its architecture does not know" in refusal(model_type="qwen3", rope_parameters=llama3)
    assert "'dynamic'" in refusal(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 0.7}
    assert "YaRN scaling has mscale" in refusal(rope_parameters=yarn)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "attention_factor": 1.2}
    assert "YaRN scaling has attention_factor" in refusal(rope_parameters=yarn)
    said = family_config("llama").to_dict() | {"rope_parameters": yarn | {"attention_factor": 1.2079441541679836}}
    assert gguf_architecture(said)  # OLMo 3 says what YaRN has anyway
    assert "a part of each head" in refusal(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    for family, name in (
        ("qwen3", "model.layers.0.self_attn.o_proj.bias"),
        ("llama", "model.layers.1.mlp.extra.weight"),
    ):
        with pytest.raises(UserError, match=f"reads no tensor {name}"):
            gguf_name(gguf_architecture_of(family), name)
    assert gguf_name(gguf_architecture_of("llama"), "model.layers.3.mlp.up_proj.bias") == "blk.3.ffn_up.bias"


def test_rounding_is_refused_by_name(run: Run, packed: Any, tmp_path: Path) -> None:
    """fp16 holds a ternary level times an fp16 scale, but not an int4 one."""
    folder = packed(run, "llama")
    with pytest.raises(
        UserError, match=r"gguf-f16 would change weights of 2 of 21 tensors \(.*embed_tokens"
    ) as refused:
        exporter.export(folder, tmp_path / "m", quantized=False)
    assert "--allow-lossy" in refused.value.hint
    assert list(tmp_path.iterdir()) == []
    result = exporter.export(folder, tmp_path / "m", quantized=False, allow_lossy=True)
    assert sorted(result.lossy) == ["lm_head.weight", "model.embed_tokens.weight"]
    reader = {tensor.name: tensor for tensor in read(tmp_path / "m").tensors}
    expected = decoded(folder)["lm_head.weight"].half().numpy()
    assert (reader["output.weight"].data == expected).all()


def test_size_is_explained(run: Run, packed: Any) -> None:
    """More than 10 % above the packed bits: how much, why, and what helps."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    remedies = {
        ("--bits", 1.88, "--group-size", 256): (14, "mix ternary and int4", "--granularity tensor"),
        ("--bits", 1.58, "--group-size", 64): (14, "one scale for 256 weights, not 64", "--group-size 256"),
        ("--bits", 1.58, "--group-size", 40): (16, "groups of 40 weights are no multiple of 32", "--group-size 256"),
    }
    for options, (count, cause, remedy) in remedies.items():
        plan = exporter.EXPORTER.plan(PackedModel.open(packed(run, "llama", options, **shape)))
        assert plan.real_bits > 1.1 * plan.packed_real_bits
        (said,) = [each for each in plan.causes if cause in each]
        assert said.startswith(f"{count} matrices take ")
        assert remedy in said
        if count == 14:  # 1.58 * 7/8 + 4/8 + 16/256, and 1.58 + 16/64
            packed_bits = "1.94" if "mix" in cause else "1.83"
            assert f"Q4_0, 4.50 bits a weight instead of {packed_bits}," in said


# The command line -------------------------------------------------------------------------------------------------


def test_pack_exports_also_when_it_is_up_to_date(run: Run, llama: Path, tmp_path: Path) -> None:
    work = tmp_path / "job"
    first = run("pack", llama, "--bits", 4, "--plan", "interleave", "--work", work, "--export", "gguf", "--json")
    assert first.code == 0, first.err
    (done,) = first.json()["exports"]
    assert done["file"] == str(work / "exports" / "gguf" / "model.gguf")
    assert "real bits" in first.err
    assert Path(done["file"]).stat().st_size == done["bytes"]
    digest = sha256(Path(done["file"]))
    Path(done["file"]).unlink()
    again = run(
        "pack", llama, "--bits", 4, "--plan", "interleave", "--work", work, "--export", "gguf,gguf-f32", "--json"
    )
    assert again.code == 0, again.err
    assert "pack is up to date" in again.err
    assert [each["export"] for each in again.json()["exports"]] == ["gguf", "gguf-f32"]
    assert sha256(Path(done["file"])) == digest
    assert sorted(each.name for each in (work / "exports").iterdir()) == ["gguf", "gguf-f32"]
    assert run("pack", "--work", work, "--export", "gguf-f16", "--allow-lossy").code == 0
    refused = run("pack", "--work", work, "--export", "gguf-f16")  # what was allowed once is not for ever
    assert refused.code == 1
    assert "would change weights" in refused.err


def test_a_packed_folder_is_exported_directly(run: Run, packed: Any, tmp_path: Path) -> None:
    folder = packed(run, "llama")
    done = run("pack", folder, "--export", "gguf", "--json")
    assert done.code == 0, done.err
    assert done.json()["exports"][0]["file"] == str(folder.parent / "exports" / "gguf" / "model.gguf")
    shown = run("pack", folder, "--export", "gguf-f16", "--allow-lossy")
    assert shown.code == 0, shown.err
    assert "gguf-f16: " in shown.out
    assert "changes weights of 2 tensors" in shown.out
    for words, sentence in (
        ((folder,), "packed already"),
        ((folder, "--export", "gguf", "--bits", 4), "so --bits cannot change it"),
        ((folder, "--export", "gguff"), "no export called 'gguff'"),
    ):
        refused = run("pack", *words)
        assert refused.code == USAGE
        assert sentence in refused.err
    before = snapshot(folder.parent)
    dry = run("pack", folder, "--export", "gguf,gguf-f32", "--dry-run", "--json")
    assert dry.json()["bytes"]["gguf"] == done.json()["exports"][0]["bytes"]
    assert dry.json()["real_bits"]["gguf-f32"] > 32
    assert snapshot(folder.parent) == before
    lossy = run("pack", folder, "--export", "gguf,gguf-f16")
    assert lossy.code == 1
    assert "--allow-lossy" in lossy.err


def test_what_cannot_be_exported_is_refused_before_anything_is_made(
    run: Run, make_model: ModelMaker, text_file: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "lfm3", "lfm3")
    (tmp_path / "r.yaml").write_text("pack: {export: [gguf]}\n")
    refused = run("calibrate", tmp_path / "lfm3", "--recipe", tmp_path / "r.yaml", "--work", tmp_path / "job")
    assert refused.code == 1
    assert "its family 'lfm3'" in refused.err
    assert not (tmp_path / "job").exists()


def test_a_chat_template_is_kept(run: Run, llama: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    folder = with_template(llama, tmp_path / "chat", template)
    done = run("pack", folder, "--bits", 4, "--plan", "interleave", "--work", tmp_path / "job", "--export", "gguf")
    assert done.code == 0, done.err
    found = values(read(tmp_path / "job" / "exports" / "gguf" / "model.gguf"))
    assert found["tokenizer.chat_template"] == template
    assert math.isclose(found["llama.rope.freq_base"], 10000.0)

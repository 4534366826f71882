"""Other people's quantized models as packed ones: the same numbers, or a refusal that names the tensor."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgerazor import exporters, formats, importers, models, transformers_plugin
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.importers import mlx as mlx_import
from edgerazor.importers.core import base
from edgerazor.importers.core import gguf_source as gguf_import
from edgerazor.importers.core.base import IntegerMatrix, UnrepresentableError
from edgerazor.packed import PackedModel
from edgerazor.untrusted.gguf_file import GgufFile
from helpers.packed_folders import all_of, decoded_model, suitable_model, write_packed
from helpers.tiny_job import Run
from helpers.tiny_models import VOCABULARY, ModelMaker, mostly_slow

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

ALL = formats.names()
#: Rows of 256 and 512 columns are whole blocks of every GGML type.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
IDS = torch.randint(2, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
CONSOLE = Console(quiet=True)
#: How the tokenizer of Llama 3 cuts text into words.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(path: Path, target: Path, **changes: Any) -> PackedModel:
    result = importers.import_model(path, target, CONSOLE, **{"activation_bits": 16, "kv_bits": 16, **changes})
    assert result.folder == str(target)
    return PackedModel.open(target)


def weight(opened: PackedModel, name: str) -> Tensor:
    matrix = opened.matrix(name)
    return formats.decode_matrix(matrix.encoded, matrix.spec)


def digests(opened: PackedModel) -> dict[str, str]:
    return {name: entry.digest for name, entry in opened.header.matrices.items()}


# Integers in our formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("group", [8, 32])
def test_our_own_codes_come_back(name: str, group: int) -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    w[1, :group] = 0
    number_format = formats.get(name)
    codes, scales = number_format.encode(w, group)
    level = number_format.level_(codes.float())
    twice = bool((level % 1 != 0).any())
    found, spec = base.encode_exactly(IntegerMatrix((level * (1 + twice)).short(), scales.float() / (1 + twice), group))
    assert torch.equal(formats.decode_matrix(found, spec), number_format.decode(codes, scales, group))
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scales, scales)
    assert spec.group_size == group
    assert spec.formats == (name,)


def test_formats_by_hand() -> None:
    ones = torch.ones(1, 1)
    cases = {(-1, 0, 1): "ternary", (-1, 1): "ternary", (-3, -1, 1, 3): "int2", (-2, -1): "int2z"}
    cases |= {(-3, 0): "int3", (-4, 3): "int3", (-8, 7): "int4", (8, 0): "int5", (-128, 127): "int8", (0, 0): "ternary"}
    for values, name in cases.items():
        found, spec = base.encode_exactly(
            IntegerMatrix(torch.tensor([values], dtype=torch.int16), ones / 8, len(values))
        )
        assert spec.formats == (name,), values
        assert formats.decode_matrix(found, spec).tolist() == [[value / 8 for value in values]]


def test_negative_scales_change_the_signs() -> None:
    values = torch.tensor([[-1, 0, 1, 1], [-8, 7, 3, 0]], dtype=torch.int16)
    scales = torch.tensor([[-0.5, 0.25], [-1.0, 2.0]])
    found, spec = base.encode_exactly(IntegerMatrix(values, scales, 2))
    assert spec.formats == ("int5",)  # 8 is beyond int4
    assert formats.decode_matrix(found, spec).tolist() == [[0.5, 0, 0.25, 0.25], [8, -7, 6, 0]]


def test_groups_become_as_large_as_they_can() -> None:
    values = torch.ones(2, 12, dtype=torch.int16)
    for scales, size in (
        ([[1, 1, 1], [1, 1, 1]], 12),  # a row
        ([[1, 1, 2], [3, 3, 4]], 8),
        ([[1, 1, 2], [3, 4, 4]], 4),
    ):
        found, spec = base.encode_exactly(IntegerMatrix(values, torch.tensor(scales).float(), 4))
        assert spec.group_size == size
        assert formats.decode_matrix(found, spec).tolist() == [[row[i // 4] for i in range(12)] for row in scales]


def test_what_fits_nowhere_is_refused() -> None:
    def attempt(values: list[int], scale: float, lossy: bool = False) -> Tensor:
        matrix = IntegerMatrix(torch.tensor([values], dtype=torch.int16), torch.tensor([[scale]]), len(values))
        return formats.decode_matrix(*base.encode_exactly(matrix, lossy))

    with pytest.raises(UnrepresentableError, match="from -129 to 0, which no number format"):
        attempt([-129, 0], 1.0)
    with pytest.raises(UnrepresentableError, match="no float16 number"):
        attempt([1, 0], 1 / 3)
    assert attempt([1, 0], 1 / 3, lossy=True).tolist() == [[float(torch.tensor(1 / 3).half()), 0]]
    with pytest.raises(UnrepresentableError, match="too large for float16"):
        attempt([1, 0], 1e5, lossy=True)
    with pytest.raises(UnrepresentableError, match="not finite"):
        attempt([1, 0], float("nan"))


# GGUF -------------------------------------------------------------------------------------------------------------


#: Types that `gguf` does not decode: they are tested by their definitions.
UNDECODED = {"Q1_0", "Q2_0", "PQ2_0", "PTQ1_0"}


@pytest.mark.parametrize("name", sorted(gguf_import.DECODERS.keys() - UNDECODED))
def test_blocks_are_those_of_ggml(name: str) -> None:
    """Against `gguf`'s decoder, on random bytes with ordinary scales."""
    types = {each.name: each for each in gguf.GGMLQuantizationType}
    size, width = gguf.GGML_QUANT_SIZES[types[name]]
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 243 if name == "TQ1_0" else 256, (50, width), dtype=np.uint8)
    place = {"TQ1_0": [52], "TQ2_0": [64], "Q2_K": [80, 82], "Q3_K": [108]}.get(name, [0])
    scales = draw.normal(size=50).astype("<f2").view(np.uint8).reshape(50, 2)
    for start in place:
        blocks[:, start : start + 2] = scales
    if name == "TQ2_0":
        blocks[:, :64] = (blocks[:, :64] & 0x55) | 0x80 >> 1  # no field is 3
    values, units = gguf_import.DECODERS[name](blocks)
    assert values.shape == (50, size)
    expected = gguf.quants.dequantize(blocks, types[name])
    assert np.array_equal(values.astype(np.float64) * units[:, None], expected.astype(np.float64))


def test_blocks_that_gguf_does_not_decode() -> None:
    """Q1_0 and both kinds of Q2_0, number by number from their definitions."""
    assert gguf_import.DECODERS.keys() >= UNDECODED
    draw = np.random.default_rng(0)
    for name, size, bits, step, offset in (("Q1_0", 128, 1, 2, -1), ("Q2_0", 64, 2, 1, -1), ("PQ2_0", 128, 2, 1, -1)):
        blocks = draw.integers(0, 256, (3, 2 + size * bits // 8), dtype=np.uint8)
        blocks[:, :2] = np.frombuffer(struct.pack("<e", 0.75), dtype=np.uint8)
        values, units = gguf_import.DECODERS[name](blocks)
        assert units.tolist() == [0.75] * 3
        for block, found in zip(blocks, values, strict=True):
            stream = int.from_bytes(block[2:].tobytes(), "little")
            assert found.tolist() == [(stream >> bits * i & (2**bits - 1)) * step + offset for i in range(size)]


def test_blocks_of_llama_cpps_own_quantizer_are_refused() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (2, 84), dtype=np.uint8)
    blocks[:, 80:] = np.frombuffer(struct.pack("<2e", 0.75, 0.5), dtype=np.uint8)
    with pytest.raises(UnrepresentableError, match="minima that are no multiples"):
        gguf_import.DECODERS["Q2_K"](blocks)


def export(opened: PackedModel, target: Path, name: str = "gguf") -> Path:
    [result] = exporters.write_all(opened.folder, [name], target, False, CONSOLE)
    return Path(result.file)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "smollm3"])
def test_ternary_to_gguf_and_back(make_model: ModelMaker, tmp_path: Path, family: str, tied: bool) -> None:
    special: dict[str, Any] = {"smollm3": {"no_rope_layers": [1, 1]}, "mistral": {"sliding_window": None}}.get(
        family, {}
    )
    model = suitable_model(make_model, tmp_path / "model", family, tie_word_embeddings=tied, **{**WIDE, **special})
    opened = write_packed(tmp_path / "packed", model, all_of("ternary", 256))
    folder = tmp_path / "gguf"
    folder.mkdir()
    models.copy_companions(model, folder)  # the tokenizer; the configuration is rebuilt from metadata
    file = folder / "model.gguf"
    shutil.copyfile(export(opened, tmp_path / "out"), file)
    back = read(file, tmp_path / "back")
    assert {type_.name for type_ in {each.tensor_type for each in gguf.GGUFReader(file).tensors}} == {"TQ1_0", "F32"}
    assert digests(back) == digests(opened)
    for name in opened.header.matrices:
        ours, theirs = opened.matrix(name), back.matrix(name)
        assert torch.equal(ours.encoded.codes, theirs.encoded.codes)
        assert torch.equal(ours.encoded.scales, theirs.encoded.scales)
        assert (ours.kind, ours.spec.group_size) == (theirs.kind, theirs.spec.group_size)
    assert back.header.tied == opened.header.tied
    for name, tensor in back.others().items():
        assert torch.equal(tensor, opened.others()[name])
    expected = decoded_model(model, opened)(input_ids=IDS).logits
    loaded, tokenizer = transformers_plugin.load(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()


@pytest.mark.parametrize("export_name", ["gguf", "gguf-tq2", "gguf-q2"])
@pytest.mark.parametrize("number_format", ALL)
def test_every_format_to_gguf_and_back(
    make_model: ModelMaker, tmp_path: Path, number_format: str, export_name: str
) -> None:
    model = suitable_model(make_model, tmp_path / "model", "qwen2", tie_word_embeddings=True, **WIDE)
    opened = write_packed(tmp_path / "packed", model, all_of(number_format, 256))
    file = export(opened, tmp_path / "out", export_name)
    shutil.copyfile(model / "config.json", file.with_name("config.json"))
    models.copy_companions(model, file.parent)
    back = read(file, tmp_path / "back")
    assert digests(back) == digests(opened)
    for name in opened.header.matrices:
        assert torch.equal(weight(back, name), weight(opened, name))


def test_floating_gguf_matrices_stay_floating(make_model: ModelMaker, tmp_path: Path) -> None:
    """A tied head then has a copy of the embedding; a model without quantized layers is refused."""
    model = suitable_model(make_model, tmp_path / "model", "llama", tie_word_embeddings=True, **WIDE)
    opened = write_packed(tmp_path / "packed", model, all_of("ternary", 256))
    file = export(opened, tmp_path / "out")
    models.copy_companions(model, file.parent)
    mixed = file.with_name("mixed.gguf")
    rewrite(file, mixed, {"token_embd.weight": weight(opened, "model.embed_tokens")})
    back = read(mixed, tmp_path / "back")
    assert "model.embed_tokens" not in back.header.matrices
    others = back.others()
    assert torch.equal(others["model.embed_tokens.weight"], weight(opened, "model.embed_tokens"))
    assert torch.equal(others["lm_head.weight"], others["model.embed_tokens.weight"])
    with torch.no_grad():
        expected = decoded_model(model, opened)(input_ids=IDS).logits
        loaded, _ = transformers_plugin.load(tmp_path / "back")
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def rewrite(file: Path, target: Path, changes: dict[str, Tensor]) -> None:
    """The same GGUF file with some tensors as float32, through gguf's own reader and writer."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name in changes:
            writer.add_tensor(tensor.name, changes[tensor.name].numpy())
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def ternary(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a tiny ternary Llama, its tokenizer beside it."""
    place = tmp_path_factory.mktemp("ternary")
    model = suitable_model(make_model, place / "model", "llama", **WIDE)
    opened = write_packed(place / "packed", model, all_of("ternary", 256))
    file = export(opened, place / "out")
    models.copy_companions(model, file.parent)
    return file


def test_a_tokenizer_is_rebuilt_from_metadata(make_model: ModelMaker, tmp_path: Path) -> None:
    """Byte-level BPE whose pattern comes back; with another pattern, or as SentencePiece, it is refused."""
    model = suitable_model(make_model, tmp_path / "model", "llama", **WIDE)
    raw = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    raw["model"]["ignore_merges"] = True
    (model / "tokenizer.json").write_text(json.dumps(raw))
    opened = write_packed(tmp_path / "packed", model, all_of("ternary", 256))
    file = export(opened, tmp_path / "out")
    read(file, tmp_path / "back")
    ours, back = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "back"))
    for text in ("Nora took the ball to the mill.  12345 of them\n\n", " été </s> <s>", ""):
        assert back(text).input_ids == ours(text).input_ids
    assert (back.bos_token_id, back.eos_token_id) == (0, 1)
    content = file.read_bytes()
    changed = tmp_path / "changed.gguf"
    for old, new, reason in (
        (b"\x09\0\0\0\0\0\0\0llama-bpe", b"\x09\0\0\0\0\0\0\0other-bpe", "its pre would be another one"),
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "only byte-level BPE"),
    ):
        assert old in content
        changed.write_bytes(content.replace(old, new))
        with pytest.raises(UserError, match=f"cannot be rebuilt|cannot make a tokenizer|{reason}") as refused:
            read(changed, tmp_path / "no")
        assert "tokenizer.json" in refused.value.hint
        assert not (tmp_path / "no").exists()


def test_type_42_is_told_by_its_size(ternary: Path, tmp_path: Path) -> None:
    """Blocks of 64 weights in llama.cpp, of 128 in the fork that had the number first."""
    values = np.random.default_rng(0).integers(0, 3, (4, 1024), dtype=np.uint8)
    packed = values.reshape(4, -1, 4) << np.array([0, 2, 4, 6], dtype=np.uint8)
    codes = np.bitwise_or.reduce(packed, axis=2)
    for size in (64, 128):
        file = tmp_path / f"{size}.gguf"
        blocks = codes.reshape(-1, size // 4)
        scale = np.frombuffer(struct.pack("<e", 0.5), dtype=np.uint8)
        data = np.concatenate([np.broadcast_to(scale, (len(blocks), 2)), blocks], axis=1).tobytes()
        write_gguf(file, {"a": ((4, 1024), 42, data), "b": ((4, 1024), 42, data)})
        opened = GgufFile(file)
        assert opened.type_name("a") == opened.type_name("b") == {64: "Q2_0", 128: "PQ2_0"}[size]
        for name in "ab":
            found, scales = gguf_import.DECODERS["Q2_0"](opened.blocks(name))
            assert np.array_equal(found.reshape(4, 1024), values.astype(np.int16) - 1)
            assert set(scales.tolist()) == {0.5}


def write_gguf(file: Path, tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> None:
    """A file of version 3 without metadata, byte by byte."""
    text = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
    offset = 0
    for name, (shape, kind, data) in tensors.items():
        text += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        text += b"".join(struct.pack("<Q", size) for size in reversed(shape)) + struct.pack("<IQ", kind, offset)
        offset += -(-len(data) // 32) * 32
    content = text + b"\0" * (-len(text) % 32)
    for _, _, data in tensors.values():
        content += data + b"\0" * (-len(data) % 32)
    file.write_bytes(content)


def test_damaged_gguf_files_are_refused(ternary: Path, tmp_path: Path) -> None:
    """Cut off anywhere and with flipped bits: one sentence, or the same weights."""
    content = ternary.read_bytes()
    file = tmp_path / "model.gguf"
    models.copy_companions(ternary.parent, tmp_path)
    draw = np.random.default_rng(0)
    for length in [4, 8, 23, 24, *draw.integers(24, len(content) - 64, 8).tolist()]:
        file.write_bytes(content[:length])
        with pytest.raises(UserError) as refused:
            read(file, tmp_path / "back")
        assert "\n" not in refused.value.message
    assert not (tmp_path / "back").exists()
    opened = GgufFile(ternary)
    begin = opened._start
    for bit in draw.integers(32, 8 * begin, 100).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with contextlib.suppress(UserError):  # and no other exception
            found = GgufFile(file)
            for name in found.tensors:
                found.blocks(name)


def test_gguf_that_is_not_understood_is_refused(ternary: Path, tmp_path: Path) -> None:
    models.copy_companions(ternary.parent, tmp_path)
    content = ternary.read_bytes()
    for old, new, reason in (
        (b"llama.", b"lxama.", "does not say llama."),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", "attn_x"),
        (b"GGUF", b"GGML", "no format that can be read"),
    ):
        file = tmp_path / "model.gguf"
        file.write_bytes(content.replace(old, new))
        with pytest.raises(UserError, match=reason):
            read(file, tmp_path / "back")


def test_an_architecture_that_is_not_known_has_a_remedy(ternary: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    old, new = (struct.pack("<Q", 5) + name for name in (b"llama", b"mamba"))
    file.write_bytes(ternary.read_bytes().replace(old, new))
    with pytest.raises(UserError, match=r"architecture mamba, and only .*llama") as refused:
        read(file, tmp_path / "back")
    assert "pack MODEL --bits 4" in refused.value.hint


def metadata_only(path: Path, *pairs: bytes) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    return path


def test_rotated_weights_are_refused_by_their_key(tmp_path: Path) -> None:
    key = b"prism.hadamard.block_size"
    file = metadata_only(tmp_path / "a.gguf", struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 1024))
    with pytest.raises(UserError, match=r"rotated basis .*prism\.hadamard"):
        GgufFile(file)


@pytest.mark.parametrize("kind", [8, 9])
def test_entries_of_gguf_are_bounded(tmp_path: Path, kind: int) -> None:
    """Ten million empty strings, or lists; what is read is not."""
    count = 10_000_000
    empty = b"\0" * (8 if kind == 8 else 12)
    file = metadata_only(tmp_path / "a.gguf", struct.pack("<Q1sIIQ", 1, b"k", 9, kind, count), empty * count)
    with pytest.raises(UserError, match="more than 2,097,152 keys, tensors and strings"):
        GgufFile(file)


def test_ptq1_0_weight_by_weight() -> None:
    """Of each stage of c bytes, byte m holds the weights m, m + c, m + 2c ..., its highest digit first."""
    draw = np.random.default_rng(0)
    weights = draw.integers(-1, 2, 128)
    stages = [(16, 0, 5, 0), (8, 80, 5, 16), (2, 120, 4, 24)]  # bytes, first weight, digits, first byte
    block = np.zeros((1, 28), dtype=np.uint8)
    for count, first, digits, place in stages:
        for byte in range(count):
            number = sum((weights[first + byte + n * count] + 1) * 3 ** (4 - n) for n in range(digits))
            block[0, place + byte] = -(-int(number) * 256 // 243)
    block[0, 26:] = np.frombuffer(struct.pack("<e", 0.75), dtype=np.uint8)
    values, units = gguf_import.DECODERS["PTQ1_0"](block)
    assert values[0].tolist() == weights.tolist()
    assert units.tolist() == [0.75]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantized \(MLX\), but no matrix .* scales and biases"),
        ({"quantization_config": {"quant_method": "bitnet"}}, r"quantized \(BitNet\), but no matrix .* weight_scale"),
    ],
)
def test_a_claim_over_plain_weights_is_refused(llama: Path, tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    shutil.copytree(llama, tmp_path / "model")
    values = json.loads((llama / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(values | entry))
    with pytest.raises(UserError, match=said):
        read(tmp_path / "model", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# MLX --------------------------------------------------------------------------------------------------------------


def mlx_words(fields: Tensor, bits: int) -> Tensor:
    """Rows of fields as one stream of bits each, with Python's integers: uint32 [rows, words]."""
    rows = []
    for row in fields.tolist():
        stream = sum(field << (bits * i) for i, field in enumerate(row))
        rows.append([stream >> (32 * i) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.uint32)


def write_mlx(folder: Path, model: Path, bits: int, group: int, zero: float) -> dict[str, Tensor]:
    """A folder as mlx-lm writes it, with random fields; gives the weights."""
    folder.mkdir()
    models.copy_companions(model, folder)
    values = json.loads((model / "config.json").read_text())
    values["quantization"] = values["quantization_config"] = {"group_size": group, "bits": bits}
    (folder / "config.json").write_text(json.dumps(values))
    draw = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if tensor.dim() < 2:
            stored[name] = tensor
            continue
        top = 3 if bits == 2 and zero == 1 else 2**bits
        fields = torch.randint(0, top, tensor.shape, generator=draw)
        scales = (torch.rand(tensor.shape[0], tensor.shape[1] // group, generator=draw) + 0.1).half()
        module = name.removesuffix(".weight")
        biases = -zero * scales.float()
        stored |= {name: mlx_words(fields, bits), f"{module}.scales": scales, f"{module}.biases": biases}
        every = scales.float().repeat_interleave(group, dim=1)
        expected[module] = every * fields + biases.repeat_interleave(group, dim=1)
    save_file(stored, folder / "model.safetensors", metadata={"format": "mlx"})
    return expected


@pytest.mark.parametrize(
    ("bits", "zero", "number_format"), [(2, 1, "ternary"), (2, 1.5, "int2"), (4, 8, "int4"), (8, 128, "int8")]
)
def test_mlx_folders(make_model: ModelMaker, tmp_path: Path, bits: int, zero: float, number_format: str) -> None:
    model = suitable_model(make_model, tmp_path / "model", "qwen3", tie_word_embeddings=True, **WIDE)
    expected = write_mlx(tmp_path / "mlx", model, bits, 128, zero)
    back = read(tmp_path / "mlx", tmp_path / "back")
    assert back.header.matrices.keys() == expected.keys()
    assert back.header.tied == {"lm_head": "model.embed_tokens"}
    for name, entry in back.header.matrices.items():
        assert (entry.formats, entry.group_size) == ((number_format,), 128)
        assert torch.equal(weight(back, name), expected[name])
    assert transformers_plugin.load(tmp_path / "back")[0].get_submodule("lm_head").lazy is not None


def test_mlx_folders_with_biases_of_their_own_are_refused(make_model: ModelMaker, tmp_path: Path) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama", **WIDE)
    write_mlx(tmp_path / "mlx", model, 4, 64, 7.3)
    with pytest.raises(UserError, match=r"without loss: model\.\S+weight: its biases are no multiples of its scales"):
        read(tmp_path / "mlx", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_affine_by_hand() -> None:
    fields = torch.tensor([[0, 1, 2, 3]], dtype=torch.int16)
    found = mlx_import.affine(fields, torch.tensor([[0.5, 0.0]]), torch.tensor([[-0.5, 0.0]]), 2)
    assert found.values.tolist() == [[-1, 0, 2, 3]]
    half = mlx_import.affine(fields, torch.tensor([[0.5]]), torch.tensor([[-0.75]]), 4)
    assert (half.values.tolist(), half.scales.tolist()) == ([[-3, -1, 1, 3]], [[0.25]])


# BitNet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear_class", mostly_slow(["autobitlinear", "bitlinear"], "bitlinear"))
def test_bitnet_folders(make_model: ModelMaker, tmp_path: Path, linear_class: str) -> None:
    from transformers.integrations.bitnet import pack_weights

    model = suitable_model(make_model, tmp_path / "model", "llama", **WIDE)
    folder = tmp_path / "bitnet"
    folder.mkdir()
    models.copy_companions(model, folder)
    values = json.loads((model / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitnet", "linear_class": linear_class}
    (folder / "config.json").write_text(json.dumps(values))
    stored, expected = {}, {}
    draw = torch.Generator().manual_seed(0)
    for number, (name, tensor) in enumerate(load_file(model / "model.safetensors").items()):
        if "_proj" not in name:
            stored[name] = tensor
            continue
        codes = torch.randint(-1, 2, tensor.shape, generator=draw).to(torch.int8)
        scale = torch.tensor([2.0 ** -(number % 5)], dtype=torch.bfloat16)
        module = name.removesuffix(".weight")
        expected[module] = codes * (scale.float() if linear_class == "autobitlinear" else 1 / scale.float())
        stored |= {name: pack_weights(codes.clone()), f"{module}.weight_scale": scale}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    back = read(folder, tmp_path / "back", activation_bits=8)
    assert back.header.matrices.keys() == expected.keys()
    assert back.header.settings["group_size"] == 512
    for name, entry in back.header.matrices.items():
        assert entry.formats == ("ternary",)
        assert entry.group_size == entry.shape[1]
        assert torch.equal(weight(back, name), expected[name])
    if linear_class == "autobitlinear":  # transformers compiles the other one's functions
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours, _ = transformers_plugin.load(tmp_path / "back")
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling takes longer than all else here
            torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0.02, atol=0.02)


def test_scales_that_are_no_float16_numbers(make_model: ModelMaker, tmp_path: Path) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama", **WIDE)
    write_mlx(tmp_path / "mlx", model, 2, 128, 1)
    stored = load_file(tmp_path / "mlx" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for part, sign in (("scales", 1), ("biases", -1)):
        stored[f"{name}.{part}"] = torch.full((512, 2), sign / 3)
    save_file(stored, tmp_path / "mlx" / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name}\.weight: a scale is no float16 number") as refused:
        read(tmp_path / "mlx", tmp_path / "back")
    assert "--allow-lossy" in refused.value.hint
    back = read(tmp_path / "mlx", tmp_path / "back", lossy=True)
    assert back.matrix(name).encoded.scales.unique().tolist() == [float(torch.tensor(1 / 3).half())]
    again = importers.import_model(
        tmp_path / "mlx", tmp_path / "again", CONSOLE, activation_bits=8, kv_bits=8, lossy=True
    )
    assert again.lossy == [name]


# Dequantized ternary models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ternary_weights_in_16_bits(make_model: ModelMaker, tmp_path: Path, dtype: torch.dtype) -> None:
    """Groups of 128, which nobody says; the embedding is no ternary one."""
    model = suitable_model(make_model, tmp_path / "model", "qwen3", **{**WIDE, "hidden_size": 320})
    stored = load_file(model / "model.safetensors")
    expected = {}
    for name, tensor in stored.items():
        if "_proj" in name:
            codes, scales = formats.get("ternary").encode(tensor, 128)
            scales = scales.bfloat16().half() if dtype == torch.bfloat16 else scales
            expected[name.removesuffix(".weight")] = codes, scales
            tensor = formats.get("ternary").decode(codes, scales, 128)
        stored[name] = tensor.to(dtype)
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    back = read(model, tmp_path / "back")
    assert back.header.matrices.keys() == expected.keys()
    for name, (codes, scales) in expected.items():
        matrix = back.matrix(name)
        assert (matrix.spec.formats, matrix.spec.group_size) == (("ternary",), 128)
        assert torch.equal(matrix.encoded.codes, codes)
        assert torch.equal(matrix.encoded.scales, scales)
    assert back.others()["lm_head.weight"].dtype == dtype


def test_ternary_weights_in_16_bits_are_rounded_on_demand(run: Run, make_model: ModelMaker, tmp_path: Path) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama", **WIDE)
    stored = load_file(model / "model.safetensors")
    ternary = {
        key: formats.get("ternary").quantize_dequantize(each, 128) for key, each in stored.items() if "_proj" in key
    }
    save_file({**stored, **ternary}, model / "model.safetensors", metadata={"format": "pt"})
    kept = run("pack", model, "--work", tmp_path / "kept", "--json").json()
    assert kept["importer"] == "levels"
    assert kept["formats"]["ternary"] == sum(each.numel() for each in ternary.values())
    rounded = run("pack", model, "--work", tmp_path / "rounded", "--bits", 4, "--json").json()
    assert rounded["nominal_bits"] == 4


def test_one_matrix_with_more_levels_is_named(make_model: ModelMaker, tmp_path: Path) -> None:
    model = suitable_model(make_model, tmp_path / "model", "llama", **WIDE)
    assert importers.find_importer(model) is None
    stored = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    ternary = {
        key: formats.get("ternary").quantize_dequantize(each, 128) for key, each in stored.items() if "_proj" in key
    }
    save_file({**stored, **ternary, name: stored[name]}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name}: its weights are not 0 and plus or minus one number"):
        read(model, tmp_path / "back")


# The command ------------------------------------------------------------------------------------------------------


def test_pack_reads_a_gguf_file_and_exports_it(run: Run, ternary: Path, tmp_path: Path) -> None:
    """There and back, and out again: the last file has the bytes of the first one's tensors."""
    work = tmp_path / "work"
    done = run("pack", ternary, "--work", work, "--export", "gguf,compressed-tensors", "--json")
    assert done.code == 0, done.err
    result = done.json()
    assert (result["importer"], result["lossy"]) == ("gguf", [])
    assert result["formats"].keys() == {"ternary", "floating"}
    assert [each["export"] for each in result["exports"]] == ["gguf", "compressed-tensors"]
    first, last = (GgufFile(file) for file in (ternary, Path(result["exports"][0]["file"])))
    assert first.tensors == last.tensors
    assert all(np.array_equal(first.blocks(name), last.blocks(name)) for name in first.tensors)
    header = PackedModel.open(work / "packed").header
    assert (header.settings["activation_bits"], header.settings["kv_bits"]) == (16, 16)
    assert header.provenance["source"] == "import"
    said = run("pack", ternary, "--work", work, "--activation-bits", 8, "--quiet")  # over an import of before
    assert said.code == 0
    assert "every weight as it was" in said.out
    assert PackedModel.open(work / "packed").header.settings["activation_bits"] == 8
    assert "8-bit inputs of linear layers and a 16-bit cache; --kv-bits 8 is faster" in " ".join(said.out.split())
    assert run("show", work / "packed").code == 0
    out = run("pack", work / "packed", "--export", "hf-f32", "--json").json()["exports"][0]
    assert AutoModelForCausalLM.from_pretrained(out["file"]).dtype == torch.float32


def test_pack_takes_no_plan_with_foreign_codes(run: Run, ternary: Path, llama: Path, tmp_path: Path) -> None:
    said = run("pack", ternary, "--work", tmp_path / "work", "--student", "best")
    assert said.code == 2
    assert "takes no --student" in said.err
    assert run("pack", ternary, "--work", tmp_path / "work", "--dry-run").code == 2
    assert not (tmp_path / "work").exists()
    job = tmp_path / "job"
    assert run("pack", llama, "--work", job, "--bits", 4, "--quiet").code == 0
    said = run("pack", ternary, "--work", job, "--force")
    assert said.code == 2
    assert "holds another job" in said.err

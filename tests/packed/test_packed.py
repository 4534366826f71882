"""The packed folder: exact round trips, golden bytes, and no damage that goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgerazor import formats, packed
from edgerazor.errors import FAILED, UserError
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.packed import PackedMatrix, PackedModel

ALL = formats.names()
SETTINGS = {"activation_bits": 8, "kv_bits": 8}
PROVENANCE = {"teacher": "tiny", "seed": 1}
FLIPS = 100  # of each file; `make fuzz` does many more


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(name: str, kind: Any, spec: MatrixSpec, rows: int, cols: int) -> PackedMatrix:
    return PackedMatrix(name, kind, formats.encode_matrix(weights(rows, cols, seed=len(name)), spec), spec)


def some_matrices() -> list[PackedMatrix]:
    mixed = MatrixSpec(tuple(ALL), 16, (torch.arange(7) % len(ALL)).to(torch.uint8))
    chosen = (torch.arange(15).view(5, 3) * 5 % len(ALL)).to(torch.uint8)
    blocks = MatrixSpec(tuple(ALL), 16, block_formats=chosen)
    columns = MatrixSpec(("ternary", "int4"), 8, block_formats=torch.tensor([[1, 0, 0]], dtype=torch.uint8))
    return [
        matrix("model.embed_tokens", "embedding", MatrixSpec(("int4",), 16), 11, 20),
        matrix("layers.0.mixed", "linear", mixed, 7, 33),
        matrix("layers.0.blocks", "linear", blocks, 5, 33),
        matrix("layers.0.columns", "linear", columns, 4, 24),
        *(matrix(f"layers.0.{name}", "linear", MatrixSpec((name,), 1000), 5, 13) for name in ALL),
    ]


def some_others() -> dict[str, Tensor]:
    return {
        "norm.weight": weights(9).bfloat16(),
        "layers.0.bias": weights(3),
        "layers.0.scalar": torch.tensor(3.5, dtype=torch.float16),
        "layers.0.flags": torch.tensor([True, False]),
        "layers.0.positions": torch.arange(3),
    }


def write(folder: Path, **changes: Any) -> packed.Header:
    folder.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {
        "matrices": some_matrices(),
        "others": some_others(),
        "tied": {"lm_head": "model.embed_tokens"},
        "settings": SETTINGS,
        "provenance": PROVENANCE,
        **changes,
    }
    matrices = [each.source() for each in arguments.pop("matrices")]
    return packed.write(folder, matrices, arguments.pop("others"), **arguments)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and formats.tensor_bytes(a) == formats.tensor_bytes(b)


def holds_what_was_written(model: PackedModel) -> bool:
    """Everything that decides what the model computes is as `write` was given it."""
    header, matrices = model.header, {each.name: model.matrix(each.name) for each in some_matrices()}
    others = model.others()
    return (
        header.tied == {"lm_head": "model.embed_tokens"}
        and header.settings == SETTINGS
        and header.provenance == PROVENANCE
        and list(header.matrices) == sorted(matrices)
        and others.keys() == some_others().keys()
        and all(same(others[name], tensor) for name, tensor in some_others().items())
        and all(
            same(matrices[each.name].encoded.codes, each.encoded.codes)
            and same(matrices[each.name].encoded.scales, each.encoded.scales)
            and matrices[each.name].kind == each.kind
            and matrices[each.name].spec.formats == each.spec.formats
            and matrices[each.name].spec.group_size == each.spec.group_size
            for each in some_matrices()
        )
    )


# Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 200, 1])
def test_what_is_written_is_read(tmp_path: Path, shard_bytes: int) -> None:
    header = write(tmp_path, shard_bytes=shard_bytes)
    model = PackedModel.open(tmp_path)
    model.verify()
    assert model.header == header
    assert holds_what_was_written(model)
    assert (len(model.files()) == 1) == (shard_bytes == 10**9)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors") == sorted(
        path.name for path in model.files()
    )


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_equal_runs_write_equal_bytes(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path / "a", shard_bytes=shard_bytes)
    write(
        tmp_path / "b",
        shard_bytes=shard_bytes,
        matrices=reversed(some_matrices()),
        others=dict(reversed(some_others().items())),
    )
    a, b = ({file.name: file.read_bytes() for file in (tmp_path / each).iterdir()} for each in "ab")
    assert a == b


def test_golden_file(tmp_path: Path) -> None:
    w = torch.tensor([[2.0, -2, 0, 0, 9, -3], [7, -3.5, 1, 0, 14, -14], [127, 1, -1, 0, 254, 2]])
    spec = MatrixSpec(("int8", "int4", "ternary"), 4, torch.tensor([2, 1, 0], dtype=torch.uint8), published=True)
    write(
        tmp_path,
        matrices=[PackedMatrix("m", "linear", formats.encode_matrix(w, spec), spec)],
        others={"norm": torch.tensor([1.0, -2.0])},
        tied={},
    )
    content = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert (8 + length) % 64 == 0
    data = content[8 + length :]
    codes = {"ff148988": 0x88, "ff817f80": 0x80, "ff818080": 0x80, "5a545555": 0x55}  # int4, int8 twice, ternary
    for start, (first, padding) in zip((192, 320, 384, 512), codes.items(), strict=True):  # scales between them
        assert data[start : start + 64] == bytes.fromhex(first) + bytes([padding]) * 60
    scales = [data[start : start + 2].hex() for start in (256, 288, 448, 480, 576, 608)]
    assert scales == ["003c", "0040", "003c", "0040", "0040", "004a"]  # 1 2 of int4, 1 2 of int8, 2 12 of ternary
    assert data[640:].hex() == "0000803f000000c0" + "06"  # norm, float32; row_formats: 2 + 1*4 + 0*16
    tensors = (data[192:320], data[320:512], data[640 + 8 :], data[512:640], data[640 : 640 + 8])
    digest = bytes.fromhex(formats.digest(formats.encode_matrix(w, spec), spec))
    sums = digest + b"".join(hashlib.sha256(each).digest() for each in tensors)
    assert data[:192] == sums
    entries = json.loads(content[8 : 8 + length])
    about = entries.pop("__metadata__")
    assert list(entries) == [
        "edgerazor.sha256",
        *(f"m.weight.{part}" for part in ("int4", "int8", "ternary")),
        "norm",
        "m.weight.row_formats",
    ]
    assert about["edgerazor_sha256"] == hashlib.sha256(about["edgerazor"].encode()).hexdigest()
    assert json.loads(about["edgerazor"]) == {
        "version": 1,
        "matrices": [
            {
                "kind": "linear",
                "formats": ["int8", "int4", "ternary"],
                "group_size": 4,
                "shape": [3, 6],
                "parts": ["int4", "int8", "row_formats", "ternary"],
                "names": ["m"],
            }
        ],
        "others": [{"dtype": "F32", "shape": [2], "names": ["norm"]}],
        "tied": {},
        "settings": SETTINGS,
        "provenance": PROVENANCE,
        "extras": {},
        "sha256": hashlib.sha256(sums).hexdigest(),
    }


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in some_others().items())
    for each in some_matrices():
        for part, pieces in formats.serialize_parts(formats.pack_matrix(each.encoded, each.spec)).items():
            stored = loaded[packed.part_name(each.name, part)]
            assert stored.dtype == torch.uint8
            assert stored.numpy().tobytes() == b"".join(pieces)


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_codes_and_scales_are_read_where_they_lie(tmp_path: Path, shard_bytes: int) -> None:
    """Each part of codes begins on a vector, and codes and scales are views of one tensor."""
    write(tmp_path, shard_bytes=shard_bytes)
    model = PackedModel.open(tmp_path)
    for path in model.files():
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        assert (8 + length) % 64 == 0
        entries = json.loads(content[8 : 8 + length])
        parts = [name for name in entries if ".weight." in name and not name.endswith("_formats")]
        assert all(entries[name]["data_offsets"][0] % 64 == 0 for name in parts)
    for each in some_matrices():
        parts, expected = model.parts(each.name), formats.pack_matrix(each.encoded, each.spec)
        assert parts.keys() == expected.keys()
        assert all(same(parts[part], tensor) for part, tensor in expected.items())
        for part in (name for name in parts if f"{name}.scales" in parts):
            assert parts[part].untyped_storage().data_ptr() == parts[f"{part}.scales"].untyped_storage().data_ptr()


def test_a_file_that_another_program_has_rewritten_is_read(tmp_path: Path) -> None:
    """Its tensors may lie in another order, and begin anywhere."""
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about, moved = entries.pop("__metadata__"), b""
    for name, entry in sorted(entries.items(), key=lambda each: each[1]["data_offsets"][1] % 2 == 0):
        begin, end = entry["data_offsets"]
        entries[name] = {**entry, "data_offsets": [len(moved), len(moved) + end - begin]}
        moved += data[begin:end]
    text = json.dumps({"__metadata__": about, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + moved)
    model = PackedModel.open(tmp_path)
    model.verify()
    assert holds_what_was_written(model)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    linear = some_matrices()[1]
    wrong: dict[str, dict[str, Any]] = {
        "two tensors are called": {"others": {"layers.0.mixed.weight.int4": weights(1)}},
        "no quantized linear": {"matrices": some_matrices()[:1]},
        "looks like a range": {"others": {"layers.3-4": weights(1)}},
        "is tied to": {"tied": {"lm_head": "nothing"}},
        "cannot be stored": {"others": {"x": torch.zeros(1, dtype=torch.complex64)}},
    }
    for reason, changes in wrong.items():
        with pytest.raises(ValueError, match=reason):
            write(tmp_path, **changes)
    with pytest.raises(ValueError, match="two tensors"):
        write(tmp_path, matrices=[linear, linear])
    write(tmp_path)
    with pytest.raises(ValueError, match="no matrix called"):
        PackedModel.open(tmp_path).matrix("layers.9")


# Digests and sizes ------------------------------------------------------------------------------------------------


def test_digests_of_training_are_compared(tmp_path: Path) -> None:
    write(tmp_path)
    digests = {each.name: formats.digest(each.encoded, each.spec) for each in some_matrices()}
    packed.verify_digests(tmp_path, digests)
    with pytest.raises(UserError, match=r"layers\.0\.mixed does not hold"):
        packed.verify_digests(tmp_path, {**digests, "layers.0.mixed": "0" * 64})
    with pytest.raises(UserError, match="extra is in training, but not"):
        packed.verify_digests(tmp_path, {**digests, "extra": "0" * 64})
    del digests["layers.0.mixed"]
    with pytest.raises(UserError, match=r"layers\.0\.mixed is in the packed model, but not"):
        packed.verify_digests(tmp_path, digests)


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_sizes_are_counted(tmp_path: Path, shard_bytes: int) -> None:
    rows = (torch.arange(16) % 8 == 0).to(torch.uint8)
    write(
        tmp_path,
        matrices=[
            matrix("embed", "embedding", MatrixSpec(("int4",), 32), 10, 64),
            matrix("a", "linear", MatrixSpec(("ternary", "int4"), 32, rows), 16, 64),
            matrix("b", "linear", MatrixSpec(("int8",), 32), 16, 64),
        ],
        others={"norm": weights(64), "bias": weights(16).bfloat16()},
        tied={"lm_head": "embed"},
        shard_bytes=shard_bytes,
    )
    table = packed.size_table(PackedModel.open(tmp_path))
    linear, embedding, other = table.classes
    assert [each.kind for each in table.classes] == ["linear", "embedding", "other"]
    assert (linear.weights, embedding.weights, other.weights, table.parameters) == (2048, 640, 80, 2768)
    # a: a block of 4 vectors, one of 8, scales 16 * 2 * 2 of each, row formats 2; b: 1024 bytes and 64 of scales
    assert linear.bytes == 4 * 64 + 8 * 64 + 2 * 64 + 2 + 1024 + 64
    assert linear.nominal_bits == table.nominal_bits == pytest.approx((1.58 * 7 / 8 + 4 / 8 + 8) / 2, abs=1e-12)
    assert (embedding.bytes, embedding.nominal_bits, embedding.real_bits) == (576, 4.0, 7.2)  # 6 rows fill
    assert (other.bytes, other.nominal_bits, other.real_bits) == (288, 28.8, 28.8)
    assert table.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert table.real_bits == 8 * table.bytes / 2768


def test_a_small_model_has_the_real_bits_that_were_promised() -> None:
    """The shapes of Qwen3-0.6B: at most 2.31 bits, of which the tensors alone take 2.309."""
    hidden, wide, heads, keys, vocabulary = 1024, 3072, 2048, 1024, 151936
    shapes = {"self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (keys, hidden)}
    shapes |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, heads)}
    shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    norms = {"self_attn.q_norm": 128, "self_attn.k_norm": 128, "input_layernorm": hidden}
    norms |= {"post_attention_layernorm": hidden}
    layers = [f"model.layers.{number}" for number in range(28)]
    ternary, int4 = MatrixSpec(("ternary",), 256), MatrixSpec(("int4",), 256)
    matrices: list[Any] = [("model.embed_tokens", "embedding", int4, (vocabulary, hidden))]
    matrices += [(f"{layer}.{name}", "linear", ternary, shape) for layer in layers for name, shape in shapes.items()]
    others: dict[str, packed.TensorSpec] = {"model.norm.weight": ("BF16", (hidden,))}
    others |= {f"{layer}.{name}.weight": ("BF16", (size,)) for layer in layers for name, size in norms.items()}
    about = {f"fact {number}": "f" * 64 for number in range(20)}
    tied = {"lm_head": "model.embed_tokens"}
    size = packed.predict(matrices, others, tied=tied, settings=SETTINGS, provenance=about)
    tensors = sum(spec.packed_bytes(shape) for _, _, spec, shape in matrices)
    tensors += sum(2 * math.prod(shape) for _, shape in others.values())
    assert size.weights == 596_049_920
    assert 8 * tensors / size.weights == pytest.approx(2.3090, abs=5e-5)
    assert size.bytes - tensors < 60_000
    assert size.real_bits < 2.3098


PREDICTED: dict[str, dict[str, Any]] = {
    "everything": {},
    "one matrix": {"matrices": some_matrices()[1:2], "others": {}, "tied": {}},
    "no tied head": {"tied": {}},
    "other provenance": {"provenance": {"teacher": "Größe", "sha256": "f" * 64, "none": None}},
    "other settings": {"settings": {**SETTINGS, "thresholds": [0.1, 1e-7]}},
}


@pytest.mark.parametrize("case", PREDICTED)
@pytest.mark.parametrize("shard_bytes", [10**9, 2000, 200, 1])
def test_the_size_is_predicted_to_the_byte(tmp_path: Path, case: str, shard_bytes: int) -> None:
    arguments: dict[str, Any] = {
        "matrices": some_matrices(),
        "others": some_others(),
        "tied": {"lm_head": "model.embed_tokens"},
        "settings": SETTINGS,
        "provenance": PROVENANCE,
        **PREDICTED[case],
    }
    write(tmp_path, **arguments, shard_bytes=shard_bytes)
    matrices = [(m.name, m.kind, m.spec, tuple(m.encoded.codes.shape)) for m in arguments.pop("matrices")]
    others = {name: packed.tensor_spec(name, tensor) for name, tensor in arguments.pop("others").items()}
    size = packed.predict(matrices, others, **arguments, shard_bytes=shard_bytes)  # type: ignore[arg-type]
    assert size.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    table = packed.size_table(PackedModel.open(tmp_path))
    assert (size.bytes, size.weights, size.real_bits) == (table.bytes, table.parameters, table.real_bits)


def test_what_cannot_be_written_is_not_predicted() -> None:
    arguments: dict[str, Any] = {"tied": {}, "settings": SETTINGS, "provenance": PROVENANCE}
    linear = ("m", "linear", MatrixSpec(("int4",), 16), (2, 16))
    with pytest.raises(ValueError, match="two tensors are called"):
        packed.predict([linear], {"m.weight.int4": ("F16", (2, 1))}, **arguments)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no quantized linear"):
        packed.predict([], {}, **arguments)
    with pytest.raises(ValueError, match="cannot be stored"):
        packed.tensor_spec("x", torch.zeros(1, dtype=torch.complex64))


# Damage -----------------------------------------------------------------------------------------------------------


def refused(folder: Path, reason: str | None = None) -> None:
    """Opening and verifying fails with one sentence and exit code 1."""
    with pytest.raises(UserError, match=reason) as failure:
        PackedModel.open(folder).verify()
    assert failure.value.code == FAILED
    assert "\n" not in failure.value.message
    assert str(folder) in failure.value.message


def opened_or_refused(folder: Path) -> PackedModel | None:
    """The verified model, or None where it is refused as it should be; any other exception is a failure."""
    try:
        model = PackedModel.open(folder)
        model.verify()
    except UserError:
        return None
    return model


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, 63, 64, len(content) // 2, len(content) - 1, *range(10, len(content), 397)}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        refused(tmp_path)
    for extra in (b"\0", b" " * 64):
        path.write_bytes(content + extra)
        refused(tmp_path)


@pytest.mark.slow
def test_no_flipped_bit_changes_the_model_unnoticed(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=400)
    assert len(PackedModel.open(tmp_path).files()) > 1
    chooser, unnoticed = random.Random(0), 0
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        content = path.read_bytes()
        for bit in chooser.sample(range(8 * len(content)), FLIPS):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            model = opened_or_refused(tmp_path)
            if model is not None:  # a flip in padding or in what is a comment to us
                unnoticed += 1
                assert holds_what_was_written(model), f"bit {bit} of {path.name}"
        path.write_bytes(content)
    assert unnoticed < FLIPS * len(paths) / 50


def test_flipped_data_bits_are_all_noticed(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for bit in random.Random(1).sample(range(8 * start, 8 * len(content)), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused(tmp_path, "checksum")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], change_header: Callable[[Any], Any]) -> None:
    """Change the entries of a safetensors file and our header in it, with a checksum of the header that fits."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    about = entries["__metadata__"]
    text = json.dumps(change_header(json.loads(about["edgerazor"])))
    about |= {"edgerazor": text, "edgerazor_sha256": hashlib.sha256(text.encode()).hexdigest()}
    change(entries)
    new = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def put(*path_and_value: Any) -> Callable[[Any], Any]:
    """A change of one place in nested dictionaries; of a list of groups, in the one of that name."""
    *path, last, value = path_and_value

    def change(tree: Any) -> Any:
        place = tree
        for step in path:
            place = next(each for each in place if step in each["names"]) if isinstance(place, list) else place[step]
        place[last] = value
        return tree

    return change


def swap_formats(header: Any) -> Any:
    """The same formats in another order: then the rows have other ones."""
    (mixed,) = (group for group in header["matrices"] if "layers.0.mixed" in group["names"])
    mixed["formats"].reverse()
    return header


def choice_apart(header: Any) -> Any:
    """The formats of blocks as a tensor of its own."""
    (blocks,) = (group for group in header["matrices"] if "layers.0.blocks" in group["names"])
    blocks["parts"].remove("block_formats")
    header["others"].append({"dtype": "U8", "shape": [5, 2], "names": ["layers.0.blocks.weight.block_formats"]})
    return header


M, B, C = (("matrices", f"layers.0.{name}") for name in ("mixed", "blocks", "columns"))
NORM = ("others", "norm.weight")
LIES: dict[str, Callable[[Any], Any]] = {
    "has version 5 of the packed format, but this program reads versions 1 to 4": put("version", 5),
    "has version 0 of the packed format": put("version", 0),
    "which is no whole number": put("version", "0"),
    "wrong at surprise": put("surprise", 1),
    "wrong at tied": put("tied", 3),
    r"wrong at the top": lambda header: [header],
    r"wrong at matrices.\d.shape": put(*M, "shape", [7, "33"]),
    r"wrong at matrices.\d.group_size": put(*M, "group_size", 0),
    r"wrong at matrices.\d.kind": put(*M, "kind", "other"),
    r"wrong at matrices.\d.parts": put(*M, "parts", []),
    "impossible shape": put(*M, "shape", [7, -33]),
    r"should be U8 \[256\], but is U8 \[320\]": put(*M, "group_size", 33),
    "should be U8": put(*M, "shape", [7, 24]),
    "must be|recorded digest": put(*M, "shape", [8, 33]),
    "have 1 blocks of rows together, but it has 17 rows": put("matrices", "model.embed_tokens", "shape", [17, 20]),
    "impossible shape .* group size": put(*M, "group_size", 1 << 62),
    "unknown format int99": put(*M, "formats", ["int99", *ALL[1:]]),
    "repeats one": put(*M, "formats", [ALL[0], *ALL]),
    "list of parts repeats one": put(*M, "parts", [ALL[0], ALL[0]]),
    "parts are not those": put("matrices", "layers.0.int8", "formats", ["int4"]),
    "part .* must be|out of range|outside the range|bytes each|recorded digest": swap_formats,
    "does not say which row": choice_apart,
    r"blocks.weight.block_formats: it should be U8 \[5, 3\]": put(*B, "group_size", 7),
    r"blocks.weight.block_formats: it should be U8 \[6, 2\]": put(*B, "shape", [6, 33]),
    r"columns.weight.block_formats: it should be U8 \[1, 2\]": put(*C, "formats", ["ternary", "int4", *ALL[:3]]),
    "have 0 blocks of tails together, but it has 4": put(*C, "shape", [4, 23]),
    "unknown dtype": put(*NORM, "dtype", "F8"),
    r"norm.weight: it should be F16": put(*NORM, "dtype", "F16"),
    "tensor extra is missing": put(*NORM, "names", ["extra"]),
    "layers.0.mixed.weight.int4.tail is missing": put(*M, "parts", ["int4.tail"]),
    r"edgerazor.sha256: it should be U8 \[\d+, 32\]": put("others", []),
    "describes norm.weight twice": put(*NORM, "names", ["norm.weight", "norm.weight"]),
    "describes layers.0.int8 twice": put(*M, "names", ["layers.0.int8"]),
    "more tensors than there are": put(*NORM, "names", ["0-999999999." * 9 + "weight"]),
    "9-3 is no range": put(*NORM, "names", ["layers.9-3"]),
    "both a part of": put("others", "layers.0.bias", "names", ["layers.0.mixed.weight.int4"]),
    "is the name of the checksums": put("others", "layers.0.bias", "names", ["edgerazor.sha256"]),
    "only a matrix can be shared": put("tied", {"lm_head": "norm"}),
    "checksums do not have the recorded checksum": put("sha256", "0" * 64),
}


@pytest.mark.parametrize("reason", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, reason: str) -> None:
    write(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda entries: None, LIES[reason])
    refused(tmp_path, reason)


def test_tensors_that_the_header_does_not_know_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"

    def add(entries: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        entries["ghost"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}

    rewrite(path, add, lambda header: header)
    refused(tmp_path, "the tensor ghost does not belong to it")


def put_checksum(folder: Path, of: str, value: bytes) -> None:
    """Another checksum, of a stored tensor or (`matrix:digest`) of a matrix, with all that must fit it."""
    header, rows = PackedModel.open(folder).header, []
    for name, entry in header.matrices.items():
        rows += [f"{name}:digest", *(header.tensor_name(name, part) for part in entry.sha256)]
    signs = [f"{packed.SIGNS}{columns}" for columns in sorted(header.rotations, key=int)]
    row = [*rows, *header.others, *signs].index(of)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    begin, end = (8 + length + each for each in json.loads(content[8 : 8 + length])["edgerazor.sha256"]["data_offsets"])
    content[begin + 32 * row : begin + 32 * row + 32] = value
    path.write_bytes(content)
    sha = hashlib.sha256(content[begin:end]).hexdigest()
    rewrite(path, lambda entries: None, put("sha256", sha))


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        ("layers.0.mixed:digest", "layers.0.mixed: its codes and scales do not have the recorded digest"),
        ("layers.0.mixed.weight.int4", "layers.0.mixed.weight.int4: its bytes do not have the recorded checksum"),
        ("layers.0.mixed.weight.row_formats", "mixed.weight.row_formats: its bytes do not have the recorded checksum"),
        ("layers.0.flags", "layers.0.flags: its bytes do not have the recorded checksum"),
    ],
)
def test_a_checksum_that_lies_is_noticed(tmp_path: Path, of: str, reason: str) -> None:
    write(tmp_path)
    put_checksum(tmp_path, of, bytes(32))
    refused(tmp_path, reason)


def test_other_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "There is no packed model")
    path = tmp_path / "model.safetensors"
    for garbage in (b"PK\x03\x04" * 100, b"\x80\x04\x95" + b"a" * 500, b"\xff" * 64, struct.pack("<Q", 10**12)):
        path.write_bytes(garbage)
        refused(tmp_path, "cut off or not a safetensors file")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, path)
    refused(tmp_path, "no edgerazor header")
    for text, reason in (("{", "not JSON"), ("[" * 100_000, "not JSON"), ("{}", "checksum"), ("null", "checksum")):
        save_file({"x": torch.zeros(3)}, path, metadata={"edgerazor": text})
        refused(tmp_path, reason)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (0, 3, "layers.0.ternary: a code is outside the range of ternary"),
        (-1, 1, "layers.0.ternary.weight.ternary: what only fills up the part ternary is not zero"),
        (-33, 0x80, "layers.0.ternary: a scale is negative or not finite|a scale that only fills up"),
    ],
)
def test_invalid_bytes_with_fitting_checksums_are_refused(tmp_path: Path, place: int, value: int, reason: str) -> None:
    write(tmp_path)
    path, name = tmp_path / "model.safetensors", "layers.0.ternary.weight.ternary"
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    begin, end = (8 + length + each for each in json.loads(content[8 : 8 + length])[name]["data_offsets"])
    content[(begin if place >= 0 else end) + place] |= value
    path.write_bytes(content)
    put_checksum(tmp_path, name, hashlib.sha256(content[begin:end]).digest())
    refused(tmp_path, reason)


def test_an_index_cannot_lead_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, shard_bytes=200)
    write(tmp_path)  # a valid file outside of the folder
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"])
    for target in (
        "../model.safetensors",
        str(tmp_path / "model.safetensors"),
        "model.bin",
        "",
        "model-1-of-2.safetensors\n",
    ):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], first: target}}))
        refused(folder, "is not the name of a weight file")
    path.write_text(
        json.dumps({**index, "weight_map": {**index["weight_map"], first: "model-00099-of-00099.safetensors"}})
    )
    refused(folder, "the file is missing")
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "ghost": index["weight_map"][first]}}))
    refused(folder, "disagree about where ghost is")
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "\x00", "[" * 100_000):
        path.write_text(text)
        refused(folder)


def test_codes_out_of_range_are_not_written(tmp_path: Path) -> None:
    spec = MatrixSpec(("ternary",), 8)
    wrong = Encoded(torch.full((2, 8), 2, dtype=torch.int8), torch.ones(2, 1, dtype=torch.float16))
    with pytest.raises(ValueError, match="range of ternary"):
        write(tmp_path, matrices=[PackedMatrix("m", "linear", wrong, spec)], tied={})
    assert not list(tmp_path.iterdir())


# Rotation ---------------------------------------------------------------------------------------------------------


def rotated_matrices() -> list[PackedMatrix]:
    """Two widths in blocks of 4, and an odd one that is not rotated."""

    def turned(columns: int, group_size: int = 16) -> MatrixSpec:
        return MatrixSpec(("int4",), group_size, rotation=formats.hadamard(columns))

    return [
        matrix("model.embed_tokens", "embedding", turned(20), 11, 20),
        matrix("layers.0.up", "linear", turned(20), 5, 20),
        matrix("layers.0.down", "linear", turned(132), 5, 132),
        matrix("layers.0.odd", "linear", MatrixSpec(("int4",), 16), 5, 13),
    ]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_rotations_are_written_and_read(tmp_path: Path, compress: bool, shard_bytes: int) -> None:
    header = write(tmp_path / "a", matrices=rotated_matrices(), shard_bytes=shard_bytes, compress=compress)
    model = PackedModel.open(tmp_path / "a")
    model.verify()
    assert model.header == header
    assert (header.version, header.rotations) == (3, {"20": 4, "132": 4})
    assert not {name for name in model.others() if "signs" in name}
    for each in rotated_matrices():
        read = model.matrix(each.name)
        assert same(read.encoded.codes, each.encoded.codes)
        for spec in (read.spec, model.spec(each.name)):
            assert each.spec.rotation.equals(spec.rotation) if each.spec.rotation else spec.rotation is None
    (tmp_path / "b").mkdir()
    again = packed.rewrite(model, tmp_path / "b", compress=not compress)
    assert (again.rotations, again.signs) == (header.rotations, header.signs)
    PackedModel.open(tmp_path / "b").verify()


def test_rotated_models_are_predicted_to_the_byte(tmp_path: Path) -> None:
    write(tmp_path, matrices=rotated_matrices())
    matrices = [(m.name, m.kind, m.spec, tuple(m.encoded.codes.shape)) for m in rotated_matrices()]
    others = {name: packed.tensor_spec(name, tensor) for name, tensor in some_others().items()}
    tied = {"lm_head": "model.embed_tokens"}
    size = packed.predict(matrices, others, tied=tied, settings=SETTINGS, provenance=PROVENANCE)  # type: ignore[arg-type]
    table = packed.size_table(PackedModel.open(tmp_path))
    assert (size.bytes, size.weights) == (table.bytes, table.parameters)
    assert size.bytes == (tmp_path / "model.safetensors").stat().st_size


def test_matrices_of_one_width_have_one_rotation(tmp_path: Path) -> None:
    signs = -formats.hadamard(20).signs  # type: ignore[union-attr]
    for rotation in (None, formats.Rotation(2, -signs), formats.Rotation(4, signs)):
        spec = MatrixSpec(("int4",), 16, rotation=rotation)
        other = matrix("layers.0.other", "linear", spec, 3, 20)
        with pytest.raises(ValueError, match="matrices of 20 columns do not have the same rotation"):
            write(tmp_path, matrices=[*rotated_matrices(), other])
    wrong = matrix("layers.0.wrong", "linear", MatrixSpec(("int4",), 16, rotation=formats.hadamard(20)), 3, 24)
    with pytest.raises(ValueError, match="24 columns has a rotation of 20"):
        write(tmp_path, matrices=[wrong])


def version_2(header: Any) -> Any:
    """What a program for version 2 would be given."""
    header["version"] = 2
    return header


ROTATION_LIES: dict[str, Callable[[Any], Any]] = {
    "it has rotations, which version 2 does not know": version_2,
    "a block of a rotation must be a power of two from 2 to 512, not 3": put("rotations", "20", 3),
    "a block of a rotation must be a power of two from 2 to 512, not 1024": put("rotations", "132", 1024),
    "a block of a rotation must be a power of two from 2 to 512, not -4": put("rotations", "20", -4),
    "20 columns are no multiple of the block 8 of their rotation": put("rotations", "20", 8),
    "wrong at rotations.20": put("rotations", "20", "4"),
    "wrong at rotations": put("rotations", [20, 4]),
    "the tensor edgerazor.signs.13 is missing": put("rotations", "13", 1),
    "020 is no number of columns": put("rotations", {"020": 4, "132": 4}),
    "the tensor edgerazor.signs.20 does not belong to it|U8": put("rotations", {"132": 4}),
    r"edgerazor.sha256: it should be U8 \[\d+, 32\]": put("rotations", {}),
}


@pytest.mark.parametrize("reason", ROTATION_LIES)
def test_a_rotation_that_lies_is_refused(tmp_path: Path, reason: str) -> None:
    write(tmp_path, matrices=rotated_matrices())
    rewrite(tmp_path / "model.safetensors", lambda entries: None, ROTATION_LIES[reason])
    refused(tmp_path, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda entry: entry.update(shape=[2]), r"signs.20: it should be U8 \[3\], but is U8 \[2\]"),
        (lambda entry: entry.update(dtype="I8"), r"signs.20: it should be U8 \[3\], but is I8 \[3\]"),
    ],
)
def test_signs_of_another_shape_are_refused(tmp_path: Path, change: Callable[[Any], None], reason: str) -> None:
    write(tmp_path, matrices=rotated_matrices(), others={})

    def damage(entries: dict[str, Any]) -> None:
        entry = entries["edgerazor.signs.20"]
        change(entry)
        begin, end = entry["data_offsets"]
        if entry["shape"] == [2]:  # the byte that is left over must belong to something
            entry["data_offsets"] = [begin, end - 1]
            entries["edgerazor.signs.rest"] = {"dtype": "U8", "shape": [1], "data_offsets": [end - 1, end]}

    rewrite(tmp_path / "model.safetensors", damage, lambda header: header)
    refused(tmp_path, f"{reason}|signs.rest does not belong to it")


def test_damaged_signs_are_refused(tmp_path: Path) -> None:
    write(tmp_path, matrices=rotated_matrices())
    path, name = tmp_path / "model.safetensors", "edgerazor.signs.20"
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    begin, end = (8 + length + each for each in json.loads(content[8 : 8 + length])[name]["data_offsets"])
    content[begin] ^= 1
    path.write_bytes(content)
    refused(tmp_path, f"{name}: its bytes do not have the recorded checksum")
    content[begin] ^= 1
    content[end - 1] |= 0x80  # behind the last of 20 columns
    path.write_bytes(content)
    put_checksum(tmp_path, name, hashlib.sha256(content[begin:end]).digest())
    refused(tmp_path, f"{name}: a bit behind the last sign is not 0")

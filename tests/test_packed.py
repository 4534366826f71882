"""The packed folder: exact round trips, golden bytes, and no damage that goes unnoticed."""

from __future__ import annotations

import hashlib
import json
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
    header, found = model.header, {each.name: model.matrix(each.name) for each in some_matrices()}
    others = model.others()
    return (
        header.tied == {"lm_head": "model.embed_tokens"}
        and header.settings == SETTINGS
        and header.provenance == PROVENANCE
        and list(header.matrices) == sorted(found)
        and others.keys() == some_others().keys()
        and all(same(others[name], tensor) for name, tensor in some_others().items())
        and all(
            same(found[each.name].encoded.codes, each.encoded.codes)
            and same(found[each.name].encoded.scales, each.encoded.scales)
            and found[each.name].kind == each.kind
            and found[each.name].spec.formats == each.spec.formats
            and found[each.name].spec.group_size == each.spec.group_size
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
    spec = MatrixSpec(("int8", "int4", "ternary"), 4, torch.tensor([2, 1, 0], dtype=torch.uint8))
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
    for start, (first, padding) in zip((0, 128, 192, 320), codes.items(), strict=True):  # scales between them
        assert data[start : start + 64] == bytes.fromhex(first) + bytes([padding]) * 60
    scales = [data[start : start + 2].hex() for start in (64, 96, 256, 288, 384, 416)]
    assert scales == ["003c", "0040", "003c", "0040", "0040", "004a"]  # 1 2 of int4, 1 2 of int8, 2 12 of ternary
    assert data[448:].hex() == "0000803f000000c0" + "06"  # norm, float32; row_formats: 2 + 1*4 + 0*16
    names = json.loads(content[8 : 8 + length])
    assert [name for name in names if name != "__metadata__"] == [
        *(f"m.weight.{part}" for part in ("int4", "int4.scales", "int8", "int8.scales", "ternary", "ternary.scales")),
        "norm",
        "m.weight.row_formats",
    ]


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in some_others().items())
    for each in some_matrices():
        for part, tensor in formats.pack_matrix(each.encoded, each.spec).items():
            assert same(loaded[packed.part_name(each.name, part)], tensor)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    linear = some_matrices()[1]
    wrong: dict[str, dict[str, Any]] = {
        "two tensors are called": {"others": {"layers.0.mixed.weight.int4.scales": weights(1)}},
        "no quantized linear": {"matrices": some_matrices()[:1]},
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
        packed.predict([linear], {"m.weight.int4.scales": ("F16", (2, 1))}, **arguments)  # type: ignore[list-item]
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
    """A change of one place in nested dictionaries."""
    *path, last, value = path_and_value

    def change(tree: Any) -> Any:
        place = tree
        for step in path:
            place = place[step]
        place[last] = value
        return tree

    return change


def swap_formats(header: Any) -> Any:
    """The same formats in another order: then the rows have other ones."""
    header["matrices"]["layers.0.mixed"]["formats"].reverse()
    return header


M, B, C = (("matrices", f"layers.0.{name}") for name in ("mixed", "blocks", "columns"))
LIES: dict[str, Callable[[Any], Any]] = {
    "has version 2 of the packed format": put("version", 2),
    "has version 0 of the packed format": put("version", 0),
    r"wrong at version": put("version", "0"),
    "wrong at surprise": put("surprise", 1),
    "wrong at tied": put("tied", 3),
    r"wrong at the top": lambda header: [header],
    "wrong at matrices.layers.0.mixed.shape": put(*M, "shape", [7, "33"]),
    "wrong at matrices.layers.0.mixed.group_size": put(*M, "group_size", 0),
    "wrong at matrices.layers.0.mixed.kind": put(*M, "kind", "other"),
    "impossible shape": put(*M, "shape", [7, -33]),
    r"should be F16 \[1, 1, 16\]": put(*M, "group_size", 33),
    "should be U8": put(*M, "shape", [7, 32]),
    "must be|recorded digest": put(*M, "shape", [8, 33]),
    "have 1 blocks of rows together, but it has 17 rows": put("matrices", "model.embed_tokens", "shape", [17, 20]),
    "impossible shape .* group size": put(*M, "group_size", 1 << 62),
    "unknown format int99": put(*M, "formats", ["int99", *ALL[1:]]),
    "repeats one": put(*M, "formats", [ALL[0], *ALL]),
    "parts are not those": put("matrices", "layers.0.int8", "sha256", {}),
    "recorded digest": put(*M, "digest", "0" * 64),
    "recorded checksum": put(*M, "sha256", ALL[0], "0" * 64),
    "part .* must be|out of range|outside the range|bytes each|recorded digest": swap_formats,
    "does not say which row": put(*B, "sha256", "row_formats", "0" * 64),
    r"blocks.weight.block_formats: it should be U8 \[5, 3\]": put(*B, "group_size", 7),
    r"blocks.weight.block_formats: it should be U8 \[6, 2\]": put(*B, "shape", [6, 33]),
    r"columns.weight.block_formats: it should be U8 \[1, 2\]": put(*C, "formats", ["ternary", "int4", *ALL[:3]]),
    "have 0 blocks of tails together, but it has 4": put(*C, "shape", [4, 23]),
    "unknown dtype": put("others", "norm.weight", "dtype", "F8"),
    r"norm.weight: it should be F16": put("others", "norm.weight", "dtype", "F16"),
    "tensor extra is missing": put("others", "extra", {"dtype": "F32", "shape": [1], "sha256": "0"}),
    "layers.0.bias does not belong": put("others", {}),
    "both a part of": put("others", "layers.0.mixed.weight.int4", {"dtype": "U8", "shape": [7, 3], "sha256": "0"}),
    "only a matrix can be shared": put("tied", {"lm_head": "norm"}),
}


@pytest.mark.parametrize("reason", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, reason: str) -> None:
    write(tmp_path)
    rewrite(tmp_path / "model.safetensors", lambda entries: None, LIES[reason])
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


def test_an_invalid_code_with_fitting_checksums_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    begin, end = json.loads(content[8 : 8 + length])["layers.0.ternary.weight.ternary"]["data_offsets"]
    content[8 + length + begin] |= 3
    path.write_bytes(content)
    sha = hashlib.sha256(content[8 + length + begin : 8 + length + end]).hexdigest()
    rewrite(path, lambda entries: None, put("matrices", "layers.0.ternary", "sha256", "ternary", sha))
    refused(tmp_path, "layers.0.ternary: a code is outside the range of ternary")


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

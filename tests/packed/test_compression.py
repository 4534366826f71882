"""Compressed folders: the same bytes come back, near the entropy of the codes, and no frame is trusted."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from torch import Tensor

from edgerazor import formats, packed
from edgerazor.errors import UserError
from edgerazor.formats import Encoded, MatrixSpec, Streams
from edgerazor.packed import MatrixSource, PackedModel
from edgerazor.packed.compression import LARGEST_RATIO, NARROWEST, compress, decompress, entropy_bytes, largest_frame
from edgerazor.packed.growing import Turns

ALL = formats.names()


def weights(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(*shape: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def specs() -> dict[str, tuple[MatrixSpec, tuple[int, int]]]:
    """Every format in awkward shapes, and formats of rows, blocks and columns."""
    cases = {
        f"{name}.{rows}x{cols}.{group}": (MatrixSpec((name,), group), (rows, cols))
        for name in ALL
        for rows, cols, group in ((1, 1, 1), (5, 13, 1000), (17, 33, 16), (31, 130, 3), (48, 256, 256), (16, 960, 64))
    }
    count = len(ALL)
    cases["rows"] = (MatrixSpec(tuple(ALL), 16, chosen(37, count=count)), (37, 33))
    cases["blocks"] = (MatrixSpec(tuple(ALL), 16, block_formats=chosen(37, 3, count=count)), (37, 33))
    cases["columns"] = (MatrixSpec(tuple(ALL), 16, block_formats=chosen(1, 3, count=count)), (37, 48))
    return cases


def sources(peculiar: bool = True) -> list[MatrixSource]:
    made = []
    for index, (name, (spec, shape)) in enumerate(specs().items()):
        encoded = formats.encode_matrix(weights(*shape, seed=index), spec)
        if peculiar and index % 7 == 0:  # all codes zero, and one with a scale far from the others
            encoded = Encoded(torch.zeros_like(encoded.codes), encoded.scales.clone())
            encoded.scales[0, 0] = 60000.0
        made.append(MatrixSource(f"layers.{name}", "linear", spec, shape, lambda encoded=encoded: encoded))
    return made


def write(folder: Path, **changes: Any) -> packed.Header:
    folder.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "matrices": sources(),
        "others": {"norm.weight": weights(9).bfloat16(), "scalar": torch.tensor(3.5), "flags": torch.tensor([True])},
        "tied": {"lm_head": "layers.rows"},
        "settings": {"kv_bits": 8, "activation_bits": 8},
        "provenance": {"seed": 1},
        **changes,
    }
    return packed.write(folder, arguments.pop("matrices"), arguments.pop("others"), **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", specs())
def test_streams_give_the_parts_back(name: str) -> None:
    spec, shape = specs()[name]
    encoded = formats.encode_matrix(weights(*shape), spec)
    streams, sizes = formats.to_streams(encoded, spec), formats.stream_bytes(spec, shape)
    parts = formats.pack_matrix(encoded, spec)
    for number in range(max(len(part_streams.candidates) for part_streams in streams.values())):
        joined = {
            part: torch.cat(part_streams.candidates[number % len(part_streams.candidates)])
            for part, part_streams in streams.items()
        }
        assert all(stream.numel() <= sizes[part] for part, stream in joined.items())
        back = formats.from_streams(joined, spec, shape)
        assert back.keys() == parts.keys() - {formats.ROW_FORMATS, formats.BLOCK_FORMATS}
        assert all(torch.equal(back[part].view(torch.uint8), parts[part].view(torch.uint8)) for part in back)


def test_streams_are_as_specified() -> None:
    spec = MatrixSpec(("int3",), 4)
    scales = torch.tensor([[1.0], [1.5], [16.0]], dtype=torch.float16)  # 0x3c00, 0x3e00, 0x4c00
    codes = torch.tensor([[-4, 3, 0], [1, -1, 2], [0, 0, 0]], dtype=torch.int8)
    streams = formats.to_streams(Encoded(codes, scales), spec)
    ways = [[stream.tolist() for stream in way] for way in streams["int3"].candidates]
    one, two = [1, 0, 7, 4, 5, 3, 6, 4, 4, 4], [2, 0 + 8 * 7, 4, 5 + 8 * 3, 6, 4 + 8 * 4, 4]
    # up to 3 zeros in front of 1, -1, 2, -2, 3, -3 or -4, and a 1 behind all
    assert ways == [[one], [two], [[0, 3, 1 + 3 * 6, 1 + 3 * 4, 1 + 1, 1 + 3 * 1, 1 + 3 * 2, 0, 1]]]
    ternary = formats.to_streams(Encoded(codes.sign(), scales), MatrixSpec(("ternary",), 4))["ternary"]
    digits = [0 + 3 * 2 + 9 * 1, 2 + 3 * 0 + 9 * 2, 1 + 3 * 1 + 9 * 1]
    assert [way[0].tolist() for way in ternary.candidates] == [[3, *digits], [4, *digits], [0, 3, 4, 1, 2, 4, 1, 0, 1]]
    assert [[stream.tolist() for stream in way] for way in streams["int3.scales"].candidates] == [
        [[4, 0x00, 0x3C, 0, 0], [0, 0x20, 0x00], [0, 0, 1]],
        [[6, 0x00, 0x3C, 0, 0, 0], [0, 0x08, 0x40], [0, 0, 0]],
        [[8, 0x00, 0x3C, 0, 0, 0], [0, 0x02, 0x10], [0, 0, 0]],
    ]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.6, 0.9, 0.999, 1.0])
def test_sparse_codes_come_back_and_take_little_more_than_their_entropy(name: str, zeros: float) -> None:
    number_format, generator = formats.get(name), torch.Generator().manual_seed(1)
    shape = (96, 2048)
    codes = torch.randint(number_format.min_code, number_format.max_code + 1, shape, generator=generator)
    codes = torch.where(torch.rand(shape, generator=generator) < zeros, 0, codes).to(torch.int8)
    spec, encoded = MatrixSpec((name,), 256), Encoded(codes, torch.ones(96, 8, dtype=torch.float16))
    sizes, streams = formats.stream_bytes(spec, shape), formats.to_streams(encoded, spec)
    frames = {part: as_tensor(compress(part_streams)) for part, part_streams in streams.items()}
    assert frames[name].numel() * LARGEST_RATIO * NARROWEST >= codes.numel()
    parts = formats.pack_matrix(encoded, spec)
    back = formats.from_streams({part: decompress(frame, sizes[part]) for part, frame in frames.items()}, spec, shape)
    assert all(torch.equal(back[part].view(torch.uint8), parts[part].view(torch.uint8)) for part in back)
    if zeros <= (0.9 if number_format.code_bits < 5 else 0.6 if number_format.code_bits < 8 else 0.0):
        entropy = entropy_bytes(codes.view(torch.uint8) + number_format.offset)
        assert frames[name].numel() <= 1.02 * entropy


@pytest.mark.parametrize(
    ("name", "stream", "reason"),
    [
        ("int4", [], "another number of bytes"),
        ("int4", [2, 0x88, 0x88], "another number of bytes"),
        ("int4", [2, 0x88, 0x88, 0x88, 0x98], "what only fills up a row of codes is not zero"),
        ("int4", [3, 0x88, 0x88], "another number of bytes"),
        ("int8", [2, 0, 0, 0, 0], "another number of bytes"),
        ("ternary", [4, 40, 81], "a byte of codes is out of range"),
        ("ternary", [3, 27, 13], "a byte of codes is out of range"),
        ("ternary", [0], "no possible length"),
        ("ternary", [0, 7], "no possible length"),
        ("ternary", [0, 0, 0], "no possible length"),
        ("ternary", [0, 128, 0], "no possible length"),
        ("ternary", [0, 7, 15], "a byte of codes is out of range"),
        ("ternary", [0, 7, 0], "another number"),
        ("ternary", [0, 7, 6], "another number"),
        ("ternary", [0, 7, 14], "another number"),
        ("ternary", [0, 7, 0, 1], "another number"),
        ("ternary", [0, 7, 0, 0, 0], "another number"),
    ],
)
def test_wrong_streams_are_refused(name: str, stream: list[int], reason: str) -> None:
    spec, shape = MatrixSpec((name,), 3), (2, 3)
    encoded = Encoded(torch.zeros(shape, dtype=torch.int8), torch.ones(2, 1, dtype=torch.float16))
    good = {
        part: torch.cat(part_streams.candidates[0]) for part, part_streams in formats.to_streams(encoded, spec).items()
    }
    formats.from_streams(good, spec, shape)
    if name == "ternary":
        formats.from_streams(good | {name: torch.tensor([0, 7, 1 + 6], dtype=torch.uint8)}, spec, shape)
    with pytest.raises(ValueError, match=reason):
        formats.from_streams(good | {name: torch.tensor(stream, dtype=torch.uint8)}, spec, shape)
    scales = f"{name}.scales"
    for wrong in ([], [5, 0, 60, 0, 0, 0, 0, 0], [4, 0, 60, 0, 0, 0, 0], [4, 0, 60, 1, 0, 0, 0, 0][:7]):
        with pytest.raises(ValueError, match="another number of bytes"):
            formats.from_streams(good | {scales: torch.tensor(wrong, dtype=torch.uint8)}, spec, shape)
    with pytest.raises(ValueError, match="a scale is out of range"):
        formats.from_streams(good | {scales: torch.tensor([4, 0, 60, 17, 0, 0, 0, 0]).byte()}, spec, shape)


@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1])
def test_a_folder_comes_back_to_the_byte(tmp_path: Path, shard_bytes: int) -> None:
    plain = write(tmp_path / "plain", shard_bytes=shard_bytes, extras={"note": 1})
    direct = write(tmp_path / "direct", shard_bytes=shard_bytes, extras={"note": 1}, compress=True)
    for name in ("small", "again"):
        (tmp_path / name).mkdir()
    packed.rewrite(PackedModel.open(tmp_path / "plain"), tmp_path / "small", compress=True)
    packed.rewrite(PackedModel.open(tmp_path / "small"), tmp_path / "again", compress=False)
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")
    assert contents(tmp_path / "small") == contents(tmp_path / "direct")
    assert direct.matrices == plain.matrices  # checksums are those of what is uncompressed
    assert direct.compression is not None
    assert plain.compression is None


def test_what_is_compressed_is_read(tmp_path: Path) -> None:
    write(tmp_path / "plain")
    header = write(tmp_path / "small", compress=True, shard_bytes=3000)
    plain, small = PackedModel.open(tmp_path / "plain"), PackedModel.open(tmp_path / "small")
    small.verify()
    assert small.header == header
    assert len(small.files()) > 1
    assert all(torch.equal(small.others()[name], tensor) for name, tensor in plain.others().items())
    for name in header.matrices:
        a, b = plain.parts(name), small.parts(name)
        assert a.keys() == b.keys()
        assert all(a[part].dtype == b[part].dtype and torch.equal(a[part], b[part]) for part in a)
        assert torch.equal(plain.matrix(name).encoded.codes, small.matrix(name).encoded.codes)


def test_equal_runs_write_equal_bytes_whatever_is_ready_first(tmp_path: Path) -> None:
    write(tmp_path / "a", compress=True, shard_bytes=3000)

    def late(source: MatrixSource) -> MatrixSource:
        def encode() -> Encoded:
            time.sleep(0.002 * (hash(source.name) % 3))
            return source.encode()

        return MatrixSource(source.name, source.kind, source.spec, source.shape, encode)

    write(tmp_path / "b", compress=True, shard_bytes=3000, matrices=[late(each) for each in reversed(sources())])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    header = write(tmp_path, compress=True)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded["norm.weight"].dtype == torch.bfloat16
    name = "layers.int4.48x256.256"
    frame = loaded[f"{name}.weight.int4.zst"].numpy().tobytes()
    assert frame[:4] == bytes.fromhex("28b52ffd")
    stored = PackedModel.open(tmp_path).matrix(name).encoded.codes.flatten() + 8
    content = zstandard.ZstdDecompressor().decompress(frame)
    assert list(content[-1 - len(stored) :]) == [1, *stored.tolist()]  # a code to a byte, since there are few
    assert header.compression is not None
    assert header.compression.model_dump() == {"method": "zstd", "filter": 1}


# Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "group_size", "most"),
    [
        ("ternary", (1024, 3072), 256, 1.008),
        ("ternary", (1000, 960), 64, 1.01),
        ("ternary", (256, 256), 256, 1.017),
        ("int4", (1024, 2048), 256, 1.01),
        ("int4", (1000, 960), 64, 1.008),
        ("int4", (256, 256), 256, 1.017),
        ("int2", (512, 1024), 256, 1.012),
        ("int2z", (512, 1024), 256, 1.012),
        ("int2z", (1000, 960), 64, 1.01),
        ("int2z", (256, 256), 256, 1.03),  # of which 1.7 are scales: there are too few for a statistic of 16 bits
        ("int3", (512, 1024), 256, 1.015),
        ("int3", (256, 256), 256, 1.02),
        ("int5", (512, 1024), 256, 1.012),
        ("int8", (512, 1024), 256, 1.01),
    ],
)
def test_gaussian_weights_take_little_more_than_their_entropy(
    name: str, shape: tuple[int, int], group_size: int, most: float
) -> None:
    spec = MatrixSpec((name,), group_size)
    encoded = formats.encode_matrix(weights(*shape), spec)
    frame_bytes = {part: len(compress(streams)) for part, streams in formats.to_streams(encoded, spec).items()}
    assert 1 <= sum(frame_bytes.values()) / packed.matrix_entropy_bytes(encoded, spec) <= most
    codes = entropy_bytes(encoded.codes.view(torch.uint8) + formats.get(name).offset)
    assert 1 <= frame_bytes[name] / codes <= min(most, 1.015)


def test_entropy_by_hand() -> None:
    assert entropy_bytes(torch.tensor([[0, 1], [2, 3]])) == 4 * 2 / 8
    assert entropy_bytes(torch.tensor([5, 5, 5])) == 0
    assert entropy_bytes(torch.tensor([1, 1, 1, 0])) == pytest.approx(4 * 0.8112781244591328 / 8)
    spec = MatrixSpec(("ternary", "int4"), 2, torch.tensor([0, 1], dtype=torch.uint8))
    encoded = Encoded(torch.tensor([[-1, 0], [1, 7]], dtype=torch.int8), torch.ones(2, 1, dtype=torch.float16))
    assert packed.matrix_entropy_bytes(encoded, spec) == 2 * 2 * 1 / 8  # each format's codes for themselves


def test_equal_rows_take_less_than_their_entropy() -> None:
    spec = MatrixSpec(("int4",), 256)
    encoded = formats.encode_matrix(weights(4, 256).repeat(128, 1), spec)
    frame_bytes = sum(len(compress(streams)) for streams in formats.to_streams(encoded, spec).values())
    assert frame_bytes < 0.1 * packed.matrix_entropy_bytes(encoded, spec)


# Frames -----------------------------------------------------------------------------------------------------------


def as_tensor(frame: bytes) -> Tensor:
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


@pytest.mark.parametrize("size", [1, 100, LARGEST_RATIO * 1000 + 1, 1 << 20])
@pytest.mark.parametrize("kind", ["zero", "noise"])
def test_a_frame_is_neither_too_small_nor_too_large(size: int, kind: str) -> None:
    noise = torch.randint(256, (size,), generator=torch.Generator().manual_seed(0)).byte()
    stream = torch.zeros(size, dtype=torch.uint8) if kind == "zero" else noise
    frame = compress(Streams([[stream, stream]]))
    assert 2 * size / LARGEST_RATIO <= len(frame) <= largest_frame(2 * size)
    assert torch.equal(decompress(as_tensor(frame), 2 * size), torch.cat([stream, stream]))


def test_wrong_frames_are_refused_before_they_take_memory() -> None:
    data = bytes(range(256)) * 8
    good = zstandard.ZstdCompressor().compress(data)
    trained = zstandard.train_dictionary(1024, [bytes([i, i + 1, 7] * 50) for i in range(200)])
    unsized = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    wide = zstandard.ZstdCompressionParameters(window_log=24, strategy=zstandard.STRATEGY_FAST, write_content_size=True)
    window = zstandard.ZstdCompressor(compression_params=wide).compressobj(size=1 << 25)
    noise = torch.randint(256, (1 << 25,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes()
    size = len(data)
    wrong: dict[str, tuple[bytes, int]] = {
        "not one zstd frame": (good[:3], size),
        "not one zstd frame .*did not decompress full frame": (good[:-1], size),
        "not a zstd frame of at most 2047": (good, size - 1),
        "not a zstd frame of": (struct.pack("<II", 0x184D2A50, size) + data, size),
        "not one zstd frame .*unused data": (good + b"\0", size),
        "not one zstd frame .*bytes of unused": (good + good, size),
        "a dictionary": (zstandard.ZstdCompressor(dict_data=trained).compress(data), size),
        "not a zstd frame of at most 2048": (unsized.compress(data) + unsized.flush(), size),
        "less than 1/256": (bomb, 1 << 20),
        "a window of more than 131072 bytes": (window.compress(noise) + window.flush(), 1 << 25),
    }
    for reason, (frame, claimed) in wrong.items():
        with pytest.raises(ValueError, match=reason):
            decompress(as_tensor(frame), claimed)


def change_header(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the tensors' entries and our header, and give that a right checksum again."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    header = json.loads(entries["__metadata__"]["edgerazor"])
    change(entries, header)
    text = json.dumps(header)
    entries["__metadata__"] |= {"edgerazor": text, "edgerazor_sha256": hashlib.sha256(text.encode()).hexdigest()}
    new = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compression": {"method": "brotli", "filter": 1}}, "does not know .filter 1, method 'brotli'."),
        ({"compression": {"method": "zstd", "filter": 2}}, "does not know .filter 2, method 'zstd'."),
        ({"compression": {"method": "zstd", "filter": 1, "level": 3}}, "its header is wrong at compression.level"),
        ({"compression": "zstd"}, "its header is wrong at compression"),
        ({}, "tensor .* is missing"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write(tmp_path, compress=True)

    def changed(entries: dict[str, Any], header: dict[str, Any]) -> None:
        del header["compression"]
        header |= change

    change_header(tmp_path, changed)
    with pytest.raises(UserError, match=reason):
        PackedModel.open(tmp_path)


def test_names_that_look_compressed_do_not_matter(tmp_path: Path) -> None:
    spec = MatrixSpec(("ternary", "int4"), 64, chosen(20, count=2))
    encoded = formats.encode_matrix(weights(20, 70), spec)
    source = MatrixSource("m", "linear", spec, (20, 70), lambda: encoded)
    write(tmp_path, matrices=[source], others={"m.weight.int4.zst": torch.zeros(3)}, tied={})
    PackedModel.open(tmp_path).verify()
    with pytest.raises(ValueError, match=r"two tensors are called|both a part of a matrix"):
        write(tmp_path / "small", matrices=[source], others={"m.weight.int4.zst": weights(3)}, tied={}, compress=True)


def test_a_small_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    spec = MatrixSpec(("ternary",), 256)
    encoded = formats.encode_matrix(weights(64, 256), spec)
    write(tmp_path, matrices=[MatrixSource("m", "linear", spec, (64, 256), lambda: encoded)], tied={}, compress=True)

    def changed(entries: dict[str, Any], header: dict[str, Any]) -> None:
        header["matrices"][0]["shape"] = [1 << 30, 1 << 30]

    change_header(tmp_path, changed)
    with pytest.raises(UserError, match="m: its frames are too small for 1152921504606846976 codes"):
        PackedModel.open(tmp_path)


def test_no_flipped_bit_changes_a_weight_unnoticed(tmp_path: Path) -> None:
    spec = MatrixSpec(("ternary", "int4"), 64, chosen(20, count=2))
    encoded = formats.encode_matrix(weights(20, 70), spec)
    write(tmp_path, matrices=[MatrixSource("m", "linear", spec, (20, 70), lambda: encoded)], tied={}, compress=True)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    parts, harmless = formats.pack_matrix(encoded, spec), 0
    for position in range(8 + length, len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            read = PackedModel.open(tmp_path).parts("m")
        except UserError:
            continue
        assert all(torch.equal(read[part], tensor) for part, tensor in parts.items())
        harmless += 1  # zstd itself ignores some bits
    assert harmless < 0.05 * (len(content) - length)


# Order ------------------------------------------------------------------------------------------------------------


def test_nobody_waits_for_a_task_that_failed() -> None:
    turns, order, waited = Turns(), [], []

    def task(number: int, begin: threading.Event) -> None:
        begin.wait()
        try:
            with turns.task(number):
                if number == 2:
                    raise ValueError("broken")
                with turns.turn(number):
                    order.append(number)
        except RuntimeError as error:
            waited.append(str(error))
        except ValueError:
            pass

    begins = [threading.Event() for _ in range(5)]
    threads = [threading.Thread(target=task, args=(number, begin)) for number, begin in enumerate(begins)]
    for thread in threads:
        thread.start()
    for number in (4, 2, 3, 1, 0):
        begins[number].set()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    assert order == [0, 1]
    assert waited == ["task 2 has failed"] * 2


def test_a_failing_matrix_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> Encoded:
        raise RuntimeError("broken")

    first = sources()[0]
    broken = MatrixSource("layers.broken", "linear", first.spec, first.shape, fail)
    with pytest.raises(RuntimeError, match="broken"):
        write(tmp_path, matrices=[*sources(), broken], compress=True)
    assert list(tmp_path.iterdir()) == []

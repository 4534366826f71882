"""`edgerazor/packed/FORMAT.md` is right: its example is what is written, and a reader made from its text can read."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from edgerazor import formats, packed
from edgerazor.formats import Encoded, MatrixSpec
from edgerazor.packed import MatrixSource

ALL = formats.names()

# A reader written from FORMAT.md; it uses nothing of ours ----------------------------------------------------------

#: format -> smallest code, what is added to a code for its level, bits
FORMATS = {
    "ternary": (-1, 0.0, 2),
    "int2": (-2, 0.5, 2),
    "int2z": (-2, 0.0, 2),
    "int3": (-4, 0.0, 3),
    "int4": (-8, 0.0, 4),
    "int5": (-16, 0.0, 5),
    "int8": (-128, 0.0, 8),
}
Rows = list[list[Any]]


def read_file(content: bytes) -> tuple[dict[str, bytes], dict[str, str]]:
    """Bytes of each tensor, and the metadata."""
    (n,) = struct.unpack("<Q", content[:8])
    assert (8 + n) % 64 == 0
    entries = json.loads(content[8 : 8 + n])
    metadata = entries.pop("__metadata__")
    places = {name: entry["data_offsets"] for name, entry in entries.items()}
    return {name: content[8 + n + begin : 8 + n + end] for name, (begin, end) in places.items()}, metadata


def quads_of(cols: int, group_size: int) -> list[list[int | None]]:
    """The columns of each quad; None where code 0 fills it."""
    quads: list[list[int | None]] = []
    for start in range(0, cols, group_size):
        group: list[int | None] = [*range(start, min(start + group_size, cols))]
        group += [None] * (-len(group) % 4)
        quads += [group[i : i + 4] for i in range(0, len(group), 4)]
    return quads


def chunk_vectors(name: str, n: int) -> list[tuple[int, int, int]]:
    """(width, shift of u, vectors) of each plane of a chunk of n quads; width 0 is base 3."""
    if name == "ternary":
        return [(0, 0, n // 5), (2, 0, -(-(n % 5) * 2 // 8))]
    bits, planes, shift = FORMATS[name][2], [], 0
    for width in (8,) if bits == 8 else (4, 2, 1):
        if bits & width:
            planes.append((width, shift, -(-n * width // 8)))
            shift += width
    return planes


def read_codes(name: str, block: bytes, cols: int, group_size: int) -> Rows:
    """Codes of the 16 rows of a row block."""
    quads = quads_of(cols, group_size)
    u: dict[tuple[int, int, int], int] = {}
    size, vector = 64 if name == "ternary" else 8, 0
    for first in range(0, len(quads), size):
        n, done = min(size, len(quads) - first), 0
        for width, shift, vectors in chunk_vectors(name, n):
            for v in range(vectors):
                for place, byte in enumerate(block[64 * vector : 64 * vector + 64]):
                    if width == 0:
                        t4, r = (byte >> 6, byte & 63) if byte < 192 else divmod(byte - 192, 17)
                        r += 64 * (byte >= 192)
                        fields = [r % 3, r // 3 % 3, r // 9 % 3, r // 27, t4]
                    else:
                        fields = [byte >> width * f & (1 << width) - 1 for f in range(8 // width)]
                    for f, field in enumerate(fields):
                        key = (place // 4, first + done + len(fields) * v + f, place % 4)
                        u[key] = u.get(key, 0) | field << shift
                vector += 1
            done += 5 * vectors if width == 0 else 0
    assert 64 * vector == len(block)
    minimum = FORMATS[name][0]
    codes = [[0] * cols for _ in range(16)]
    for (row, quad, j), value in u.items():
        column = quads[quad][j] if quad < len(quads) else None
        if column is None:
            assert value + minimum == 0
        else:
            codes[row][column] = value + minimum
    return codes


def read_part(name: str, stored: bytes, cols: int, group_size: int) -> tuple[Rows, Rows]:
    """Codes and scales of all rows of a part, those of its last block that do not exist included."""
    quads, size = len(quads_of(cols, group_size)), 64 if name == "ternary" else 8
    chunks = [min(size, quads - first) for first in range(0, quads, size)]
    code_bytes = 64 * sum(count for n in chunks for _, _, count in chunk_vectors(name, n))
    groups = -(-cols // group_size)
    blocks = len(stored) // (code_bytes + 32 * groups)
    codes: Rows = []
    scales: Rows = []
    for b in range(blocks):
        codes += read_codes(name, stored[b * code_bytes : (b + 1) * code_bytes], cols, group_size)
        start = blocks * code_bytes + b * 32 * groups
        values = struct.unpack(f"<{16 * groups}e", stored[start : start + 32 * groups])
        scales += [list(values[row::16]) for row in range(16)]
    assert not any(stored[blocks * (code_bytes + 32 * groups) :])
    assert len(stored) % 64 == 0
    return codes, scales


def read_frame(name: str, frame: bytes, rows: int, cols: int, group_size: int) -> tuple[Rows, Rows]:
    """Codes and scales of a compressed part with so many rows."""
    content = zstandard.ZstdDecompressor().decompress(frame)
    groups = -(-cols // group_size)
    count, m = rows * groups, content[0]
    smallest = int.from_bytes(content[1:3], "little")
    at = 3 + -(-count * m // 8)
    low = int.from_bytes(content[3:at], "little")
    values = []
    for i in range(count):
        d = low >> m * i & (1 << m) - 1 | content[at + i] << m | content[at + count + i] << m + 8
        values.append(struct.unpack("<e", struct.pack("<H", smallest + d))[0])
    scales = [values[row * groups : (row + 1) * groups] for row in range(rows)]
    data = content[at + 2 * count :]
    minimum, _, bits = FORMATS[name]
    base = 3 if name == "ternary" else 1 << bits
    if k := data[0]:
        width = -(-cols // k)
        lines = [data[1 + row * width : 1 + (row + 1) * width] for row in range(rows)]
        digits = [[byte // base**i % base for byte in line for i in range(k)] for line in lines]
        return [[digit + minimum for digit in row[:cols]] for row in digits], scales
    n, others = data[1], sorted(filter(None, range(minimum, minimum + base)), key=lambda code: (abs(code), code < 0))
    flat: list[int] = []
    for byte in data[2:]:
        i, r = divmod(byte - 1, n)
        flat += [0] * n if byte == 0 else [0] * r + [others[i]]
    assert flat.pop() == 1
    return [flat[row * cols : (row + 1) * cols] for row in range(rows)], scales


def read_indices(stored: bytes, rows: int, columns: int, count: int) -> Rows:
    bits = next(bits for bits in (1, 2, 4) if count <= 1 << bits)
    width = len(stored) // rows
    lines = [int.from_bytes(stored[row * width : (row + 1) * width], "little") for row in range(rows)]
    return [[line >> bits * i & (1 << bits) - 1 for i in range(columns)] for line in lines]


def read_matrix(tensors: dict[str, bytes], name: str, entry: dict[str, Any]) -> tuple[Rows, Rows, Rows]:
    """Codes, scales, and the format of each group of each row."""
    (rows, cols), names = entry["shape"], entry["formats"]
    group = min(entry["group_size"], cols)
    groups, whole = -(-cols // group), cols // group
    stored = tensors.get(f"{name}.weight.block_formats")
    if stored is not None:
        bits = next(bits for bits in (1, 2, 4) if len(names) <= 1 << bits)
        alike = len(stored) < rows * -(-groups * bits // 8)
        lines = read_indices(stored, 1 if alike else rows, groups, len(names))
        chosen = [[names[i] for i in lines[0 if alike else row]] for row in range(rows)]
        views = [(whole, 0, group, "")] + [(1, whole, cols % group, ".tail")] * (cols % group > 0)
    else:
        single = bytes(-(-rows * 4 // 8))
        indices = read_indices(tensors.get(f"{name}.weight.row_formats", single), 1, rows, len(names))[0]
        chosen = [[names[i]] * groups for i in indices]
        views = [(1, 0, cols, "")]
    codes: Rows = [[0] * cols for _ in range(rows)]
    scales: Rows = [[0.0] * groups for _ in range(rows)]
    for per_row, first, width, suffix in views:
        places = [(row, first + b) for row in range(rows) for b in range(per_row)]
        for part in {*names}:
            mine = [(row, g) for row, g in places if chosen[row][g] == part]
            if not mine:
                continue
            plain, frame = f"{name}.weight.{part}{suffix}", f"{name}.weight.{part}{suffix}.zst"
            part_codes, part_scales = (
                read_frame(part, tensors[frame], len(mine), width, group)
                if frame in tensors
                else read_part(part, tensors[plain], width, group)
            )
            for (row, g), line, scale in zip(mine, part_codes, part_scales, strict=False):
                codes[row][g * group : g * group + width] = line
                scales[row][g : g + len(scale)] = scale
    return codes, scales, chosen


def decode(codes: Rows, scales: Rows, chosen: Rows, group: int) -> Rows:
    return [
        [(q + FORMATS[names[i // group]][1]) * line[i // group] for i, q in enumerate(row)]
        for row, line, names in zip(codes, scales, chosen, strict=True)
    ]


def digest(codes: Rows, scales: Rows, chosen: Rows, group: int) -> str:
    used = sorted({name for row in chosen for name in row})
    description: dict[str, Any] = {"formats": used, "group_size": group, "shape": [len(codes), len(codes[0])]}
    within = any(name != row[0] for row in chosen for name in row)
    if within:
        description["unit"] = "block"
    sha = hashlib.sha256(json.dumps(description).encode())
    sha.update(bytes(used.index(name) for row in chosen for name in (row if within else row[:1])))
    sha.update(b"".join(struct.pack(f"<{len(row)}b", *row) for row in codes))
    sha.update(b"".join(struct.pack(f"<{len(row)}e", *row) for row in scales))
    return sha.hexdigest()


def rotate(x: list[float], signs: bytes, b: int) -> list[float]:
    """`x R` as the text says it; every operation is rounded to float32."""

    def rounded(value: float) -> float:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])

    x = [-value if signs[j // 8] >> j % 8 & 1 else value for j, value in enumerate(x)]
    for start in range(0, len(x), b):
        h = 1
        while h < b:
            for i in (i for i in range(b) if not i & h):
                one, other = x[start + i], x[start + i + h]
                x[start + i], x[start + i + h] = rounded(one + other), rounded(one - other)
            h *= 2
    return [rounded(rounded(1 / math.sqrt(b)) * value) for value in x]


# The example ------------------------------------------------------------------------------------------------------


def fenced(kind: str) -> str:
    """The fenced block of the document that is called so."""
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```$", packed.specification(), re.MULTILINE | re.DOTALL)
    return str(block)


def documented_data() -> bytes:
    """The data of the example's file, from the dump in the document."""
    data = b""
    for line in fenced("hexdump data").splitlines():
        if line == "*":
            continue
        offset, _, values = line.partition("  ")
        while len(data) < int(offset, 16):
            data += data[-16:]
        data += bytes.fromhex(values)
    return data


def documented_file() -> bytes:
    text = fenced("text header").replace("\n", "").encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text + documented_data()


def test_the_example_is_what_is_written(tmp_path: Path) -> None:
    model = json.loads(fenced("json model"))
    spec = MatrixSpec(
        tuple(model["formats"]), model["group_size"], torch.tensor(model["row_formats"], dtype=torch.uint8)
    )
    encoded = Encoded(torch.tensor(model["codes"]).to(torch.int8), torch.tensor(model["scales"]).half())
    shape = (len(model["codes"]), len(model["codes"][0]))
    packed.write(
        tmp_path,
        [MatrixSource("proj", "linear", spec, shape, lambda: encoded)],
        {"norm": torch.tensor(model["norm"])},
        tied={},
        settings=model["settings"],
        provenance=model["provenance"],
    )
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == documented_file()
    text = packed.specification()
    assert f"has {len(written)} bytes. The first 8 are `{written[:8].hex(' ')}`" in text


def test_the_example_is_decoded_by_the_text() -> None:
    model = json.loads(fenced("json model"))
    tensors, metadata = read_file(documented_file())
    header = json.loads(metadata["edgerazor"])
    assert hashlib.sha256(metadata["edgerazor"].encode()).hexdigest() == metadata["edgerazor_sha256"]
    (entry,) = header["matrices"]
    codes, scales, chosen = read_matrix(tensors, "proj", entry)
    assert (codes, scales) == (model["codes"], model["scales"])
    assert decode(codes, scales, chosen, 16) == json.loads(fenced("json weights"))
    sums = digest(codes, scales, chosen, 16)
    sums += "".join(hashlib.sha256(tensors[f"proj.weight.{part}"]).hexdigest() for part in entry["parts"])
    sums += hashlib.sha256(tensors["norm"]).hexdigest()
    assert tensors["edgerazor.sha256"].hex() == sums
    assert hashlib.sha256(tensors["edgerazor.sha256"]).hexdigest() == header["sha256"]


# Everything that the text describes -------------------------------------------------------------------------------


def specs(rows: int, cols: int, group_size: int) -> dict[str, MatrixSpec]:
    groups, names = formats.group_count(cols, group_size), tuple(ALL)
    blocks = torch.arange(rows * groups).view(rows, groups) * 5 % len(names)
    each = {name: MatrixSpec((name,), group_size) for name in names}
    each["rows"] = MatrixSpec(names, group_size, (torch.arange(rows) * 3 % len(names)).to(torch.uint8))
    each["blocks"] = MatrixSpec(names, group_size, block_formats=blocks.to(torch.uint8))
    each["columns"] = MatrixSpec(("int4", "ternary"), group_size, block_formats=(blocks[:1] % 2).to(torch.uint8))
    return each


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("rows", "cols", "group_size"), [(18, 101, 40), (3, 300, 1000), (17, 64, 30)])
def test_a_reader_made_from_the_text_reads_all_formats(
    rows: int, cols: int, group_size: int, compress: bool, tmp_path: Path
) -> None:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
    w[1] = 0
    every = specs(rows, cols, group_size)
    sparse = torch.zeros(rows, cols)
    sparse[:, ::17] = 1.0
    encoded = {name: formats.encode_matrix(w, spec) for name, spec in every.items()}
    every["sparse"], encoded["sparse"] = every["ternary"], formats.encode_matrix(sparse, every["ternary"])
    sources = [
        MatrixSource(name, "linear", spec, (rows, cols), lambda name=name: encoded[name])  # type: ignore[misc]
        for name, spec in every.items()
    ]
    packed.write(tmp_path, sources, {}, tied={}, settings={}, provenance={}, compress=compress)
    tensors, metadata = read_file((tmp_path / "model.safetensors").read_bytes())
    header = json.loads(metadata["edgerazor"])
    entries = {name: entry for entry in header["matrices"] for name in entry["names"]}
    assert entries.keys() == every.keys()
    sums = iter(tensors["edgerazor.sha256"][i : i + 32].hex() for i in range(0, len(tensors["edgerazor.sha256"]), 32))
    for name, entry in sorted(entries.items()):
        codes, scales, chosen = read_matrix(tensors, name, entry)
        assert codes == encoded[name].codes.tolist(), name
        assert scales == encoded[name].scales.tolist(), name
        group = min(group_size, cols)
        assert digest(codes, scales, chosen, group) == next(sums), name
        decoded = torch.tensor(decode(codes, scales, chosen, group))
        assert torch.equal(decoded, formats.decode_matrix(encoded[name], every[name])), name
        for _ in entry["parts"]:
            next(sums)
    assert math.prod(encoded["sparse"].codes.shape) > 0


@pytest.mark.parametrize("columns", [12, 96, 576])
def test_a_reader_made_from_the_text_rotates_to_the_bit(columns: int, tmp_path: Path) -> None:
    rotation = formats.hadamard(columns)
    assert rotation is not None
    spec, w = MatrixSpec(("int4",), 16, rotation=rotation), torch.randn(2, columns)
    encoded = formats.encode_matrix(rotation.rotate(w), spec)
    source = MatrixSource("proj", "linear", spec, (2, columns), lambda: encoded)
    packed.write(tmp_path, [source], {}, tied={}, settings={}, provenance={})
    tensors, metadata = read_file((tmp_path / "model.safetensors").read_bytes())
    header = json.loads(metadata["edgerazor"])
    signs = tensors[f"edgerazor.signs.{columns}"]
    digests = (hashlib.sha256(f"edgerazor signs {columns} {number}".encode()).digest() for number in range(3))
    stream = b"".join(digests)[: len(signs)]
    assert signs[:-1] == stream[:-1]
    assert signs[-1] == stream[-1] & (1 << (columns - 1) % 8 + 1) - 1
    assert (header["version"], header["rotations"]) == (3, {str(columns): columns & -columns})
    assert tensors["edgerazor.sha256"][-32:] == hashlib.sha256(signs).digest()
    x = torch.randn(columns)
    assert rotate(x.tolist(), signs, columns & -columns) == rotation.rotate(x).tolist()


def test_the_document_names_every_field_and_format() -> None:
    text = packed.specification()
    for name in ALL:
        assert f"| `{name}` |" in text, name
    from edgerazor.packed.description import Description

    for field in Description.model_fields:
        assert f"| `{field}" in text, field
    for setting in packed.SETTINGS:
        assert f"`{setting}`" in text, setting
    assert f"versions 1 to {packed.VERSION}" in text

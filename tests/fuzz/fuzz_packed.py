"""Packed folders, damaged in every way we could think of: the reader refuses them, or finds all as it was.

    make fuzz                              100,000 damaged folders (N=...), or as many as FUZZ_SECONDS=... allow
    PYTHONPATH=tests python tests/fuzz/fuzz_packed.py --only 4711   one of them again, with a traceback

Small folders of every kind (mixed rows, blocks, tails, rotations, tied matrices, shards, scales of inputs) lie in
memory; a worker process changes one, writes it to a folder, and opens and verifies it there. *The law*:
`PackedModel.open`, `verify` and `input_scales` either succeed with exactly what was written, or raise a `UserError` of
one sentence with exit code 1. Where the header's checksum was made again to fit the change, the header may describe
another model, but its matrices must decode to what their recorded digests say. Nothing may crash, hang, or take 1 GB of
memory: the worker runs under a limit, and a watcher restarts it behind whatever ended it.

Each damaged folder follows from its number alone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from edgerazor import formats, packed
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.packed import CHECKSUMS, INDEX_FILE, WEIGHTS_FILE, PackedModel
from edgerazor.packed.description import HEADER_KEY, HEADER_SUM_KEY
from helpers.fuzzing import Folder, Subject, check_sentence, main

# Folders to damage ------------------------------------------------------------------------------------------------


def specs() -> dict[str, tuple[MatrixSpec, int, int]]:
    """kind of matrix -> specification, rows, columns."""
    every = tuple(formats.names())
    rows = (torch.arange(19) % len(every)).to(torch.uint8)
    blocks = (torch.arange(15).view(5, 3) * 5 % len(every)).to(torch.uint8)
    columns = torch.tensor([[1, 0, 0]], dtype=torch.uint8)
    return {
        "mixed": (MatrixSpec(every, 16, rows), 19, 33),
        "blocks": (MatrixSpec(every[:3], 16, block_formats=blocks % 3), 5, 33),
        "columns": (MatrixSpec(("ternary", "int4"), 8, block_formats=columns), 4, 24),
        "rows": (MatrixSpec(("ternary", "int4"), 8, (torch.arange(17) % 8 == 0).to(torch.uint8)), 17, 22),
        "rotated": (MatrixSpec(("int4",), 8, rotation=formats.hadamard(12)), 5, 12),
        "turned": (MatrixSpec(("ternary", "int3"), 8, rows % 2, rotation=formats.hadamard(44)), 19, 44),
        **{name: (MatrixSpec((name,), 8), 5, 13) for name in every},
    }


#: kind of folder -> kinds of its matrices, and whether it is cut into shards; of `compressed` ones, before that.
KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "plain": (("ternary", "int4"), False),
    "bits": (("int3", "int8", "int2"), False),
    "mixed": (("mixed",), False),
    "rows": (("rows", "int4"), False),
    "blocks": (("blocks", "columns"), False),
    "sharded": (("ternary", "rows"), True),
    "rotated": (("rotated", "turned"), False),
    "compressed": (("ternary", "int4", "int3"), False),
    "compressed mixed": (("mixed", "blocks"), False),
    "compressed shards": (("rows", "columns"), True),
    "compressed rotated": (("rotated", "turned"), True),
}


def make_folders(place: Path) -> list[Folder]:
    """One of each kind, all with a tied embedding, other tensors, and scales of inputs."""
    known, made = specs(), []
    for kind, (names, sharded) in KINDS.items():
        folder = place / kind
        folder.mkdir()
        matrices = []
        for name, role in [("int4", "embedding"), *((name, "linear") for name in names)]:
            spec, rows, cols = known[name]
            w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(len(matrices)))
            path = "model.embed" if role == "embedding" else f"layers.{name}"
            encoded = formats.encode_matrix(w, spec)
            matrices.append(packed.PackedMatrix(path, role, encoded, spec).source())  # type: ignore[arg-type]
        others = {"norm.weight": torch.randn(9).bfloat16(), f"layers.{names[0]}.input_scale": torch.tensor(0.25)}
        header = packed.write(
            folder,
            matrices,
            others,
            tied={"lm_head": "model.embed"},
            settings={"activation_bits": 8, "kv_bits": 8, "thresholds": []},
            provenance={"teacher": {"name": "tiny"}, "seed": 1},
            shard_bytes=700 if sharded else 10**9,
            compress=kind.startswith("compressed"),
        )
        made.append(Folder(kind, {file.name: file.read_bytes() for file in folder.iterdir()}, header))
    return made


# Bytes and JSON ---------------------------------------------------------------------------------------------------


class Twice:
    """Stands in the place of a dictionary that has a name twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.pairs = pairs


class Raw(str):
    """JSON, or what claims to be."""


def dump(tree: Any) -> str:
    """JSON that may be wrong."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict | Twice):
        pairs = tree.pairs if isinstance(tree, Twice) else list(tree.items())
        return "{" + ",".join(f"{json.dumps(key)}:{dump(value)}" for key, value in pairs) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    return json.dumps(tree)


def split(content: bytes) -> tuple[Any, bytes]:
    """Header of a safetensors file, and its data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(text: bytes, data: bytes) -> bytes:
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text + data


def paths(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a tree but its top."""
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*here, key)
        yield from paths(value, (*here, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


RAW = ["NaN", "Infinity", "-Infinity", "1e400", "-0", "0x10", "01", "1" * 5000, "", "'", "nul", '"\\x"', '"\\ud800"']
RAW += ["[" * 5000, "[" * 300 + "]" * 300, '{"a":' * 2000 + "1" + "}" * 2000, "\x00", "//", '"\n"']
NASTY: list[Any] = [None, True, False, 0, 1, -1, 1.5, 1e308, 2**31, 2**53, 2**62, 2**63, 2**64, 10**30]
NASTY += ["", "x", "\x00", "../../x", "/dev/zero", "a\nb\x1b[31m", "\ud800", "é" * 200, "y" * 100_000, "ternary", "F64"]
NASTY += ["layers.0-1", "0-999999999." * 9, "layers.3-2.x"]
NASTY += [[], {}, [[]], [1, 2, 3], [-1, 4], [2**40, 2**40], {"a": 1}, [0], ["int4", "int4"], {"": ""}]


def nasty(draw: random.Random, old: Any, tree: Any, places: list[tuple[Any, ...]]) -> Any:
    """Something in the place of `old`: near it, of another place, or strange."""
    choice = draw.random()
    if isinstance(old, int) and choice < 0.4:
        return draw.choice(
            [old + 1, old - 1, 2 * old, old // 2, -old, old + 64, old ^ 1 << draw.randrange(40), float(old)]
        )
    if isinstance(old, str) and choice < 0.2:
        return draw.choice([old + "x", old[1:], old.upper(), old + "\n", f" {old}", old[::-1], old * 2])
    if isinstance(old, list) and choice < 0.3:
        return draw.choice([old + old, old[1:], old[::-1], [old], [*old, 1], [value for value in old if value]])
    if choice < 0.6:
        return copy.deepcopy(at(tree, draw.choice(places)))
    return Raw(draw.choice(RAW)) if choice < 0.7 else copy.deepcopy(draw.choice(NASTY))


def change_tree(draw: random.Random, tree: Any) -> Any:
    """A changed copy of a JSON tree."""
    tree = copy.deepcopy(tree)
    if draw.random() < 0.02:
        return copy.deepcopy(draw.choice(NASTY))
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        places = list(paths(tree))
        if not places:
            break
        *above, key = draw.choice(places)
        place = at(tree, tuple(above))
        act = draw.random()
        if act < 0.6:
            place[key] = nasty(draw, place[key], tree, places)
        elif act < 0.7:
            del place[key]
        elif act < 0.8 and isinstance(place, dict):
            name = draw.choice(["", "new", f"{key}x", "a\nb", "\ud800", "__metadata__", *map(str, place)])
            place[name] = copy.deepcopy(place[key])
            if draw.random() < 0.5 and name != key:
                del place[key]
        elif isinstance(place, dict) and above:
            pairs = [*place.items(), (key, nasty(draw, place[key], tree, places))]
            draw.shuffle(pairs)
            at(tree, tuple(above[:-1]))[above[-1]] = Twice(pairs)
            break  # what is there twice has no paths
        elif isinstance(place, list):
            place.insert(draw.randrange(len(place) + 1), copy.deepcopy(draw.choice(NASTY)))
    return tree


# Damage: each changes a folder in memory ---------------------------------------------------------------------------


def flip_bits(draw: random.Random, folder: Folder) -> None:
    name = draw.choice(sorted(folder.files))
    content = bytearray(folder.files[name])
    for _ in range(draw.choice([1, 1, 1, 2, 10, 100])):
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
    folder.files[name] = bytes(content)


def rewrite_bytes(draw: random.Random, folder: Folder) -> None:
    """Cut, lengthen, leave out, double, overwrite, shuffle."""
    name = draw.choice(sorted(folder.files))
    content = folder.files[name]
    start = draw.randrange(len(content) + 1)
    if draw.random() < 0.3:  # where something begins or ends
        start = draw.choice([0, 7, 8, 9, 64, len(content) - 1, len(content)])
    stop = min(len(content), start + draw.choice([1, 2, 8, 64, 10**6]))
    piece, noise = content[start:stop], draw.randbytes(draw.choice([1, 8, 64, 1000]))
    folder.files[name] = draw.choice(
        [
            content[:start],
            content + noise,
            content + b"\0" * len(noise),
            content[:start] + content[stop:],
            content[:stop] + piece + content[stop:],
            content[:start] + noise + content[stop:],
            content[:start] + noise + content[start:],
            content[:start] + b"\0" * len(piece) + content[stop:],
            content[:start] + b"\xff" * len(piece) + content[stop:],
            noise,
            b"",
        ]
    )


def lie_about_length(draw: random.Random, folder: Folder) -> None:
    """The eight bytes that say how long a safetensors header is."""
    name = draw.choice(folder.weights())
    content = folder.files[name]
    (length,) = struct.unpack("<Q", content[:8])
    lengths = [0, 1, 2, 7, length - 1, length + 1, length + 64, len(content), len(content) - 8, 10**8, 10**8 + 1]
    lengths += [2**31, 2**32 + length, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, draw.randrange(2**64)]
    folder.files[name] = struct.pack("<Q", draw.choice(lengths)) + content[8:]


def change_entries(draw: random.Random, folder: Folder) -> None:
    """The JSON of a safetensors file: dtypes, shapes, places, names, metadata."""
    name = draw.choice(folder.weights())
    entries, data = split(folder.files[name])
    folder.files[name] = join(encoded(draw, dump(change_tree(draw, entries))), data)


def change_header(draw: random.Random, folder: Folder) -> None:
    """Our header, most often with a checksum that fits."""
    name = folder.weights()[0]
    entries, data = split(folder.files[name])
    header = dump(change_tree(draw, json.loads(entries["__metadata__"][HEADER_KEY])))
    put_header(draw, folder, entries, data, header)


def put_header(draw: random.Random, folder: Folder, entries: Any, data: bytes, header: str) -> None:
    metadata = entries["__metadata__"]
    metadata[HEADER_KEY] = header
    if draw.random() < 0.9:
        metadata[HEADER_SUM_KEY] = hashlib.sha256(header.encode(errors="surrogatepass")).hexdigest()
        folder.lies = True
    folder.files[folder.weights()[0]] = join(encoded(draw, dump(entries)), data)


def encoded(draw: random.Random, text: str) -> bytes:
    """UTF-8, or now and then something else."""
    if draw.random() < 0.02:
        return text.encode(draw.choice(["utf-16", "utf-8-sig", "utf-32"]), errors="surrogatepass")
    raw = text.encode(errors="surrogatepass")
    return raw.replace(b"norm", b"no\xffm", draw.randrange(3)) if draw.random() < 0.02 else raw


def change_data_and_checksum(draw: random.Random, folder: Folder) -> None:
    """Bytes of a tensor, with a checksum of it that fits: codes out of range, scales that are no numbers."""
    contents = {name: split(folder.files[name]) for name in folder.weights()}
    name = draw.choice(list(contents))
    entries, data = contents[name]
    tensor = draw.choice([name for name in entries if name != "__metadata__"])
    start, stop = entries[tensor]["data_offsets"]
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 50])):
        place = draw.randrange(start, stop)
        changed[place] = draw.choice([0, 0xFF, 0x7F, 0x80, draw.randrange(256)])
    if draw.random() < 0.2:
        changed[start:stop] = draw.choice([b"\0", b"\xff", b"\x00\x7c", b"\x01\x80"]) * (stop - start)
        del changed[len(data) :]
    folder.files[name] = join(dump(entries).encode(), bytes(changed))
    rows = checksum_rows(folder.header)
    if tensor in rows:
        put_checksum(folder, rows.index(tensor), hashlib.sha256(changed[start:stop]).digest())
    refer_to_checksums(draw, folder)


def change_checksums(draw: random.Random, folder: Folder) -> None:
    """The tensor of checksums, which then has a checksum that fits: others, or in another order."""
    rows = checksum_rows(folder.header)
    for _ in range(draw.choice([1, 1, 3])):
        first, second = (draw.randrange(len(rows)) for _ in range(2))
        sums = checksum(folder, first), checksum(folder, second)
        if draw.random() < 0.5 and first != second:
            put_checksum(folder, first, sums[1])
            put_checksum(folder, second, sums[0])
        else:
            put_checksum(folder, first, draw.choice([sums[1], bytes(32), draw.randbytes(32)]))
    refer_to_checksums(draw, folder)


def checksum_rows(header: packed.Header) -> list[str]:
    """What each checksum is of: the name of a stored tensor, or nothing where it is the digest of a matrix."""
    rows = []
    for name, entry in header.matrices.items():
        rows += ["", *(header.tensor_name(name, part) for part in entry.sha256)]
    return [*rows, *header.others, *(f"{packed.SIGNS}{columns}" for columns in sorted(header.rotations, key=int))]


def checksum_place(folder: Folder) -> tuple[str, int, int]:
    """The file that has the checksums, and where they begin and end in it."""
    for name in folder.weights():
        entries, data = split(folder.files[name])
        if CHECKSUMS in entries:
            begin, end = entries[CHECKSUMS]["data_offsets"]
            before = len(folder.files[name]) - len(data)
            return name, before + begin, before + end
    raise AssertionError("there are no checksums")


def checksum(folder: Folder, row: int) -> bytes:
    name, begin, _ = checksum_place(folder)
    return folder.files[name][begin + 32 * row : begin + 32 * row + 32]


def put_checksum(folder: Folder, row: int, value: bytes) -> None:
    name, begin, _ = checksum_place(folder)
    content = folder.files[name]
    folder.files[name] = content[: begin + 32 * row] + value + content[begin + 32 * row + 32 :]


def refer_to_checksums(draw: random.Random, folder: Folder) -> None:
    """A header with the checksum of the checksums."""
    name, begin, end = checksum_place(folder)
    entries, data = split(folder.files[folder.weights()[0]])
    header = json.loads(entries["__metadata__"][HEADER_KEY])
    header["sha256"] = hashlib.sha256(folder.files[name][begin:end]).hexdigest()
    put_header(draw, folder, entries, data, dump(header))


def change_index(draw: random.Random, folder: Folder) -> None:
    """The list of shards, or one beside a folder that has none."""
    index = json.loads(folder.files.get(INDEX_FILE, b'{"weight_map": {"norm.weight": "model.safetensors"}}'))
    tricks = ["../model.safetensors", "/etc/passwd", "model.bin", "", ".", "model-00001-of-00001.safetensors\n"]
    tricks += ["model-00099-of-00099.safetensors", "model-00001-of-00003.safetensors", "\x00", "a" * 5000, "\ud800"]
    if draw.random() < 0.5:
        key = draw.choice(list(index["weight_map"]))
        index["weight_map"][key] = draw.choice(tricks)
    else:
        index = change_tree(draw, index)
    folder.files[INDEX_FILE] = encoded(draw, dump(index))


def exchange_files(draw: random.Random, folder: Folder) -> None:
    """Missing files, and files with each other's names."""
    first, second = draw.choices(sorted(folder.files), k=2)
    if draw.random() < 0.5 or first == second:
        del folder.files[first]
    elif draw.random() < 0.5:
        folder.files[first], folder.files[second] = folder.files[second], folder.files[first]
    else:
        folder.files[first] = folder.files[second]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened, contextlib.chdir(path.parent):
        opened.bind(path.name)


SPECIAL: list[Callable[[Path], None]] = [
    os.mkfifo,
    Path.mkdir,
    make_socket,
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/nowhere/at/all"),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/null"),
    lambda path: path.symlink_to(path.parent),
]


def replace_by_no_file(draw: random.Random, folder: Folder) -> None:
    """A pipe, a folder, a socket, a device, or a link that leads nowhere."""
    name = draw.choice([*folder.files, INDEX_FILE, WEIGHTS_FILE])
    folder.files.pop(name, None)
    folder.special[name] = draw.choice(SPECIAL)


#: damage -> how often
DAMAGES: dict[Callable[[random.Random, Folder], None], int] = {
    flip_bits: 15,
    rewrite_bytes: 15,
    lie_about_length: 5,
    change_entries: 20,
    change_header: 25,
    change_data_and_checksum: 10,
    change_checksums: 3,
    change_index: 6,
    exchange_files: 2,
    replace_by_no_file: 2,
}


# The law ----------------------------------------------------------------------------------------------------------


def check(path: Path, folder: Folder) -> str:
    """`refused`, `unharmed`, or `other` for another model under a renewed checksum.

    Raises:
        AssertionError: the law is broken.
    """
    try:
        model = PackedModel.open(path)
        model.verify()
        model.input_scales()
    except UserError as error:
        check_sentence(error)
        return "refused"
    if model.header == folder.header:
        return "unharmed"
    assert folder.lies, "something is not as it was written, and nobody noticed"
    for name, entry in model.header.matrices.items():
        matrix = model.matrix(name)
        assert formats.digest(matrix.encoded, matrix.spec) == entry.digest
    return "other"


SUBJECT = Subject(__file__, make_folders, DAMAGES, check)

if __name__ == "__main__":
    main(SUBJECT, __doc__, 100_000)

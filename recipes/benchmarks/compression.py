"""What `pack --compress` stores of Gaussian weights, beside their Shannon entropy, and how fast.

    make compression                 the table in recipes/results/packing.md
    python -m recipes.benchmarks.compression --results none

*Entropy* is that of single codes (order 0), and of single scales, of one matrix; *above*: how much larger the zstd
frames are, and those of codes alone. (256 scales have an entropy of 8 bits each at most, because there are no more of
them; no coder knows them beforehand, so small matrices are above by more.) Speeds are of one core, in millions of
weights a second, best of `--rounds`: `write` makes frames of codes and scales, `read` makes of frames the parts that
kernels read. Neither has the checksums in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from edgerazor import formats, packed
from edgerazor.console import Console
from edgerazor.console import table as rich_table
from edgerazor.formats import MatrixSpec
from edgerazor.packed.compression import compress, decompress, entropy_bytes
from edgerazor.workdir import machine
from recipes.benchmarks.folders import RESULTS
from recipes.benchmarks.results import commit, markdown, publish

HEAD = ("format", "matrix", "group", "packed bits", "entropy", "stored", "above", "codes above", "write", "read")
MATRICES = [
    *((name, (1024, 3072), 256) for name in ("ternary", "int2", "int2z", "int3", "int4", "int5", "int8")),
    *((name, (1024, 960), 64) for name in ("ternary", "int2z", "int4")),
    *((name, (256, 256), 256) for name in ("ternary", "int2", "int2z", "int3", "int4", "int5", "int8")),
]


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The shortest of some runs."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def row(name: str, shape: tuple[int, int], group_size: int, rounds: int) -> list[str]:
    """One line of the table."""
    spec = MatrixSpec((name,), group_size)
    generator = torch.Generator().manual_seed(0)
    encoded = formats.encode_matrix(0.02 * torch.randn(shape, generator=generator), spec)
    weights, sizes = encoded.codes.numel(), formats.stream_bytes(spec, shape)

    def write() -> dict[str, bytes]:
        return {part: compress(streams) for part, streams in formats.to_streams(encoded, spec).items()}

    frames = {part: torch.frombuffer(bytearray(frame), dtype=torch.uint8) for part, frame in write().items()}

    def read() -> object:
        streams = {part: decompress(frame, sizes[part]) for part, frame in frames.items()}
        return formats.from_streams(streams, spec, shape)

    entropy = packed.matrix_entropy_bytes(encoded, spec)
    stored = sum(frame.numel() for frame in frames.values())
    offset = formats.get(name).offset
    codes = frames[name].numel() / entropy_bytes(encoded.codes.view(torch.uint8) + offset)
    bits = [f"{8 * size / weights:.3f}" for size in (spec.packed_bytes(shape), entropy, stored)]
    speeds = [f"{weights / seconds(work, rounds) / 1e6:.0f}" for work in (write, read)]
    above = [f"{stored / entropy - 1:.2%}", f"{codes - 1:.2%}"]
    return [name, f"{shape[0]} x {shape[1]}", str(group_size), *bits, *above, *speeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default=str(RESULTS / "packing.md"), help="where the table goes, or `none`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(name, shape, group_size, options.rounds) for name, shape, group_size in MATRICES]
    Console().out.print(rich_table("Gaussian weights, compressed", list(HEAD), rows))
    if options.results != "none":
        publish("compression", f"{machine()}; commit {commit()}.\n\n{markdown(HEAD, rows)}", Path(options.results))


if __name__ == "__main__":
    main()

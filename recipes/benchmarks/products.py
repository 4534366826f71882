"""How fast the products with packed matrices are: one token against the bandwidth of memory, many against arithmetic.

    python -m recipes.benchmarks.products [--isa NAME ...] [--formats NAME ...] [--json]

One token: a matrix larger than the caches is read once a product; GB/s are its bytes, scales included, and the share is
that of the bandwidth measured in the same rounds, with as many threads. Many tokens: products with a matrix that fits
the caches, in multiplications (and additions) per second. Medians of interleaved rounds; run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

from edgerazor import formats
from edgerazor.kernels import native
from edgerazor.kernels.memory import huge_memory

#: A ternary part as it is once expanded to codes of two bits.
EXPANDED = "ternary2"


def random_part(name: str, geometry: native.RowLayout, rows: int) -> native.FormatRows:
    """A part of random bytes, its scales beside one another in memory."""
    number_format = formats.get("int2z" if name == EXPANDED else name)
    bits = 0 if name == "ternary" else number_format.code_bits
    blocks, width = -(-rows // native.ROWS), geometry.block_bytes(bits)
    codes = huge_memory(blocks * width).view(blocks, width)
    codes[:] = torch.randint(0, 243, (1, width), dtype=torch.uint8)
    scales = huge_memory(blocks * geometry.groups * native.ROWS * 2).view(torch.float16)
    scales.fill_(0.01)
    return native.FormatRows.of(codes, scales.view(blocks, geometry.groups, native.ROWS), rows, number_format)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Product:
    """Products of random activations with a random part, by some threads."""

    def __init__(self, name: str, group: int, shape: tuple[int, int], tokens: int) -> None:
        self.label = (name, group)
        self.geometry = native.RowLayout(shape[1], group, group)
        self.part = random_part(name, self.geometry, shape[0])
        self.x = native.quantize(torch.randn(tokens, shape[1]), self.geometry)
        self.y = torch.empty(tokens, shape[0])
        self.bytes = self.part.codes.nbytes + self.part.scales.nbytes
        self.multiplications = shape[0] * shape[1] * tokens

    def run(self, pool: ThreadPoolExecutor, threads: int, isa: int) -> None:
        cuts = [self.part.blocks * i // threads // 4 * 4 for i in range(threads)] + [self.part.blocks]

        def share(ends: tuple[int, int]) -> None:
            native.linear_blocks(self.x, self.geometry, self.part, None, self.y, *ends, isa)

        list(pool.map(share, pairwise(cuts)))


def one_token(name: str, group: int, arguments: argparse.Namespace, isas: list[int]) -> list[dict[str, object]]:
    """Rows of the table for a token: every instruction set and number of threads, interleaved with reading."""
    columns = 2048
    width = native.RowLayout(columns, group, group).block_bytes(0 if name == "ternary" else 2)
    product = Product(name, group, (arguments.megabytes * 2**20 // width // 4 * 4 * native.ROWS, columns), 1)
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for threads in arguments.threads:
            with ThreadPoolExecutor(threads) as pool:
                pieces = product.part.codes.view(-1).chunk(threads)
                for isa in (-1, *isas):
                    work = (
                        (lambda: list(pool.map(native.read, pieces)))  # noqa: B023
                        if isa < 0
                        else (lambda: product.run(pool, threads, isa))  # noqa: B023
                    )
                    seconds.setdefault((threads, isa), []).append(timed(work))
    rows: list[dict[str, object]] = []
    for (threads, isa), times in seconds.items():
        if isa >= 0:
            reading = product.part.codes.nbytes / statistics.median(seconds[threads, -1])
            speed = product.bytes / statistics.median(times)
            rows.append(
                {"tokens": 1, "format": name, "group": group, "isa": native.isas()[isa], "threads": threads}
                | {"gigabytes_per_second": speed / 1e9, "share": speed / reading}
            )
    return rows


def many_tokens(name: str, group: int, arguments: argparse.Namespace, isas: list[int]) -> list[dict[str, object]]:
    """Rows of the table for many tokens."""
    product = Product(name, group, (2048, 2048), arguments.tokens)
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for threads in arguments.threads:
            with ThreadPoolExecutor(threads) as pool:
                for isa in isas:
                    spent = timed(lambda: product.run(pool, threads, isa))  # noqa: B023
                    seconds.setdefault((threads, isa), []).append(spent)
    return [
        {"tokens": arguments.tokens, "format": name, "group": group, "isa": native.isas()[isa], "threads": threads}
        | {"gigamacs_per_second": product.multiplications / statistics.median(times) / 1e9}
        for (threads, isa), times in seconds.items()
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", choices=native.isas(), default=list(native.isas()[1:]))
    parser.add_argument("--formats", nargs="+", default=["ternary", EXPANDED, "int2", "int3", "int4", "int5", "int8"])
    parser.add_argument("--groups", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--megabytes", type=int, default=1024, help="of the matrix for one token")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    isas = [native.isas().index(name) for name in arguments.isa]
    for group in arguments.groups:
        for name in arguments.formats:
            for measure in (one_token, many_tokens):
                for row in measure(name, group, arguments, isas):
                    if arguments.json:
                        print(json.dumps(row))
                    else:
                        print("  ".join(f"{v:9.3g}" if isinstance(v, float) else f"{v!s:>9}" for v in row.values()))
                sys.stdout.flush()


if __name__ == "__main__":
    main()

"""What the rotation of inputs costs in the native decoder: rotated and unrotated models in turns, in one run.

    python -m recipes.benchmarks.rotation [--shapes NAME ...] [--formats NAME ...] [--threads N]

Decoders of random bytes in published shapes, embedding and head int4; both share all weights, and only one of them
rotates. In each round either takes in a prompt and then decodes some tokens, and the order changes from round to round.
Medians, and the median of the rounds' ratios, go into recipes/results/speed.md. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edgerazor import formats, kernels
from edgerazor.formats import SCALES, MatrixSpec
from edgerazor.kernels import native
from edgerazor.kernels.decoder import RMS, Decoder, Layer, Linear, Network, Norm, SequenceSpan
from edgerazor.workdir import machine
from recipes.benchmarks.folders import RESULTS
from recipes.benchmarks.products import random_part, timed
from recipes.benchmarks.results import commit, markdown, publish

PAGE = RESULTS / "speed.md"
HEAD = (
    "model",
    "format",
    "threads",
    "decode: ms/token",
    "rotated",
    "ratio",
    "prefill: ms/token",
    "rotated",
    "ratio",
)
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
POSITIONS = 4096  # of RoPE, and KV slots


class Shape(NamedTuple):
    """Sizes of a model of the llama kind."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "SmolLM2-135M": Shape(49_152, 576, 1536, 30, 9, 3, 64),
    "Qwen3-0.6B": Shape(151_936, 1024, 3072, 28, 16, 8, 128),
}


def linear(name: str, group: int, rows: int, columns: int) -> Linear:
    """A linear layer of random bytes, as the runtime would hold it for the kernels in use."""
    part = random_part(name, native.RowLayout(columns, group, group), rows)
    parts = {name: part.codes, name + SCALES: part.scales}
    matrix = native.Matrix(parts, MatrixSpec((name,), group), (rows, columns))
    if kernels.name() in kernels.EXPANDED:
        matrix = matrix.expanded()
    return Linear(matrix, None, group)


def network(shape: Shape, name: str, group: int) -> Network:
    """A model whose matrices have a format and whose embedding, which is the head, has int4."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q": (query, shape.hidden), "k": (key, shape.hidden), "v": (key, shape.hidden)}
    sizes |= {"o": (shape.hidden, query), "gate": (shape.intermediate, shape.hidden)}
    sizes |= {"up": (shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
    norm = Norm(RMS, 1e-6, torch.ones(shape.hidden))
    layers = []
    for _ in range(shape.layers):
        linears: dict[str, Any] = {place: linear(name, group, *size) for place, size in sizes.items()}
        layers.append(Layer(**linears, before_attention=norm, before_mlp=norm, rope_dim=shape.head_dim))
    embedding = linear("int4", group, shape.vocabulary, shape.hidden)
    return Network(
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        embedding=embedding,
        head=embedding,
        final_norm=norm,
        layers=layers,
        rope_dim=shape.head_dim,
        attention_scale=shape.head_dim**-0.5,
    )


def rotated(plain: Network) -> Network:
    """The same matrices, taken for rotated ones."""

    def turn(unrotated: Linear) -> Linear:
        return replace(unrotated, rotation=formats.hadamard(unrotated.matrix.columns))

    layers = []
    for layer in plain.layers:
        changes: dict[str, Any] = {name: turn(getattr(layer, name)) for name in LINEARS}
        layers.append(replace(layer, **changes))
    embedding = turn(plain.embedding)
    return replace(plain, embedding=embedding, head=embedding, layers=layers)


class Runner:
    """A decoder that is timed."""

    def __init__(self, made: Network, threads: int, isa: int, prompt: int) -> None:
        self.decoder = Decoder(made, threads, isa)
        angles = torch.rand(POSITIONS, made.rope_dim // 2)
        self.decoder.set_rope(angles.cos(), angles.sin())
        self.decoder.reserve(POSITIONS)
        self.prompt = torch.randint(0, made.vocab_size, (prompt,))

    def decode(self, tokens: int) -> float:
        """Milliseconds a token, behind the prompt."""
        span = SequenceSpan(0, 0, 0, len(self.prompt), 1)
        return 1e3 * timed(lambda: self.decoder.greedy(span, 1, tokens)) / tokens

    def prefill(self) -> float:
        """Milliseconds a token."""
        count = len(self.prompt)
        spans = [SequenceSpan(0, 0, 0, 0, count)]
        return 1e3 * timed(lambda: self.decoder.logits(spans, self.prompt, [count - 1])) / count


def measure(name: str, number_format: str, options: argparse.Namespace) -> list[str]:
    """The row under `HEAD` of a shape and a format."""
    plain = network(SHAPES[name], number_format, options.group)
    isa = native.isas().index(kernels.name())
    made = [plain] if options.plain else [plain, rotated(plain)]
    runners = [Runner(one, options.threads, isa, options.prompt) for one in made]
    times: list[list[tuple[float, float]]] = [[] for _ in runners]
    for number in range(-1, options.rounds):  # the first round is not counted
        for index in range(len(runners)) if number % 2 else reversed(range(len(runners))):
            prefill = runners[index].prefill()
            if number >= 0:
                times[index].append((runners[index].decode(options.tokens), prefill))
    cells = [name, number_format, str(options.threads)]
    for what in range(2):
        series = [[taken[what] for taken in of_runner] for of_runner in times]
        cells += [f"{statistics.median(of_runner):.3f}" for of_runner in series]
        if len(series) == 2:
            cells.append(f"{statistics.median(b / a for a, b in zip(*series, strict=True)):.3f}")
        print(f"least: {' '.join(f'{min(of_runner):.3f}' for of_runner in series)}", flush=True)
    return cells


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", default=["ternary", "int4"])
    parser.add_argument("--group", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=8, help="that are decoded in a round")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--plain", action="store_true", help="unrotated models only")
    parser.add_argument("--page", type=Path, default=PAGE, help="with marks for the table")
    parser.add_argument("--no-page", action="store_true")
    return parser.parse_args()


def main() -> None:
    """The command line."""
    options = parse()
    rows = []
    for shape, number_format in product(options.shapes, options.formats):
        rows.append(measure(shape, number_format, options))
        print("  ".join(rows[-1]), flush=True)
    if not (options.no_page or options.plain):
        facts = f"{machine()}, kernels {kernels.name()}; groups of {options.group}, a prompt of {options.prompt} tokens"
        text = f"{markdown(HEAD, rows)}\n\n{facts}; medians of {options.rounds} rounds in turns; commit {commit()}."
        publish("rotation", text, options.page)


if __name__ == "__main__":
    main()

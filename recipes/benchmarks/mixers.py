"""What layers of other parts take in the native decoder: models of published shapes and random bytes, in turns.

    python -m recipes.benchmarks.mixers [--shapes NAME ...] [--threads N] [--long]

All matrices are int4, embedding and head the same one. In each round the memory's bandwidth is measured, and every
model takes in a prompt and then decodes some tokens. `share` is the bytes of the weights that a token reads, over the
time of a token, in units of that bandwidth; prefill is in billions of products a second. With `--long`, decode is also
timed behind 32768 tokens, whose keys and values are whatever the cache holds. Medians. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from edgerazor.benchmark.bandwidth import Bandwidth
from edgerazor.kernels.decoder import (
    RMS,
    Convolution,
    Decoder,
    GatedDeltaRule,
    Layer,
    Network,
    Norm,
    SequenceSpan,
    ShortConvolution,
)
from edgerazor.runtime.weight_memory import matrix_bytes
from recipes.benchmarks.products import timed
from recipes.benchmarks.results import markdown
from recipes.benchmarks.rotation import SHAPES as PLAIN
from recipes.benchmarks.rotation import linear, network

HEAD = ("model", "MB/token", "decode: ms/token", "share", "behind 32768", "prefill: G products/s")
LONG = 32768
GROUP = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `mixers` are those of its layers, in turn: attention, convolution or delta rule."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mixers: str
    activation: str = "silu"
    norms_behind: bool = False
    window: int = 0


SHAPES = {
    "Qwen3-0.6B": None,
    "Gemma-3-270M": Shape(262_144, 640, 2048, 18, 4, 1, 256, "a", "gelu_tanh", True, 512),
    "LFM2-700M": Shape(65_536, 1536, 6912, 16, 24, 8, 64, "ccaccaccacacacac"),
    "Qwen3.5-0.8B": Shape(248_320, 1024, 3584, 24, 8, 2, 256, "ddda"),
}


def build(name: str) -> Network:
    """A model of random bytes."""
    shape = SHAPES[name]
    if shape is None:
        return network(PLAIN[name], "int4", GROUP)
    hidden, inner = shape.hidden, shape.intermediate
    norm, of_head = Norm(RMS, 1e-6, torch.ones(hidden)), Norm(RMS, 1e-6, torch.ones(shape.head_dim))
    layers = []
    for number in range(shape.layers):
        kind = shape.mixers[number % len(shape.mixers)]
        mlp: dict[str, Any] = {place: linear("int4", GROUP, inner, hidden) for place in ("gate", "up")}
        behind: dict[str, Any] = {"after_attention": norm, "after_mlp": norm} if shape.norms_behind else {}
        layers.append(
            Layer(
                **mixer(shape, kind),
                **mlp,
                **behind,
                down=linear("int4", GROUP, hidden, inner),
                before_attention=norm,
                before_mlp=norm,
                q_norm=of_head if kind == "a" else None,
                k_norm=of_head if kind == "a" else None,
                rope_dim=shape.head_dim if kind == "a" else 0,
                sliding_window=shape.window if number % 6 != 5 else 0,
                activation=shape.activation,
            )
        )
    embedding = linear("int4", GROUP, shape.vocabulary, hidden)
    return Network(
        hidden_size=hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=inner,
        embedding=embedding,
        head=embedding,
        final_norm=norm,
        layers=layers,
        rope_dim=shape.head_dim,
        attention_scale=shape.head_dim**-0.5,
    )


def mixer(shape: Shape, kind: str) -> dict[str, Any]:
    """The matrices of attention, or another mixer; the delta rule has 16 heads of 128 features."""
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    none = {"q": None, "k": None, "v": None}
    if kind == "c":
        convolution = Convolution(torch.randn(3, hidden))
        inputs = ShortConvolution(linear("int4", GROUP, 3 * hidden, hidden), convolution)
        return {**none, "o": linear("int4", GROUP, hidden, hidden), "mixer": inputs}
    if kind == "d":
        heads, width = 16, 128
        rows = (3 * heads * width, heads * width, heads, heads)
        inputs_of: list[Any] = [linear("int4", GROUP, count, hidden) for count in rows]
        rule = GatedDeltaRule(
            *inputs_of,
            Convolution(torch.randn(4, 3 * heads * width)),
            -torch.rand(heads),
            torch.zeros(heads),
            Norm(RMS, 1e-6, torch.ones(width)),
            *(heads, heads, width, width),
        )
        return {**none, "o": linear("int4", GROUP, hidden, heads * width), "mixer": rule}
    sizes = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    return {place: linear("int4", GROUP, *size) for place, size in sizes.items()}


def read_matrices(made: Network) -> list[Any]:
    """The matrices that a token reads."""
    linears = [made.head]
    for layer in made.layers:
        linears += [one for one in (*layer.inputs, layer.o, layer.gate, layer.up, layer.down) if one is not None]
    return [one.matrix for one in linears]


class Runner:
    """A decoder that is timed."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        made = build(name)
        matrices = read_matrices(made)
        self.name, self.bytes = name, sum(matrix_bytes(matrix) for matrix in matrices)
        self.products = sum(matrix.out * matrix.columns for matrix in matrices[1:])
        self.decoder, self.options = Decoder(made, options.threads), options
        positions = LONG + 1024 if options.long else 1024
        angles = torch.rand(positions, made.rope_dim // 2)
        self.decoder.set_rope(angles.cos(), angles.sin())
        self.decoder.reserve(positions)
        self.decoder.reserve_states(1)
        self.prompt = torch.randint(0, made.vocab_size, (options.prompt,))

    def decode(self, past: int) -> float:
        """Seconds a token, behind so many."""
        span = SequenceSpan(0, 0, 0, past, 1, 0 if self.decoder.network.has_states else -1)
        return timed(lambda: self.decoder.greedy(span, 1, self.options.tokens)) / self.options.tokens

    def prefill(self) -> float:
        """Products a second."""
        count = len(self.prompt)
        spans = [SequenceSpan(0, 0, 0, 0, count)]
        return count * self.products / timed(lambda: self.decoder.logits(spans, self.prompt, []))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8, help="that are decoded in a round")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--long", action="store_true", help="behind 32768 tokens, too")
    options = parser.parse_args()
    bandwidth, runners = Bandwidth(), [Runner(name, options) for name in options.shapes]
    columns: dict[str, list[list[float]]] = {runner.name: [[], [], [], []] for runner in runners}
    for number in range(-1, options.rounds):  # the first round is not counted
        for runner in runners:
            speed = bandwidth.measure(options.threads)
            prefill, seconds = runner.prefill(), runner.decode(options.prompt)
            behind = runner.decode(LONG) if options.long else float("nan")
            for column, value in zip(
                columns[runner.name], (seconds, runner.bytes / seconds / speed, behind, prefill), strict=True
            ):
                if number >= 0:
                    column.append(value)
    rows = []
    for runner in runners:
        seconds, share, behind, prefill = map(statistics.median, columns[runner.name])
        rows.append([runner.name, f"{runner.bytes / 1e6:.0f}", f"{1e3 * seconds:.2f}", f"{share:.2f}",
                     f"{1e3 * behind:.2f}", f"{prefill / 1e9:.1f}"])  # fmt: skip
    print(markdown(HEAD, rows))


if __name__ == "__main__":
    main()

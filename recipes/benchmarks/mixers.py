"""What layers of other parts take in the native decoder: models of published shapes and random bytes, in turns.

    python -m recipes.benchmarks.mixers [--tables NAME ...] [--threads N] [--rounds N] [--no-page]

All matrices are int4, embedding and head the same one. In each round the memory's bandwidth is measured, and every
model takes in a prompt and then decodes some tokens behind it. `share` is the bytes that a token moves, over the time
of a token, in units of that bandwidth: weights, keys and values, and states, which are read and written; MB are those
of weights alone. Prefill is in billions of products a second. Columns of ratios are medians of the ratios of rounds, to
the first model of the table or to the same model behind fewer tokens. Keys and values of long contexts are whatever the
cache holds.

    models    published shapes beside the plain one
    states    layers with states alone, behind 1024 and 32768 tokens; a small vocabulary
    experts   8 of 64 experts beside 8 of 8, which read as many bytes for a token
    inputs    inputs of single layers, and layers that attend to the keys and values of others, which compute in prefill
              only tokens with an output: its products are counted as if they computed all

The tables go into recipes/results/mixers.md. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgerazor import kernels
from edgerazor.benchmark.bandwidth import Bandwidth
from edgerazor.kernels.decoder import (
    RMS,
    Convolution,
    Decoder,
    Expert,
    Experts,
    GatedDeltaRule,
    Layer,
    LayerInputs,
    Linear,
    Mamba2,
    Network,
    Norm,
    SequenceSpan,
    ShortConvolution,
)
from edgerazor.packed import cores
from edgerazor.runtime.weight_memory import matrix_bytes
from edgerazor.workdir import machine
from recipes.benchmarks.folders import RESULTS
from recipes.benchmarks.products import timed
from recipes.benchmarks.results import commit, markdown, publish
from recipes.benchmarks.rotation import SHAPES as PLAIN
from recipes.benchmarks.rotation import linear, network

HEAD = ("model", "MB/token", "decode: ms/token", "ratio", "share", "prefill: G products/s", "ratio")
HEAD_OF_STATES = ("model", "behind 1024: ms/token", "behind 32768: ms/token", "ratio")
PAGE = RESULTS / "mixers.md"
SHORT, LONG = 1024, 32768
GROUP = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `mixers` are those of its layers, in turn: attention, convolution, delta rule or Mamba-2."""

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
    experts: int = 0
    chosen: int = 8
    inputs: int = 0  # features of the inputs of single layers
    shared: int = 0  # the last layers, which attend to keys and values of others, and have MLPs twice as wide
    full_dim: int = 0  # width of heads in layers without a window; 0: as in the others
    full_every: int = 6


#: Shapes of `recipes.benchmarks.rotation` have no entry of their own.
MODELS = {
    "Qwen3-0.6B": None,
    "Gemma-3-270M": Shape(262_144, 640, 2048, 18, 4, 1, 256, "a", "gelu_tanh", True, 512),
    "LFM2-700M": Shape(65_536, 1536, 6912, 16, 24, 8, 64, "ccaccaccacacacac"),
    "Qwen3.5-0.8B": Shape(248_320, 1024, 3584, 24, 8, 2, 256, "ddda"),
    "Granite-4.0-H-350M": Shape(100_352, 768, 2048, 32, 12, 4, 64, "mmmmmmma"),
}
STATES = {
    "short convolutions of LFM2-700M": Shape(2048, 1536, 6912, 16, 24, 8, 64, "c"),
    "gated delta rule of Qwen3.5-0.8B": Shape(2048, 1024, 3584, 24, 8, 2, 256, "d"),
    "Mamba-2 of Granite-4.0-H-350M": Shape(2048, 768, 2048, 32, 12, 4, 64, "m"),
}
#: Layers of OLMoE-1B-7B, and a vocabulary that does not outweigh them.
EXPERTS = {
    "OLMoE-1B-7B, 4 layers, with 8 experts": Shape(8192, 2048, 1024, 4, 16, 16, 128, "a", experts=8),
    "OLMoE-1B-7B, 4 layers, 8 of 64 experts": Shape(8192, 2048, 1024, 4, 16, 16, 128, "a", experts=64),
}
INPUTS = {
    "Qwen3-0.6B": None,
    "Gemma-4-E2B": Shape(
        *(262_144, 1536, 6144, 35, 8, 1, 256, "a", "gelu_tanh", True, 512),
        **{"inputs": 256, "shared": 20, "full_dim": 512, "full_every": 5},
    ),
}
TABLES = {"models": MODELS, "states": STATES, "experts": EXPERTS, "inputs": INPUTS}


def build(name: str, shape: Shape | None) -> Network:
    """A model of random bytes."""
    if shape is None:
        return network(PLAIN[name], "int4", GROUP)
    hidden = shape.hidden
    norm, of_head = Norm(RMS, 1e-6, torch.ones(hidden)), Norm(RMS, 1e-6, torch.ones(shape.head_dim))
    layers = []
    for number in range(shape.layers):
        kind = shape.mixers[number % len(shape.mixers)]
        full = (number + 1) % shape.full_every == 0
        if shape.inputs:
            layers.append(layer_with_input(shape, number, full))
            continue
        none = {"gate": None, "up": None, "down": None}
        mlp: dict[str, Any] = {**none, "experts": experts(shape)} if shape.experts else gated_mlp(shape)
        behind: dict[str, Any] = {"after_attention": norm, "after_mlp": norm} if shape.norms_behind else {}
        layers.append(
            Layer(
                **mixer(shape, kind),
                **mlp,
                **behind,
                before_attention=norm,
                before_mlp=norm,
                q_norm=of_head if kind == "a" else None,
                k_norm=of_head if kind == "a" else None,
                rope_dim=shape.head_dim if kind == "a" else 0,
                sliding_window=0 if full else shape.window,
                activation=shape.activation,
            )
        )
    embedding = linear("int4", GROUP, shape.vocabulary, hidden)
    return Network(
        hidden_size=hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        embedding=embedding,
        head=embedding,
        final_norm=norm,
        layers=layers,
        rope_dim=shape.full_dim or shape.head_dim,
        attention_scale=shape.head_dim**-0.5,
        layer_inputs=layer_inputs(shape) if shape.inputs else None,
    )


def layer_with_input(shape: Shape, number: int, full: bool) -> Layer:
    """A layer of Gemma 4, some of which attend to the keys and values of the last ones before them."""
    hidden, first = shape.hidden, shape.layers - shape.shared
    shape = replace(shape, head_dim=shape.full_dim if full else shape.head_dim)
    norm, of_head = Norm(RMS, 1e-6, torch.ones(hidden)), Norm(RMS, 1e-6, torch.ones(shape.head_dim))
    source = None if number < first else first - 1 if full else first - 2
    own: dict[str, Any] = {"k": None, "v": None} if source is not None else {"k_norm": of_head, "v_norm": of_head}
    wide = replace(shape, intermediate=shape.intermediate * (1 if source is None else 2))
    return Layer(
        **{**mixer(shape, "a"), **gated_mlp(wide), **own},
        **dict.fromkeys(("before_attention", "after_attention", "before_mlp", "after_mlp", "after_input"), norm),
        q_norm=of_head,
        rope_dim=shape.head_dim,
        sliding_window=0 if full else shape.window,
        activation=shape.activation,
        kv_source=source,
        head_dim=shape.head_dim,
        intermediate_size=wide.intermediate,
        input_gate=linear("int4", GROUP, shape.inputs, hidden),
        input_o=linear("int4", GROUP, hidden, shape.inputs),
        output_scale=0.5,
    )


def layer_inputs(shape: Shape) -> LayerInputs:
    """The table of inputs of layers, and the projection in 16 bits."""
    width = shape.layers * shape.inputs
    projection = torch.randn(width, shape.hidden).to(torch.bfloat16)
    norm = Norm(RMS, 1e-6, torch.ones(shape.inputs))
    return LayerInputs(shape.inputs, linear("int4", GROUP, shape.vocabulary, width), projection, norm)


def gated_mlp(shape: Shape) -> dict[str, Linear]:
    """The matrices of an MLP, or of an expert."""
    hidden, inner = shape.hidden, shape.intermediate
    matrices = {place: linear("int4", GROUP, inner, hidden) for place in ("gate", "up")}
    return {**matrices, "down": linear("int4", GROUP, hidden, inner)}


def experts(shape: Shape) -> Experts:
    """A mixture whose router is random, so that tokens go everywhere."""
    router = torch.randn(shape.experts, shape.hidden)
    return Experts([Expert(**gated_mlp(shape)) for _ in range(shape.experts)], router, shape.chosen)


def mixer(shape: Shape, kind: str) -> dict[str, Any]:
    """The matrices of attention, or another mixer.

    The delta rule has 16 heads of 128 features, and Mamba-2 48 of 32, with 128 rows of state.
    """
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
    if kind == "m":
        heads, width, state = 48, 32, 128
        convolved = heads * width + 2 * state
        vectors = (-torch.rand(heads), torch.zeros(heads), torch.ones(heads))
        model = Mamba2(
            linear("int4", GROUP, heads * width + convolved + heads, hidden),
            Convolution(torch.randn(4, convolved)),
            *vectors,
            Norm(RMS, 1e-6, torch.ones(heads * width)),
            *(1, heads, width, state),
        )
        return {**none, "o": linear("int4", GROUP, hidden, heads * width), "mixer": model}
    sizes = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
    return {place: linear("int4", GROUP, *size) for place, size in sizes.items()}


def read_matrices(made: Network) -> list[Any]:
    """The matrices that a token reads; of experts, which are alike, as many as are chosen."""
    linears = [made.head]
    for layer in made.layers:
        places = (*layer.inputs, layer.o, layer.gate, layer.up, layer.down, layer.input_gate, layer.input_o)
        linears += [one for one in places if one is not None]
        if (mixture := layer.experts) is not None:
            linears += [one for expert in mixture.experts[: mixture.chosen] for one in expert.linears]
    return [one.matrix for one in linears]


class Runner:
    """A decoder that is timed."""

    def __init__(self, name: str, shape: Shape | None, positions: int, options: argparse.Namespace) -> None:
        made = build(name, shape)
        matrices = read_matrices(made)
        self.name, self.bytes = name, sum(matrix_bytes(matrix) for matrix in matrices)
        if made.layer_inputs is not None:
            self.bytes += made.layer_inputs.projection.nbytes
        self.products = sum(matrix.out * matrix.columns for matrix in matrices[1:])
        self.decoder, self.options = Decoder(made, options.threads), options
        angles = torch.rand(positions, made.rope_dim // 2)
        self.decoder.set_rope(angles.cos(), angles.sin())
        self.decoder.reserve(positions)
        self.decoder.reserve_states(1)
        cached = made.kv_slot_bytes() * (options.prompt + options.tokens / 2)
        self.moved = self.bytes + cached + 2 * self.decoder.state_bytes()
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


def measure(table: str, options: argparse.Namespace) -> str:
    """A table of models that are timed in turns."""
    longest = LONG if table == "states" else SHORT
    runners = [Runner(name, shape, longest + 1024, options) for name, shape in TABLES[table].items()]
    bandwidth = Bandwidth()
    rounds: list[list[tuple[float, ...]]] = []
    for number in range(-1, options.rounds):  # the first round is not counted
        row: list[tuple[float, ...]] = []
        for runner in runners:
            if table == "states":
                runner.decode(SHORT)  # what comes first finds the caches cold
                contexts = (SHORT, LONG) if number % 2 else (LONG, SHORT)
                of_context = {context: runner.decode(context) for context in contexts}
                row.append((of_context[SHORT], of_context[LONG]))
                continue
            speed, prefill, seconds = (
                bandwidth.measure(options.threads),
                runner.prefill(),
                runner.decode(options.prompt),
            )
            row.append((seconds, runner.moved / seconds / speed, prefill))
        if number >= 0:
            rounds.append(row)

    def median(column: int, of: int, over: tuple[int, int] | None = None) -> float:
        """Of a column of a model, or of its ratio to a column of a model."""
        divisors = [1.0 if over is None else row[over[0]][over[1]] for row in rounds]
        return statistics.median(row[of][column] / divisor for row, divisor in zip(rounds, divisors, strict=True))

    rows = []
    for at, runner in enumerate(runners):
        milliseconds = f"{1e3 * median(0, at):.2f}"
        if table == "states":
            rows.append([runner.name, milliseconds, f"{1e3 * median(1, at):.2f}", f"{median(1, at, (at, 0)):.3f}"])
        else:
            ratios = f"{median(0, at, (0, 0)):.3f}", f"{median(2, at, (0, 2)):.2f}"
            rows.append([runner.name, f"{runner.bytes / 1e6:.0f}", milliseconds, ratios[0], f"{median(1, at):.2f}",
                         f"{median(2, at) / 1e9:.0f}", ratios[1]])  # fmt: skip
    return markdown(HEAD_OF_STATES if table == "states" else HEAD, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8, help="that are decoded in a round")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--no-page", action="store_true", help="only print the tables")
    options = parser.parse_args()
    for table in options.tables:
        text = measure(table, options)
        facts = f"{machine()}, kernels {kernels.name()}, {options.threads} threads, a prompt of {options.prompt} tokens"
        text = f"{text}\n\n{facts}; medians of {options.rounds} rounds in turns; commit {commit()}."
        print(text, flush=True)
        if not options.no_page:
            publish(table, text, PAGE)


if __name__ == "__main__":
    main()

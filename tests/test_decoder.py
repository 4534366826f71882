"""The decoder of the native library: what it computes does not depend on how it is asked, and what it refuses."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec
from edgerazor.kernels import decoder, native
from edgerazor.kernels.decoder import RMS, Decoder, Layer, Linear, Network, Norm, Run

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not built")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY, GROUP = 40, 4, 2, 6, 52, 50, 16
TOKENS = torch.randint(0, VOCABULARY, (20,), generator=torch.Generator().manual_seed(0)).tolist()


def matrix(rows: int, columns: int, seed: int, name: str = "int4") -> native.Matrix:
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    spec = MatrixSpec((name,), GROUP)
    return native.Matrix(formats.pack_matrix(formats.encode_matrix(weights, spec), spec), spec, (rows, columns))


def linear(rows: int, columns: int, seed: int, bias: bool = False) -> Linear:
    vector = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) if bias else None
    return Linear(matrix(rows, columns, seed), vector, GROUP)


def norm(features: int, seed: int) -> Norm:
    return Norm(RMS, 1e-6, 1 + 0.1 * torch.randn(features, generator=torch.Generator().manual_seed(seed)))


def layer(seed: int, **changes: Any) -> Layer:
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"q": (query, HIDDEN), "k": (key, HIDDEN), "v": (key, HIDDEN), "o": (HIDDEN, query)}
    shapes |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    linears: dict[str, Any] = {
        name: linear(*shape, seed + place, name == "q") for place, (name, shape) in enumerate(shapes.items())
    }
    norms: dict[str, Any] = {"before_attention": norm(HIDDEN, seed + 8), "before_mlp": norm(HIDDEN, seed + 9)}
    return Layer(**{**linears, **norms, "rotary": 4, **changes})


def network(**changes: Any) -> Network:
    values: dict[str, Any] = {
        "hidden": HIDDEN,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate": INNER,
        "embedding": linear(VOCABULARY, HIDDEN, 1),
        "head": linear(VOCABULARY, HIDDEN, 2),
        "final_norm": norm(HIDDEN, 3),
        "layers": [layer(100), layer(200, window=9)],
        "rotary_features": 4,
        "attention_scale": HEAD_DIM**-0.5,
    }
    return Network(**{**values, **changes})


def tables(positions: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * torch.tensor([1.0, 0.1])
    return angles.cos(), angles.sin()


def ready(made: Network | None = None, threads: int = 1, cells: int = 256) -> Decoder:
    found = Decoder(made or network(), threads)
    found.rotary(*tables(64))
    found.reserve(cells)
    return found


EVERY = range(len(TOKENS))


def test_any_cut_into_runs_and_calls_gives_the_same_bits() -> None:
    expected = ready().logits([Run(0, 0, 0, 0, 20)], TOKENS, EVERY)
    for threads in (1, 2, 3):
        one = ready(threads=threads)
        parts = [one.logits([Run(0, 0, 64, start, end - start)], TOKENS[start:end], range(end - start))
                 for start, end in ((0, 1), (1, 8), (8, 20))]  # fmt: skip
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)
        split = [Run(0, 0, 0, 0, 7), Run(0, 7, 16, 0, 6), Run(0, 7, 16, 6, 7)]
        torch.testing.assert_close(one.logits(split, TOKENS, EVERY), expected, rtol=0, atol=1e-5)
        apart = [Run(0, 0, 128, 0, 20), Run(0, 0, 160, 0, 20)]
        found = one.logits(apart, TOKENS * 2, [*range(20, 40), 3, 3])
        torch.testing.assert_close(found, torch.cat([expected, expected[[3, 3]]]), rtol=0, atol=1e-5)


def test_scores_are_those_of_the_logits() -> None:
    one = ready()
    logits = one.logits([Run(0, 0, 0, 0, 20)], TOKENS, EVERY)
    wanted, targets = [5, 0, 5, 19, 5], [7, 49, 0, 3, 7]
    chances, best = one.scores([Run(0, 0, 0, 0, 20)], TOKENS, wanted, targets)
    expected = logits.log_softmax(-1)[wanted, targets]
    torch.testing.assert_close(chances, expected, rtol=1e-5, atol=1e-5)
    assert best.tolist() == logits.argmax(-1)[wanted].tolist()


def test_greedy_is_a_loop_of_argmax() -> None:
    for threads in (1, 3):
        one, other = ready(threads=threads), ready(threads=threads)
        text = TOKENS[:9]
        while len(text) < 25:
            text.append(int(one.logits([Run(0, 0, 0, 0, len(text))], text, [len(text) - 1]).argmax()))
        other.logits([Run(0, 0, 0, 0, 8)], TOKENS[:8], [])
        assert other.greedy(Run(0, 0, 0, 8, 1), TOKENS[8], 16) == text[9:]
        stop = text[12]
        first = text.index(stop, 9)
        assert other.greedy(Run(0, 0, 0, 8, 1), TOKENS[8], 16, [stop, -5, 10**9]) == text[9 : first + 1]


def test_layers_one_by_one_are_the_whole() -> None:
    """With the head's product by the reference of a matrix."""
    made = network(final_norm=None)
    one = ready(made, threads=2)
    runs = [Run(0, 0, 0, 0, 20)]
    states = made.embedding.matrix.embedding(torch.tensor(TOKENS))
    for index in range(len(made.layers)):
        states = one.layer(index, runs, states)
    expected = made.head.matrix.linear(states, None, 8, GROUP)
    torch.testing.assert_close(one.logits(runs, TOKENS, EVERY), expected, rtol=0, atol=1e-5)


def test_weights_stay_and_calls_wait_for_one_another() -> None:
    one = ready(threads=2)
    expected = one.logits([Run(0, 0, 0, 0, 20)], TOKENS, EVERY)
    gc.collect()
    found: dict[int, Tensor] = {}

    def compute(cell: int) -> None:
        for _ in range(20):
            found[cell] = one.logits([Run(0, 0, cell, 0, 20)], TOKENS, EVERY)

    callers = [threading.Thread(target=compute, args=(cell,)) for cell in (0, 32, 64)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert all(torch.equal(each, expected) for each in found.values())


def test_the_cache_grows_and_keeps_what_it_has() -> None:
    one = ready(cells=16)
    before = one.cache_bytes()
    one.logits([Run(0, 0, 0, 0, 8)], TOKENS[:8], [])
    one.reserve(5000)
    assert one.cache_bytes() >= 5000 * one.network.cell_bytes() > before
    one.reserve(3)
    assert one.cells >= 5000
    found = one.logits([Run(0, 0, 0, 8, 12)], TOKENS[8:], [11])
    expected = ready().logits([Run(0, 0, 0, 0, 20)], TOKENS, [19])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bytes_of_a_cell(bits: int) -> None:
    width = {4: 3 + 4, 8: 6 + 4, 16: 24}[bits]
    assert network(kv_bits=bits).cell_bytes() == 2 * 2 * KV_HEADS * width


def test_numbers_that_are_none_are_an_error() -> None:
    large = Norm(RMS, 1e-6, torch.full((HIDDEN,), 3e38))
    one = ready(network(layers=[layer(100, before_mlp=large)]), threads=2)
    with pytest.raises(decoder.NotFiniteError):
        one.logits([Run(0, 0, 0, 0, 20)], TOKENS, [])
    with pytest.raises(decoder.NotFiniteError):
        one.greedy(Run(0, 0, 0, 0, 1), 3, 5)


NETWORKS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "heads": (lambda: {"heads": 3}, "impossible sizes"),
    "no layers' size": (lambda: {"intermediate": INNER + 1}, "gate must be"),
    "activation bits": (lambda: {"activation_bits": 9}, "2 to 8 or 16 bits"),
    "cache bits": (lambda: {"kv_bits": 6}, "4, 8 or 16 bits"),
    "odd rotary": (lambda: {"rotary_features": 3}, "in pairs"),
    "long rotary": (lambda: {"rotary_features": 8}, "in pairs"),
    "other rotary": (lambda: {"rotary_features": 2}, "turns all 2 features or none, not 4"),
    "embedding": (lambda: {"embedding": linear(VOCABULARY + 1, HIDDEN, 1)}, "embedding must be"),
    "head": (lambda: {"head": linear(VOCABULARY, HIDDEN + 1, 1)}, "head must be"),
    "norm": (lambda: {"final_norm": norm(HIDDEN + 1, 1)}, "weight of final_norm must be"),
    "kind": (lambda: {"final_norm": Norm(7, 1e-6)}, "no norm that we know"),
    "bias of rms": (lambda: {"final_norm": Norm(RMS, 1e-6, None, torch.zeros(HIDDEN))}, "no norm that we know"),
    "epsilon": (lambda: {"final_norm": Norm(RMS, float("nan"))}, "no norm that we know"),
    "q": (lambda: {"layers": [layer(1, q=linear(HEADS * HEAD_DIM + 1, HIDDEN, 1))]}, "q must be"),
    "window": (lambda: {"layers": [layer(1, window=-1)]}, "a window cannot have"),
    "window, broken": (lambda: {"layers": [layer(1, window=1.5)]}, "a window cannot have"),
    "heads, broken": (lambda: {"heads": 2.0}, "impossible sizes"),
    "q norm": (lambda: {"layers": [layer(1, q_norm=norm(HEAD_DIM + 1, 1))]}, "weight of q_norm"),
    "all heads": (lambda: {"layers": [layer(1, q_norm=norm(HEAD_DIM, 1))], "norm_all_heads": True}, "weight of q_norm"),
    "scale": (
        lambda: {"head": dataclasses.replace(linear(VOCABULARY, HIDDEN, 1), scale=float("inf"))},
        "head has the scale inf",
    ),
    "bias": (
        lambda: {
            "head": dataclasses.replace(
                linear(VOCABULARY, HIDDEN, 1), bias=torch.zeros(VOCABULARY, dtype=torch.float64)
            )
        },
        "bias of head",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_does_not_fit_is_refused(name: str) -> None:
    changes, about = NETWORKS[name]
    with pytest.raises(ValueError, match=about):
        Decoder(network(**changes()))
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        Decoder(network(), 0)


def test_calls_that_do_not_fit_are_refused() -> None:
    one = ready(cells=100)
    assert one.cells == 112
    for runs, tokens, wanted, about in (
        ([], [], [], "no runs"),
        ([Run(0, 0, 0, 0, 0)], [], [], "impossible run"),
        ([Run(0, 0, 8, 0, 1)], [1], [], "impossible run"),
        ([Run(8, 1, 16, 0, 1)], [1], [], "impossible run"),
        ([Run(0, -1, 16, 0, 1)], [1], [], "impossible run"),
        ([Run(0, 0, 96, 0, 17)], [1] * 17, [], "reserved cells"),
        ([Run(96, 17, 0, 0, 1)], [1], [], "reserved cells"),
        ([Run(0, 60, 64, 0, 5)], [1] * 5, [], "has 64 positions"),
        ([Run(0, 0, 0, 0, 17), Run(0, 0, 16, 0, 1)], [1] * 18, [], "write to the same cell"),
        ([Run(0, 0, 0, 0, 2)], [1], [], "1 tokens in runs of 2"),
        ([Run(0, 0, 0, 0, 2)], [1, VOCABULARY], [], "tokens must be between"),
        ([Run(0, 0, 0, 0, 2)], [1, -1], [], "tokens must be between"),
        ([Run(0, 0, 0, 0, 2)], [1, 1 << 40], [], "tokens must be between"),
        ([Run(0, 0, 0, 0, 2)], [1, 2], [2], "wanted tokens must be between"),
        ([Run(0, 0, 0, 0, 2)], [1, 2], [-1], "wanted tokens must be between"),
    ):
        with pytest.raises(ValueError, match=about):
            one.logits(runs, tokens, wanted)
    run = [Run(0, 0, 0, 0, 2)]
    with pytest.raises(ValueError, match="targets must be between"):
        one.scores(run, [1, 2], [0], [VOCABULARY])
    with pytest.raises(ValueError, match="2 targets of 1 tokens"):
        one.scores(run, [1, 2], [0], [1, 2])
    with pytest.raises(ValueError, match="begins with 1 token"):
        one.greedy(run[0], 1, 5)
    with pytest.raises(ValueError, match="reserved cells"):
        one.greedy(Run(0, 0, 96, 0, 1), 1, 17)
    with pytest.raises(ValueError, match="no layer 2"):
        one.layer(2, run, torch.zeros(2, HIDDEN))
    with pytest.raises(ValueError, match="states must be"):
        one.layer(0, run, torch.zeros(3, HIDDEN))
    for wrong in (torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.float64), torch.zeros(2, 5).T):
        with pytest.raises(ValueError, match="tables of the rotary embedding"):
            one.rotary(wrong, wrong)


@pytest.mark.parametrize("cells", [-1, 2**31, 2**64, 2**64 + 1, 1.5, None])
def test_absurd_numbers_of_cells(cells: Any) -> None:
    """What C would cut off to 64 bits never gets there."""
    ours = Decoder(network())
    with pytest.raises(ValueError, match="a cache has 0 to"):
        ours.reserve(cells)
    assert ours.cells == 0


def test_a_cache_larger_than_the_machine_is_refused_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Decoder(network())
    monkeypatch.setattr(decoder, "memory_bytes", lambda: 1 << 20)
    with pytest.raises(MemoryError, match="a cache of 1000000 tokens"):
        ours.reserve(1_000_000)
    assert ours.cells == 0


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**20])
def test_absurd_numbers_of_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        Decoder(network(), threads=threads)

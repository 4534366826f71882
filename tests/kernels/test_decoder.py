"""The native decoder: its results do not depend on the division into spans and calls; bad arguments are refused."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec
from edgerazor.kernels import decoder, native
from edgerazor.kernels.decoder import PAGE_SLOTS, RMS, Decoder, Layer, Linear, Network, Norm, PagedSpan, PageTable
from edgerazor.kernels.decoder import SequenceSpan as Span

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native library is not built")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY, GROUP = 40, 4, 2, 6, 52, 50, 16
TOKENS = torch.randint(0, VOCABULARY, (20,), generator=torch.Generator().manual_seed(0)).tolist()


def matrix(rows: int, columns: int, seed: int, name: str = "int4") -> native.Matrix:
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    spec = MatrixSpec((name,), GROUP)
    return native.Matrix(formats.pack_matrix(formats.encode_matrix(weights, spec), spec), spec, (rows, columns))


def linear(rows: int, columns: int, seed: int, bias: bool = False, rotated: bool = False) -> Linear:
    vector = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) if bias else None
    return Linear(matrix(rows, columns, seed), vector, GROUP, rotation=formats.hadamard(columns) if rotated else None)


def norm(features: int, seed: int) -> Norm:
    return Norm(RMS, 1e-6, 1 + 0.1 * torch.randn(features, generator=torch.Generator().manual_seed(seed)))


def layer(seed: int, rotated: bool = False, **changes: Any) -> Layer:
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"q": (query, HIDDEN), "k": (key, HIDDEN), "v": (key, HIDDEN), "o": (HIDDEN, query)}
    shapes |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    linears: dict[str, Any] = {
        name: linear(*shape, seed + place, name == "q", rotated) for place, (name, shape) in enumerate(shapes.items())
    }
    norms: dict[str, Any] = {"before_attention": norm(HIDDEN, seed + 8), "before_mlp": norm(HIDDEN, seed + 9)}
    return Layer(**{**linears, **norms, "rope_dim": 4, **changes})


def network(**changes: Any) -> Network:
    values: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INNER,
        "embedding": linear(VOCABULARY, HIDDEN, 1),
        "head": linear(VOCABULARY, HIDDEN, 2),
        "final_norm": norm(HIDDEN, 3),
        "layers": [layer(100), layer(200, sliding_window=9)],
        "rope_dim": 4,
        "attention_scale": HEAD_DIM**-0.5,
    }
    return Network(**{**values, **changes})


def tables(positions: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * torch.tensor([1.0, 0.1])
    return angles.cos(), angles.sin()


def ready(made: Network | None = None, threads: int = 1, slots: int = 256) -> Decoder:
    ours = Decoder(made or network(), threads)
    ours.set_rope(*tables(64))
    ours.reserve(slots)
    return ours


def rotated_network(**changes: Any) -> Network:
    """All matrices are rotated, and rows of the embedding have a factor."""
    values: dict[str, Any] = {
        "embedding": linear(VOCABULARY, HIDDEN, 1, rotated=True),
        "head": linear(VOCABULARY, HIDDEN, 2, rotated=True),
        "layers": [layer(100, rotated=True), layer(200, rotated=True, sliding_window=9)],
        "embedding_scale": 3.0,
    }
    return network(**{**values, **changes})


EVERY = range(len(TOKENS))


@pytest.mark.parametrize("make", [network, rotated_network])
def test_any_division_into_spans_and_calls_gives_the_same_logits(make: Callable[[], Network]) -> None:
    expected = ready(make()).logits([Span(0, 0, 0, 0, 20)], TOKENS, EVERY)
    for threads in (1, 2, 3):
        one = ready(make(), threads=threads)
        parts = [one.logits([Span(0, 0, 64, start, end - start)], TOKENS[start:end], range(end - start))
                 for start, end in ((0, 1), (1, 8), (8, 20))]  # fmt: skip
        torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)
        split = [Span(0, 0, 0, 0, 7), Span(0, 7, 16, 0, 6), Span(0, 7, 16, 6, 7)]
        torch.testing.assert_close(one.logits(split, TOKENS, EVERY), expected, rtol=0, atol=1e-5)
        apart = [Span(0, 0, 128, 0, 20), Span(0, 0, 160, 0, 20)]
        logits = one.logits(apart, TOKENS * 2, [*range(20, 40), 3, 3])
        torch.testing.assert_close(logits, torch.cat([expected, expected[[3, 3]]]), rtol=0, atol=1e-5)


def test_scores_are_those_of_the_logits() -> None:
    one = ready()
    logits = one.logits([Span(0, 0, 0, 0, 20)], TOKENS, EVERY)
    positions, targets = [5, 0, 5, 19, 5], [7, 49, 0, 3, 7]
    log_probabilities, best = one.scores([Span(0, 0, 0, 0, 20)], TOKENS, positions, targets)
    expected = logits.log_softmax(-1)[positions, targets]
    torch.testing.assert_close(log_probabilities, expected, rtol=1e-5, atol=1e-5)
    assert best.tolist() == logits.argmax(-1)[positions].tolist()


def test_greedy_is_a_loop_of_argmax() -> None:
    for threads in (1, 3):
        one, other = ready(threads=threads), ready(threads=threads)
        text = TOKENS[:9]
        while len(text) < 25:
            text.append(int(one.logits([Span(0, 0, 0, 0, len(text))], text, [len(text) - 1]).argmax()))
        other.logits([Span(0, 0, 0, 0, 8)], TOKENS[:8], [])
        assert other.greedy(Span(0, 0, 0, 8, 1), TOKENS[8], 16) == text[9:]
        stop = text[12]
        first = text.index(stop, 9)
        assert other.greedy(Span(0, 0, 0, 8, 1), TOKENS[8], 16, [stop, -5, 10**9]) == text[9 : first + 1]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("make", [network, rotated_network])
def test_layers_one_by_one_are_the_whole(make: Callable[..., Network], bits: int) -> None:
    """With the head's product by the reference of a matrix."""
    made = make(final_norm=None, activation_bits=bits)
    one = ready(made, threads=2)
    spans = [Span(0, 0, 0, 0, 20)]
    rotation = made.head.rotation
    states = made.embedding.matrix.embedding(torch.tensor(TOKENS))
    if rotation:
        states = 3 * rotation.rotate_back(states)
    for index in range(len(made.layers)):
        states = one.layer(index, spans, states)
    states = rotation.rotate(states) if rotation else states
    head = made.head.matrix
    expected = head.linear(states, None, 8, GROUP) if bits == 8 else head.linear_float(states)
    torch.testing.assert_close(one.logits(spans, TOKENS, EVERY), expected, rtol=0, atol=1e-5)


# Page tables --------------------------------------------------------------------------------------------------------

LONG = torch.randint(0, VOCABULARY, (200,), generator=torch.Generator().manual_seed(1)).tolist()


def pages(*numbers: int) -> PageTable:
    table = PageTable()
    for number in numbers:
        table.append(number)
    return table


def paged(made: Network | None = None, threads: int = 2) -> Decoder:
    ours = ready(made, threads, slots=2000)
    ours.set_rope(*tables(256))
    return ours


def step(
    ours: Decoder, spans: list[PagedSpan], tokens: list[int], positions: Iterable[int], totals: bool = False
) -> tuple[Tensor, list[int], Tensor]:
    """Logits, the likeliest tokens, and logarithms of totals."""
    outputs = list(positions)
    logits = np.full((len(outputs) + 1, VOCABULARY), 7, dtype=np.float32)
    best, log_totals = ours.step(spans, tokens, outputs, [totals] * len(outputs), logits)
    assert (logits[-1] == 7).all()
    return torch.from_numpy(logits[:-1]), best.tolist(), torch.from_numpy(log_totals)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_pages_anywhere_give_the_bits_of_consecutive_slots(bits: int, threads: int) -> None:
    """In any division into calls: a sequence's results are the same alone, in pieces, and beside others."""
    ours = paged(network(kv_bits=bits), threads)
    expected = ours.logits([Span(0, 0, 1024, 0, 200)], LONG, range(200))
    table, past = pages(9, 3, 14, 7), 0
    for count in (1, 62, 1, 1, 64, 5, 1, 65):
        of_span = LONG[past : past + count]
        logits, best, totals = step(ours, [PagedSpan(table, past, count)], of_span, range(count), totals=True)
        assert torch.equal(logits, expected[past : past + count])
        assert best == logits.argmax(-1).tolist()
        torch.testing.assert_close(totals, logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
        past += count
    others = [pages(0, 1), pages(2), pages(4, 5)]
    spans = [PagedSpan(others[0], 0, 66), PagedSpan(table, 199, 1), PagedSpan(others[1], 0, 1),
             PagedSpan(others[2], 0, 70)]  # fmt: skip
    logits, *_ = step(ours, spans, [*LONG[:66], LONG[199], 5, *LONG[:70]], [65, 66, 137])
    assert torch.equal(logits, expected[[65, 199, 69]])


def test_many_sequences_share_pages_and_part() -> None:
    ours = paged()
    shared = pages(11, 6)
    step(ours, [PagedSpan(shared, 0, 128)], LONG[:128], [])
    tables_of = [pages(11, 6, 15 + number) for number in range(9)]
    texts = [[*LONG[:128], number] for number in range(9)]
    for _ in range(3):
        spans = [PagedSpan(table, len(text) - 1, 1) for table, text in zip(tables_of, texts, strict=True)]
        logits, best, _ = step(ours, spans, [text[-1] for text in texts], range(9))
        for row, text in enumerate(texts):
            alone = ours.logits([Span(0, 0, 0, 0, len(text))], text, [len(text) - 1])
            assert torch.equal(logits[row], alone[0])
            text.append(best[row])


def test_greedy_decoding_in_pages() -> None:
    ours = paged()
    step(ours, [PagedSpan(pages(8), 0, 60)], LONG[:60], [])
    ours.logits([Span(0, 0, 0, 0, 60)], LONG[:60], [])
    expected = ours.greedy(Span(0, 0, 0, 60, 1), LONG[60], 20)
    assert ours.greedy(PagedSpan(pages(8, 21), 60, 1), LONG[60], 20) == expected
    with pytest.raises(ValueError, match="impossible span"):
        ours.greedy(PagedSpan(pages(8), 60, 1), LONG[60], 5)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_copied_page_is_the_same_page(bits: int) -> None:
    ours = paged(network(kv_bits=bits))
    step(ours, [PagedSpan(pages(5), 0, 40)], LONG[:40], [])
    ours.copy_page(5, 18)
    expected, *_ = step(ours, [PagedSpan(pages(5), 40, 10)], LONG[40:50], range(10))
    step(ours, [PagedSpan(pages(5), 0, 40)], LONG[100:140], [])
    logits, *_ = step(ours, [PagedSpan(pages(18), 40, 10)], LONG[40:50], range(10))
    assert torch.equal(logits, expected)


def test_steps_that_do_not_fit_are_refused() -> None:
    ours = ready(slots=2 * PAGE_SLOTS)
    for spans, tokens, positions, message in (
        ([], [], [], "no spans"),
        ([PagedSpan(pages(0), 0, 0)], [], [], "impossible span"),
        ([PagedSpan(pages(0), -1, 1)], [1], [], "impossible span"),
        ([PagedSpan(pages(0), 60, 5)], [1] * 5, [], "impossible span"),
        ([PagedSpan(pages(2), 0, 1)], [1], [], "2 pages are reserved"),
        ([PagedSpan(pages(0, 1), 60, 5)], [1] * 5, [], "has 64 positions"),
        ([PagedSpan(pages(0), 0, 1), PagedSpan(pages(0), 5, 1)], [1, 2], [], "write to the same page"),
        ([PagedSpan(pages(0), 0, 2)], [1], [], "1 tokens in spans of 2"),
        ([PagedSpan(pages(0), 0, 1)], [VOCABULARY], [], "tokens must be between"),
        ([PagedSpan(pages(0), 0, 2)], [1, 1], [1, 0], "must ascend"),
        ([PagedSpan(pages(0), 0, 2)], [1, 1], [2], "must ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            step(ours, spans, tokens, positions)
    span = [PagedSpan(pages(0), 0, 1)]
    for logits in (np.empty((0, VOCABULARY), np.float32), np.empty((1, 3), np.float32), np.empty((1, VOCABULARY))):
        with pytest.raises(ValueError, match="1 outputs need"):
            ours.step(span, [1], [0], [False], logits)
    with pytest.raises(ValueError, match="no page -1"):
        pages(-1)
    with pytest.raises(ValueError, match="no page 2"):
        ours.copy_page(0, 2)
    large = Norm(RMS, 1e-6, torch.full((HIDDEN,), 3e38))
    with pytest.raises(decoder.NotFiniteError):
        step(ready(network(layers=[layer(100, before_mlp=large)])), span, [1], [0])


def test_weights_stay_and_calls_wait_for_one_another() -> None:
    one = ready(threads=2)
    expected = one.logits([Span(0, 0, 0, 0, 20)], TOKENS, EVERY)
    gc.collect()
    logits: dict[int, Tensor] = {}

    def compute(slot: int) -> None:
        for _ in range(20):
            logits[slot] = one.logits([Span(0, 0, slot, 0, 20)], TOKENS, EVERY)

    callers = [threading.Thread(target=compute, args=(slot,)) for slot in (0, 32, 64)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(each, expected) for each in logits.values())


def test_the_kv_cache_grows_and_keeps_its_contents() -> None:
    one = ready(slots=16)
    before = one.kv_cache_bytes()
    one.logits([Span(0, 0, 0, 0, 8)], TOKENS[:8], [])
    one.reserve(5000)
    assert one.kv_cache_bytes() >= 5000 * one.network.kv_slot_bytes() > before
    one.reserve(3)
    assert one.slots >= 5000
    logits = one.logits([Span(0, 0, 0, 8, 12)], TOKENS[8:], [11])
    expected = ready().logits([Span(0, 0, 0, 0, 20)], TOKENS, [19])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_bytes_of_a_kv_slot(bits: int) -> None:
    width = {4: 3 + 4, 8: 6 + 4, 16: 24}[bits]
    assert network(kv_bits=bits).kv_slot_bytes() == 2 * 2 * KV_HEADS * width


def test_numbers_that_are_none_are_an_error() -> None:
    large = Norm(RMS, 1e-6, torch.full((HIDDEN,), 3e38))
    one = ready(network(layers=[layer(100, before_mlp=large)]), threads=2)
    with pytest.raises(decoder.NotFiniteError):
        one.logits([Span(0, 0, 0, 0, 20)], TOKENS, [])
    with pytest.raises(decoder.NotFiniteError):
        one.greedy(Span(0, 0, 0, 0, 1), 3, 5)


ROTATIONS = [formats.hadamard(columns) for columns in (HIDDEN, HIDDEN + 8)]

NETWORKS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "heads": (lambda: {"num_heads": 3}, "impossible sizes"),
    "no layers' size": (lambda: {"intermediate_size": INNER + 1}, "gate must be"),
    "activation bits": (lambda: {"activation_bits": 9}, "2 to 8 or 16 bits"),
    "cache bits": (lambda: {"kv_bits": 6}, "4, 8 or 16 bits"),
    "odd rotary": (lambda: {"rope_dim": 3}, "in pairs"),
    "long rotary": (lambda: {"rope_dim": 8}, "in pairs"),
    "other rotary": (lambda: {"rope_dim": 2}, "rotates all 2 features or none in a layer, not 4"),
    "embedding": (lambda: {"embedding": linear(VOCABULARY + 1, HIDDEN, 1)}, "embedding must be"),
    "head": (lambda: {"head": linear(VOCABULARY, HIDDEN + 1, 1)}, "head must be"),
    "norm": (lambda: {"final_norm": norm(HIDDEN + 1, 1)}, "weight of final_norm must be"),
    "kind": (lambda: {"final_norm": Norm(7, 1e-6)}, "no norm that we know"),
    "bias of rms": (lambda: {"final_norm": Norm(RMS, 1e-6, None, torch.zeros(HIDDEN))}, "no norm that we know"),
    "epsilon": (lambda: {"final_norm": Norm(RMS, float("nan"))}, "no norm that we know"),
    "q": (lambda: {"layers": [layer(1, q=linear(HEADS * HEAD_DIM + 1, HIDDEN, 1))]}, "q must be"),
    "window": (lambda: {"layers": [layer(1, sliding_window=-1)]}, "a sliding window cannot have"),
    "window, broken": (lambda: {"layers": [layer(1, sliding_window=1.5)]}, "a sliding window cannot have"),
    "heads, broken": (lambda: {"num_heads": 2.0}, "impossible sizes"),
    "q norm": (lambda: {"layers": [layer(1, q_norm=norm(HEAD_DIM + 1, 1))]}, "weight of q_norm"),
    "all heads": (lambda: {"layers": [layer(1, q_norm=norm(HEAD_DIM, 1))], "norm_all_heads": True}, "weight of q_norm"),
    "scale": (
        lambda: {"head": dataclasses.replace(linear(VOCABULARY, HIDDEN, 1), scale=float("inf"))},
        "head has the scale inf",
    ),
    "rotation": (
        lambda: {"head": dataclasses.replace(linear(VOCABULARY, HIDDEN, 1), rotation=ROTATIONS[1])},
        "head has 40 columns, but its rotation 48",
    ),
    "rotation of q": (
        lambda: {"layers": [layer(1, q=dataclasses.replace(linear(24, HIDDEN, 1), rotation=ROTATIONS[0]))]},
        "q and the layers that share its input do not have the same rotation",
    ),
    "rotation of up": (
        lambda: {"layers": [layer(1, up=dataclasses.replace(linear(INNER, HIDDEN, 1), rotation=ROTATIONS[0]))]},
        "gate and the layers that share its input do not have the same rotation",
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
    changes, message = NETWORKS[name]
    with pytest.raises(ValueError, match=message):
        Decoder(network(**changes()))
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        Decoder(network(), 0)


def test_calls_that_do_not_fit_are_refused() -> None:
    one = ready(slots=100)
    assert one.slots == 112
    for spans, tokens, positions, message in (
        ([], [], [], "no spans"),
        ([Span(0, 0, 0, 0, 0)], [], [], "impossible span"),
        ([Span(0, 0, 8, 0, 1)], [1], [], "impossible span"),
        ([Span(8, 1, 16, 0, 1)], [1], [], "impossible span"),
        ([Span(0, -1, 16, 0, 1)], [1], [], "impossible span"),
        ([Span(0, 0, 96, 0, 17)], [1] * 17, [], "KV slots are reserved"),
        ([Span(96, 17, 0, 0, 1)], [1], [], "KV slots are reserved"),
        ([Span(0, 60, 64, 0, 5)], [1] * 5, [], "has 64 positions"),
        ([Span(0, 0, 0, 0, 17), Span(0, 0, 16, 0, 1)], [1] * 18, [], "write to the same KV slot"),
        ([Span(0, 0, 0, 0, 2)], [1], [], "1 tokens in spans of 2"),
        ([Span(0, 0, 0, 0, 2)], [1, VOCABULARY], [], "tokens must be between"),
        ([Span(0, 0, 0, 0, 2)], [1, -1], [], "tokens must be between"),
        ([Span(0, 0, 0, 0, 2)], [1, 1 << 40], [], "tokens must be between"),
        ([Span(0, 0, 0, 0, 2)], [1, 2], [2], "output positions must be between"),
        ([Span(0, 0, 0, 0, 2)], [1, 2], [-1], "output positions must be between"),
    ):
        with pytest.raises(ValueError, match=message):
            one.logits(spans, tokens, positions)
    spans = [Span(0, 0, 0, 0, 2)]
    with pytest.raises(ValueError, match="targets must be between"):
        one.scores(spans, [1, 2], [0], [VOCABULARY])
    with pytest.raises(ValueError, match="2 targets of 1 tokens"):
        one.scores(spans, [1, 2], [0], [1, 2])
    with pytest.raises(ValueError, match="begins with 1 token"):
        one.greedy(spans[0], 1, 5)
    with pytest.raises(ValueError, match="KV slots are reserved"):
        one.greedy(Span(0, 0, 96, 0, 1), 1, 17)
    with pytest.raises(ValueError, match="no layer 2"):
        one.layer(2, spans, torch.zeros(2, HIDDEN))
    with pytest.raises(ValueError, match="hidden states must be"):
        one.layer(0, spans, torch.zeros(3, HIDDEN))
    for wrong in (torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.float64), torch.zeros(2, 5).T):
        with pytest.raises(ValueError, match="tables of the rotary embedding"):
            one.set_rope(wrong, wrong)


@pytest.mark.parametrize("slots", [-1, 2**31, 2**64, 2**64 + 1, 1.5, None])
def test_absurd_numbers_of_kv_slots(slots: Any) -> None:
    """Numbers that ctypes would truncate to 64 bits never reach the library."""
    ours = Decoder(network())
    with pytest.raises(ValueError, match="a KV cache has 0 to"):
        ours.reserve(slots)
    assert ours.slots == 0


def test_a_kv_cache_larger_than_the_machine_is_refused_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Decoder(network())
    monkeypatch.setattr(decoder, "physical_memory", lambda: 1 << 20)
    with pytest.raises(MemoryError, match="a cache of 1000000 tokens"):
        ours.reserve(1_000_000)
    assert ours.slots == 0


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**20])
def test_absurd_numbers_of_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        Decoder(network(), threads=threads)

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
from edgerazor.kernels.decoder import (
    PAGE_SLOTS,
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
    PagedSpan,
    PageTable,
    ShortConvolution,
)
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


def gated_network(**changes: Any) -> Network:
    """Fused matrices, gates of attention, norms around, tables of positions, factors and caps."""
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    around = {"after_attention": norm(HIDDEN, 7), "after_mlp": norm(HIDDEN, 8), "q_norm": norm(HEAD_DIM, 9)}
    layers = [
        layer(100, q=linear(query + 2 * key, HIDDEN, 3), k=None, v=None, gate=linear(2 * INNER, HIDDEN, 4), up=None),
        layer(200, q=linear(2 * query, HIDDEN, 5), gated_queries=True, rope_table=1, sliding_window=9, **around),
        layer(300, gate=None, attention_gate=linear(HEADS, HIDDEN, 6), activation="gelu_tanh", **around),
        layer(400, attention_gate=linear(query, HIDDEN, 6), activation="relu_squared"),
    ]
    values: dict[str, Any] = {
        **{"layers": layers, "rope_tables": 2, "residual_scale": 0.7, "logit_scale": 0.5, "embedding_scale": 2.0},
        **{"attention_soft_cap": 2.0, "logit_soft_cap": 0.4, "norm_after_rope": True},
    }
    return network(**{**values, **changes})


def convolution(features: int, taps: int, seed: int) -> Convolution:
    return Convolution(torch.randn(taps, features, generator=torch.Generator().manual_seed(seed)))


def delta_rule(seed: int) -> GatedDeltaRule:
    """Of 2 key heads of 5 features and 4 value heads of 9."""
    qkv, values = 2 * 2 * 5 + 4 * 9, 4 * 9
    shapes = ((qkv, HIDDEN), (values, HIDDEN), (4, HIDDEN), (4, HIDDEN))
    inputs: list[Any] = [linear(*shape, seed + place) for place, shape in enumerate(shapes)]
    return GatedDeltaRule(
        *inputs,
        convolution(qkv, 4, seed + 4),
        -torch.tensor([0.1, 1.0, 3.0, 9.0]),
        torch.tensor([0.0, -1.0, 1.0, 2.0]),
        norm(9, seed + 5),
        *(2, 4, 5, 9),
    )


def mamba2(seed: int, **changes: Any) -> Mamba2:
    """Of 2 groups of 3 heads of 9 features, with states of 7 rows."""
    width, convolved, heads = 6 * 9, 6 * 9 + 2 * 2 * 7, 6
    values = {
        "inputs": linear(width + convolved + heads, HIDDEN, seed),
        "convolution": convolution(convolved, 4, seed + 1),
        "decay": -torch.tensor([0.1, 1.0, 3.0, 9.0, 0.5, 0.01]),
        "step_bias": torch.tensor([0.0, -1.0, 1.0, 2.0, 0.5, -2.0]),
        "skip": torch.tensor([1.0, 0.0, -1.0, 0.3, 1.2, 0.7]),
        "norm": norm(width, seed + 2),
        **{"groups": 2, "heads": heads, "head_dim": 9, "state_size": 7},
        **{"least_step": 0.01, "most_step": 1.5},
    }
    return Mamba2(**{**values, **changes})


def recurrent_network(**changes: Any) -> Network:
    """A short convolution, attention, the gated delta rule, Mamba-2."""
    none: dict[str, Any] = {"q": None, "k": None, "v": None}
    short = ShortConvolution(linear(3 * HIDDEN, HIDDEN, 31), convolution(HIDDEN, 3, 32))
    layers = [
        layer(100, **none, o=linear(HIDDEN, HIDDEN, 33), mixer=short),
        layer(200),
        layer(300, **none, o=linear(HIDDEN, 36, 34), mixer=delta_rule(40)),
        layer(400, **none, o=linear(HIDDEN, 54, 35), mixer=mamba2(50)),
    ]
    return network(**{"layers": layers, **changes})


FEATURES = 5


def expert(seed: int) -> Expert:
    return Expert(linear(20, HIDDEN, seed), linear(20, HIDDEN, seed + 1), linear(HIDDEN, 20, seed + 2))


def shared_network(**changes: Any) -> Network:
    """Layers with inputs of their own, heads of two widths, values that are keys, two that attend to keys of others,
    and experts beside an MLP."""
    wide: dict[str, Any] = {
        **{"head_dim": 10, "num_kv_heads": 1, "rope_dim": 4, "rope_table": 1},
        **{"q": linear(40, HIDDEN, 51), "o": linear(HIDDEN, 40, 52)},
    }
    own = [
        {"input_gate": linear(FEATURES, HIDDEN, 60 + i), "input_o": linear(HIDDEN, FEATURES, 70 + i)}
        | {"after_input": norm(HIDDEN, 80 + i), "output_scale": 0.9, "v_norm": Norm(RMS, 1e-6), "rope_dim": 2}
        for i in range(5)
    ]
    norms = {name: norm(HIDDEN, 90) for name in ("router_norm", "before", "after", "after_mlp_alone")}
    router, factors = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3)), torch.linspace(0.5, 2, 5)
    mixture = Experts([expert(20 + i) for i in range(5)], router, 2, normalized=True, factors=factors, **norms)
    twice = {"gate": linear(2 * INNER, HIDDEN, 53), "up": linear(2 * INNER, HIDDEN, 54)}
    none = {"k": None, "v": None}
    layers = [
        layer(100, **own[0], sliding_window=9, experts=mixture),
        layer(200, **{**own[1], **wide, "k": linear(10, HIDDEN, 55), "v": None}),
        layer(300, **own[2], k_norm=norm(HEAD_DIM, 4)),
        layer(400, **own[3], **none, kv_source=0, sliding_window=9),
        layer(
            *(500,),
            **{**own[4], **wide, **none, **twice, "down": linear(HIDDEN, 2 * INNER, 56)},
            **{"kv_source": 1, "intermediate_size": 2 * INNER},
        ),
    ]
    projection = torch.randn(5 * FEATURES, HIDDEN, generator=torch.Generator().manual_seed(5))
    inputs = LayerInputs(FEATURES, linear(VOCABULARY, 5 * FEATURES, 57), projection, norm(FEATURES, 58), 2.0, 0.3, 0.7)
    return network(**{"layers": layers, "layer_inputs": inputs, "rope_tables": 2, **changes})


EVERY = range(len(TOKENS))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_layers_with_inputs_and_keys_of_others_in_any_division(bits: int, threads: int) -> None:
    """Tokens without an output go through the last two layers in no call, and it makes no difference."""
    made = shared_network(activation_bits=bits)
    one, other = Decoder(made, 1), Decoder(made, threads)
    for each in (one, other):
        each.set_rope(*(table.repeat(1, 2) for table in tables(64)))
        each.reserve(128)
    assert made.kv_slot_bytes() == 2 * (2 * 2 * (HEAD_DIM + 4) + 10 + 4)
    expected = one.logits([Span(0, 0, 0, 0, 20)], TOKENS, EVERY)
    divisions = ((0, 1), (1, 8), (8, 20))
    parts = [other.logits([Span(0, 0, 64, begin, end - begin)], TOKENS[begin:end], range(end - begin))
             for begin, end in divisions]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)
    for begin, end in divisions:
        for first in {begin, max(begin, end - 3), end - 1, end}:
            outputs = range(first - begin, end - begin)
            part = other.logits([Span(0, 0, 64, begin, end - begin)], TOKENS[begin:end], outputs)
            torch.testing.assert_close(part, expected[first:end], rtol=0, atol=1e-5)
    split = [Span(0, 0, 0, 0, 7), Span(0, 7, 16, 0, 6), Span(0, 7, 16, 6, 7)]
    torch.testing.assert_close(other.logits(split, TOKENS, [9, 19]), expected[[9, 19]], rtol=0, atol=1e-5)
    text = TOKENS[:9]
    while len(text) < 20:
        text.append(int(one.logits([Span(0, 0, 0, 0, len(text))], text, [len(text) - 1]).argmax()))
    other.logits([Span(0, 0, 0, 0, 8)], TOKENS[:8], [])
    assert other.greedy(Span(0, 0, 0, 8, 1), TOKENS[8], 11) == text[9:]
    with pytest.raises(ValueError, match="that hidden states alone go into"):
        one.layer(0, [Span(0, 0, 0, 0, 20)], torch.zeros(20, HIDDEN))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_layers_of_other_parts_in_any_division(bits: int, threads: int) -> None:
    made = gated_network(activation_bits=bits)
    wide, scales = [table.repeat(1, 2) for table in tables(64)], torch.linspace(1, 2, 64)
    wide[0][:, 2:] *= 0.9
    one, other = Decoder(made, 1), Decoder(made, threads)
    for each in (one, other):
        each.set_rope(*wide, scales)
        each.reserve(128)
    expected = one.logits([Span(0, 0, 0, 0, 20)], TOKENS, EVERY)
    assert float(expected.abs().max()) < 0.4
    parts = [other.logits([Span(0, 0, 64, start, end - start)], TOKENS[start:end], range(end - start))
             for start, end in ((0, 1), (1, 8), (8, 20))]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-5)


# States ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_states_go_on_are_copied_and_forked(bits: int, threads: int) -> None:
    made = recurrent_network(activation_bits=bits)
    one, other = ready(made), ready(made, threads)
    one.reserve_states(1)
    other.reserve_states(5)
    of_mamba = 3 * 82 + 10 + 6 * 7 * 16  # whole vectors of 16 floats
    assert one.state_bytes() == 4 * (2 * HIDDEN + 3 * 56 + 8 + 4 * 5 * 16 + of_mamba)
    expected = one.logits([Span(0, 0, 0, 0, 20)], TOKENS, EVERY)
    first = other.logits([Span(0, 0, 64, 0, 1, -1, 2)], TOKENS[:1], [0])
    other.copy_state(2, 4)
    for _ in range(2):  # the state of slot 4 is read, and stays
        rest = [other.logits([Span(0, 0, 64, 1, 6, 4, 2)], TOKENS[1:7], range(6)),
                other.logits([Span(0, 0, 64, 7, 13, 2, 2)], TOKENS[7:], range(13))]  # fmt: skip
        torch.testing.assert_close(torch.cat([first, *rest]), expected, rtol=0, atol=1e-5)
    # Two continuations of a prefix that the same call computes, and another sequence.
    spans = [Span(0, 0, 0, 0, 7, -1, 0), Span(0, 7, 16, 0, 6, 0, 1), Span(0, 7, 32, 0, 13, 0, 1), Span(0, 0, 48, 0, 9)]
    tokens = [*TOKENS[:7], *TOKENS[7:13], *TOKENS[7:], *TOKENS[:9]]
    logits = other.logits(spans, tokens, [12, 25, 34])
    torch.testing.assert_close(logits, expected[[12, 19, 8]], rtol=0, atol=1e-5)


def test_greedy_decoding_with_states() -> None:
    one, other = ready(recurrent_network(), threads=2), ready(recurrent_network())
    one.reserve_states(2)
    other.reserve_states(1)
    text = TOKENS[:9]
    while len(text) < 25:
        text.append(int(other.logits([Span(0, 0, 0, 0, len(text))], text, [len(text) - 1]).argmax()))
    one.logits([Span(0, 0, 0, 0, 8, -1, 1)], TOKENS[:8], [])
    for _ in range(2):
        assert one.greedy(Span(0, 0, 0, 8, 1, 1, 0), TOKENS[8], 16) == text[9:]


def test_more_tokens_than_are_computed_together_keep_their_state() -> None:
    long = torch.randint(0, VOCABULARY, (700,), generator=torch.Generator().manual_seed(2)).tolist()
    one = ready(recurrent_network(), threads=2, slots=1500)
    one.set_rope(*tables(800))
    one.reserve_states(2)
    whole = one.logits([Span(0, 0, 0, 0, 700)], long, [699])
    one.logits([Span(0, 0, 0, 0, 100)], long[:100], [])
    parts = one.logits([Span(0, 0, 0, 100, 600, 0, 1)], long[100:], [599])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_states_that_are_not_there_are_refused() -> None:
    one = ready(recurrent_network())
    assert ready().state_bytes() == 0
    with pytest.raises(ValueError, match="0 state slots are reserved"):
        one.logits([Span(0, 0, 0, 0, 2)], [1, 2], [])
    one.reserve_states(2)
    for span in (Span(0, 0, 0, 0, 2, 2, 0), Span(0, 0, 0, 0, 2, -2, 0), Span(0, 0, 0, 0, 2, -1, 2)):
        with pytest.raises(ValueError, match="2 state slots are reserved"):
            one.logits([span], [1, 2], [])
    with pytest.raises(ValueError, match="no state slot 2"):
        one.copy_state(0, 2)
    with pytest.raises(ValueError, match="has no page tables"):
        step(one, [PagedSpan(pages(0), 0, 1)], [1], [0])
    for count in (-1, 2**40, 1.5):
        with pytest.raises(ValueError, match="state slots, not"):
            one.reserve_states(count)  # type: ignore[arg-type]


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


def paged(made: Network | None = None, threads: int = 2, slots: int = 2000) -> Decoder:
    ours = ready(made, threads, slots=slots)
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


@pytest.mark.parametrize("threads", [1, 2])
def test_greedy_decoding_of_sequences_side_by_side(threads: int) -> None:
    ours = paged(threads=threads)
    lengths, tables_of = (60, 3, 100), [pages(8, 21), pages(2, 5), pages(9, 7)]
    for table, length in zip(tables_of, lengths, strict=True):
        step(ours, [PagedSpan(table, 0, length)], LONG[:length], [])
    spans = [PagedSpan(table, length, 1) for table, length in zip(tables_of, lengths, strict=True)]
    alone = [ours.greedy(span, LONG[span.past_length], 20) for span in spans]
    expected = [list(tokens) for tokens in zip(*alone, strict=True)]
    begin = [LONG[length] for length in lengths]
    assert ours.greedy_together(spans, begin, 20) == expected
    stop = alone[1][7]
    first = next(number for number, tokens in enumerate(expected) if stop in tokens)
    assert ours.greedy_together(spans, begin, 20, [stop, -1]) == expected[: first + 1]
    assert ours.greedy_together(spans, begin, 20, interrupt=np.ones(1, dtype=np.int32)) == expected[:1]
    assert ours.greedy_together(spans, begin, 20, interrupt=np.zeros(1, dtype=np.int32)) == expected
    with pytest.raises(ValueError, match="2 tokens for 3 spans"):
        ours.greedy_together(spans, begin[:2], 5)
    with pytest.raises(ValueError, match="begins with 1 token, not 2"):
        ours.greedy_together([PagedSpan(tables_of[0], 60, 2)], begin[:1], 5)


def test_greedy_decoding_of_more_sequences_than_logits_are_computed_at_a_time() -> None:
    ours = paged(slots=PAGE_SLOTS * 70)
    tables_of = [pages(number) for number in range(70)]
    spans = [PagedSpan(table, 0, 1) for table in tables_of]
    begin = [number % 50 for number in range(70)]
    alone = [ours.greedy(span, token, 4) for span, token in zip(spans, begin, strict=True)]
    assert ours.greedy_together(spans, begin, 4) == [list(tokens) for tokens in zip(*alone, strict=True)]


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
    "other rotary": (lambda: {"rope_dim": 2}, "rotates up to 2 features in pairs in a layer, not 4"),
    "heads of a layer": (lambda: {"layers": [layer(1, num_kv_heads=3)]}, "4 heads cannot share 3 heads"),
    "keys of a later layer": (lambda: {"layers": [layer(1, k=None, v=None, kv_source=0)]}, "cannot attend to the keys"),
    "keys of two": (lambda: {"layers": [layer(1), layer(2, kv_source=0)]}, "has none of its own"),
    "input that is not there": (
        lambda: {"layers": [layer(1, input_gate=linear(4, HIDDEN, 1), input_o=linear(HIDDEN, 4, 1))]},
        "an input that the network does not have",
    ),
    "table of inputs": (
        lambda: {"layer_inputs": LayerInputs(4, linear(VOCABULARY, 9, 1), torch.zeros(8, HIDDEN))},
        "table of inputs must be",
    ),
    "projection of inputs": (
        lambda: {"layer_inputs": LayerInputs(4, linear(VOCABULARY, 8, 1), torch.zeros(8, HIDDEN).half())},
        "a projection of inputs must be float32 or bfloat16",
    ),
    "scale of a layer": (lambda: {"layers": [layer(1, output_scale=float("inf"))]}, "impossible scale of a layer"),
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
    "no q": (lambda: {"layers": [layer(1, q=None)]}, "q is missing"),
    "no k": (lambda: {"layers": [layer(1, k=None)]}, "k is missing"),
    "no MLP": (lambda: {"layers": [layer(1, gate=None, up=None)]}, "an MLP needs gate or up"),
    "fused gate": (lambda: {"layers": [layer(1, up=None)]}, "gate must be"),
    "gated queries": (lambda: {"layers": [layer(1, gated_queries=True)]}, "q must be"),
    "gate of attention": (
        lambda: {"layers": [layer(1, attention_gate=linear(HEADS + 1, HIDDEN, 1))]},
        "a gate of attention cannot have 5 rows",
    ),
    "activation": (lambda: {"layers": [layer(1, activation="tanh")]}, "no activation function tanh"),
    "table": (lambda: {"layers": [layer(1, rope_table=1)]}, "no table 1 of positions"),
    "tables": (lambda: {"rope_tables": 3}, "2 layers cannot have 3 tables"),
    "cap": (lambda: {"logit_soft_cap": -1.0}, "impossible soft caps"),
    "factor": (lambda: {"residual_scale": float("nan")}, "impossible scales"),
    "convolution": (
        lambda: {
            "layers": [
                layer(
                    1,
                    o=linear(HIDDEN, HIDDEN, 1),
                    mixer=ShortConvolution(linear(3 * HIDDEN, HIDDEN, 1), convolution(HIDDEN + 1, 3, 1)),
                )
            ]
        },
        "a convolution must be",
    ),
    "delta rule": (
        lambda: {"layers": [layer(1, o=linear(HIDDEN, 36, 1), mixer=dataclasses.replace(delta_rule(1), key_heads=3))]},
        "impossible sizes",
    ),
    "Mamba-2": (
        lambda: {"layers": [layer(1, o=linear(HIDDEN, 54, 1), mixer=mamba2(1, groups=4))]},
        "impossible sizes",
    ),
    "steps": (
        lambda: {"layers": [layer(1, o=linear(HIDDEN, 54, 1), mixer=mamba2(1, least_step=2.0))]},
        "steps cannot be from 2.0 to 1.5",
    ),
    "groups of Mamba-2": (
        lambda: {"layers": [layer(1, o=linear(HIDDEN, 54, 1), mixer=mamba2(1, state_size=8))]},
        "inputs must be",
    ),
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

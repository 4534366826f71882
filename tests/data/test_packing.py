"""Rows that never mix documents: nothing lost, little padded, and the order a function of the step."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgerazor.data import MASKED, Batch, TokenRows, Tokens, sample_batches
from edgerazor.data.packing import cuts
from edgerazor.data.rows import SORTED_STEPS
from helpers.tiny_models import FAMILIES, ModelMaker

LENGTH = 32


def source(seed: int, count: int = 60, first: int = 0) -> Tokens:
    """Documents whose tokens count up from a number that is their own; lengths from 1 to 3 rows."""
    draw = random.Random(seed)
    sizes = [min(3 * LENGTH, 1 + int(draw.expovariate(1 / 12))) for _ in range(count)]
    pieces = [np.arange(size, dtype=np.int32) + 1000 * (first + number) for number, size in enumerate(sizes)]
    return Tokens.of([(piece, np.ones(len(piece), dtype=bool)) for piece in pieces])


def tokens_of(batch: Batch) -> list[list[int]]:
    """The real tokens of each row."""
    return [[each for each in row if each != MASKED] for row in batch["labels"].tolist()]


def documents_of(tokens: Tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.ids, tokens.starts[1:])]


def test_no_row_mixes_documents_and_none_is_lost() -> None:
    tokens = source(0)
    rows = TokenRows([tokens], [1.0], LENGTH, packing="document")
    expected = []
    for document in documents_of(tokens):
        expected += [document[k : k + LENGTH] for k in range(0, len(document), LENGTH)]
    expected = [piece for piece in expected if len(piece) > 1]  # a lone token predicts nothing
    assert [row["input_ids"].tolist() for row in rows.in_order()] == expected
    assert len(rows) == len(expected)
    assert rows.tokens == sum(map(len, expected))
    assert rows.tokens_per_row == pytest.approx(rows.tokens / len(rows))
    for index in range(3 * len(rows)):
        assert len({token // 1000 for token in rows.row(index)["input_ids"].tolist()}) == 1


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_without_anything_to_predict_are_left_out(seed: int, packing: str) -> None:
    """Against a plain loop, for documents in which only some tokens are to be learned."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 20) for _ in range(50)]
    learn = [np.array([draw.random() < 0.15 for _ in range(size)]) for size in sizes]
    tokens = Tokens.of([(np.arange(size, dtype=np.int32), mask) for size, mask in zip(sizes, learn, strict=True)])
    starts = [*tokens.starts.tolist(), len(tokens)] if packing == "document" else [0, len(tokens)]
    expected = []
    for begin, end in pairwise(starts):
        pieces = [(k, min(k + 7, end)) for k in range(begin, end, 7)]
        expected += [(a, b) for a, b in pieces if tokens.learn[a + 1 : b].any()]
    assert [tuple(each) for each in cuts(tokens, 7, packing).tolist()] == expected  # type: ignore[arg-type]
    assert len(cuts(Tokens.of([]), 7, packing)) == 0  # type: ignore[arg-type]


def test_batches_are_padded_to_their_longest_row() -> None:
    rows = TokenRows([source(0)], [1.0], LENGTH, padding=7, packing="document")
    for step in range(20):
        batch = rows.batch(step, batch_size=4)
        sizes = [len(row) for row in tokens_of(batch)]
        assert batch["input_ids"].shape == (4, max(sizes))
        for ids, labels, size in zip(batch["input_ids"], batch["labels"], sizes, strict=True):
            assert torch.equal(ids[:size], labels[:size])
            assert (ids[size:] == 7).all()
            assert (labels[size:] == MASKED).all()


def test_sorting_wastes_little() -> None:
    """Share of padding in batches of 8: 57 % of rows as they come, 12 % at most of sorted ones."""
    rows = TokenRows([source(1, 2000)], [1.0], LENGTH, packing="document")

    def waste(batches: list[Batch]) -> float:
        total = sum(batch["labels"].numel() for batch in batches)
        return 1 - sum(len(row) for batch in batches for row in tokens_of(batch)) / total

    plain = [[rows.row(index) for index in range(8 * step, 8 * step + 8)] for step in range(160)]
    assert waste([rows._stacked(each) for each in plain]) > 0.5
    assert waste([rows.batch(step, batch_size=8) for step in range(160)]) < 0.12
    assert waste(list(sample_batches(rows, 512, 8))) < 0.05


@pytest.mark.parametrize(("world", "accumulation", "size"), [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (8, 1, 1)])
def test_a_steps_rows_are_the_same_however_they_are_shared_out(world: int, accumulation: int, size: int) -> None:
    def step_rows(rows: TokenRows, step: int, world: int, accumulation: int, size: int) -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()
        for rank in range(world):
            for micro in range(accumulation):
                found.update(map(tuple, tokens_of(rows.batch(step, micro, rank, world, size, accumulation))))
        return found

    def make() -> TokenRows:
        return TokenRows([source(0), source(1, 40, 100)], [2.0, 1.0], LENGTH, seed=4, packing="document")

    whole, divided = make(), make()
    for step in (0, 1, 17, 40, 16, 3):  # in any order: a resumed run begins anywhere
        assert step_rows(divided, step, world, accumulation, size) == step_rows(whole, step, 1, 1, 8)


def test_every_window_of_steps_has_its_rows_once_and_its_shares() -> None:
    rows = TokenRows([source(0), source(1, 40, 100)], [2.0, 1.0], LENGTH, packing="document")
    for window in range(3):
        steps = range(window * SORTED_STEPS, (window + 1) * SORTED_STEPS)
        batches = [rows.batch(step, batch_size=6) for step in steps]
        found = Counter(tuple(row) for batch in batches for row in tokens_of(batch))
        indices = range(6 * steps.start, 6 * steps.stop)
        assert found == Counter(tuple(rows.row(index)["input_ids"].tolist()) for index in indices)
        shares = Counter(row[0] >= 100_000 for row in found.elements())
        assert shares == {False: 64, True: 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_for_any_family(family: str, make_model: ModelMaker, tmp_path: Path) -> None:
    """A row alone, and padded beside a longer one: the same logits, without an attention mask."""
    folder = tmp_path / family
    make_model(folder, family)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    short, long = torch.arange(20, 29), torch.arange(30, 53)
    pieces = [(np.array(each, dtype=np.int32), np.ones(len(each), dtype=bool)) for each in (short, long)]
    rows = TokenRows([Tokens.of(pieces)], [1.0], LENGTH, padding=1, packing="document")
    (batch,) = sample_batches(rows, 2, 2)
    with torch.no_grad():
        alone = model(short[None], use_cache=False).logits[0]
        beside = model(batch["input_ids"], use_cache=False).logits[0, : len(short)]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)

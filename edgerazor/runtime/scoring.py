"""How probable continuations are: what is asked, what is answered, and the plain way to compute it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from edgerazor.runtime.token_ids import Ids

#: Tokens that are computed at a time to score them.
BATCH_TOKENS = 1024


class Score(NamedTuple):
    """How probable a continuation is.

    Attributes:
        log_probability: natural, of all its tokens together.
        greedy: whether each of them is the most probable one (the first of equal ones) at its place.
    """

    log_probability: float
    greedy: bool


#: What `Model.score` is given: a prefix, its continuations, and perhaps counts of their last tokens.
ScoreInput: TypeAlias = tuple[Ids, Sequence[Ids]] | tuple[Ids, Sequence[Ids], Sequence[int]]


class ScoreRequest(NamedTuple):
    """A checked request: how probable the last `counts` tokens of the continuations are."""

    prefix: list[int]
    continuations: list[list[int]]
    counts: list[int]


class _Sequence(NamedTuple):
    """A sequence to score: its request, its continuation there, and the tokens of prefix and continuation."""

    request: int
    continuation: int
    tokens: list[int]


def score_whole(requests: list[ScoreRequest], logits: Callable[[Tensor, int], Tensor]) -> list[list[Score]]:
    """`Model.score` of checked requests by computing each prefix again with each of its continuations.

    Args:
        requests: checked.
        logits: gives those of the last tokens of a batch, as `Model.logits`.

    Returns:
        a score for each continuation of each request.
    """
    scores = [[Score(0.0, True)] * len(request.continuations) for request in requests]
    sequences = [
        _Sequence(number, index, [*request.prefix, *continuation])
        for number, request in enumerate(requests)
        for index, continuation in enumerate(request.continuations)
    ]
    for batch in _batches(sequences):
        counts = [requests[sequence.request].counts[sequence.continuation] for sequence in batch]
        tokens = torch.tensor([sequence.tokens for sequence in batch])  # [B, T + 1]
        log_probabilities = logits(tokens[:, :-1], max(counts)).log_softmax(-1)  # [B, max(counts), V]
        for sequence, count, row, of_row in zip(batch, counts, tokens, log_probabilities, strict=True):
            targets, of_targets = row[-count:], of_row[-count:]  # [n], [n, V]
            total = float(of_targets.gather(1, targets[:, None]).double().sum())
            is_greedy = bool((of_targets.argmax(-1) == targets).all())
            scores[sequence.request][sequence.continuation] = Score(total, is_greedy)
    return scores


def _batches(sequences: list[_Sequence]) -> Iterator[list[_Sequence]]:
    """Batches of equal lengths, so that nothing has to be padded; the longest first."""
    by_length = sorted(sequences, key=lambda sequence: -len(sequence.tokens))
    for length, group in itertools.groupby(by_length, key=lambda sequence: len(sequence.tokens)):
        of_length = list(group)
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(of_length), size):
            yield of_length[start : start + size]

"""Which part of a source is held out for measuring.

It is spread over the source, because a file is often in order: its end may be of another kind than the rest. Whole
documents are kept apart where there are enough of them, so that nothing of them is trained on; of a few long documents,
pieces of a row. The source is divided into as many stretches as there are parts to keep, and of each stretch the seed
draws one part. The held-out parts are shuffled, so that the first rows of them are spread over the source as well.
"""

from __future__ import annotations

import numpy as np

from edgerazor.data.packing import pieces, useful
from edgerazor.data.tokens import Tokens, permutation

#: Documents longer than this many rows are cut into pieces, unless so many of them are kept whole.
LONG_ROWS, MANY_DOCUMENTS = 2, 4


def split_held_out(tokens: Tokens, length: int, fraction: float, seed: tuple[int, ...] = (0,)) -> tuple[Tokens, Tokens]:
    """Keep a part of a source for measuring on text that training never sees.

    Args:
        tokens: of the source, N of them.
        length: tokens in a row.
        fraction: about which share of the tokens to hold out, above 0 and below 1/2.
        seed: of the choice: any non-negative numbers.

    Returns:
        training and held-out tokens, no token in both; the latter none where there are no two parts to learn from.
    """
    documents = np.stack([tokens.starts, np.append(tokens.starts[1:], len(tokens))[: len(tokens.starts)]], axis=1)
    chosen = _sample(tokens, documents, fraction, seed)
    share = int((chosen[:, 1] - chosen[:, 0]).sum()) / max(len(tokens), 1)
    # No document with pictures is longer than a row, so that they are not cut apart here.
    spread = len(chosen) >= MANY_DOCUMENTS or len(tokens) <= LONG_ROWS * length * len(documents)
    if not (spread and fraction / 2 <= share <= 2 * fraction):
        chosen = _sample(tokens, pieces(tokens, length, "document"), fraction, seed)
    return _without(tokens, chosen), _only(tokens, chosen[permutation((*seed, len(chosen)), len(chosen))])


def _sample(tokens: Tokens, parts: np.ndarray, fraction: float, seed: tuple[int, ...]) -> np.ndarray:
    """Choose one part from each of `P · fraction` equal stretches of the parts `[P, 2]` that hold anything to learn."""
    parts = parts[useful(tokens, parts)]
    count = max(1, round(len(parts) * fraction))
    if len(parts) < 2:
        return parts[:0]
    bounds = np.arange(count + 1) * len(parts) // count
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return parts[bounds[:-1] + (bits % np.diff(bounds).astype(np.uint64)).astype(np.int64)]


def _only(tokens: Tokens, parts: np.ndarray) -> Tokens:
    """The tokens of the parts `[P, 2]`, each a document of its own."""
    return Tokens.of([(tokens.ids[begin:end], tokens.learn[begin:end]) for begin, end in parts], tokens.prefix)


def _without(tokens: Tokens, parts: np.ndarray) -> Tokens:
    """The tokens outside the parts `[P, 2]` (ascending); what follows a part begins a document."""
    keep = np.ones(len(tokens), dtype=bool)
    for begin, end in parts:
        keep[begin:end] = False
    begun = np.zeros(len(tokens) + 1, dtype=bool)
    begun[tokens.starts] = begun[parts[:, 1]] = True
    starts = np.flatnonzero(begun[:-1][keep])
    return Tokens(tokens.ids[keep], starts.astype(np.int64), tokens.learn[keep], tokens.prefix)

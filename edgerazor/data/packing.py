"""Where the tokens of a source are cut into rows.

`stream`: the documents follow one another, and every row has the full length, whatever it holds. Nothing is wasted, but
a row may hold the end of one document and the beginning of another, and attention sees both.

`document`: a row holds one document, or a piece of a long one, and nothing else. Rows are as long as their documents;
those of a batch are padded to the longest of them, which needs no attention mask, since a causal model never looks at
what follows.

Either way, a row from which nothing can be predicted is left out: a lone last token, a piece without assistant turns.

Where the tokenizer puts a BOS before a text, every row begins with one, which is counted in its length: the text's own,
or one that is put before what the row holds. Then the first token of a text's later pieces can be predicted, too.
"""

from __future__ import annotations

from array import array
from typing import Literal

import numpy as np

from edgerazor.data.tokens import Tokens

Packing = Literal["stream", "document"]


def cuts(tokens: Tokens, length: int, packing: Packing) -> np.ndarray:
    """Begin and end in `tokens` of every row: `[R, 2]` int64, ascending; `Tokens.row` makes a row of it.

    Args:
        tokens: of the source, N of them.
        length: most tokens in a row, its prefix included; at least 2.
        packing: see above.
    """
    spans = pieces(tokens, length, packing)
    return spans[useful(tokens, spans)]


def pieces(tokens: Tokens, length: int, packing: Packing) -> np.ndarray:
    """All tokens in pieces of at most a row, `[P, 2]` int64: also those from which nothing can be predicted."""
    starts = tokens.starts if packing == "document" else np.zeros(min(1, len(tokens)), dtype=np.int64)
    stops = np.append(starts[1:], len(tokens))[: len(starts)]
    if tokens.prefix:
        return _pieces_with_prefix(tokens, starts, stops, length)
    counts = -(-(stops - starts) // length)  # rows of each document
    first = np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(starts, counts) + (np.arange(len(first)) - first) * length
    ends = np.minimum(begins + length, np.repeat(stops, counts))
    return np.stack([begins, ends], axis=1)


def _pieces_with_prefix(tokens: Tokens, starts: np.ndarray, stops: np.ndarray, length: int) -> np.ndarray:
    """Piece after piece, because how much a row holds depends on whether it begins with the prefix already."""
    present, rest = tokens.has_prefix(), max(1, length - len(tokens.prefix))
    spans = array("q")
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        while start < stop:
            end = min(start + (length if present[start] else rest), stop)
            spans.extend((start, end))
            start = end
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def useful(tokens: Tokens, spans: np.ndarray) -> np.ndarray:
    """`[P]` bool: whether anything can be predicted in pieces `[P, 2]`; the first token of a row never is."""
    learned = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(tokens.learn)])  # how many before each token
    begins, ends = spans[:, 0], spans[:, 1]
    first = begins + (tokens.has_prefix()[begins] if tokens.prefix else 1)  # an added prefix is the first token
    return np.asarray(learned[ends] > learned[np.minimum(first, ends)])

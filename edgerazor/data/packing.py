"""Where the tokens of a source are cut into rows.

`stream`: the documents follow one another, and every row has the full length, whatever it holds. Nothing is wasted, but
a row may hold the end of one document and the beginning of another, and attention sees both.

`document`: a row holds one document, or a piece of a long one, and nothing else. Rows are as long as their documents;
those of a batch are padded to the longest of them, which needs no attention mask, since a causal model never looks at
what follows.

Either way, a row from which nothing can be predicted is left out: a lone last token, a piece without assistant turns.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgerazor.data.tokens import Tokens

Packing = Literal["stream", "document"]


def cuts(tokens: Tokens, length: int, packing: Packing) -> np.ndarray:
    """Begin and end of every row: `[R, 2]` int64, ascending.

    Args:
        tokens: of the source, N of them.
        length: most tokens in a row, at least 2.
        packing: see above.
    """
    starts = tokens.starts if packing == "document" else np.zeros(min(1, len(tokens)), dtype=np.int64)
    stops = np.append(starts[1:], len(tokens))[: len(starts)]
    counts = -(-(stops - starts) // length)  # rows of each document
    first = np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.repeat(starts, counts) + (np.arange(len(first)) - first) * length
    ends = np.minimum(begins + length, np.repeat(stops, counts))
    learned = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(tokens.learn)])  # how many before each token
    useful = learned[ends] > learned[np.minimum(begins + 1, ends)]  # the first token of a row is never predicted
    return np.stack([begins, ends], axis=1)[useful]

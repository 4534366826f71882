"""Tokens without a row in the embedding: a tokenizer may have had some added that its model was never given.

A model's loader notes beside the tokenizer how many rows there are (`limit`), and whoever makes tokens of text for the
model asks (`check`): one sentence with the token's name, where the lookup would fail without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from edgerazor.errors import UserError, plain

#: The attribute of a tokenizer that holds the number of rows.
ROWS = "edgerazor_embedding_rows"


def limit(tokenizer: Any, rows: int) -> None:
    """Note how many tokens the model knows, and pad with one of them: padding is masked, so any will do.

    Args:
        tokenizer: of transformers; changed in place.
        rows: of the model's embedding.
    """
    setattr(tokenizer, ROWS, rows)
    padding = tokenizer.pad_token_id
    if padding is None or padding >= rows:
        known = (
            token for token in (tokenizer.eos_token_id, tokenizer.unk_token_id) if token is not None and token < rows
        )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(next(known, 0))


def check(tokenizer: Any, ids: Iterable[int] | np.ndarray) -> None:
    """Make sure that the model knows the tokens of a text.

    Args:
        tokenizer: that made them; of one that no model was loaded for, nothing is known.
        ids: of the tokens.

    Raises:
        UserError: it names the first that the model has no row for.
    """
    rows = getattr(tokenizer, ROWS, None)
    numbers = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if rows is None or not numbers.size or int(numbers.max()) < rows:
        return
    token = int(numbers[numbers >= rows][0])
    raise UserError(
        f"The text holds the token {plain(tokenizer.convert_ids_to_tokens(token))!r}, which is number {token:,} of the "
        f"tokenizer, but the model's embedding has rows for {rows:,} tokens only, numbered from 0.",
        "Take the tokenizer that belongs to the model, or leave the token out of the text.",
    )

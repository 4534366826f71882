"""From the sources of a recipe to rows of tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from edgerazor.data import chat
from edgerazor.data.held_out import split_held_out
from edgerazor.data.packing import Packing, cuts
from edgerazor.data.rows import TokenRows
from edgerazor.data.sources import documents
from edgerazor.data.streaming import StreamedRows
from edgerazor.data.tokens import Tokens, prefix_of, tokenize
from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PictureReading(Protocol):
    """Reads conversations with pictures: ids `[n]` int32 and what is learned, `[n]` bool, at most `length` of each."""

    def __call__(self, conversations: Sequence[chat.Conversation], length: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The tokens of each."""


@dataclass(frozen=True)
class RowSettings:
    """How the documents of sources become rows, and what of them is held out for measuring.

    Args:
        length: most tokens in a row, at least 2.
        seed: of the order of the rows, and of the choice of the held-out ones.
        held_out_fraction: share of each source to hold out, spread over it; from 0 to below 1/2.
        packing: how documents become rows, see `packing.py`.
        held_out_rows: of a streamed source, its first rows are held out instead, where the fraction is not 0.
        template_kwargs: what the chat template is given beside the messages.
        held_out_length: tokens of a row by which the held-out share is chosen; `length` where it is None.
        bos: `auto`: every row begins with the BOS of a tokenizer that adds one; `text`: rows where a text begins.
        held_out_seed: of the choice of the held-out share; `seed` where it is None.
        pictures: reads conversations with pictures, at most so many tokens of each; None where there is no model that
            sees.
    """

    length: int
    seed: int = 0
    held_out_fraction: float = 0.0
    packing: Packing = "stream"
    held_out_rows: int = 256
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    held_out_length: int | None = None
    bos: Literal["auto", "text"] = "auto"
    held_out_seed: int | None = None
    pictures: PictureReading | None = None


#: The training rows of a source, and its held-out tokens where there are any.
_Parts = tuple[Tokens | StreamedRows, Tokens | None]


def open_rows(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, settings: RowSettings
) -> tuple[TokenRows, TokenRows | None]:
    """Read and tokenize a mixture of sources.

    Args:
        sources: files or data sets of the hub, at least one.
        tokenizer: a tokenizer of transformers.
        settings: how they become rows.

    Returns:
        `(training rows, held-out rows)`; the latter None when the held-out fraction is 0. No token is in both.

    Raises:
        UserError: a source cannot be read, is empty, or is too short; or the chat template does not know an option.
    """
    if not sources:
        raise usage_error("There is no text: the list of sources is empty.", "Name a text file with --data FILE.")
    chat.check_options(tokenizer, settings.template_kwargs)
    prefix = prefix_of(tokenizer) if settings.bos == "auto" else ()
    parts = [_open_source(source, number, tokenizer, settings, prefix) for number, source in enumerate(sources)]
    held_out = [tokens for _, tokens in parts if tokens is not None]
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    weights = [source.weight for source in sources]

    def mixed(mixture: Sequence[Tokens | StreamedRows]) -> TokenRows:
        return TokenRows(mixture, weights, settings.length, settings.seed, padding, settings.packing)

    return mixed([training for training, _ in parts]), mixed(held_out) if held_out else None


def _open_source(
    source: Source, number: int, tokenizer: PreTrainedTokenizerBase, settings: RowSettings, prefix: tuple[int, ...]
) -> _Parts:
    """Read one source; `number` is its place in the mixture, a part of its seed."""
    length, packing, seed = settings.length, settings.packing, (settings.seed, number)
    held_out_seed = seed if settings.held_out_seed is None else (settings.held_out_seed, number)
    options, fraction = dict(settings.template_kwargs), settings.held_out_fraction
    if source.streaming:
        count = settings.held_out_rows if fraction else 0
        stream = StreamedRows(source, tokenizer, length, packing, seed, count, options, prefix)
        return stream, stream.held_out if count else None
    read_pictures = None
    if settings.pictures is not None and packing == "document":
        # so that a picture is never cut apart, and what is held out by another length is whole there, too
        most = min(length, settings.held_out_length or length) - len(prefix)
        read_pictures = functools.partial(settings.pictures, length=most)
    tokens = tokenize(documents(source), tokenizer, options, prefix, read_pictures)
    if not len(cuts(tokens, length, packing)):
        raise _nothing_to_learn(source, len(tokens))
    if not fraction:
        return tokens, None
    training, held_out = split_held_out(tokens, settings.held_out_length or length, fraction, held_out_seed)
    if not all(len(cuts(part, length, packing)) for part in (training, held_out)):
        raise UserError(
            f"There is too little text in {_name(source)} to keep {fraction:.1%} of it for measuring.",
            "Give more text, or held-out text of its own (held_out in the recipe's data section).",
        )
    return training, held_out


def _name(source: Source) -> str:
    return source.file or f"the data set {source.dataset!r}"


def _nothing_to_learn(source: Source, count: int) -> UserError:
    where = f"There is no text to learn from in {_name(source)}"
    if count < 2:
        return UserError(f"{where}: {count} tokens; expected at least 2.")
    return UserError(f"{where}: nothing that is to be learned follows anything in its {count} tokens.")

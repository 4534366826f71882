"""From the sources of a recipe to rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

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


def open_rows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int = 0,
    held_out_fraction: float = 0.0,
    packing: Packing = "stream",
    held_out_rows: int = 256,
    template_kwargs: Mapping[str, Any] | None = None,
    held_out_length: int | None = None,
    bos: Literal["auto", "text"] = "auto",
) -> tuple[TokenRows, TokenRows | None]:
    """Read and tokenize a mixture of sources.

    Args:
        sources: files or data sets of the hub, at least one.
        tokenizer: a tokenizer of transformers.
        length: most tokens in a row, at least 2.
        seed: of the order of the rows.
        held_out_fraction: share of each source to keep apart for measuring, spread over it; from 0 to below 1/2.
        packing: how documents become rows, see `packing.py`.
        held_out_rows: of a streamed source, the first rows instead, where the fraction is not 0.
        template_kwargs: what the chat template is given beside the messages.
        held_out_length: the length by which the held-out share is chosen; of the rows where it is None.
        bos: `auto`: every row begins with the BOS of a tokenizer that adds one; `text`: rows where a text begins.

    Returns:
        `(training rows, held-out rows)`; the latter None when the fraction is 0. No token is in both.

    Raises:
        UserError: a source cannot be read, is empty, or is too short.
    """
    if not sources:
        raise usage_error("There is no text: the list of sources is empty.", "Name a text file with --data FILE.")
    options = dict(template_kwargs or {})
    chat.check_options(tokenizer, options)
    prefix = prefix_of(tokenizer) if bos == "auto" else ()
    training: list[Tokens | StreamedRows] = []
    held_out: list[Tokens] = []
    for number, source in enumerate(sources):
        if source.streaming:
            kept = held_out_rows if held_out_fraction else 0
            stream = StreamedRows(source, tokenizer, length, packing, (seed, number), kept, options, prefix)
            training.append(stream)
            held_out += [stream.held_out] if kept else []
            continue
        tokens = tokenize(documents(source), tokenizer, options, prefix)
        if not len(cuts(tokens, length, packing)):
            raise _nothing(source, len(tokens))
        if held_out_fraction:
            tokens, rest = split_held_out(tokens, held_out_length or length, held_out_fraction, (seed, number))
            _check_parts(source, (tokens, rest), length, held_out_fraction, packing)
            held_out.append(rest)
        training.append(tokens)
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    weights = [source.weight for source in sources]

    def rows(found: Sequence[Tokens | StreamedRows]) -> TokenRows:
        return TokenRows(found, weights, length, seed, padding, packing)

    return rows(training), rows(held_out) if held_out else None


def _check_parts(
    source: Source, parts: tuple[Tokens, Tokens], length: int, held_out_fraction: float, packing: Packing
) -> None:
    """Make sure that there is something to train on and something to measure on."""
    if not all(len(cuts(part, length, packing)) for part in parts):
        raise UserError(
            f"There is too little text in {_name(source)} to keep {held_out_fraction:.1%} of it for measuring.",
            "Give more text, or held-out text of its own (held_out in the recipe's data section).",
        )


def _name(source: Source) -> str:
    return source.file or f"the data set {source.dataset!r}"


def _nothing(source: Source, count: int) -> UserError:
    where = f"There is no text to learn from in {_name(source)}"
    if count < 2:
        return UserError(f"{where}: {count} tokens; expected at least 2.")
    return UserError(f"{where}: nothing that is to be learned follows anything in its {count} tokens.")

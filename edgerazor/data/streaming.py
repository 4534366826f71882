"""The rows of a data set that is read as it is needed, in bounded memory.

Rows are cut from the stream in its own order, and `BLOCK` of them are in memory at a time; within a block they are
shuffled. The order is again a function of the seed and the turn, but turns have to come in ascending order, give or
take a block, or what lies between is read again.

A run resumes from a bookmark, which says where in the data set the block begins: how many of its rows were read, the
library's own state (`IterableDataset.state_dict`), and how many tokens of the next document were used before. With the
library's state, earlier shards are not opened again, and of the current one only what the file format asks for. Where
the library gives none, the rows before the bookmark are skipped, which reads them but does not tokenize them.

At the end of the stream it begins again. Every process reads the whole stream and keeps the rows that are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from edgerazor.data.packing import Packing
from edgerazor.data.sources import Document, load_dataset, of_row, unavailable
from edgerazor.data.tokens import Tokens, batch_of, encode, permutation, prefix_of, with_prefix
from edgerazor.errors import UserError
from edgerazor.recipe import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Rows that are kept and shuffled together.
BLOCK = 1024
#: Documents that are tokenized together.
BATCH_DOCUMENTS = 32

#: Where a row begins: `documents` read before it, the library's `state` then, tokens `used` of the next document.
Bookmark = dict[str, Any]
Piece = tuple[np.ndarray, np.ndarray]
BEGINNING: Bookmark = {"documents": 0, "state": None, "used": 0}


class StreamedRows:
    """The rows of one streamed source.

    Args:
        source: a data set.
        tokenizer: of the model.
        length: most tokens in a row, at least 2.
        packing: how documents become rows, see `packing.py`.
        seed: of the order within a block: any non-negative numbers.
        held_out_rows: rows at the beginning of the stream that training never sees.
        options: what the chat template is given beside the messages.
        prefix: what every row begins with; by default `prefix_of`.

    Raises:
        UserError: the data set cannot be read, or holds nothing beyond the held-out rows.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        packing: Packing,
        seed: tuple[int, ...],
        held_out_rows: int = 0,
        options: Mapping[str, Any] | None = None,
        prefix: tuple[int, ...] | None = None,
    ) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._length, self._packing, self._seed = length, packing, seed
        self._prefix = prefix_of(tokenizer) if prefix is None else prefix
        self._options = options
        rows = self._read(BEGINNING)
        self._held_out = [piece for _, piece in islice(rows, held_out_rows)]
        first = next(rows, None)
        if first is None:
            raise self._too_little(held_out_rows)
        self._bookmarks: dict[int, Bookmark] = {0: first[0]}
        self._blocks: dict[int, list[Piece]] = {}
        self._live: tuple[int, Piece, Iterator[tuple[Bookmark, Piece]]] | None = None  # block, its first row, the rest

    def _too_little(self, held_out_rows: int) -> UserError:
        name = f"the data set {self._source.dataset!r}"
        if not self._held_out:
            return UserError(f"There is no text to learn from in {name}.")
        return UserError(
            f"There is too little text in {name} to keep its first {held_out_rows} rows for measuring.",
            "Lower held_out_rows in the recipe's data section, or do not stream it.",
        )

    @property
    def held_out(self) -> Tokens:
        """The tokens of the held-out rows."""
        return Tokens.of(self._held_out, self._prefix)

    @property
    def mean_length(self) -> float:
        """Tokens in a row, on average over the first block."""
        rows = [piece for _, piece in islice(self._endless(self._bookmarks[0]), BLOCK)]
        return sum(len(ids) for ids, _ in rows) / len(rows)

    def row(self, turn: int) -> dict[str, Tensor]:
        """The row of a turn in the training order, which never ends: `input_ids` and `labels`, int64 `[n]`."""
        number, place = divmod(turn, BLOCK)
        if number not in self._blocks:
            self._blocks = {key: self._blocks[key] for key in (number - 1,) if key in self._blocks}
            self._blocks[number] = self._block(number)
        return batch_of(*self._blocks[number][place])

    def in_order(self) -> Iterator[dict[str, Tensor]]:
        """The rows as they stand in the stream, held-out ones left out, none of them twice."""
        return (batch_of(*piece) for _, piece in self._read(self._bookmarks[0]))

    def state(self, turn: int) -> dict[str, Any]:
        """What `restore` needs to go on with a turn that has been read before, or comes next: plain values."""
        block = max(number for number in self._bookmarks if number <= turn // BLOCK)
        return {"block": block, "bookmark": self._bookmarks[block]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where another run was, without reading again what it read."""
        self._bookmarks[int(state["block"])] = state["bookmark"]

    def _block(self, number: int) -> list[Piece]:
        """The rows of a block in their training order; reads on from the nearest bookmark before it."""
        if self._live is None or self._live[0] != number:
            nearest = max(block for block in self._bookmarks if block <= number)
            rows = self._endless(self._bookmarks[nearest])
            self._live = nearest, next(rows)[1], rows
        while True:
            here, first, rows = self._live
            block = [first, *(piece for _, piece in islice(rows, BLOCK - 1))]
            bookmark, ahead = next(rows)
            self._bookmarks[here + 1] = bookmark
            self._live = here + 1, ahead, rows
            if here == number:
                return [block[place] for place in permutation((*self._seed, number), BLOCK)]

    def _endless(self, bookmark: Bookmark) -> Iterator[tuple[Bookmark, Piece]]:
        """Rows from a bookmark on, again and again."""
        while True:
            yield from self._read(bookmark)
            bookmark = self._bookmarks[0]

    def _read(self, bookmark: Bookmark) -> Iterator[tuple[Bookmark, Piece]]:
        """Rows from a bookmark to the end of the stream, each with a bookmark of its own."""
        held: list[tuple[Bookmark, np.ndarray, np.ndarray]] = []  # documents that are not yet all in rows
        used = int(bookmark["used"])  # tokens of the first of these that are
        for place, (ids, learn) in self._encoded(bookmark):
            held.append((place, ids, learn))
            whole = self._packing == "document"
            while (left := sum(len(ids) for _, ids, _ in held) - used) >= self._length or (whole and left > 0):
                row, used = self._take(held, used)
                yield from row
        while held:
            row, used = self._take(held, used)
            yield from row

    def _take(
        self, held: list[tuple[Bookmark, np.ndarray, np.ndarray]], used: int
    ) -> tuple[list[tuple[Bookmark, Piece]], int]:
        """Cut the next row from the held documents (none if it has nothing to learn); also gives the tokens used."""
        bookmark = {**held[0][0], "used": used}
        end = used + self._length
        needed, size = 0, 0
        while needed < len(held) and size < end:
            size += len(held[needed][1])
            needed += 1
        ids = np.concatenate([part for _, part, _ in held[:needed]])[used:end]
        learn = np.concatenate([part for _, _, part in held[:needed]])[used:end]
        taken = len(ids)
        ids, learn = with_prefix(ids, learn, self._prefix)
        taken -= max(0, len(ids) - self._length)  # an added prefix is counted in the length
        ids, learn = ids[: self._length], learn[: self._length]
        used += taken
        while held and used >= len(held[0][1]):
            used -= len(held.pop(0)[1])
        return ([(bookmark, (ids, learn))] if learn[1:].any() else []), used

    def _encoded(self, bookmark: Bookmark) -> Iterator[tuple[Bookmark, Piece]]:
        """The tokens of each document, with a bookmark before it."""
        documents = self._documents(bookmark)
        while batch := list(islice(documents, BATCH_DOCUMENTS)):
            pieces = encode([document for _, document in batch], self._tokenizer, self._options)
            yield from zip((bookmark for bookmark, _ in batch), pieces, strict=True)

    def _documents(self, bookmark: Bookmark) -> Iterator[tuple[Bookmark, Document]]:
        stream = load_dataset(self._source)
        number = int(bookmark["documents"])
        if bookmark["state"] is not None:
            stream.load_state_dict(bookmark["state"])
        elif number:
            stream = stream.skip(number)
        before = bookmark["state"]
        records = iter(stream)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # the library's and the network's own, of many kinds
                raise unavailable(self._source, error) from error
            for document in of_row(self._source, number, record):
                yield {"documents": number, "state": before}, document
            number, before = number + 1, _state_of(stream)


def _state_of(stream: Any) -> dict[str, Any] | None:
    """The state of the data set by the `datasets` library, where it has one."""
    try:
        return dict(stream.state_dict())
    except (AttributeError, NotImplementedError):
        return None

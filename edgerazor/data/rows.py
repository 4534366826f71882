"""Rows of tokens in a fixed order.

The order of the rows is a pure function of the seed: `row(i)` is the i-th training row, for any `i`, as
often as it is asked. So a run resumes by remembering one integer, and processes share the work by counting:
process and micro-batch only decide which of a step's rows are whose. Each pass over a source has a permutation of
its own. Sources are mixed by weight so evenly that after any number of rows each has had its share within one row.

Rows of different lengths (`document` packing) are padded to the longest of their batch. So that little is wasted,
the rows of `SORTED_STEPS` steps are sorted by length and shared out anew among these steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import count as numbers
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from edgerazor.data.packing import Packing, cuts
from edgerazor.data.streaming import StreamedRows
from edgerazor.data.tokens import MASKED, Tokens, batch_of, permutation

#: Optimizer steps whose rows are sorted by length together.
SORTED_STEPS = 16

Batch = dict[str, Tensor]


class Mixture:
    """Which source each row comes from, so that after `n` rows source `s` has had `n·share[s]` of them within one row.

    This is the chairman assignment problem, and the rule is R. Tijdeman's (Discrete Mathematics 32, 1980, 323-330):
    of the sources that are far enough behind their share, take the one that would first be too far behind.

    Args:
        weights: positive weights of the sources, relative to each other.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._shares = [weight / sum(weights) for weight in weights]
        self._counts = [0] * len(weights)
        self._sources = array("L")
        self._turns = array("Q")

    def __call__(self, row: int) -> tuple[int, int]:
        """`(source, how many rows it had before)` of a row, counted from 0."""
        if len(self._shares) == 1:
            return 0, row
        while len(self._sources) <= row:
            source = self._next(len(self._sources) + 1)
            self._sources.append(source)
            self._turns.append(self._counts[source])
            self._counts[source] += 1
        return self._sources[row], self._turns[row]

    def before(self, source: int, row: int) -> int:
        """How many of the rows before a row are of a source."""
        if len(self._shares) == 1:
            return row
        self(row)
        return self._sources[:row].count(source)

    def _next(self, number: int) -> int:
        slack = 1 / (2 * len(self._shares) - 2)
        pairs = list(enumerate(zip(self._shares, self._counts, strict=True)))
        behind = [s for s, (share, count) in pairs if share * number - count >= slack - 1e-9]
        return min(behind, key=lambda s: (self._counts[s] + 1 - slack) / self._shares[s])


class SourceRows:
    """The rows of one source that lies in memory.

    Args:
        tokens: of the source.
        length: most tokens in a row, at least 2.
        packing: how it is cut into rows.
        seed: of the permutations: any non-negative numbers.

    Raises:
        ValueError: there is no row to learn from.
    """

    def __init__(self, tokens: Tokens, length: int, packing: Packing, seed: tuple[int, ...]) -> None:
        self._tokens = tokens
        self._cuts = cuts(tokens, length, packing)
        if not len(self._cuts):
            raise ValueError("A source gives no row to learn from: its tokens are out of range.")
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of different rows."""
        return len(self._cuts)

    @property
    def tokens(self) -> int:
        """Number of different tokens, prefixes that were added to rows included."""
        added = int((~self._tokens.has_prefix()[self._cuts[:, 0]]).sum()) * len(self._tokens.prefix)
        return int((self._cuts[:, 1] - self._cuts[:, 0]).sum()) + added

    @property
    def mean_length(self) -> float:
        """Tokens in a row, on average."""
        return self.tokens / len(self)

    def row(self, turn: int) -> Batch:
        """The row of a turn in the training order, which never ends: `input_ids` and `labels`, int64 `[n]`."""
        epoch, position = divmod(turn, len(self))
        return self._cut(int(self._order(epoch)[position]))

    def in_order(self) -> Iterator[Batch]:
        """The rows as they stand in the source, none of them twice."""
        return map(self._cut, range(len(self)))

    def _cut(self, number: int) -> Batch:
        begin, end = self._cuts[number]
        return batch_of(*self._tokens.row(begin, end))

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of the rows in one pass over them: `[rows]` int64."""
        if epoch not in self._orders:
            if len(self._orders) >= 2:
                self._orders.clear()
            self._orders[epoch] = permutation((*self._seed, epoch), len(self))
        return self._orders[epoch]


class TokenRows:
    """Rows of tokens of several sources in a fixed, endless order.

    Args:
        sources: for each source its tokens (`[N]` int32 where all are to be learned), at least 2; or a streamed one.
        weights: for each source its share of the rows, relative to the others, > 0.
        length: most tokens in a row, at least 2.
        seed: of the permutations, >= 0.
        padding: token id that fills rows.
        packing: how sources are cut into rows.

    Raises:
        ValueError: an argument is out of range, or nothing is to be learned from a source.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray | Tokens | StreamedRows],
        weights: Sequence[float],
        length: int,
        seed: int = 0,
        padding: int = 0,
        packing: Packing = "stream",
    ) -> None:
        if length < 2 or seed < 0 or not sources or min(weights) <= 0:
            raise ValueError(f"Rows of {length} tokens, seed {seed}, {len(sources)} sources: out of range.")
        self.length = length
        self.seed = seed
        self.padding = padding
        self.packing = packing
        self._sources = [self._rows_of(source, number) for number, source in enumerate(sources)]
        self._shares = [weight / sum(weights) for weight in weights]
        self._mixture = Mixture(weights)
        self._window: tuple[tuple[int, int], list[Batch]] | None = None

    def _rows_of(self, source: np.ndarray | Tokens | StreamedRows, number: int) -> SourceRows | StreamedRows:
        if isinstance(source, StreamedRows):
            return source
        tokens = Tokens.of_text(source) if isinstance(source, np.ndarray) else source
        return SourceRows(tokens, self.length, self.packing, (self.seed, number))

    def __len__(self) -> int:
        """Number of different rows, over all sources that lie in memory."""
        return sum(len(source) for source in self._sources if isinstance(source, SourceRows))

    @property
    def tokens(self) -> int:
        """Number of different tokens, over all sources that lie in memory, padding not counted."""
        return sum(source.tokens for source in self._sources if isinstance(source, SourceRows))

    def passes(self, count: int) -> float:
        """How often the first `count >= 0` training rows go through the source that they repeat most; 0 of streams."""
        passes = [
            count * share / len(source)
            for share, source in zip(self._shares, self._sources, strict=True)
            if isinstance(source, SourceRows)
        ]
        return max(passes, default=0.0)

    @property
    def tokens_per_row(self) -> float:
        """Tokens that a training row takes: the full length in `stream` packing, on average in `document` packing."""
        if self.packing == "stream":
            return float(self.length)
        return sum(share * source.mean_length for share, source in zip(self._shares, self._sources, strict=True))

    def row(self, index: int) -> Batch:
        """The row that comes at `index >= 0` of the training order, which never ends.

        Returns:
            `input_ids [T]` and `labels [T]`, int64, equal but for what no loss counts, where labels are -100. `T` is
            the length in `stream` packing, and that of the document's piece in `document` packing.
        """
        if index < 0:
            raise ValueError(f"Row {index}: rows are counted from 0.")
        source, turn = self._mixture(index)
        return self._filled(self._sources[source].row(turn))

    def batch(
        self, step: int, micro: int = 0, rank: int = 0, world: int = 1, batch_size: int = 1, accumulation: int = 1
    ) -> Batch:
        """The rows of one micro-batch of one process.

        An optimizer step consumes `accumulation · world · batch_size` rows, the same ones however they are shared out.
        In `stream` packing these are consecutive.

        Args:
            step: optimizer step, from 0.
            micro: micro-batch of the step, `0 <= micro < accumulation`.
            rank: process, `0 <= rank < world`.
            world: number of processes.
            batch_size: `B`, rows in a micro-batch.
            accumulation: micro-batches in a step, per process.

        Returns:
            `input_ids [B, T]` and `labels [B, T]`, int64.
        """
        if not (0 <= micro < accumulation and 0 <= rank < world):
            raise ValueError(f"Micro-batch {micro} of {accumulation}, process {rank} of {world}: out of range.")
        rows_per_step = accumulation * world * batch_size
        first = (micro * world + rank) * batch_size
        if self.packing == "stream":
            rows = [self.row(step * rows_per_step + first + offset) for offset in range(batch_size)]
        else:
            rows = self._sorted(step, rows_per_step)[first : first + batch_size]
        return self._stacked(rows)

    def state(self, step: int, rows_per_step: int) -> dict[str, Any]:
        """Where streamed sources stand before a step of `rows_per_step` rows: plain values for `restore`."""
        first = (step if self.packing == "stream" else step // SORTED_STEPS * SORTED_STEPS) * rows_per_step
        return {
            str(number): source.state(self._mixture.before(number, first))
            for number, source in enumerate(self._sources)
            if isinstance(source, StreamedRows)
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Let streamed sources continue where another run was, without reading again what it read."""
        for number, source in enumerate(self._sources):
            if isinstance(source, StreamedRows) and str(number) in state:
                source.restore(state[str(number)])

    def _sorted(self, step: int, rows_per_step: int) -> list[Batch]:
        """The rows of a step, sorted by length together with those of the steps around it."""
        window, place = divmod(step, SORTED_STEPS)
        if self._window is None or self._window[0] != (window, rows_per_step):
            first = window * SORTED_STEPS * rows_per_step
            rows = [self.row(first + offset) for offset in range(SORTED_STEPS * rows_per_step)]
            self._window = (window, rows_per_step), sorted(rows, key=_size)
        turn = int(permutation((self.seed, len(self._sources), window), SORTED_STEPS)[place])
        return self._window[1][turn * rows_per_step : (turn + 1) * rows_per_step]

    def in_order(self, count: int | None = None) -> Iterator[Batch]:
        """The first `count` rows (all by default) as they stand in the sources, none of them twice.

        Sources are mixed by weight until one of them ends; what the others have left follows.
        """
        return map(self._filled, islice(self._in_order(), count))

    def _in_order(self) -> Iterator[Batch]:
        rest = [source.in_order() for source in self._sources]
        for index in numbers():
            row = next(rest[self._mixture(index)[0]], None)
            if row is None:
                break
            yield row
        for source in rest:
            yield from source

    def batches(self, rows: Sequence[Batch], batch_size: int) -> Iterator[Batch]:
        """Rows `batch_size` at a time, sorted by length so that little is padded."""
        ordered = sorted(rows, key=_size)
        for first in range(0, len(ordered), batch_size):
            yield self._stacked(ordered[first : first + batch_size])

    def _stacked(self, rows: Sequence[Batch]) -> Batch:
        length = max(map(_size, rows))
        rows = [self._filled(row, length) for row in rows]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def _filled(self, row: Batch, length: int = 0) -> Batch:
        """A row padded to a length, and to the full one in `stream` packing."""
        missing = max(length, self.length if self.packing == "stream" else 0) - _size(row)
        if missing <= 0:
            return row
        values = {"input_ids": self.padding, "labels": MASKED}
        return {key: pad(row[key], (0, missing), value=value) for key, value in values.items()}


def _size(row: Batch) -> int:
    return len(row["input_ids"])


def sample_batches(rows: TokenRows, count: int, batch_size: int) -> Iterator[Batch]:
    """The first `count` rows in the order of the sources, the same ones every time, for calibrating and measuring.

    Args:
        rows: where they come from.
        count: number of rows; where there are fewer, all of them.
        batch_size: `B`; the last batch may be smaller.

    Returns:
        iterator of `input_ids [B, T]` and `labels [B, T]`, int64.
    """
    return rows.batches(list(rows.in_order(count)), batch_size)

"""Text -> token batches in a fixed order.

A source (a file or a data set of the hub) gives documents; a document becomes the tokenizer's tokens, with its
own special tokens and an end-of-text token; the documents of a source follow one another in one long stream, which
is cut into rows of equal length. No token is dropped: the last row of a source is padded with positions that no
loss counts (only a lone last token, from which nothing can be predicted, is left out).

The order of the rows is a pure function of the seed: `row(i)` is the i-th training row, for any `i`, as
often as it is asked. So a run resumes by remembering one integer, and processes share the work by counting:
process and micro-batch only decide which of a step's rows are whose. Each pass over a source has a permutation of
its own. Sources are mixed by weight so evenly that after any number of rows each has had its share within one row.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
import torch
from torch import Tensor

from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Separates the documents of a plain text file that says nothing else.
END_OF_TEXT = "<|endoftext|>"
#: Label of a padded position, which no loss counts (the convention of PyTorch and transformers).
MASKED = -100
#: How much of a source may be held out so as to hold out whole documents, when less was asked for.
LARGEST_HELD_OUT = 0.25

Batch = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------------------------


def documents(source: Source) -> Iterator[str]:
    """The texts of a source in its own order, empty ones left out.

    Raises:
        UserError: the file or data set cannot be read, or does not hold what the source says.
    """
    if source.file is None:
        return _of_dataset(source)
    path = _existing(source.file)
    kinds = {".txt": _of_text, ".json": _of_json_lines, ".jsonl": _of_json_lines}
    kind = _kind(path)
    if kind not in kinds:
        raise usage_error(f"{path} is not a text file of a known kind; expected .txt, .jsonl or .json, plain or .gz.")
    return kinds[kind](path, source)


def _existing(file: str) -> Path:
    path = Path(file)
    if path.is_dir():
        raise usage_error(f"{path} is a folder; expected a text file.", "Name the files in it one by one.")
    if not path.exists():
        raise usage_error(f"There is no file {path}.")
    return path


def _kind(path: Path) -> str:
    """The ending that says what a file holds, with `.gz` taken off."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """The file as text, decompressed; whatever is wrong with its bytes becomes one sentence."""
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield cast(TextIO, file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}.") from error


def _of_text(path: Path, source: Source) -> Iterator[str]:
    if source.separator == "":
        raise usage_error(f"The separator of {path} is empty; expected text between documents, such as {END_OF_TEXT}.")
    with _reading(path) as file:
        text = file.read()
    separator = source.separator or END_OF_TEXT
    if separator not in text:
        yield from [text] if text.strip() else []
        return
    for part in text.split(separator):
        if part.strip():
            yield part.strip("\n")  # the line breaks around a separator are part of the separation


def _of_json_lines(path: Path, source: Source) -> Iterator[str]:
    with _reading(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {path}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON; expected one JSON object on each line.") from error
            if not isinstance(record, dict):
                raise UserError(f"{where} is a JSON {type(record).__name__}; expected an object.")
            _require_column(where, source.column, list(record))
            yield from _text_of(where, source.column, record[source.column])


def _require_column(where: str, column: str, present: list[str]) -> None:
    if column in present:
        return
    if "messages" in present and "text" not in present:
        raise UserError(
            f"{where} holds chat messages, which are not supported as training text yet.",
            "Give a column of plain text (column: NAME in the recipe).",
        )
    names = ", ".join(map(repr, present)) or "none"
    raise UserError(f"{where} has no column {column!r}; its columns are {names}.", "Set column: NAME in the recipe.")


def _text_of(where: str, column: str, value: object) -> Iterator[str]:
    """The text of a record, or nothing if it is blank."""
    if not isinstance(value, str):
        raise UserError(f"{where} has {type(value).__name__} in column {column!r}; expected text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half of a surrogate pair in column {column!r}; expected valid text.") from error
    if value.strip():
        yield value


def _of_dataset(source: Source) -> Iterator[str]:
    import datasets

    name = f"The data set {source.dataset!r}"
    try:
        loaded = datasets.load_dataset(source.dataset, source.config, split=source.split)
    except Exception as error:  # the library's and the network's own, of many kinds
        raise _unavailable(source, error) from error
    _require_column(name, source.column, loaded.column_names)
    for number, value in enumerate(loaded[source.column]):
        yield from _text_of(f"Row {number} of {name[0].lower()}{name[1:]}", source.column, value)


def _unavailable(source: Source, error: Exception) -> UserError:
    which = f" with configuration {source.config!r}" if source.config else ""
    return UserError(
        f"The data set {source.dataset!r}{which}, split {source.split!r}, cannot be loaded: {_first_line(error)}.",
        "Check its id, configuration and split, and the network; or give a local file.",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def fingerprint(sources: Iterable[Source]) -> str:
    """What would be read: sha256, in hex, over the contents of the files (or the data sets' revisions) and the fields.

    A file that was only moved or renamed (keeping its ending) has the same fingerprint.

    Raises:
        UserError: a file is missing or unreadable, or a data set's revision cannot be found out.
    """
    parts: list[dict[str, Any]] = []
    for source in sources:
        part: dict[str, Any] = {"column": source.column, "separator": source.separator, "weight": source.weight}
        if source.file is not None:
            path = _existing(source.file)
            part |= {"kind": _kind(path), "sha256": _file_digest(path)}
        else:
            part |= {"dataset": source.dataset, "config": source.config, "split": source.split}
            part["revision"] = _revision(source)
        parts.append(part)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}.") from error


def _revision(source: Source) -> str:
    import datasets

    try:
        return str(datasets.load_dataset_builder(source.dataset, source.config).hash)
    except Exception as error:
        raise _unavailable(source, error) from error


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """All texts as one stream of tokens.

    Each text gets the special tokens that the tokenizer adds (a BOS where it has one), and the tokenizer's EOS at its
    end where it has one and did not add it.

    Returns:
        `(tokens [N] int32, starts [D] int64)`: the stream, and where in it each of the `D` texts begins.
    """
    eos = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    texts = iter(texts)
    while some := list(islice(texts, 256)):
        encoded = tokenizer(
            some,
            add_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # rows are cut below, so texts longer than the model's context are no reason to warn
        )
        for ids in encoded["input_ids"]:
            ended = eos is None or (len(ids) > 0 and ids[-1] == eos)
            pieces.append(np.array(ids if ended else [*ids, eos], dtype=np.int32))
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    return tokens, np.cumsum(lengths) - lengths


def split_held_out(
    tokens: np.ndarray, starts: np.ndarray, length: int, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the end off a stream of tokens, for measuring on text that training never sees.

    The cut is at the start of the last document that leaves at least `fraction` behind it. Where whole documents would
    take far more than asked for (one long document, for one), the cut goes through a document, between two rows.

    Args:
        tokens: `[N]` int32.
        starts: `[D]` int64, where documents begin.
        length: tokens in a row.
        fraction: share of the tokens to hold out, above 0 and below 1.

    Returns:
        `(training [N - M], held out [M])`, views of `tokens`.
    """
    total = len(tokens)
    goal = int(total * (1 - fraction))
    candidates = starts[(starts > 0) & (starts <= goal)]
    cut = int(candidates[-1]) if len(candidates) else 0
    if total - cut > max(2 * fraction, LARGEST_HELD_OUT) * total:
        cut = goal // length * length or goal
    return tokens[:cut], tokens[cut:]


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

    def _next(self, number: int) -> int:
        slack = 1 / (2 * len(self._shares) - 2)
        pairs = list(enumerate(zip(self._shares, self._counts, strict=True)))
        behind = [s for s, (share, count) in pairs if share * number - count >= slack - 1e-9]
        return min(behind, key=lambda s: (self._counts[s] + 1 - slack) / self._shares[s])


class TokenRows:
    """Rows of tokens in a fixed, endless order.

    Args:
        streams: for each source its tokens `[N]` int32, at least 2.
        weights: for each source its share of the rows, relative to the others, > 0.
        length: tokens in a row, at least 2.
        seed: of the permutations, >= 0.
        padding: token id that fills a source's last row.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, streams: Sequence[np.ndarray], weights: Sequence[float], length: int, seed: int = 0, padding: int = 0
    ) -> None:
        if length < 2 or seed < 0 or not streams or min(map(len, streams)) < 2 or min(weights) <= 0:
            raise ValueError(f"Rows of {length} tokens, seed {seed}, {len(streams)} sources: out of range.")
        self.length = length
        self.seed = seed
        self.padding = padding
        self._streams = list(streams)
        # a lone token left over at the end would predict nothing
        self._sizes = [(len(stream) - 2) // length + 1 for stream in streams]
        self._mixture = Mixture(weights)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Number of different rows, over all sources."""
        return sum(self._sizes)

    @property
    def tokens(self) -> int:
        """Number of different tokens, over all sources, padding not counted."""
        return sum(min(len(s), n * self.length) for s, n in zip(self._streams, self._sizes, strict=True))

    def row(self, index: int) -> Batch:
        """The row that comes at `index >= 0` of the training order, which never ends.

        Returns:
            `input_ids [T]` and `labels [T]`, int64, equal but for padding, where labels are -100.
        """
        if index < 0:
            raise ValueError(f"Row {index}: rows are counted from 0.")
        source, turn = self._mixture(index)
        epoch, position = divmod(turn, self._sizes[source])
        return self._cut(source, int(self._order(source, epoch)[position]))

    def batch(
        self, step: int, micro: int = 0, rank: int = 0, world: int = 1, batch_size: int = 1, accumulation: int = 1
    ) -> Batch:
        """The rows of one micro-batch of one process.

        An optimizer step consumes `accumulation · world · batch_size` consecutive rows, however they are shared out.

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
        first = ((step * accumulation + micro) * world + rank) * batch_size
        return _stacked([self.row(first + offset) for offset in range(batch_size)])

    def in_order(self, count: int | None = None) -> Iterator[Batch]:
        """The first `count` rows (all by default) as they stand in the sources, none of them twice.

        Sources are mixed by weight until one of them ends; what the others have left follows.
        """
        rows = self._in_order()
        return (self._cut(source, number) for source, number in islice(rows, count))

    def _in_order(self) -> Iterator[tuple[int, int]]:
        taken = [0] * len(self._sizes)
        for index in range(len(self)):
            source, turn = self._mixture(index)
            if turn == self._sizes[source]:
                break
            taken[source] += 1
            yield source, turn
        for source, size in enumerate(self._sizes):
            yield from ((source, number) for number in range(taken[source], size))

    def _cut(self, source: int, number: int) -> Batch:
        piece = self._streams[source][number * self.length : (number + 1) * self.length].astype(np.int64)
        missing = (0, self.length - len(piece))
        return {
            "input_ids": torch.from_numpy(np.pad(piece, missing, constant_values=self.padding)),
            "labels": torch.from_numpy(np.pad(piece, missing, constant_values=MASKED)),
        }

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The permutation of a source's rows in one pass over them: `[rows]` int64."""
        key = (source, epoch)
        if key not in self._orders:
            if len(self._orders) >= 2 * len(self._sizes):
                self._orders.clear()
            # raw bits, because NumPy keeps those (not its permutations) the same in every version
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, source, epoch])).random_raw(self._sizes[source])
            self._orders[key] = np.argsort(bits, kind="stable")
        return self._orders[key]


def open_rows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int = 0,
    held_out_fraction: float = 0.0,
) -> tuple[TokenRows, TokenRows | None]:
    """Read and tokenize a mixture of sources.

    Args:
        sources: files or data sets of the hub, at least one.
        tokenizer: a tokenizer of transformers.
        length: tokens in a row, at least 2.
        seed: of the order of the rows.
        held_out_fraction: share of each source, from its end, to keep apart for measuring; from 0 to below 1.

    Returns:
        `(training rows, held-out rows)`; the latter None when the fraction is 0. No token is in both.

    Raises:
        UserError: a source cannot be read, is empty, or is too short.
    """
    if not sources:
        raise usage_error("There is no text: the list of sources is empty.", "Name a text file with --data FILE.")
    training, held_out = [], []
    for source in sources:
        name = source.file or f"the data set {source.dataset!r}"
        tokens, starts = tokenize(documents(source), tokenizer)
        if len(tokens) < 2:
            raise UserError(f"There is no text to learn from in {name}: {len(tokens)} tokens; expected at least 2.")
        if held_out_fraction:
            tokens, rest = split_held_out(tokens, starts, length, held_out_fraction)
            if min(len(tokens), len(rest)) < 2:
                raise UserError(
                    f"There is too little text in {name} to keep {held_out_fraction:.1%} of it for measuring.",
                    "Give more text, or held-out text of its own (held_out in the recipe's data section).",
                )
            held_out.append(rest)
        training.append(tokens)
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    weights = [source.weight for source in sources]
    rows = TokenRows(training, weights, length, seed, padding)
    return rows, TokenRows(held_out, weights, length, seed, padding) if held_out else None


def sample_batches(rows: TokenRows, count: int, batch_size: int) -> Iterator[Batch]:
    """The first `count` rows in the order of the sources, the same ones every time, for calibrating and measuring.

    Args:
        rows: where they come from.
        count: number of rows; where there are fewer, all of them.
        batch_size: `B`; the last batch may be smaller.

    Returns:
        iterator of `input_ids [B, T]` and `labels [B, T]`, int64.
    """
    chosen = rows.in_order(count)
    while some := list(islice(chosen, batch_size)):
        yield _stacked(some)


def _stacked(rows: list[Batch]) -> Batch:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

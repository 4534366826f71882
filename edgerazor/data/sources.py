"""Where text comes from: the documents of a file or a data set, and what identifies them.

A document is a text (`str`) or a conversation (`chat.Conversation`): in a record of a JSON file or a data set, text
stands in the column that the source names, and a list of messages in `messages`, `conversations` or that column.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from edgerazor import untrusted
from edgerazor.data.chat import Conversation, check_encodable, parse_conversation
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.recipe import Source

#: Separates the documents of a plain text file that says nothing else.
END_OF_TEXT = "<|endoftext|>"
#: Columns that hold conversations where the source names no column that is there.
CHAT_COLUMNS = ("messages", "conversations")

Document = str | Conversation


def documents(source: Source) -> Iterator[Document]:
    """The texts and conversations of a source in its own order, blank texts left out.

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
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error


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


def _of_json_lines(path: Path, source: Source) -> Iterator[Document]:
    with _reading(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {path}"
            try:
                record = untrusted.parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"{where} is not JSON that can be read: {plain(error, 100)}.",
                    "Expected one JSON object on each line.",
                ) from error
            if not isinstance(record, dict):
                raise UserError(f"{where} is a JSON {type(record).__name__}; expected an object.")
            yield from _of_record(where, source.column, record, path.parent)


def _of_record(where: str, column: str, record: Mapping[str, object], folder: Path | None = None) -> Iterator[Document]:
    """The text or the conversation of a record, or nothing if it is blank; pictures' paths start from a folder."""
    given = [name for name, value in record.items() if not _is_absent(value)]
    # An empty text beside messages does not count; where nothing is given, the column's absence is what is reported.
    column = column_of(where, column, given if _is_known(column, given) else list(record))
    value = record[column]
    if isinstance(value, list):
        yield parse_conversation(where, value, record.get("tools"), folder)
    else:
        yield from _text_of(where, column, value)


def _is_known(column: str, present: list[str]) -> bool:
    """Whether `column_of` finds a column among those that are present."""
    return column in present or (column == "text" and any(name in present for name in CHAT_COLUMNS))


def _is_absent(value: object) -> bool:
    """Whether a field says nothing: files and data sets that mix rows of two kinds fill so what a row does not have."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def column_of(where: str, column: str, present: list[str]) -> str:
    """The column to read: the one that the source names, or, where that is the usual `text`, a usual one of chat data.

    Raises:
        UserError: there is none.
    """
    if column in present:
        return column
    if _is_known(column, present):
        return next(name for name in CHAT_COLUMNS if name in present)
    names = ", ".join(map(repr, present)) or "none"
    raise UserError(f"{where} has no column {column!r}; its columns are {names}.", "Set column: NAME in the recipe.")


def _text_of(where: str, column: str, value: object) -> Iterator[str]:
    """The text of a record, or nothing if it is blank."""
    if not isinstance(value, str):
        kind = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where} has {kind} in column {column!r}; expected text or messages.")
    check_encodable(where, f"column {column!r}", value)
    if value.strip():
        yield value


def _of_dataset(source: Source) -> Iterator[Document]:
    for number, record in enumerate(load_dataset(source)):
        yield from of_row(source, number, record)


def of_row(source: Source, number: int, record: Mapping[str, object]) -> Iterator[Document]:
    """The text or the conversation of a data set's row, or nothing if it is blank."""
    return _of_record(f"Row {number} of the data set {source.dataset!r}", source.column, record)


def load_dataset(source: Source) -> Any:
    """The data set of a source, with the columns that are of use; one that is streamed is only opened.

    Raises:
        UserError: it cannot be loaded, or does not hold what the source says.
    """
    import datasets

    try:
        options = {"streaming": True} if source.streaming else {}
        loaded = datasets.load_dataset(source.dataset, source.config, split=source.split, **options)
    except Exception as error:  # the library's and the network's own, of many kinds
        raise unavailable(source, error) from error
    names = loaded.column_names
    if names is None:  # a streamed data set may not know before it is read
        return loaded
    chosen = {column_of(f"The data set {source.dataset!r}", source.column, names)}
    if source.column == "text":  # rows may have one or the other
        chosen |= {name for name in CHAT_COLUMNS if name in names}
    if not chosen.isdisjoint(CHAT_COLUMNS):
        chosen.add("tools")
    return loaded.select_columns([name for name in names if name in chosen])


def unavailable(source: Source, error: Exception) -> UserError:
    """The sentence for a data set that cannot be loaded or read."""
    which = f" with configuration {source.config!r}" if source.config else ""
    return UserError(
        f"The data set {source.dataset!r}{which}, split {source.split!r}, cannot be loaded: {_reason(error)}.",
        "Check its id, configuration and split, and the network; or give a local file.",
    )


def _reason(error: BaseException) -> str:
    """The first line of an exception of another library, for the end of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def fingerprint(sources: Iterable[Source]) -> str:
    """Identifies what would be read: sha256, in hex, over the contents of the files (or the data sets' revisions) and
    the fields.

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
            if pictures := _picture_digests(path, source):
                part["pictures"] = pictures
        else:
            part |= {"dataset": source.dataset, "config": source.config, "split": source.split}
            part["revision"] = _revision(source)
            part |= {"streaming": True} if source.streaming else {}
        parts.append(part)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _picture_digests(path: Path, source: Source) -> list[str]:
    """Digests of the picture files that the conversations of a file name, in their order."""
    if _kind(path) == ".txt" or not _names_pictures(path):
        return []
    listed = [
        part.get("path")
        for document in documents(source)
        if isinstance(document, Conversation)
        for part in document.pictures
    ]
    files = [path.parent / name for name in listed if isinstance(name, str) and "://" not in name]
    return [_file_digest(file) for file in files]


def _names_pictures(path: Path) -> bool:
    """Whether a file of JSON lines may name picture files."""
    with _reading(path) as file:
        return any('"path"' in line and '"image"' in line for line in file)


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error


def _revision(source: Source) -> str:
    import datasets

    try:
        return str(datasets.load_dataset_builder(source.dataset, source.config).hash)
    except Exception as error:
        raise unavailable(source, error) from error

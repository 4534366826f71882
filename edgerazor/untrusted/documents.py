"""JSON of strangers: of bounded size, depth, number of entries and digits, or refused with the reason.

`parse_json` and the functions that begin with `load` raise ValueError, for callers that have a sentence of their own;
`read_json` raises that one sentence.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from edgerazor.errors import UserError, plain

#: Most bytes of a document that is read whole: many times what a large model needs.
MOST_BYTES = 1 << 24
#: Of our own results, which grow with the model.
MOST_BYTES_OF_OURS = 1 << 30
#: Bytes that are read at a time.
PIECE = 1 << 20
#: Levels of lists and objects in each other; Python and its libraries recurse, and end at about a thousand.
MOST_LEVELS = 64
#: Lists, objects and what is in them, of which each takes some hundred bytes of memory.
MOST_ENTRIES = 1 << 20
#: Of a tokenizer: each token with its number, each pair of tokens that are merged.
MOST_ENTRIES_OF_TOKENIZERS = 1 << 24
#: Digits of a whole number; more is refused by nearly everything that numbers are given to.
MOST_DIGITS = 40

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_Model = TypeVar("_Model", bound=BaseModel)


def parse_json(
    text: bytes | str,
    top: type | None = None,
    *,
    unambiguous: bool = False,
    most_entries: int = MOST_ENTRIES,
) -> Any:
    """Parse JSON in UTF-8, within bounds.

    Args:
        text: the document.
        top: dict, list, str ... that it must be; None for any.
        unambiguous: refuse names that an object has twice (readers differ in what they make of them) and numbers that
            are not finite.
        most_entries: of all lists and objects together.

    Raises:
        ValueError: it is something else, too deep or too large; the reason, in words.
    """
    hooks: dict[str, Any] = {"parse_int": _whole_number}
    if unambiguous:
        hooks |= {"object_pairs_hook": _unique_names, "parse_constant": _finite_number, "parse_float": _finite_number}
    try:
        text = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    _check_entries(text, most_entries)
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    _check_levels(value)
    if _SURROGATE.search(text):
        _check_text(value)
    if top is not None and type(value) is not top:
        raise ValueError(f"it holds {_json_name(type(value))}, not {_json_name(top)}")
    return value


def _check_entries(text: str, most: int) -> None:
    """Refuse what would fill the memory, before there are objects of it."""

    def count(piece: str) -> int:
        return sum(piece.count(mark) for mark in ",[{")

    if count(text) > most and count(_STRING.sub("", text)) > most:
        raise ValueError(f"it has more than {most:,} entries")


def _check_levels(value: Any) -> None:
    """Refuse what is nested too deeply; without recursion, which too many levels would end."""
    level, inner = 0, [value]
    while inner:
        if level > MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
        level += 1
        lists = [node if isinstance(node, list) else node.values() for node in inner if isinstance(node, list | dict)]
        inner = [member for members in lists for member in members if isinstance(member, list | dict)]


def _check_text(value: Any) -> None:
    """Refuse halves of surrogate pairs, which JSON can spell and no file, terminal or tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no text") from None


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it has {plain(repr(twice), 80)} twice")
    return entries


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it has the number {plain(text, 50)}")
    return number


def _json_name(kind: type) -> str:
    """A type of Python as one of JSON."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(kind, "a number")


def read_bytes(path: Path, most: int = MOST_BYTES, pipes: bool = False) -> bytes:
    """Read a whole file, if it is not too large.

    Args:
        path: its place.
        most: bytes that it may have.
        pipes: whether it may be a pipe or a device, as what a shell gives for `<(command)` is.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file (but a pipe, say, which nobody may ever write to), or larger.
    """
    if not pipes and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")
    content = bytearray()
    with open(path, "rb") as file:  # in pieces: a buffer of the most bytes may be more than there is memory
        while len(content) <= most and (piece := file.read(min(PIECE, most + 1 - len(content)))):
            content += piece
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return bytes(content)


def load_json(path: Path, top: type | None = dict, *, unambiguous: bool = False, most_bytes: int = MOST_BYTES) -> Any:
    """What a JSON file holds; see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; the reason.
    """
    most_entries = max(MOST_ENTRIES, most_bytes >> 4)
    return parse_json(read_bytes(path, most_bytes), top, unambiguous=unambiguous, most_entries=most_entries)


def read_json(path: Path, top: type | None = dict, *, hint: str = "", most_bytes: int = MOST_BYTES) -> Any:
    """What a JSON file holds; see `parse_json`.

    Args:
        path: its place.
        top: dict, list ... that it must hold; None for any.
        hint: what to do where it does not.
        most_bytes: that it may have.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        return load_json(path, top, most_bytes=most_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or type(error).__name__}.", hint) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {plain(error).rstrip('.')}.", hint) from None


def load_model(path: Path, kind: type[_Model]) -> _Model:
    """Read one of our own results as the pydantic model that it was written from.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged (of pydantic, where a field is not as it should be).
    """
    content = read_bytes(path, MOST_BYTES_OF_OURS)
    parse_json(content, dict, most_entries=MOST_BYTES_OF_OURS >> 4)
    return kind.model_validate_json(content)

"""Words of anybody as Markdown, behind some of ours: shown as they are, never as an image, HTML or part of a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgerazor.errors import harmless, plain

#: Characters that Markdown may take for more than themselves; underscores within a word are none.
_MARKS = re.compile(r"([\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w))")


def escaped(text: object, most: int = 400) -> str:
    """Text as part of a line: bounded, without control characters, no character of it a mark.

    Args:
        text: what is to be shown.
        most: characters of it.
    """
    return _MARKS.sub(r"\\\1", plain(text, most))


def code(text: object, most: int = 400) -> str:
    """Text as code within a line, whatever backticks it has."""
    words = plain(text, most)
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    pad = " " if words.startswith("`") or words.endswith("`") or not words else ""
    return f"{fence}{pad}{words}{pad}{fence}"


def block(text: str, language: str = "", most: int = 20_000) -> str:
    """Lines as a block of code, between fences that none of them can end."""
    lines = harmless(text if len(text) <= most else f"{text[:most]}...")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines.rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; the first column is words, the others numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))

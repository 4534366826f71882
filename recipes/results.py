"""Tables for recipes/RESULTS.md, and where in it they go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from edgerazor.workdir import versions, write_text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def packages() -> str:
    """The packages that count and their versions, in words."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def publish(name: str, text: str, results: Path) -> None:
    """Put a text between the marks of its name, instead of what was there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = results.read_text(encoding="utf-8").split(begin)
    write_text(results, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")

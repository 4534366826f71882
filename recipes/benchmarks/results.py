"""Tables for the pages of recipes/results, where in a page they go, and how their numbers are written."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgerazor.workdir import versions, write_text
from recipes.benchmarks.folders import CHECKOUT


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def packages() -> str:
    """The packages that count and their versions, in words."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def commit() -> str:
    """The commit of this tree, with a plus where files differ from it; empty outside of git."""
    words = ["git", "-C", str(CHECKOUT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def publish(name: str, text: str, page: Path) -> None:
    """Put a text between the marks of its name in a page, instead of what was there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    write_text(page, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")

"""What people see: results on stdout, progress and logs on stderr.

No colour and no live bars when stderr is not a terminal; there progress is a line now and then, so that a CI log
stays readable. With `--json` stdout holds one JSON object and nothing else; `--quiet` silences stderr but for errors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pydantic import BaseModel
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from edgerazor.errors import UserError, harmless, plain, usage_error

#: Seconds between progress lines where there is no terminal.
LINE_EVERY = 10.0
#: Most bytes of an error's sentence and of its hint, and of any other line for people.
LONGEST_ERROR, LONGEST_HINT, LONGEST_LINE = 1500, 500, 1000


def is_main_process() -> bool:
    """Whether this is the process that writes and talks, where a launcher (torchrun) started several."""
    return launched("RANK", 0) == 0


def launched(name: str, default: int) -> int:
    """A number that a launcher puts into the environment.

    Raises:
        UserError: it is none.
    """
    said = os.environ.get(name, str(default))
    if not (said.isascii() and said.isdecimal() and len(said) < 10):
        raise usage_error(
            f"The environment says {name}={plain(said, 40)}, which is no number of processes.",
            f"Launchers (torchrun) set it; without one: `unset {name}`.",
        )
    return int(said)


class Terminal(RichConsole):
    """A console whose words are words: whatever is shown (a line, a cell, a bar's title), nothing in it is a command.

    Strangers' texts reach us in more places than anybody can list, so it is here, at the end, that they are made
    harmless. No markup either: `[/x]` in the name of a file is a part of it.
    """

    def __init__(self, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for each in super().render(renderable, options):
            text = each.text
            yield each if each.control or text.isprintable() else Segment(harmless(text), each.style)


class Tracker:
    """One task's progress; `advance` moves it, `note` sets the words behind it."""

    def advance(self, amount: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class BarTracker(Tracker):
    def __init__(self, progress: Progress, task: int) -> None:
        self.progress, self.task = progress, task

    def advance(self, amount: int = 1) -> None:
        self.progress.advance(self.task, amount)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self.progress.update(self.task, note=text)  # type: ignore[arg-type]


class LineTracker(Tracker):
    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self.console, self.title, self.total, self.done = console, title, total, done
        self.text, self.latest = "", time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.latest >= LINE_EVERY or self.done == self.total:
            self.latest = now
            done = f"{self.done}/{self.total}" if self.total else str(self.done)
            self.console.say(f"{self.title}: {done} {self.text}".rstrip())

    def note(self, text: str) -> None:
        self.text = text


class Console:
    """Where a command writes.

    Args:
        as_json: print results as one JSON object.
        quiet: nothing on stderr but errors.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.is_main = is_main_process()
        self.as_json, self.quiet = as_json, quiet or not self.is_main
        self.err = Terminal(stderr=True, soft_wrap=True)
        self.out = Terminal()
        if not self.out.is_terminal:
            self.out.width = 160

    def say(self, text: str) -> None:
        """One line for people."""
        if not self.quiet:
            self.err.print(harmless(text, LONGEST_LINE))

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.err.print(f"Warning: {harmless(text, LONGEST_LINE)}", style="yellow")

    def tell(self, text: str) -> None:
        """Lines that are said even when quiet is asked for: how a command is to be called."""
        self.err.print(harmless(text, LONGEST_ERROR), end="")

    def error(self, error: UserError) -> None:
        self.err.print(f"Error: {harmless(error.message, LONGEST_ERROR)}", style="bold red")
        if error.hint:
            self.err.print(harmless(error.hint, LONGEST_HINT))

    def result(self, result: BaseModel, *shown: RenderableType) -> None:
        """A command's result: JSON, or what is given to be shown."""
        if self.as_json:
            text = json.dumps(result.model_dump(mode="json"), indent=1, allow_nan=False)
            print(text.replace("\x7f", "\\u007f"), file=sys.stdout, flush=True)  # the one that JSON leaves as it is
        else:
            for item in shown:
                item = harmless(item) if isinstance(item, str) else item
                self.out.print(item, soft_wrap=isinstance(item, str))

    @contextmanager
    def track(self, title: str, total: int, done: int = 0) -> Iterator[Tracker]:
        """Progress over `total` units, of which `done` are behind us; 0 where nobody knows how many there will be."""
        if self.quiet:
            yield Tracker()
        elif not self.err.is_terminal:
            yield LineTracker(self, title, total, done)
        else:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Progress(*columns, console=self.err, transient=True) as progress:
                yield BarTracker(progress, progress.add_task(title, total=total or None, completed=done, note=""))


def table(title: str, columns: list[str], rows: list[list[str]], caption: str = "") -> Table:
    """A table whose first column is words and whose other columns are numbers."""
    result = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        result.add_row(*row)
    return result


def megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


def percent(share: float | None) -> str:
    """12.3 % for 0.123; an empty string for what is not known."""
    return "" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """12 s, 5 min, 3.4 h: as exact as an estimate deserves."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def describe(plan: BaseModel) -> list[str]:
    """A dry run for people: a line per field, with units."""
    lines = []
    for key, value in plan.model_dump(mode="json").items():
        name = "size" if key == "bytes" else key.removesuffix("_bytes").replace("_", " ")
        if key.endswith("bytes"):
            shown = "unknown" if value is None else megabytes(value)
        elif key.startswith("seconds"):
            shown = "unknown" if value is None else duration(value)
        elif isinstance(value, dict):
            shown = "; ".join(f"{item} ({_compact(about)})" for item, about in value.items()) or "none"
        elif isinstance(value, list):
            shown = ", ".join(map(str, value)) or "none"
        else:
            shown = _compact(value)
        lines.append(f"{name}: {shown}")
    return lines


def _compact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_compact(item)}" for key, item in value.items())
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

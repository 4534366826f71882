"""What people see: results on stdout, progress and logs on stderr.

This file imports rich and pydantic; what has to be there before anything heavy is imported stands in `terminal`.

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
    """A number that a launcher puts into the environment: `RANK`, `WORLD_SIZE`.

    Raises:
        UserError: the variable holds no number.
    """
    value = os.environ.get(name, str(default))
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise usage_error(
            f"The environment says {name}={plain(value, 40)}, which is no number of processes.",
            f"Launchers (torchrun) set it; without one: `unset {name}`.",
        )
    return int(value)


class Terminal(RichConsole):
    """A console that prints text as text: nothing in a line, a cell or a bar's title is a command to the terminal.

    Texts of strangers arrive in more places than anybody can list, so they are made harmless here, where everything is
    printed. There is no markup either: `[/x]` in the name of a file is a part of the name.
    """

    def __init__(self, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            harmful = not segment.control and not segment.text.isprintable()
            yield Segment(harmless(segment.text), segment.style) if harmful else segment


class Tracker:
    """Progress of one task; `advance` moves it, `note` sets the words behind it. This one shows nothing."""

    def advance(self, amount: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class BarTracker(Tracker):
    """Progress as a live bar."""

    def __init__(self, progress: Progress, task: int) -> None:
        self.progress, self.task = progress, task

    def advance(self, amount: int = 1) -> None:
        self.progress.advance(self.task, amount)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self.progress.update(self.task, note=text)  # type: ignore[arg-type]


class LineTracker(Tracker):
    """Progress as a line now and then, where stderr is no terminal."""

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
        self.said: set[str] = set()
        self.err = Terminal(stderr=True, soft_wrap=True)
        self.out = Terminal()
        if not self.out.is_terminal:
            self.out.width = 160

    def say(self, text: str) -> None:
        """Print one line for people."""
        if not self.quiet:
            self.err.print(harmless(text, LONGEST_LINE))

    def say_once(self, text: str) -> None:
        """Print a line for people unless it was printed before: what several stages of one command have to say."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.err.print(f"Warning: {harmless(text, LONGEST_LINE)}", style="yellow")

    def tell(self, text: str) -> None:
        """Print lines even where `quiet` is set: how a command is to be called."""
        self.err.print(harmless(text, LONGEST_ERROR), end="")

    def error(self, error: UserError) -> None:
        self.err.print(f"Error: {harmless(error.message, LONGEST_ERROR)}", style="bold red")
        if error.hint:
            self.err.print(harmless(error.hint, LONGEST_HINT))

    def result(self, result: BaseModel, *shown: RenderableType) -> None:
        """Print a command's result: as JSON, or the texts and tables that show it."""
        if self.as_json:
            text = json.dumps(result.model_dump(mode="json"), indent=1, allow_nan=False)
            print(text.replace("\x7f", "\\u007f"), file=sys.stdout, flush=True)  # the one that JSON leaves as it is
        else:
            for item in shown:
                item = harmless(item) if isinstance(item, str) else item
                self.out.print(item, soft_wrap=isinstance(item, str))

    @contextmanager
    def track(self, title: str, total: int, done: int = 0) -> Iterator[Tracker]:
        """Track progress over `total` units, of which `done` are behind us; a total of 0 is unknown."""
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
            shown = "; ".join(f"{item} ({_compact(details)})" for item, details in value.items()) or "none"
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

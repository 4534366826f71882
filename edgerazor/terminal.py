"""How the process begins and ends: its three streams, what libraries write to them, and Ctrl-C.

Nothing heavy is imported here, because this comes before everything else: a Ctrl-C during the imports of
`edgerazor.console` must already end well. What is printed through `edgerazor.console` is made harmless there; what
libraries write (their loggers, `warnings`, bars, tracebacks) goes through `Guarded`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from edgerazor.errors import FAILED, INTERRUPTED, harmless

#: Most bytes of one write of a library: its text may quote a stranger's file, however long.
LONGEST = 1500
#: A text of nothing else moves the cursor to the line above or below: bars of libraries do that.
MOVES = re.compile(r"(\n|\x1b\[A)+\Z")
#: How often a thread of GNU OpenMP, which torch computes with, looks for work before it sleeps: for some 40
#: microseconds. Without a limit it looks for milliseconds, and where another program needs a core as well, the threads
#: wait for each other: recipes/results/speed.md, `python -m recipes.benchmarks.waiting`.
SPINS = "3000"
#: Whether Ctrl-C was pressed, or SIGTERM came; the C code of a library that was being imported may raise another error.
interrupted = False


class Guarded:
    """A text stream that lets no control characters and no endless text pass; its other attributes are the stream's.

    On a terminal, bars may still go back to the start of their line, and to the line above.
    """

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream  # rich writes there itself; what it writes was made harmless before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        stream = self.rich_proxied_file
        bare = text.lstrip("\r")
        if not stream.isatty():
            stream.write(harmless(text.replace("\r", "\n"), LONGEST))
        elif MOVES.match(bare):
            stream.write(text)
        else:
            stream.write(text[: len(text) - len(bare)] + harmless(bare, LONGEST))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def prepare() -> None:
    """Open missing streams, let no stream fail for a letter, guard stderr, remember Ctrl-C, and limit spinning.

    A closed stdout (`>&-`) stays None in Python, but its file descriptor is taken: otherwise a file of ours would get
    it, and with it what a library prints. `generate`, which has no other result, refuses a closed stdout.
    """
    limit_spinning()
    for number in range(3):
        with contextlib.suppress(OSError):
            while (descriptor := os.open(os.devnull, os.O_RDWR)) < number:  # lower ones that were closed
                pass
            if descriptor != number:
                os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - libraries expect one, to the end of the process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # letters that an ASCII or Latin-1 terminal does not have
    if not isinstance(sys.stderr, Guarded):
        sys.stderr = Guarded(sys.stderr)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a machine that is taken away says so
        signal.signal(signal.SIGTERM, _interrupt)


def limit_spinning() -> None:
    """Let torch's threads sleep early while they wait for each other; before torch is imported, which reads it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _interrupt(*_: object) -> NoReturn:
    global interrupted
    interrupted = True
    raise KeyboardInterrupt


def leave() -> None:
    """Ignore Ctrl-C from here on: the process is about to end, and its last sentence is not to be cut off.

    Another SIGTERM ends it at once.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_interrupted() -> NoReturn:
    """End the process after an interrupt that no command handled."""
    leave()
    sys.stderr.write("Error: Interrupted.\n")
    sys.exit(INTERRUPTED)


def end_without_memory() -> NoReturn:
    """End the process at once: an orderly end of Python and its libraries would need memory, too."""
    with contextlib.suppress(OSError):
        os.write(2, b"Error: There is not enough memory.\n")
    os._exit(FAILED)

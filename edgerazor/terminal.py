"""The process at both its ends: its three streams, what libraries write to them, and Ctrl-C.

Light, because it is imported before everything else. What goes to the terminal through `edgerazor.console` is made
harmless there; what libraries write (their loggers, `warnings`, bars, tracebacks) goes through `Guarded`.
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

#: Bytes of one thing that a library says: a stranger's file may have made it as long as it likes.
LONGEST = 1500
#: With nothing else in it, this is how bars of libraries find the line above their own.
MOVES = re.compile(r"(\n|\x1b\[A)+\Z")
#: Whether Ctrl-C was pressed; the C code of a library that was being imported may have made another error of it.
interrupted = False


class Guarded:
    """A text stream through which no control characters pass, and nothing endless; all else is that of the stream.

    On a terminal, bars may go back to the start of their line, and to the line above.
    """

    def __init__(self, stream: Any) -> None:
        self.rich_proxied_file = stream  # rich writes there itself: what it is given was made harmless before

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
    """Streams that are open and cannot fail for a letter, a guard before stderr, and a Ctrl-C that is remembered.

    A closed stdout (`>&-`) stays None in Python, but its number is taken, so that no file of ours gets it and what a
    library prints; `generate`, whose only result it is, refuses it.
    """
    for number in range(3):
        with contextlib.suppress(OSError):
            while (got := os.open(os.devnull, os.O_RDWR)) < number:  # lower numbers that were closed
                pass
            if got != number:
                os.close(got)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - libraries expect one, to the end of the process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # letters that an ASCII or Latin-1 terminal does not have
    if not isinstance(sys.stderr, Guarded):
        sys.stderr = Guarded(sys.stderr)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    global interrupted
    interrupted = True
    raise KeyboardInterrupt


def leave() -> None:
    """From here on Ctrl-C does nothing: the process is about to end, and says why."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_interrupted() -> NoReturn:
    """For an interrupt before there is a command that could say it better."""
    leave()
    sys.stderr.write("Error: Interrupted.\n")
    sys.exit(INTERRUPTED)


def end_without_memory() -> NoReturn:
    """At once: what Python and its libraries do at their end needs memory, too."""
    with contextlib.suppress(OSError):
        os.write(2, b"Error: There is not enough memory.\n")
    os._exit(FAILED)

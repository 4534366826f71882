"""A process that is killed at its n-th dealing with the file system, whatever function makes it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

KILLED = 9

#: Events of Python itself that change something on the disk.
EVENTS = frozenset(
    "os.rename os.remove os.mkdir os.rmdir os.chmod os.truncate os.link os.symlink fcntl.flock shutil.rmtree".split()
)
#: Deeds that Python has no events for.
DEEDS = ("pwrite", "posix_fallocate", "fsync", "close")


def die_at(moment: int, act: Callable[[], object]) -> bool:
    """Run `act` in a forked process that is killed before its n-th deed, in whatever thread; whether it was."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), f"at moment {moment} it failed by itself"
        return code == KILLED
    try:
        _count(moment)
        act()
        os._exit(0)
    finally:
        os._exit(1)


def _count(moment: int) -> None:
    seen, lock = [0], threading.Lock()

    def deed() -> None:
        with lock:
            seen[0] += 1
            if seen[0] == moment:
                os._exit(KILLED)

    def happens(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE):
            deed()

    def guarded(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            deed()
            return function(*args, **kwargs)

        return call

    for name in DEEDS:
        setattr(os, name, guarded(getattr(os, name)))
    sys.addaudithook(happens)

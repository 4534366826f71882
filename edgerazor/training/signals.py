"""Ctrl-C and termination during a training: the step is finished and everything is saved before the process ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Signals:
    """Whether the process has been asked to end."""

    received = False


@contextmanager
def watch_signals() -> Iterator[Signals]:
    """Record SIGINT and SIGTERM instead of ending in the middle of a step; a second one ends the process at once.

    A launcher passes a Ctrl-C on to processes that have received it already, so a second signal within one second is
    taken for the first one.
    """
    signals = Signals()
    first_received = 0.0

    def handle(number: int, _frame: Any) -> None:
        nonlocal first_received
        if not signals.received:
            signals.received, first_received = True, time.monotonic()
        elif time.monotonic() - first_received > 1.0:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield signals
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

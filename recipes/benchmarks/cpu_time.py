"""CPU seconds of what is made, added up over interruptions; other programs on the machine do not lengthen them."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgerazor.workdir import write_json

RECORD = "cpu_seconds.json"


def of_programs() -> float:
    """CPU seconds of the programs that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_seconds() -> float:
    """CPU seconds of this process, all its threads, and of the programs that it started and that have ended."""
    return time.process_time() + of_programs()


def stored(folder: Path) -> dict[str, float]:
    """Seconds by name that a folder's record has; none where there is no record."""
    record = folder / RECORD
    return json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}


@contextmanager
def counted(folder: Path, name: str) -> Iterator[None]:
    """Add the CPU seconds of a block to those of its name in a folder's record, also where an exception leaves it."""
    began = cpu_seconds()
    try:
        yield
    finally:
        seconds = stored(folder)
        write_json(folder / RECORD, {**seconds, name: round(seconds.get(name, 0.0) + cpu_seconds() - began, 3)})

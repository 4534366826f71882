"""What the fuzzers share: a folder in memory, damaged, and worker processes that check what comes of it.

A worker changes one folder after the other, writes it to the disk and checks it there, under a limit of memory; a
watcher restarts it behind whatever ended it. Each damaged folder follows from its number alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from edgerazor import packed
from edgerazor.benchmark.engines import peak_memory
from edgerazor.errors import FAILED, UserError

MEMORY = 10**9
LONGEST_SENTENCE = 1000
#: That are worth reading.
MOST_FAILURES = 20
#: Folders between two words about how far a worker is.
TOLD = 500


@dataclass
class Folder:
    """A packed folder in memory; `special` makes files that are no files; `lies`: the header's checksum was renewed."""

    kind: str
    files: dict[str, bytes]
    header: packed.Header
    special: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    lies: bool = False

    def copy(self) -> Folder:
        return Folder(self.kind, dict(self.files), self.header)

    def weights(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".safetensors"))


class Subject(NamedTuple):
    """What is fuzzed.

    Attributes:
        script: that runs `main` of this file with the subject; workers are started with it.
        make: one folder of each kind, given a place to write them to.
        damages: what is done to a folder, and how often beside the others.
        check: what came of a folder at a path in a word, `unharmed` if nothing; an error if the law is broken.
        patience: seconds after which a folder counts as hanging.
        last_patience: after which the whole process does, where even a signal does not help.
        memory: a worker's limit in bytes, beyond what it takes to have imported everything; None for none.
    """

    script: str
    make: Callable[[Path], list[Folder]]
    damages: Mapping[Callable[[random.Random, Folder], None], int]
    check: Callable[[Path, Folder], str]
    patience: int = 60
    last_patience: int = 360
    memory: int | None = MEMORY

    def damaged(self, number: int, seed: int, folders: list[Folder]) -> tuple[Folder, str]:
        """The folder of that number, and what was done to it."""
        draw = random.Random(f"{seed} {number}")
        folder = draw.choice(folders).copy()
        (damage,) = draw.choices(list(self.damages), list(self.damages.values()))
        damage(draw, folder)
        return folder, damage.__name__


def check_sentence(error: UserError) -> None:
    assert error.code == FAILED, f"exit code {error.code}"
    for text in (error.message, error.hint):
        assert text.isprintable(), f"no sentence: {text!r}"
        text.encode()
    assert len(error.message) <= LONGEST_SENTENCE, f"no sentence, but {len(error.message)} letters"
    assert error.message.endswith("."), f"no sentence: {error.message}"


def put(folder: Folder, before: Folder | None, path: Path) -> None:
    """Write a folder; files that are there already, of `before`, are left."""
    old = before.files if before and not before.special else {}
    if before and before.special:
        shutil.rmtree(path)
        path.mkdir()
    for name in old.keys() - folder.files.keys():
        (path / name).unlink()
    for name, content in folder.files.items():
        if old.get(name) is not content:
            (path / name).write_bytes(content)
    for name, make in folder.special.items():
        make(path / name)


# Processes --------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Nothing may catch it."""


def give_up(*_: object) -> None:
    raise Hang


def limit_memory(memory: int) -> None:
    """Of this process, to what one has that has imported everything and reads a model."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    size, resident = (int(status[name].split()[0]) * 1024 for name in ("VmSize", "VmRSS"))
    resource.setrlimit(resource.RLIMIT_AS, (size - resident + memory,) * 2)


def work(subject: Subject, numbers: range, seed: int, deadline: float, loud: bool) -> None:
    """Check some folders; a line of JSON to stdout before each, behind each failure, and at the end."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, OSError):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[numbers.start % numbers.step % len(cores)]})  # many at a time: a core for each
    signal.signal(signal.SIGALRM, give_up)
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if os.access(ram, os.W_OK) else None) as place:
        folders, path, before = subject.make(Path(place)), Path(place) / "damaged", None
        path.mkdir()
        for folder in folders:
            put(folder, before, path)
            assert subject.check(path, folder) == "unharmed", folder.kind
            before = folder
        if subject.memory is not None:
            limit_memory(subject.memory)
        counts: Counter[str] = Counter()
        failures = 0
        for number in numbers:
            if time.time() > deadline or failures == MOST_FAILURES:
                break
            print(json.dumps({"at": number}), file=told, flush=True)
            folder, damage = subject.damaged(number, seed, folders)
            put(folder, before, path)
            before = folder
            signal.setitimer(signal.ITIMER_REAL, subject.patience)
            try:
                outcome = subject.check(path, folder)
            except BaseException as error:
                outcome, failures = "failed", failures + 1
                short = f"{type(error).__name__}: {error}"[:2000]
                what = "".join(traceback.format_exception(error)) if loud else short
                print(json.dumps({"failed": number, "kind": folder.kind, "damage": damage, "what": what}), file=told)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            counts[f"{damage} {outcome}"] += 1
            if counts.total() == TOLD:
                print(json.dumps({"counts": counts}), file=told, flush=True)
                counts.clear()
        print(json.dumps({"counts": counts, "peak": peak_memory()}), file=told, flush=True)


@dataclass
class Outcome:
    """What came of it: `counts` of `damage outcome`, sentences about failures, peak of resident memory in bytes."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def fuzz(
    subject: Subject,
    count: int,
    seconds: float | None = None,
    seed: int = 0,
    first: int = 0,
    loud: bool = False,
    workers: int = 1,
) -> Outcome:
    """Damage `count` folders, or as many as `seconds` allow, in so many worker processes at a time."""
    began = time.time()
    outcome, deadline = Outcome(), began + (seconds or 10**9)

    def take(part: range) -> None:
        while part and time.time() < deadline and len(outcome.failures) < MOST_FAILURES:
            part = watch(subject, part, seed, deadline, loud, outcome)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(take, [range(start, count, workers) for start in range(first, first + workers)]))
    outcome.seconds = time.time() - began
    return outcome


def watch(subject: Subject, part: range, seed: int, deadline: float, loud: bool, outcome: Outcome) -> range:
    """One worker; the numbers that it did not come to.

    Raises:
        RuntimeError: it failed before the first.
    """
    words = [sys.executable, subject.script, "--work"]
    words += map(str, (part.start, part.stop, part.step, seed, deadline, int(loud)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    number, finished = None, False
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        for line in said_in_time(process, subject.last_patience):
            said = json.loads(line)
            number = said.get("at", number)
            if "failed" in said:
                outcome.failures.append("number {failed} ({damage}, {kind}): {what}".format(**said))
                print(f"FAILED {outcome.failures[-1]}", file=sys.stderr, flush=True)
            if "counts" in said:
                outcome.counts += Counter(said["counts"])
                print(f"{outcome.total:,} so far", file=sys.stderr, flush=True)
            if "peak" in said:
                outcome.peak = max(outcome.peak, said["peak"])
                finished = True
        code = process.wait()
    if number is None and not finished:
        raise RuntimeError(f"a worker ended with code {code} before its first folder")
    if not finished:
        outcome.failures.append(f"number {number}: the process ended with code {code}")
        return range(number + part.step, part.stop, part.step)
    return range(0)


def said_in_time(process: subprocess.Popen[bytes], patience: float) -> Iterator[bytes]:
    """Lines of a worker, which is killed when it is silent for so many seconds."""
    assert process.stdout is not None
    rest = b""
    while True:
        if not select.select([process.stdout], [], [], patience)[0]:
            process.kill()
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def report(outcome: Outcome) -> None:
    by_damage: dict[str, dict[str, int]] = {}
    for name, count in sorted(outcome.counts.items()):
        damage, _, what = name.partition(" ")
        by_damage.setdefault(damage, {})[what] = count
    for damage, counts in by_damage.items():
        print(f"{damage.replace('_', ' ')}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    for failure in outcome.failures:
        print(f"FAILED {failure}")
    rate = outcome.total / max(outcome.seconds, 1e-9)
    print(
        f"{outcome.total:,} damaged folders in {outcome.seconds:.0f} s ({rate:.0f} a second), "
        f"{len(outcome.failures)} failures, at most {outcome.peak / 1e6:.0f} MB of memory"
    )


def main(subject: Subject, description: str | None, count: int, workers: int = 1) -> None:
    """The command line of a fuzzer that checks `count` folders unless asked for another number."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=count, help="how many folders")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=workers, help="processes at a time")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this folder alone, with a traceback")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        first, stop, step, seed, deadline, loud = options.work
        work(subject, range(int(first), int(stop), int(step)), int(seed), float(deadline), loud == "1")
        return
    single = options.only is not None
    first, stop = (options.only, options.only + 1) if single else (0, options.count)
    outcome = fuzz(subject, stop, options.seconds, options.seed, first, single, 1 if single else options.workers)
    report(outcome)
    sys.exit(1 if outcome.failures or (subject.memory is not None and outcome.peak > subject.memory) else 0)

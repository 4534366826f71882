"""Whether `edgerazor record` comes to the same bytes when it is killed at random moments.

    python -m recipes.benchmarks.recording_kills --real-data ../shared/data

A teacher is recorded once without a break, and once by processes that are killed (SIGKILL) at random moments, each of
which goes on where the one before it was killed, until there were 20 of them. Processes are forked, with all libraries
loaded, so that kills fall into the recording and not into imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import torch

from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.job import JobContext
from edgerazor.stages import record
from edgerazor.workdir import WorkDir, hash_file
from recipes.benchmarks.folders import BUILD
from recipes.benchmarks.methods import real_teachers
from recipes.benchmarks.results import commit

KILLS, TOKENS, SHARD = 20, 12_000, 60_000


def record_teacher(model: Path, text: Path, folder: Path) -> None:
    """Record, in this process."""
    torch.set_num_threads(1)
    values = {
        "model": str(model),
        "threads": 1,
        "data": {"train": [{"file": str(text)}], "sequence_length": 256},
        "record": {"tokens": TOKENS, "shard_bytes": SHARD, "held_out_sequences": 8},
    }
    recipe = recipes.build(values)
    record.run(JobContext(recipe, WorkDir(folder.with_suffix(".job")), Console(quiet=True)), folder)


def recorded(model: Path, text: Path, folder: Path, seconds: float | None = None) -> bool:
    """Record in a process that is killed after some seconds; returns whether it ended before."""
    process = multiprocessing.get_context("fork").Process(target=record_teacher, args=(model, text, folder))
    process.start()
    process.join(seconds)
    if process.exitcode is not None:
        if process.exitcode:
            raise SystemExit(f"recording failed with exit code {process.exitcode}")
        return True
    process.kill()
    process.join()
    return False


def hashes(folder: Path) -> dict[str, str]:
    """Of the files of a recording; what a killed process was writing has a name that begins with a dot."""
    return {file.name: hash_file(file) for file in sorted(folder.iterdir()) if not file.name.startswith(".")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--real-data", type=Path, required=True, help="folder with `models` and `text` of real teachers"
    )
    parser.add_argument("--build", type=Path, default=BUILD / "recording-kills", help="folder of the recordings")
    options = parser.parse_args()
    model, text = real_teachers(options.real_data)[0].model, options.real_data / "text" / "tinyshakespeare.txt"
    shutil.rmtree(options.build, ignore_errors=True)
    whole, broken = options.build / "whole", options.build / "killed"
    began = time.monotonic()
    recorded(model, text, whole)
    duration = time.monotonic() - began
    draw, kills, runs = random.Random(0), 0, 0
    same = True
    while kills < KILLS and same:
        shutil.rmtree(broken, ignore_errors=True)
        runs += 1
        while not recorded(model, text, broken, draw.uniform(0.0, 0.7 * duration) if kills < KILLS else None):
            kills += 1
        same = hashes(whole) == hashes(broken)
    print(
        f"commit {commit()}: a recording of {TOKENS:,} tokens in {len(hashes(whole))} files, {duration:.1f} s; {kills} "
        f"processes of {runs} recordings were killed at random moments; the files of these are "
        f"{'the same' if same else 'OTHERS'}, byte for byte"
    )
    shutil.rmtree(options.build)
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

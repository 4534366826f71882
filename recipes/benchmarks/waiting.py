"""Training beside other programs, by how long a thread of OpenMP spins before it sleeps.

    python -m recipes.benchmarks.waiting

The quickstart's control training, some steps of it, alone on the machine and beside one process that keeps a core
busy. In each round every limit has its turn. 300,000 is what GNU OpenMP does without a limit; the command line sets
`edgerazor.terminal.SPINS`. The table goes into recipes/results/speed.md. Five to fifteen minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from edgerazor import terminal
from edgerazor.workdir import machine
from recipes.benchmarks import results
from recipes.benchmarks.folders import BUILD, CHECKOUT, RECIPES, RESULTS

LIMITS = ("300000", "20000", terminal.SPINS, "1000")
PAGE = RESULTS / "speed.md"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--page", type=Path, default=PAGE, help="with marks for the table")
    options = parser.parse_args()
    measured: dict[tuple[int, str], list[float]] = {}
    for round_number in range(options.rounds):
        for busy in (0, 1):
            for limit in LIMITS:
                with busy_processes(busy):
                    rate = tokens_per_second(limit, options.steps)
                measured.setdefault((busy, limit), []).append(rate)
                print(f"round {round_number + 1}, {busy} busy, {limit} spins: {rate:.0f} tokens/s", flush=True)
    results.publish("waiting", report(measured, options.rounds), options.page)


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tokens_per_second(limit: str, steps: int) -> float:
    """The rate of a training whose threads spin so often."""
    work = BUILD / "waiting"
    shutil.rmtree(work, ignore_errors=True)
    words = [sys.executable, "-m", "edgerazor", "distill", "--recipe", str(RECIPES / "control.yaml")]
    words += ["--steps", str(steps), "--work", str(work), "--json", "--quiet"]
    environment = {**os.environ, "GOMP_SPINCOUNT": limit}
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=CHECKOUT, env=environment)
    shutil.rmtree(work, ignore_errors=True)
    return float(json.loads(done.stdout)["tokens_per_second"])


def report(measured: dict[tuple[int, str], list[float]], rounds: int) -> str:
    """The table and how it was made."""
    medians = {key: statistics.median(rates) for key, rates in measured.items()}
    rows = []
    for limit in LIMITS:
        row = [f"{int(limit):,}"]
        for busy in (0, 1):
            rate = medians[busy, limit]
            row += [f"{rate:,.0f}", f"{rate / medians[busy, LIMITS[0]]:.2f}"]
        rows.append(row)
    head = ["spins", "alone: tokens/s", "ratio", "beside a busy process: tokens/s", "ratio"]
    facts = f"{machine()}; {results.packages()}; commit {results.commit()}; medians of {rounds} rounds."
    return f"{results.markdown(head, rows)}\n\n{facts}"


if __name__ == "__main__":
    main()

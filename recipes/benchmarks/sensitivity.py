"""What the estimates of sensitivity are worth, and what they cost.

    make results-sensitivity                                   both tables
    python -m recipes.benchmarks.sensitivity --work correlation --real-data DIR
    python -m recipes.benchmarks.sensitivity --work cost                  alone on the machine

*correlation*: for every tensor and format, the KL that is measured when that tensor alone has the format (`direct`),
against each estimate of it: Spearman's rank correlation over the tensors of each format, and over all pairs of tensor
and format; the ratio of the sums; and how long the estimate took.

*cost*: `edgerazor calibrate` of Qwen3-0.6B shapes with random weights at default settings, and another budget after it,
which needs no new measurement: seconds and the peak of resident memory, with and without mapped files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from edgerazor import pipeline
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.workdir import WorkDir
from recipes.benchmarks.folders import WORLD
from recipes.benchmarks.memory import random_model
from recipes.benchmarks.methods import Teacher, real_teachers, world
from recipes.benchmarks.results import markdown, number

ESTIMATES = ("direct", "auto", "hessian")
SHOWN = ("hessian", "fisher", "integrated", "alone")


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two vectors."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def damages(teacher: Teacher, folder: Path, tokens: int) -> tuple[dict[str, Tensor], list[str], dict[str, float]]:
    """Estimate -> [tensors, formats]; the formats; seconds of each calibration."""
    estimates: dict[str, dict[str, Tensor]] = {}
    seconds: dict[str, float] = {}
    names: list[str] = []
    for estimate in ESTIMATES:
        settings = {"sensitivity": estimate, "sensitivity_tokens": tokens, "sensitivity_points": 3, "bits": 2.0}
        recipe = recipes.build(recipes.merge(teacher.recipe, {"model": str(teacher.model), "calibrate": settings}))
        work = WorkDir(folder / estimate)
        began = time.monotonic()
        pipeline.run("calibrate", recipe, work, Console(quiet=True))
        seconds[estimate] = time.monotonic() - began
        measured = json.loads(work.sensitivity_file.read_text(encoding="utf-8"))
        names = list(measured["tensors"][0]["damage"])
        linear = [entry["name"] for entry in measured["tensors"] if entry["kind"] == "linear"]
        for name, value in load_file(work.statistics_file).items():
            if name.startswith("damage/"):
                _, kind, module = name.split("/", 2)
                if module in linear:
                    estimates.setdefault(kind, {})[module] = value.double().sum(1)
            elif name.startswith("alone/") and (module := name.removeprefix("alone/")) in linear:
                estimates.setdefault("alone", {})[module] = value.double()
    modules = list(estimates["direct"])
    return {kind: torch.stack([entry[m] for m in modules]) for kind, entry in estimates.items()}, names, seconds


def correlations(teacher: Teacher, tokens: int) -> str:
    """Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        estimates, names, seconds = damages(teacher, Path(folder), tokens)
    truth = estimates["direct"]
    head, lines = ["estimate", *names, "all pairs", "sum / measured sum"], []
    for kind in SHOWN:
        value = estimates[kind]
        cells = [f"{spearman(value[:, column], truth[:, column]):.3f}" for column in range(len(names))]
        ratio = number(float(value.sum() / truth.sum())) if kind != "hessian" else ""
        lines.append([kind, *cells, f"{spearman(value.flatten(), truth.flatten()):.3f}", ratio])
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    text = markdown(head, lines)
    return f"{teacher.name}, {len(truth)} tensors, {tokens:,} tokens (whole calibrations: {took}):\n\n{text}"


def cost(bits: tuple[float, ...]) -> str:
    """Markdown."""
    lines = ["| calibrate | seconds | peak of resident memory | of it anonymous |", "| --- | --- | --- | --- |"]
    with random_model(28) as model, tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text((WORLD / "heldout.txt").read_text(encoding="utf-8") * 40, encoding="utf-8")
        for budget in bits:
            words = [sys.executable, "-m", "edgerazor", "calibrate", model, "--bits", budget, "--data", text]
            words += ["--work", Path(folder) / "work", "--quiet"]
            seconds, peak, anonymous = watched([str(word) for word in words])
            lines.append(f"| --bits {budget:g} | {seconds:.0f} | {peak / 1e9:.2f} GB | {anonymous / 1e9:.2f} GB |")
    return "\n".join(lines)


def watched(words: list[str]) -> tuple[float, int, int]:
    """Seconds, and the highest resident and anonymous memory in bytes, of a command (Linux)."""
    began = time.monotonic()
    with subprocess.Popen(words) as process:
        peaks = {"VmRSS": 0, "RssAnon": 0}

        def watch() -> None:
            while process.poll() is None:
                for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
                    name, _, value = line.partition(":")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
                time.sleep(0.05)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        if process.wait():
            raise SystemExit(f"{' '.join(words)} failed")
    return time.monotonic() - began, peaks["VmRSS"], peaks["RssAnon"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=("correlation", "cost"), default=["correlation", "cost"])
    parser.add_argument("--teachers", help="comma-separated; default: all that are there")
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--tokens", type=int, default=8192, help="that sensitivity is estimated from")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 1.88], help="budgets of `cost`")
    options = parser.parse_args()
    if "correlation" in options.work:
        teachers = [world(), *(real_teachers(options.real_data) if options.real_data else [])]
        for teacher in teachers:
            if not options.teachers or teacher.name in options.teachers.split(","):
                print(correlations(teacher, options.tokens), end="\n\n", flush=True)
    if "cost" in options.work:
        print(cost(tuple(options.bits)))


if __name__ == "__main__":
    main()

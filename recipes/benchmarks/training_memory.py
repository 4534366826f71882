"""What the dry run says of a training's memory, beside the peak of the process that then trains.

    python -m recipes.benchmarks.training_memory MODEL...          model folders, such as those of `make real-models`

Two steps of 512 tokens a sequence at two bits on a CPU, each training in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from recipes.benchmarks.folders import WORLD
from recipes.benchmarks.results import markdown

#: What is trained: settings of `distill`.
CASES = (
    {"batch_size": 2, "precision": "float32"},
    {"batch_size": 8, "precision": "float32"},
    {"batch_size": 2, "precision": "bfloat16"},
    {"batch_size": 6, "precision": "bfloat16"},
    {"batch_size": 2, "precision": "float32", "gradient_checkpointing": True},
    {
        "batch_size": 2,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "cache_rounding": False,
        "optimizer": "adafactor",
        "losses": [{"name": "forward_kl"}],
    },
)


def peak(words: list[str]) -> int:
    """The peak of resident memory of a command, in bytes."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    return usage.ru_maxrss * 1024


def compare(model: str, settings: dict[str, object], folder: Path) -> list[str]:
    """A row: the model, the settings, both figures in GB, and the estimate's error."""
    recipe = folder / "recipe.yaml"
    distill = {"steps": 2, "evaluate_every": 2, "evaluate_sequences": 2, **settings}
    values = {
        "model": model,
        "data": {"train": [{"file": str(WORLD / "heldout.txt")}], "sequence_length": 512},
        "calibrate": {"bits": 2, "plan": "interleave", "sequences": 1, "batch_size": 1},
        "distill": distill,
    }
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    edgerazor = [sys.executable, "-m", "edgerazor"]
    common = ["--recipe", str(recipe), "--work", str(folder / "work"), "--quiet"]
    subprocess.run([*edgerazor, "calibrate", *common], check=True, stdout=subprocess.DEVNULL)
    said = subprocess.run([*edgerazor, "distill", *common, "--dry-run", "--json"], check=True, capture_output=True)
    estimated = json.loads(said.stdout)["memory_bytes"]
    measured = peak([*edgerazor, "distill", *common])
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    error = f"{100 * (estimated / measured - 1):+.1f} %"
    return [Path(model).name, words, f"{estimated / 1e9:.2f}", f"{measured / 1e9:.2f}", error]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers of the settings, from 0"
    )
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for case in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(model, CASES[case], Path(folder)))
    print(markdown(["model", "settings", "estimated, GB", "peak, GB", "error"], rows))


if __name__ == "__main__":
    main()

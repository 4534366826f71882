"""What the dry run says of a training's memory, beside the peak of the process that then trains.

    python -m recipes.benchmarks.training_memory MODEL...          model folders, such as those of `make real-models`
    python -m recipes.benchmarks.training_memory --frugal          random weights in the shape of Qwen3-0.6B

Two steps of 512 tokens a sequence at two bits on a CPU, each training in a process of its own (Linux). The frugal
training is one step of 2 x 1,024 tokens with all that takes less memory: a teacher streamed from disk, activations
recomputed, weights rounded anew in each pass, factored moments, and weights that change within the backward pass. With
models, all cases and the frugal one, the table goes into recipes/results/training.md, too.
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

from edgerazor.workdir import machine
from recipes.benchmarks.bench_models import Place, wide
from recipes.benchmarks.folders import BUILD, RESULTS, WORLD
from recipes.benchmarks.results import commit, markdown, packages, publish

#: Settings of `distill` that take little memory.
LITTLE = {
    "batch_size": 2,
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "cache_rounding": False,
    "optimizer": "adafactor",
}
#: What is trained: settings of `distill`.
CASES = (
    {"batch_size": 2, "precision": "float32"},
    {"batch_size": 8, "precision": "float32"},
    {"batch_size": 2, "precision": "bfloat16"},
    {"batch_size": 6, "precision": "bfloat16"},
    {"batch_size": 2, "precision": "float32", "gradient_checkpointing": True},
    {**LITTLE, "losses": [{"name": "forward_kl"}]},
)
#: EdgeRazor's default losses, for a vocabulary of 151,936.
FRUGAL = {**LITTLE, "teacher_source": "streamed", "steps": 1, "evaluate_every": 1}


def peak(words: list[str]) -> int:
    """The peak of resident memory of a command, in bytes."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    return usage.ru_maxrss * 1024


def compare(model: str, settings: dict[str, object], folder: Path, length: int = 512) -> list[str]:
    """A row: the model, the settings, both figures in GB, and the estimate's error."""
    recipe = folder / "recipe.yaml"
    distill = {"steps": 2, "evaluate_every": 2, "evaluate_sequences": 2, **settings}
    values = {
        "model": model,
        "data": {"train": [{"file": str(WORLD / "heldout.txt")}], "sequence_length": length},
        "calibrate": {"bits": 2, "plan": "interleave", "sequences": 1, "batch_size": 1},
        "distill": distill,
    }
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    edgerazor = [sys.executable, "-m", "edgerazor"]
    common = ["--recipe", str(recipe), "--work", str(folder / "work"), "--quiet"]
    subprocess.run([*edgerazor, "calibrate", *common], check=True, stdout=subprocess.DEVNULL)
    measured = peak([*edgerazor, "distill", *common, "--force"])
    said = subprocess.run([*edgerazor, "distill", *common, "--dry-run", "--json"], check=True, capture_output=True)
    estimated = json.loads(said.stdout)["memory_bytes"]
    words = ", ".join(f"{name} {value}" for name, value in settings.items())
    error = f"{100 * (estimated / measured - 1):+.1f} %"
    return [
        Path(model).name if Path(model).name != "bfloat16" else Path(model).parent.name,
        words,
        f"{estimated / 1e9:.2f}",
        f"{measured / 1e9:.2f}",
        error,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--frugal", action="store_true", help="also the frugal training of Qwen3-0.6B's shape")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers of the settings, from 0"
    )
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for case in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(model, CASES[case], Path(folder)))
    if options.frugal:
        build = BUILD / "training-memory"
        rows.append(compare(str(wide(Place(build), "Qwen3-0.6B")), FRUGAL, build, length=1024))
    table = markdown(["model", "settings", "estimated, GB", "peak, GB", "error"], rows)
    text = f"{machine()}, {packages()}, commit {commit()}.\n\n{table}"
    print(text)
    if options.models and options.frugal and list(options.cases) == list(range(len(CASES))):
        publish("memory", text, RESULTS / "training.md")


if __name__ == "__main__":
    main()

"""A small training spread over processes of this machine, beside what the dry run says of it.

    python -m recipes.benchmarks.scaling MODEL --processes 1 2 4

The embedded teacher of `recipes/world`, or MODEL, teaches a 2-bit student of itself with FSDP2 on CPUs (gloo). Of each
process: the peak of resident memory, and the bytes that it receives in a step, counted at the calls of PyTorch's
collectives (of ring collectives, all parts but its own). Both, and tokens a second, stand beside `edgerazor distill
--dry-run --world-size N`. With `--plans`, the plans of models of 8 and 32 billion weights by the same formulas follow.
Both tables go into recipes/results/training.md, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor.workdir import machine
from recipes.benchmarks.folders import RESULTS, WORLD
from recipes.benchmarks.results import commit, markdown, packages, publish

STEPS = 2
SETTINGS = {"batch_size": 1, "precision": "float32", "evaluate_sequences": 2, "steps": STEPS, "evaluate_every": STEPS}

#: Counts what a process receives, and writes it down beside its peak of memory.
COUNTING = """
import atexit, json, os, resource, sys, time
import torch
import torch.distributed as distributed
from edgerazor.training import Trainer
NAMES, counted, steps = ("all_gather_into_tensor", "reduce_scatter_tensor"), [0], []
def counting(name):
    plain = getattr(distributed, name)
    def call(*arguments, **options):
        # a whole tensor and this process's part of it, in one order or the other
        sizes = [value.nbytes for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
        counted[0] += max(sizes) - min(sizes)
        return plain(*arguments, **options)
    setattr(distributed, name, call)
new = hasattr(distributed, "all_gather_single")  # since torch 2.13
for name in ("all_gather_single", "reduce_scatter_single") if new else NAMES:
    counting(name)
step = Trainer.step
def timed(trainer, batches):
    before, began = counted[0], time.monotonic()
    loss = step(trainer, batches)
    steps.append((counted[0] - before, time.monotonic() - began))
    return loss
Trainer.step = timed
def write():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with open(sys.argv[0] + "." + os.environ["RANK"], "w") as file:
        json.dump({"peak": peak, "received": steps[-1][0], "seconds": min(one for _, one in steps[1:])}, file)
atexit.register(write)
from edgerazor.cli import main
main()
"""

#: Shapes whose plans are shown: those of Qwen3.
LARGE = {
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
LARGE_SETTINGS = {"batch_size": 1, "gradient_checkpointing": True, "steps": 100}


def write_recipe(path: Path, model: Path, settings: dict[str, Any], length: int) -> None:
    values = {
        "model": str(model),
        "threads": 1,
        "data": {"train": [{"file": str(WORLD / "heldout.txt")}], "sequence_length": length},
        "calibrate": {"bits": 2, "plan": "interleave", "sequences": 1, "batch_size": 1},
        "distill": settings,
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


def planned(recipe: Path, work: Path, *words: str) -> dict[str, Any]:
    """What the dry run says."""
    edgerazor = [sys.executable, "-m", "edgerazor", "distill", "--recipe", str(recipe), "--work", str(work), "--json"]
    done = subprocess.run([*edgerazor, "--dry-run", *words], check=True, capture_output=True)
    return dict(json.loads(done.stdout))


def measured(folder: Path, recipe: Path, work: Path, processes: int) -> dict[str, float]:
    """Of the process with most memory: its peak, bytes received in a step, and seconds of the fastest step."""
    script = folder / f"counting-{processes}.py"
    script.write_text(COUNTING, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"}
    words = ["distill", "--recipe", str(recipe), "--work", str(work), "--quiet"]
    subprocess.run([*torchrun, str(script), *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    by_rank = [json.loads(Path(f"{script}.{rank}").read_text()) for rank in range(processes)]
    return max(by_rank, key=lambda one: float(one["peak"]))


def compare(model: Path, processes: int) -> list[str]:
    """A row: planned and measured memory, traffic and speed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, work = folder / "recipe.yaml", folder / "work"
        write_recipe(recipe, model, SETTINGS, 256)
        plan = planned(recipe, work, "--world-size", str(processes))
        real = measured(folder, recipe, work, processes)
    speed = plan["tokens_per_step"] / real["seconds"]
    return [
        str(processes),
        f"{plan['memory_bytes'] / 1e9:.2f}",
        f"{real['peak'] / 1e9:.2f}",
        f"{100 * (plan['memory_bytes'] / real['peak'] - 1):+.0f} %",
        f"{plan['received_bytes'] / 1e6:.1f}",
        f"{real['received'] / 1e6:.1f}",
        f"{plan['tokens_per_second']:.0f}",
        f"{speed:.0f}",
    ]


def large_plan(name: str, processes: int, length: int = 2048) -> list[str]:
    """A row: what each GPU would hold, receive and take."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        values = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
        config = CONFIG_MAPPING["qwen3"](**LARGE[name], **values, architectures=["Qwen3ForCausalLM"], dtype="bfloat16")
        config.save_pretrained(folder / "model")
        for file in WORLD.joinpath("teacher").glob("tokenizer*"):
            (folder / "model" / file.name).write_bytes(file.read_bytes())
        write_recipe(folder / "recipe.yaml", folder / "model", LARGE_SETTINGS, length)
        words = ("--world-size", str(processes), "--gpu-memory", "80GB")
        plan = planned(folder / "recipe.yaml", folder / "work", *words)
    return [
        name,
        str(processes),
        f"{plan['memory_bytes'] / 1e9:.0f}",
        "yes" if plan["fits"] else "no",
        f"{plan['received_bytes'] / 1e9:.0f}",
        f"{plan['seconds_computing']:.2f}",
        f"{plan['seconds_receiving']:.2f}",
        f"{plan['tokens_per_second']:,.0f}",
        ", ".join(f"{part} {size.removesuffix(' GB')}" for part, size in plan["memory_parts"].items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=WORLD / "teacher")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--plans", action="store_true", help="also the plans of large models")
    options = parser.parse_args()
    where = f"{machine()}, {packages()}, commit {commit()}"
    if options.processes:
        head = ["processes", "GB each, planned", "measured", "error", "MB each receives a step, planned", "measured"]
        rows = [compare(options.model, processes) for processes in options.processes]
        show("scaling", f"{where}.\n\n{markdown([*head, 'tokens/s, planned', 'measured'], rows)}")
    if options.plans:
        head = ["model", "GPUs", "GB on each", "fits 80 GB", "GB received a step", "seconds computing", "receiving"]
        plans = [large_plan(name, processes) for name in LARGE for processes in (8, 16)]
        show("plans", markdown([*head, "tokens/s", "what the memory holds, GB"], plans))


def show(section: str, text: str) -> None:
    """Print a table, and put it into its section of the results."""
    publish(section, text, RESULTS / "training.md")
    print(text, flush=True)


if __name__ == "__main__":
    main()

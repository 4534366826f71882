"""What packing costs, and how fast a packed model opens.

    make results-packing                              all three; the tables go into recipes/results/packing.md
    python -m recipes.benchmarks.packing --work memory --dry     one, printed only

*memory*: `edgerazor pack` at 1.58 bits of random weights, at least 4 GB of bfloat16 in shards: the peak of anonymous
memory (mapped pages of the source apart), above a process that has imported the same modules. Bound: the largest
tensor in float32, and 200 MB.

*speed*: of one thread, from 16-bit weights to the written file: encode, digest, layout, checksums and writing, in MB of
16-bit weights a second; beside it what verifying the written file costs. Bound, for ternary: 300 MB/s.

*loading*: a packed model in the shapes of Qwen3-0.6B at 1.58 bits: seconds to open the folder, and with transformers
around it, each the best of five in a process that has imported everything. Bound: one second.

Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from edgerazor import formats, kernels, packed, workdir
from edgerazor.formats import MatrixSpec
from edgerazor.packed import MatrixSource
from recipes.benchmarks.folders import CHECKOUT, RESULTS, WORLD
from recipes.benchmarks.memory import SHAPE
from recipes.benchmarks.results import commit, markdown, publish

TOKENIZER = WORLD / "teacher"
WORK = ("memory", "speed", "loading")

#: Two models of 2.1 billion weights: one with a large matrix, one without.
LARGE = {
    "large vocabulary": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 36,
    },
    "small vocabulary": {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 33},
}
MB = 10**6
ALLOWED = 200 * MB
SPEED, SECONDS = 300, 1.0


# Models of random weights -----------------------------------------------------------------------------------------


def write_model(folder: Path, shape: dict[str, Any], shard: int = 10**9) -> tuple[int, int]:
    """A Qwen3 model of random bfloat16 weights and a tokenizer, never whole in memory; its bytes and largest tensor."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**SHAPE, **shape}, dtype="bfloat16")
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shards = list(cut(shapes, shard))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_weights(shapes[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    sizes = [shape.numel() for shape in shapes.values()]
    return 2 * sum(sizes), max(sizes)


def random_weights(shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    w = torch.empty(shape, dtype=torch.bfloat16)
    for rows in w.split(max(1, (1 << 22) // shape[1])):
        rows.copy_(torch.randn(rows.shape) * 0.02)
    return w


def cut(shapes: dict[str, torch.Size], shard: int) -> Iterator[list[str]]:
    """Names of the tensors of each shard."""
    names, size = [], 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > shard:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


# Memory -----------------------------------------------------------------------------------------------------------


def anonymous(process: int | str = "self") -> int:
    """Bytes of resident memory of a process that are no pages of files (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def imported() -> int:
    """Anonymous memory of a process that has imported what `edgerazor pack` does."""
    code = "import edgerazor.pipeline; from recipes.benchmarks import packing; "
    code += "from transformers import Qwen3ForCausalLM; print(packing.anonymous())"
    words = [sys.executable, "-c", code]
    return int(subprocess.run(words, cwd=CHECKOUT, capture_output=True, check=True).stdout)


def peak_of(words: list[str]) -> tuple[float, int]:
    """Seconds of a command, and the peak of its anonymous memory in bytes."""
    began, peak = time.monotonic(), 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:

        def watch() -> None:
            nonlocal peak
            while process.poll() is None:
                try:
                    peak = max(peak, anonymous(process.pid))
                except (OSError, StopIteration):  # it has just ended
                    return
                time.sleep(0.01)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        if process.wait():
            raise SystemExit(f"{' '.join(words)} failed")
        watcher.join()
    return time.monotonic() - began, peak


def memory(place: Path) -> str:
    """Markdown."""
    before = imported()
    rows = [["model", "bytes", "largest tensor in float32", "peak above imports", "bound", "seconds", "holds"]]
    for name, shape in LARGE.items():
        model = place / "model"
        model.mkdir()
        size, largest = write_model(model, shape)
        words = ["pack", str(model), "--bits", "1.58", "--rotation", "none", "--work", str(place / "work"), "--quiet"]
        seconds, peak = peak_of([sys.executable, "-m", "edgerazor", *words])
        bound = 4 * largest + ALLOWED
        cells = [f"{value / MB:,.0f} MB" for value in (size, 4 * largest, peak - before, bound)]
        rows.append([name, *cells, f"{seconds:.0f}", holds(peak - before <= bound)])
        shutil.rmtree(model)
        shutil.rmtree(place / "work")
    return f"{markdown(rows[0], rows[1:])}\n\nA process that has imported everything has {before / MB:,.0f} MB."


# Speed ------------------------------------------------------------------------------------------------------------


def speed(place: Path) -> str:
    """Markdown."""
    rows = [["formats", "encoded, packed and written", "of it on disk", "verified", "bound", "holds"]]
    weights = [random_weights(torch.Size((3072, 2048))) for _ in range(32)]
    size = 2 * sum(w.numel() for w in weights) / MB
    mixed = MatrixSpec(("ternary", "int4"), 256, (torch.arange(3072) % 8 == 0).to(torch.uint8))
    for name, spec in {
        "ternary": MatrixSpec(("ternary",), 256),
        "ternary and every 8th row int4": mixed,
        **{name: MatrixSpec((name,), 256) for name in ("int2", "int3", "int4", "int5", "int8")},
    }.items():
        writing, syncing, verifying = min(seconds_with(weights, place / "packed", spec) for _ in range(5))
        bound = f"{SPEED} MB/s" if name == "ternary" else ""
        cells = [f"{size / writing:,.0f} MB/s", f"{syncing / writing:.0%}", f"{size / verifying:,.0f} MB/s", bound]
        rows.append([name, *cells, holds(size / writing >= SPEED) if bound else ""])
    return markdown(rows[0], rows[1:])


def seconds_with(weights: list[torch.Tensor], folder: Path, spec: MatrixSpec) -> tuple[float, float, float]:
    """Seconds of writing matrices, of it those waiting for the disk, and of verifying what was written, on one core."""
    sources = [
        MatrixSource(f"layers.{i}", "linear", spec, (w.shape[0], w.shape[1]), partial(formats.encode_matrix, w, spec))
        for i, w in enumerate(weights)
    ]
    folder.mkdir()
    waited = 0.0
    fsync = os.fsync

    def timed(descriptor: int) -> None:
        nonlocal waited
        began = time.perf_counter()
        fsync(descriptor)
        waited += time.perf_counter() - began

    with one_core():
        os.fsync = timed
        began = time.perf_counter()
        packed.write(folder, sources, {}, tied={}, settings={}, provenance={})
        written = time.perf_counter()
        os.fsync = fsync
        packed.PackedModel.open(folder).verify()
        verified = time.perf_counter()
    shutil.rmtree(folder)
    return written - began, waited, verified - written


class one_core:  # noqa: N801 - used as a context manager, like those of contextlib
    """One core and one thread."""

    def __enter__(self) -> None:
        self.cores, self.threads = os.sched_getaffinity(0), torch.get_num_threads()
        os.sched_setaffinity(0, {max(self.cores)})
        torch.set_num_threads(1)

    def __exit__(self, *exception: object) -> None:
        os.sched_setaffinity(0, self.cores)
        torch.set_num_threads(self.threads)


# Loading ----------------------------------------------------------------------------------------------------------


def loading(place: Path) -> str:
    """Markdown."""
    model = place / "model"
    model.mkdir()
    write_model(model, {})
    words = ["pack", str(model), "--bits", "1.58", "--rotation", "none", "--work", str(place / "work"), "--quiet"]
    subprocess.run([sys.executable, "-m", "edgerazor", *words], check=True, stdout=subprocess.DEVNULL)
    rows = [["opened by", "seconds", "bound", "holds"]]
    for name, seconds in opening_times(place / "work" / "packed").items():
        rows.append([f"`{name}`", f"{seconds:.3f}", f"{SECONDS:g} s", holds(seconds <= SECONDS)])
    return markdown(rows[0], rows[1:])


def opening_times(folder: Path) -> dict[str, float]:
    """Seconds, the best of five, of each way; in none of them a quantized matrix is read."""
    from transformers import AutoModelForCausalLM

    from edgerazor import transformers_plugin

    ways: dict[str, Callable[[], object]] = {
        "PackedModel.open(folder)": lambda: packed.PackedModel.open(folder),
        "transformers_plugin.load(folder)": lambda: transformers_plugin.load(folder),
        "AutoModelForCausalLM.from_pretrained(folder)": lambda: AutoModelForCausalLM.from_pretrained(folder),
    }
    early = AssertionError("a matrix was read before its first use")
    with mock.patch.object(packed.PackedModel, "parts", side_effect=early):
        return {name: min(seconds_of(way) for _ in range(5)) for name, way in ways.items()}


def seconds_of(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


# The command ------------------------------------------------------------------------------------------------------


def holds(fact: bool) -> str:
    return "yes" if fact else "**no**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--dry", action="store_true", help="leave recipes/results/packing.md as it is")
    options = parser.parse_args()
    torch.manual_seed(0)
    parts = []
    for name in options.work:
        with tempfile.TemporaryDirectory() as place:
            parts.append(f"**{name}**\n\n{ {'memory': memory, 'speed': speed, 'loading': loading}[name](Path(place)) }")
        print(parts[-1], end="\n\n", flush=True)
    if not options.dry and tuple(options.work) == WORK:
        facts = [workdir.machine(), f"torch {torch.__version__}", f"kernels {kernels.name()}", f"commit {commit()}"]
        publish("packing", "\n\n".join([*parts, f"{'; '.join(facts)}."]), RESULTS / "packing.md")


if __name__ == "__main__":
    main()

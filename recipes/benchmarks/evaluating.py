"""How long lm-eval takes on a CPU: a packed model in our runtime, and models in transformers.

    make results-eval                            the table in recipes/results/speed.md
    python -m recipes.benchmarks.evaluating --layers 1 --items 8 --results none

The model has the shapes of Qwen3-0.6B and Gaussian weights, and is packed at 1.58 bits with an int4 embedding, groups
of 256. All ways answer the same ARC-easy items (of the folder `eval` of the real data, else of the embedded world),
asked by `edgerazor eval`'s own code:

* *packed, native*: the packed model in the runtime's native engine, which computes an item's prompt once;
* *packed, transformers*: the same file in transformers, with the same products;
* *bfloat16, transformers* and *float32, transformers*: the model that was packed.

The items are dealt to rounds, in each of which every way has its turn, so that what else slows the machine slows all.
*Seconds* are those of scoring, of all items; loading the model, the mean of the rounds, is given beside it. Bound, at
full size: a third of the time of bfloat16. Scores are those of guessing, the weights being random. Run it alone on the
machine; it needs 3 GB of disk for a while and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgerazor import models, modules, pipeline, runtime, tasks, transformers_plugin
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.console import table as rich_table
from edgerazor.errors import QUALITY, UserError
from edgerazor.workdir import WorkDir, machine
from recipes.benchmarks.folders import BUILD, RESULTS, WORLD
from recipes.benchmarks.results import commit, markdown, packages, publish
from recipes.benchmarks.sizes import write_gaussian

NATIVE, BASE = "packed, native", "bfloat16, transformers"
BOUND = 1 / 3
LAYERS, ITEMS = 28, 200
HEAD = ("model, engine", "kernels", "seconds", "items/s", f"x time of {BASE}", "loading, seconds", "score")


@dataclass
class Way:
    """How a model is loaded, and what came of it, summed over the rounds.

    `load` gives what scores, its tokenizer, and the names of its kernels.
    """

    load: Callable[[], tuple[Any, Any, str]]
    kernel: str = ""
    seconds: list[float] = field(default_factory=list)
    loading: list[float] = field(default_factory=list)
    right: float = 0.0


def ways(model: Path, packed: Path, threads: int) -> dict[str, Way]:
    def native() -> tuple[Any, Any, str]:
        model = runtime.load(packed, threads=threads)
        return model, model.tokenizer, model.kernel if model.engine == "native" else f"engine: {model.engine}"

    def in_transformers() -> tuple[Any, Any, str]:
        model, tokenizer = transformers_plugin.load(packed, cache_decoded=True)
        return model, tokenizer, modules.kernels_of(model)

    def plain(dtype: torch.dtype) -> Callable[[], tuple[Any, Any, str]]:
        return lambda: (*models.load(model, dtype=dtype), "torch")

    return {
        NATIVE: Way(native),
        "packed, transformers": Way(in_transformers),
        BASE: Way(plain(torch.bfloat16)),
        "float32, transformers": Way(plain(torch.float32)),
    }


def measure(all_ways: dict[str, Way], rounds: list[list[tasks.LoadedTask]], batch_size: int, console: Console) -> None:
    """Every way answers the items of a round before the next round begins."""
    plain = tasks.TaskRequest(())  # no limit, no chat template
    for number, loaded in enumerate(rounds, start=1):
        for name, way in all_ways.items():
            console.say(f"round {number} of {len(rounds)}: {name}")
            began = time.monotonic()
            model, tokenizer, way.kernel = way.load()
            way.loading.append(time.monotonic() - began)
            began = time.monotonic()
            scores, _ = tasks.evaluate(model, tokenizer, loaded, plain, batch_size, console, name)
            way.seconds.append(time.monotonic() - began)
            way.right += sum(scores[entry.name].value * entry.items for entry in loaded)
            del model


def items(options: argparse.Namespace) -> list[list[tasks.LoadedTask]]:
    """The items, dealt to the rounds."""
    name, source = "world_recall", Path(tasks.__file__).parent / "world" / "recall.jsonl"
    if options.real_data is not None:
        name, source = "arc_easy", options.real_data / "eval" / "arc_easy.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()[: options.items]
    rounds = []
    for start in range(options.rounds):
        folder = options.build / f"round{start}"
        folder.mkdir(parents=True)
        text = "".join(f"{line}\n" for line in lines[start :: options.rounds])
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        rounds.append(tasks.load(tasks.TaskRequest((name,), str(folder))))
    return rounds


def table(all_ways: dict[str, Way], count: int) -> list[list[str]]:
    """Rows under `HEAD`."""
    base = sum(all_ways[BASE].seconds)
    rows = []
    for name, way in all_ways.items():
        seconds = sum(way.seconds)
        speed = [f"{seconds:.1f}", f"{count / seconds:.2f}", f"{seconds / base:.3f}"]
        loading = sum(way.loading) / len(way.loading)
        rows.append([name, way.kernel, *speed, f"{loading:.1f}", f"{way.right / count:.1%}"])
    return rows


def too_slow(all_ways: dict[str, Way]) -> str | None:
    """What was promised and is not so."""
    share = sum(all_ways[NATIVE].seconds) / sum(all_ways[BASE].seconds)
    return None if share <= BOUND else f"{NATIVE} takes {share:.2f} of the time of {BASE}, more than a third."


def packed(options: argparse.Namespace, console: Console) -> Path:
    """Folder of the packed model."""
    write_gaussian(options.build / "model", options.layers, options.tokenizer)
    values = {"bits": 1.58, "plan": "interleave", "group_size": 256, "rotation": "none"}
    recipe = recipes.build({"model": str(options.build / "model"), "calibrate": values, "pack": {"source": "teacher"}})
    work = WorkDir(options.build / "work")
    pipeline.run("pack", recipe, work, console)
    return work.folder("pack")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--items", type=int, default=ITEMS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=recipes.Eval().batch_size, help="of transformers")
    parser.add_argument("--real-data", type=Path, help="folder with `eval/arc_easy.jsonl`")
    parser.add_argument("--tokenizer", type=Path, default=WORLD / "teacher")
    parser.add_argument("--build", type=Path, default=BUILD / "eval", help="deleted before and after")
    parser.add_argument("--results", default=str(RESULTS / "speed.md"), help="where the table goes, or `none`")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    shutil.rmtree(options.build, ignore_errors=True)
    try:
        rounds = items(options)
        all_ways = ways(options.build / "model", packed(options, console), options.threads)
        measure(all_ways, rounds, options.batch_size, console)
    except UserError as error:
        console.error(error)
        return error.code
    finally:
        shutil.rmtree(options.build, ignore_errors=True)
    count = sum(entry.items for loaded in rounds for entry in loaded)
    rows = table(all_ways, count)
    what = f"{count} items of {rounds[0][0].name}, {options.layers} layers, {options.threads} threads"
    console.out.print(rich_table(what, list(HEAD), rows))
    if options.results != "none":
        facts = f"{what}; {machine()}; {packages()}; commit {commit()}."
        publish("eval", f"{facts}\n\n{markdown(HEAD, rows)}", Path(options.results))
    slow = too_slow(all_ways) if (options.layers, count) == (LAYERS, ITEMS) else None
    if slow:
        console.error(UserError(slow))
    return QUALITY if slow else 0


if __name__ == "__main__":
    sys.exit(main())

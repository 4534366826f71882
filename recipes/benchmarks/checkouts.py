"""The native decoder of this checkout and that of another one, in turns: what a change of the sources costs.

    python -m recipes.benchmarks.checkouts FOLDER [--shapes NAME ...] [--rounds N] [--no-page]

FOLDER is another checkout (or its folders edgerazor and recipes) with a library built there. Each checkout decodes
and reads prompts in a process of its own, with the same random weights of a published shape, int4; only one of the two
works at a time, and the order changes from round to round. The ratio is the time of the other checkout over ours: above
1 this one is faster. Medians of the rounds' ratios go into recipes/results/mixers.md. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from edgerazor.packed import cores
from edgerazor.workdir import machine
from recipes.benchmarks.folders import CHECKOUT, RESULTS
from recipes.benchmarks.results import commit, markdown, publish

HEAD = ("model", "decode: ms/token", "the other", "ratio", "prefill: ms/token", "the other", "ratio")
SHAPES = ("SmolLM2-135M", "Qwen3-0.6B")
#: Runs in both checkouts, so it uses what both have: a line on stdin asks for seconds of decode and of prefill.
WORKER = """
import sys, torch
from edgerazor.kernels.decoder import Decoder, SequenceSpan
from recipes.benchmarks.products import timed
from recipes.benchmarks.rotation import SHAPES, network
shape, threads, tokens, prompt = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
made = network(SHAPES[shape], "int4", 256)
decoder = Decoder(made, threads)
angles = torch.rand(2 * prompt + tokens, made.rope_dim // 2)
decoder.set_rope(angles.cos(), angles.sin())
decoder.reserve(2 * prompt + tokens)
ids = torch.randint(0, made.vocab_size, (prompt,))
for _ in sys.stdin:
    decoder.greedy(SequenceSpan(0, 0, 0, prompt, 1), 1, 2)
    decode = timed(lambda: decoder.greedy(SequenceSpan(0, 0, 0, prompt, 1), 1, tokens)) / tokens
    prefill = timed(lambda: decoder.logits([SequenceSpan(0, 0, 0, 0, prompt)], ids, [])) / prompt
    print(decode, prefill, flush=True)
"""


class Worker:
    """A process of a checkout."""

    def __init__(self, checkout: Path, shape: str, options: argparse.Namespace) -> None:
        numbers = map(str, (options.threads, options.tokens, options.prompt))
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, shape, *numbers],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self) -> tuple[float, float]:
        """Seconds a token of decode and of prefill."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        decode, prefill = map(float, self.process.stdout.readline().split())
        return decode, prefill


def row(shape: str, options: argparse.Namespace) -> list[str]:
    """Of a table, for a shape."""
    ours, other = Worker(CHECKOUT, shape, options), Worker(options.folder.resolve(), shape, options)
    rounds: list[tuple[float, ...]] = []
    for number in range(-1, options.rounds):  # the first round is not counted
        if number % 2:
            of_other, of_ours = other.measure(), ours.measure()
        else:
            of_ours, of_other = ours.measure(), other.measure()
        if number >= 0:
            rounds.append((*of_ours, *of_other))
    for worker in (ours, other):
        worker.process.kill()
    cells = [shape]
    for kind in (0, 1):
        medians = [1e3 * statistics.median(values[kind + of] for values in rounds) for of in (0, 2)]
        ratio = statistics.median(values[kind + 2] / values[kind] for values in rounds)
        cells += [*(f"{median:.3f}" for median in medians), f"{ratio:.3f}"]
    return cells


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the other checkout")
    parser.add_argument("--name", default="another checkout", help="of the other one, for the page")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=8, help="that are decoded in a round")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--no-page", action="store_true", help="only print the table")
    options = parser.parse_args()
    text = markdown(HEAD, [row(shape, options) for shape in options.shapes])
    facts = f"Beside {options.name}; {machine()}, {options.threads} threads; {options.rounds} rounds in turns"
    text += f"\n\n{facts}; commit {commit()}."
    print(text)
    if not options.no_page:
        publish("checkouts", text, RESULTS / "mixers.md")


if __name__ == "__main__":
    main()

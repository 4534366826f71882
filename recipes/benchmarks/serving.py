"""Serving: tokens a second of many sequences at a time, beside those of one.

    make results-serve                everything, into serving.md of recipes/results
    python -m recipes.benchmarks.serving --parts process --shape SmolLM2-360M       another model, in this process alone
    python -m recipes.benchmarks.serving --parts process --format int4      other weights
    python -m recipes.benchmarks.serving --layers 2 --vocabulary 4096 --rounds 1 --results none      to try it

*In this process*: a model of the shape of Qwen3-0.6B with random weights, in the batch scheduler of
`edgerazor.runtime.batching`, on as many threads as there are cores. In every round 1, 2, 4, 8 and 16 sequences are
submitted at once, in turns, each with a prompt of its own, beside a session of one sequence without a scheduler.
*Tokens a second* are those of all sequences together, from when all of them decode to when the first one ends; *times
one* is the ratio to one sequence of the same round; *first token* is the median time from submission. Medians of the
rounds count. Greedy sequences take the likeliest token; sampled ones have a top-p of 0.95 and top-k of 40; and those
that are *sampled from all* have a temperature of 0.7 and top-p of 0.95 alone, which leaves nearly the whole vocabulary
where weights are random, and some dozens of tokens where they are a model's.

*Through HTTP*: the same model behind `edgerazor serve`, in turns with llama.cpp's server (serving_http.py).

The tables are printed, and published with `--results`. Exit code 3 when a promise is not kept.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgerazor import recipe, runtime
from edgerazor.console import Console
from edgerazor.errors import QUALITY, UserError
from edgerazor.runtime.batching import BatchScheduler, BatchSettings, SequenceEvent, SequenceRequest
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.sampling import Sampler
from edgerazor.workdir import machine
from recipes.benchmarks.bench_models import PACKED, SHAPES, Place, packed
from recipes.benchmarks.folders import BUILD, RESULTS
from recipes.benchmarks.results import commit, markdown, packages, publish
from recipes.benchmarks.serving_http import LLAMA_SERVER, http_table

SHAPE, FORMAT = "Qwen3-0.6B", "base 3"
#: Sequences at a time, by how their tokens are chosen.
BATCHES = {"greedy": (1, 2, 4, 8, 16), "sampled": (1, 4, 16), "sampled from all": (1, 4, 16)}
#: A session of its own: what one sequence gets without a scheduler.
SESSION = "session"
PROMPT, TOKENS, WARM_TOKENS = 32, 64, 16
#: Format -> sequences -> how many times the tokens of one sequence they are to get together. Weights of 4 bits keep the
#: memory busy for long enough that the products of more tokens find time; ternary ones leave it sooner (serving.md).
PROMISED = {"int4": {4: 2.5, 16: 4.0}, FORMAT: {4: 1.8, 16: 2.3}}
#: The least ratio of one sequence in the scheduler to a session.
PROMISED_ALONE = 0.98
WAIT_SECONDS = 600.0
HTTP_ROUNDS = 3
PARTS = ("process", "http")
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.95, "top_k": 40},
    "sampled from all": {"temperature": 0.7, "top_p": 0.95},
}


@dataclass
class Client:
    """Notes when its sequence got its tokens.

    Attributes:
        times: of the tokens, in seconds of the same clock.
    """

    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: SequenceEvent) -> None:
        self.times.append(time.perf_counter())
        if event.finish_reason is not None:
            self.ended.set()


@dataclass(frozen=True)
class Measured:
    """One turn.

    Attributes:
        rate: tokens a second of all sequences together.
        first_token: median seconds from submission.
    """

    rate: float
    first_token: float


#: How tokens are chosen, sequences -> the turns.
Turns = dict[tuple[str, int], list[Measured]]


def random_prompt(model: NativeModel, draw: random.Random) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [draw.randrange(2, model.vocabulary) for _ in range(PROMPT)]


def rate_of(times: Sequence[Sequence[float]]) -> float:
    """Tokens a second while all sequences decode, from the times of their tokens."""
    begin, end = max(of_one[0] for of_one in times), min(of_one[-1] for of_one in times)
    if end <= begin:
        raise UserError("The sequences did not decode at the same time.", "Let them write more tokens.")
    return sum(begin < moment <= end for of_one in times for moment in of_one) / (end - begin)


def batch(
    model: NativeModel, scheduler: BatchScheduler, kind: str, count: int, tokens: int, draw: random.Random
) -> Measured:
    """One turn of so many sequences in the scheduler."""
    generate = recipe.build({"generate": SETTINGS[kind]}).generate
    clients = [Client() for _ in range(count)]
    began = time.perf_counter()
    for number, client in enumerate(clients):
        sampler = Sampler(generate, number, model.vocabulary)
        scheduler.submit(SequenceRequest(random_prompt(model, draw), sampler, tokens, frozenset()), client)
    for client in clients:
        if not client.ended.wait(WAIT_SECONDS):
            raise UserError("A sequence did not end.")
    times = [client.times for client in clients]
    return Measured(rate_of(times), statistics.median(of_one[0] - began for of_one in times))


def session(model: NativeModel, tokens: int, draw: random.Random) -> Measured:
    """One turn of a session, whose greedy loop is in C++."""
    alone = model.session()
    began = time.perf_counter()
    alone.feed(random_prompt(model, draw))
    alone.greedy(1)
    first = time.perf_counter()
    alone.greedy(tokens - 1)
    return Measured((tokens - 1) / (time.perf_counter() - first), first - began)


def measure(model: NativeModel, rounds: int, tokens: int, console: Console) -> Turns:
    """All rounds, everything in turns; one before them warms up and does not count."""
    turns: Turns = defaultdict(list)
    draw = random.Random(0)
    scheduler = BatchScheduler(model, BatchSettings(max_sequences=16, max_queue=16))
    try:
        batch(model, scheduler, "greedy", 16, WARM_TOKENS, draw)
        for number in range(rounds):
            console.say(f"round {number + 1} of {rounds}")
            turns[SESSION, 1].append(session(model, tokens, draw))
            for kind, counts in BATCHES.items():
                for count in counts:
                    turns[kind, count].append(batch(model, scheduler, kind, count, tokens, draw))
    finally:
        scheduler.close()
    return turns


def table(turns: Turns, promised: dict[int, float]) -> tuple[str, list[str]]:
    """The table, and sentences about promises that are not kept: sequences -> times the tokens of one."""
    rows, wrong = [], []
    for (kind, count), of_batch in turns.items():
        base = turns["greedy" if kind == SESSION else kind, 1]
        ratio = statistics.median(one.rate / other.rate for one, other in zip(of_batch, base, strict=True))
        first = statistics.median(turn.first_token for turn in of_batch)
        rate = statistics.median(turn.rate for turn in of_batch)
        least = promised.get(count) if kind == "greedy" else None
        rows.append((kind, str(count), f"{rate:.1f}", f"{ratio:.2f}", f"{least or ''}", f"{1000 * first:,.0f}"))
        if least and ratio < least:
            wrong.append(f"{count} sequences get {ratio:.2f} times the tokens of one, not {least}.")
        if kind == SESSION and 1 / ratio < PROMISED_ALONE:
            wrong.append(f"One sequence in the scheduler gets {1 / ratio:.3f} of a session's tokens.")
    head = ("tokens are", "sequences", "tokens a second", "times one", "at least", "first token, ms")
    return markdown(head, rows), wrong


def in_process(options: argparse.Namespace, console: Console) -> tuple[str, list[str]]:
    """The section of what is measured in this process, and sentences about promises that are not kept."""
    place = Place(options.build / "models", options.layers, options.vocabulary)
    model = runtime.load(packed(place, options.shape, options.format), threads=options.threads, engine="native")
    assert isinstance(model, NativeModel)
    load = os.getloadavg()[0]
    turns = measure(model, options.rounds, options.tokens, console)
    text, wrong = table(turns, PROMISED.get(options.format, {}) if options.shape == SHAPE else {})
    facts = (
        f"{machine()}, kernels {model.kernel}, {model.threads} threads; {packages()}; commit {commit()}; prompts of "
        f"{PROMPT} tokens, {options.tokens} tokens written; medians of {options.rounds} rounds; load average before "
        f"them {load:.1f}."
    )
    return f"{facts}\n\n{text}", wrong


def through_http(options: argparse.Namespace, console: Console) -> str:
    """The section of what is measured through servers."""
    place = Place(options.build / "models", options.layers, options.vocabulary)
    threads = options.threads or os.cpu_count() or 1
    load = os.getloadavg()[0]
    rounds = min(options.rounds, HTTP_ROUNDS)
    table_of_servers = http_table(packed(place, SHAPE, FORMAT), options.build, threads, rounds, options.tokens, console)
    there = "" if LLAMA_SERVER.exists() else " No llama-server was built (`make llamacpp`)."
    facts = (
        f"{machine()}, {threads} threads; {packages()}; commit {commit()}; prompts of {PROMPT} tokens, "
        f"{options.tokens} tokens written; medians of {rounds} rounds; load average before them {load:.1f}.{there}"
    )
    return f"{facts}\n\n{table_of_servers}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="to compute with; as many as cores where it is not given")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="that each sequence writes")
    parser.add_argument("--layers", type=int, help="most layers of the model, to try it")
    parser.add_argument("--vocabulary", type=int, help="most entries of its vocabulary, to try it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE, help="of the model in this process")
    parser.add_argument("--format", choices=PACKED, default=FORMAT, help="of its weights, in this process")
    parser.add_argument("--build", type=Path, default=BUILD / "serving", help="of models")
    parser.add_argument("--results", default=str(RESULTS), help="folder of serving.md, or `none`")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    sections: dict[str, str] = {}
    wrong: list[str] = []
    try:
        if "process" in options.parts:
            other = [given for given in (options.shape, options.format) if given not in (SHAPE, FORMAT)]
            sections[", ".join(("in this process", *other))], wrong = in_process(options, console)
        if "http" in options.parts:
            sections["through HTTP"] = through_http(options, console)
    except UserError as error:
        console.error(error)
        return error.code
    for section, text in sections.items():
        print(text)
        if options.results != "none":
            publish(section, text, Path(options.results) / "serving.md")
    for sentence in wrong:
        console.error(UserError(sentence))
    return QUALITY if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

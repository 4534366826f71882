"""Serving through HTTP: tokens a second of many clients of a server, beside llama.cpp's on an exported file.

A part of `make results-serve` (recipes/benchmarks/serving.py). Both servers run in turns, one at a time, on loopback,
with the same weights: the packed folder, and the GGUF file that `pack --export gguf` makes of it. In every round 1, 4
and 16 clients ask at once, each with a prompt of its own, first for one token and then for many. *First token* is the
median time of the answers with one token. *Tokens a second* are those of all clients, from when the first tokens were
there: all but the first ones, by the time of the long answers less that of the short ones.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgerazor import exporters
from edgerazor.console import Console
from edgerazor.errors import UserError
from recipes.benchmarks.bench_models import once
from recipes.benchmarks.folders import BUILD
from recipes.benchmarks.results import markdown
from recipes.benchmarks.soak import Server

CLIENTS = (1, 4, 16)
PROMPT = 32
START_SECONDS, ANSWER_SECONDS = 120.0, 300.0
LLAMA_SERVER = BUILD / "llamacpp" / "tools" / "llama-server"
OURS, THEIRS = "edgerazor serve", "llama-server"


@contextlib.contextmanager
def ours(folder: Path, threads: int) -> Iterator[str]:
    """The address of a server of ours."""
    server = Server(folder, threads)
    try:
        yield server.address
    finally:
        server.process.terminate()
        server.process.wait()


@contextlib.contextmanager
def theirs(program: Path, file: Path, threads: int) -> Iterator[str]:
    """The address of a llama-server with as many places as there are clients at most."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    most = max(CLIENTS)
    words = ["--model", file, "--host", "127.0.0.1", "--port", port, "--parallel", most, "--ctx-size", 512 * most]
    words += ["--threads", threads, "--threads-batch", threads, "--n-gpu-layers", 0]
    with subprocess.Popen([str(word) for word in (program, *words)], stdout=-3, stderr=-3) as process:
        try:
            address = f"127.0.0.1:{port}"
            end = time.monotonic() + START_SECONDS
            while not healthy(address):
                if process.poll() is not None or time.monotonic() > end:
                    raise UserError("llama-server did not start.")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def healthy(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def ask(address: str, prompt: list[int], tokens: int) -> float:
    """Seconds until a text of so many tokens is there."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    connection = http.client.HTTPConnection(address, timeout=ANSWER_SECONDS)
    began = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        read = json.loads(answer.read())
    except (OSError, ValueError) as error:
        raise UserError(f"A request failed: {error}.") from None
    finally:
        connection.close()
    if answer.status != 200 or read["usage"]["completion_tokens"] != tokens:
        raise UserError(f"A request got {str(read)[:200]}.")
    return time.perf_counter() - began


def ask_at_once(address: str, prompts: list[list[int]], tokens: int) -> list[float]:
    """The seconds of one request for each prompt, all sent at once."""
    seconds: list[float] = []
    errors: list[UserError] = []

    def client(prompt: list[int]) -> None:
        try:
            seconds.append(ask(address, prompt, tokens))
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return seconds


def turn(address: str, tokens: int, draw: random.Random) -> dict[int, tuple[float, float]]:
    """Tokens a second, and seconds to the first one, by the number of clients."""
    measured = {}
    ask(address, [draw.randrange(2, 1000) for _ in range(PROMPT)], 8)
    for count in CLIENTS:
        prompts = [[draw.randrange(2, 1000) for _ in range(PROMPT)] for _ in range(2 * count)]
        short = ask_at_once(address, prompts[:count], 1)
        whole = ask_at_once(address, prompts[count:], tokens)
        measured[count] = count * (tokens - 1) / (max(whole) - max(short)), statistics.median(short)
    return measured


def http_table(folder: Path, build: Path, threads: int, rounds: int, tokens: int, console: Console) -> str:
    """The table of both servers; of ours alone where there is no llama-server."""

    def export(target: Path) -> None:
        (written,) = exporters.write_all(folder, ["gguf"], target / "exports", True, Console(quiet=True))
        Path(written.file).rename(target / "model.gguf")

    file = once(build / "exported", export) / "model.gguf" if LLAMA_SERVER.exists() else None
    turns: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    draw = random.Random(1)
    for number in range(rounds):
        console.say(f"servers, round {number + 1} of {rounds}")
        with ours(folder, threads) as address:
            for count, pair in turn(address, tokens, draw).items():
                turns[OURS, count].append(pair)
        if file is None:
            continue
        with theirs(LLAMA_SERVER, file, threads) as address:
            for count, pair in turn(address, tokens, draw).items():
                turns[THEIRS, count].append(pair)
    rows = []
    for (name, count), pairs in sorted(turns.items()):
        rates = [rate for rate, _ in pairs]
        ratio = statistics.median(rate / one for rate, (one, _) in zip(rates, turns[name, 1], strict=True))
        first = statistics.median(seconds for _, seconds in pairs)
        rows.append((name, str(count), f"{statistics.median(rates):.1f}", f"{ratio:.2f}", f"{1000 * first:,.0f}"))
    return markdown(("server", "clients", "tokens a second", "times one", "first token, ms"), rows)

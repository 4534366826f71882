"""A server among clients that behave badly: does it stay up, does its memory, and do the others get their texts?

    make soak                                                 ten minutes, with the student of `make quickstart`
    python -m recipes.benchmarks.soak FOLDER --minutes 3

Beside some clients that ask the same questions again and again there are others that go away in the middle, read
slowly, send bodies that are too large or no JSON, and ask for JSON or tools. In the end two SIGTERMs follow each other
while texts are being written. It fails where the answer to a question differs from that of the quiet server, where
anything is left running, where the memory grew by more than 5 % after the first fifth of the time, or where the process
does not end.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTIONS = 6
TOKENS = 24
#: The growth of memory that fails, and the share of the time after which it is measured.
GROWTH, WARM = 1.05, 0.2
COMPLETIONS = "/v1/completions"


class Server:
    """A server process, and requests to it."""

    def __init__(self, folder: Path, threads: int) -> None:
        words = ["serve", str(folder), "--port", "0", "--json", "--threads", str(threads), "--drain-seconds", "20"]
        self.process = subprocess.Popen([sys.executable, "-m", "edgerazor", *words], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(self.process.stdout.readline())
            if not lines[-1]:
                raise SystemExit("The server did not start.")
        self.address = json.loads("".join(lines))["url"].removeprefix("http://")

    def request(self, path: str, body: Any = None, raw: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of an answer; 0 where the connection broke."""
        connection = http.client.HTTPConnection(self.address, timeout=120)
        sent = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        try:
            with contextlib.closing(connection):
                connection.request("POST" if sent else "GET", path, sent, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                return answer.status, answer.read()
        except OSError:
            return 0, b""

    def stream(self, body: dict[str, Any]) -> socket.socket:
        """A connection on which a stream was asked for."""
        host, port = self.address.split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        content = json.dumps({**body, "stream": True}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def memory(self) -> int:
        """Bytes that the process has in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def metric(self, name: str) -> float:
        """A number of the metrics without labels."""
        page = self.request("/metrics")[1].decode()
        return next(float(line.split()[1]) for line in page.splitlines() if line.startswith(f"{name} "))


def question(number: int) -> dict[str, Any]:
    """One of those that are asked again and again; greedy and sampled ones."""
    prompt = "Once upon a time " * (1 + 3 * number)
    return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0.8 * (number % 2), "seed": number}


def text_of(answer: bytes) -> str:
    return str(json.loads(answer)["choices"][0]["text"])


class Soak:
    """The clients, each in a thread, until the time is over.

    Args:
        server: that they ask.
        expected: the answers of the quiet server.
        seed: of what they do.
    """

    def __init__(self, server: Server, expected: list[str], seed: int) -> None:
        self.server, self.expected, self.seed = server, expected, seed
        self.over = threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, clients: list[Callable[[random.Random], None]], seconds: float) -> list[int]:
        """Let them loose; the memory, second by second."""

        def loop(number: int, client: Callable[[random.Random], None]) -> None:
            draw = random.Random(self.seed + number)
            while not self.over.is_set():
                with contextlib.suppress(OSError):
                    client(draw)

        threads = [threading.Thread(target=loop, args=pair) for pair in enumerate(clients)]
        for thread in threads:
            thread.start()
        memory, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(1)
            memory.append(self.server.memory())
        self.over.set()
        for thread in threads:
            thread.join(180)
        self.counts["stuck"] = sum(thread.is_alive() for thread in threads)
        return memory

    def ask(self, draw: random.Random) -> None:
        number = draw.randrange(QUESTIONS)
        status, answer = self.server.request(COMPLETIONS, question(number))
        self.counts[f"asked: {status}"] += 1
        if status == 200 and text_of(answer) != self.expected[number]:
            self.wrong.append(f"question {number}: {text_of(answer)!r} instead of {self.expected[number]!r}")
        if status == 429:
            time.sleep(0.5)

    def go_away(self, draw: random.Random) -> None:
        connection = self.server.stream({**question(draw.randrange(QUESTIONS)), "max_tokens": 400})
        time.sleep(draw.random() * 0.5)
        connection.close()
        self.counts["went away"] += 1

    def read_slowly(self, draw: random.Random) -> None:
        connection = self.server.stream({**question(draw.randrange(QUESTIONS)), "max_tokens": 200, "n": 4})
        connection.settimeout(5)
        end = time.monotonic() + 5
        while time.monotonic() < end and connection.recv(64):
            time.sleep(0.05)
        connection.close()
        self.counts["read slowly"] += 1

    def send_nonsense(self, draw: random.Random) -> None:
        body = json.dumps(question(0)).encode()
        kinds = (
            draw.randbytes(200),
            body[: draw.randrange(1, len(body))],
            b'{"prompt": "' + b"a" * 5_000_000 + b'"}',
            b"[" * 100_000,
            json.dumps({**question(0), draw.choice("abc"): draw.random()}).encode(),
            json.dumps({**question(0), "temperature": draw.choice(["x", -1, None, []])}).encode(),
        )
        status, _ = self.server.request(COMPLETIONS, raw=draw.choice(kinds))
        self.counts[f"nonsense: {status}"] += 1
        if status >= 500:
            self.wrong.append(f"nonsense was answered with status {status}")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="packed")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2, help="of the server")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    server = Server(options.folder, options.threads)
    try:
        expected = [text_of(server.request(COMPLETIONS, question(number))[1]) for number in range(QUESTIONS)]
        soak = Soak(server, expected, options.seed)
        clients = [*[soak.ask] * 6, *[soak.go_away] * 3, *[soak.read_slowly] * 2, soak.send_nonsense]
        memory = soak.run(clients, 60 * options.minutes)
        time.sleep(2)
        left = server.metric("edgerazor_running") + server.metric("edgerazor_waiting")
        late = memory[int(WARM * len(memory)) :]
        growth = max(late) / late[0]
        last = server.stream({**question(0), "max_tokens": 400})
        last.recv(1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(30)
        last.close()
    finally:
        server.process.kill()
    result = {
        "minutes": options.minutes,
        "requests": dict(sorted(soak.counts.items())),
        "wrong": soak.wrong[:10],
        "left_running": left,
        "memory_bytes": [late[0], max(late)],
        "memory_growth": round(growth, 4),
        "exit_code_of_two_signals": code,
    }
    print(json.dumps(result, indent=1))
    ended_well = code in (0, 128 + signal.SIGTERM)  # at once, or because the text had ended
    if soak.wrong or left or growth > GROWTH or soak.counts["stuck"] or not ended_well:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

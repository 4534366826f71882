"""`edgerazor serve` as a process: what it prints and refuses, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgerazor.errors import UserError
from edgerazor.stages import serve
from helpers.serving import write_served_model
from helpers.tiny_job import Run
from helpers.tiny_models import ModelMaker

#: Processes are started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

KEY = "a key in the environment"


@pytest.fixture(scope="module")
def packed(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(make_model, tmp_path_factory.mktemp("served"))


class Process:
    """A server that runs, and requests to it."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "edgerazor", "serve", str(folder), "--port", "0", "--threads", "1", "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "EDGERAZOR_API_KEY": KEY}
        self.process = subprocess.Popen(
            [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(self.process.stdout.readline())
            assert lines[-1], self.process.stderr.read() if self.process.stderr else ""
        self.result: dict[str, Any] = json.loads("".join(lines))
        self.address = self.result["url"].removeprefix("http://")

    def request(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        with contextlib.closing(connection):
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def start(self, tokens: int) -> tuple[threading.Thread, list[Any]]:
        """Ask for a long text; its answer comes into the list."""
        answers: list[Any] = []
        body = {"prompt": "Nora", "max_tokens": tokens, "temperature": 0}

        def ask() -> None:
            try:
                answers.append(self.request("/v1/completions", body))
            except OSError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        end = time.monotonic() + 30
        while b"\nedgerazor_running 1.0" not in self.request("/metrics")[1]:
            assert time.monotonic() < end
        return thread, answers


@contextlib.contextmanager
def started(folder: Path, *words: str) -> Iterator[Process]:
    server = Process(folder, *words)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.mark.slow
def test_sigterm_lets_running_requests_finish(packed: Path) -> None:
    with started(packed) as server:
        assert server.result["needs_key"] is True
        assert server.result["engine"] == "native"
        assert server.request("/health")[0] == 200
        commands = Path(f"/proc/{server.process.pid}/cmdline")
        assert not commands.exists() or KEY not in commands.read_text()
        thread, answers = server.start(800)
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while server.request("/health")[0] == 200:
            assert time.monotonic() < end
        assert server.request("/v1/completions", {"prompt": "a"})[0] == 503
        thread.join(60)
        status, body = answers[0]
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 800)
        out, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 0, err
        assert "Ending" in err
        assert KEY not in out + err
        assert "Traceback" not in err


@pytest.mark.slow
def test_the_time_to_finish_ends_and_a_second_signal_ends_at_once(packed: Path) -> None:
    with started(packed, "--drain-seconds", "0.2") as server:
        thread, answers = server.start(4000)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        thread.join(30)
        assert isinstance(answers[0], OSError) or answers[0][0] == 503
    with started(packed, "--drain-seconds", "60") as server:
        thread, _ = server.start(4000)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 128 + signal.SIGTERM
        thread.join(30)


def test_wrong_commands(run: Run, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = [
            (["--host", "0.0.0.0"], 2, "so it needs a key"),
            (["--host", "nowhere.invalid"], 2, "so it needs a key"),
            (["--host", "nowhere.invalid", "--api-key", "k"], 2, "There is no address 'nowhere.invalid'"),
            (["--api-key", ""], 2, "An API key is printable"),
            (["--port", "70000"], 2, "--port is 70000; expected"),
            (["--port", str(taken.getsockname()[1])], 1, "address already in use"),
            (["--model", packed], 2, "both name a packed model"),
        ]
        for words, code, sentence in cases:
            outcome = run("serve", packed, *words)
            assert outcome.code == code, outcome.err
            assert sentence in " ".join(outcome.err.split())
            assert outcome.out == ""
    missing = run("serve", tmp_path / "nothing")
    assert missing.code == 2
    assert "There is no folder" in missing.err


def test_keys_come_from_the_command_line_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.KEY_VARIABLE, KEY)
    assert serve.api_key(None, "0.0.0.0") == KEY
    assert serve.api_key("other", "0.0.0.0") == "other"
    monkeypatch.delenv(serve.KEY_VARIABLE)
    for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
        assert serve.api_key(None, host) is None
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "localhost.example.org"):
        with pytest.raises(UserError, match="needs a key"):
            serve.api_key(None, host)

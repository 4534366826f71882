"""Who is let in, what is refused and how: hosts, origins, keys, limits, malformed bodies, clients that go away."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edgerazor import runtime
from edgerazor.runtime import Model
from edgerazor.server import engine as engines
from helpers.serving import KEY, POSITIONS, ScriptedScheduler, Served, serving, write_served_model
from helpers.tiny_models import VOCABULARY, ModelMaker

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
QUESTION: Any = [{"role": "user", "content": "Where is the lamp?"}]
LONG: dict[str, Any] = {"prompt": "Nora", "max_tokens": 3000, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return runtime.load(write_served_model(make_model, tmp_path_factory.mktemp("served")), threads=1)


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving(model, max_body_bytes=20_000) as server:
        yield server


def assert_error(answer: tuple[int, Any], status: int, param: str | None = None, sentence: str = "") -> None:
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert sentence in error["message"]
    assert "Traceback" not in error["message"]


# --- fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "a", "frobnicate": 1}, "frobnicate"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": {}}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [VOCABULARY]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * (POSITIONS + 1)}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "top_p": 1.5}, "top_p"),
        (COMPLETIONS, {"prompt": "a", "n": 1000}, "n"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 100}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 1000}}, "logit_bias.5"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": ["a"]}, "messages.0"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages"),
        (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, None),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        (CHAT, {"messages": QUESTION, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": QUESTION, "functions": []}, "functions"),
        (CHAT, {"messages": QUESTION, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": QUESTION, "tools": [TOOL, TOOL]}, "tools"),
        (CHAT, {"messages": QUESTION, "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"messages": QUESTION, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"messages": QUESTION, "response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"messages": QUESTION, "chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking"),
        (CHAT, {"messages": QUESTION, "model": "other"}, "model"),
        (CHAT, {"messages": QUESTION, "modalities": ["audio"]}, "modalities.0"),
    ],
)
def test_a_wrong_field_is_named(served: Served, path: str, body: Any, param: str | None) -> None:
    assert_error(served.post(path, body), 404 if param == "model" else 400, param)


def test_a_schema_that_is_none_is_refused(served: Served) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strnig"}}}
    body = {"messages": QUESTION, "response_format": wanted}
    assert_error(served.post(CHAT, body), 400, None, "The JSON schema cannot be followed")


def test_fields_that_clients_always_send_are_taken(served: Served) -> None:
    harmless = {
        "user": "someone",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "seed": None,
        "tools": None,
        "stop": None,
    }
    assert served.post(CHAT, {"messages": QUESTION, "max_tokens": 1, **harmless})[0] == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'"a"', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b"[" * 5000, {}, 400),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 4000 + b"}", {}, 400),
        (b'{"prompt": "a", "temperature": NaN}', {}, 400),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
        (b'{"prompt": "' + b"a" * 30_000 + b'"}', {}, 413),
        (b'{"prompt": "' + b"a" * 400_000 + b'"}', {}, 413),
    ],
)
def test_a_malformed_body_is_an_error(served: Served, body: bytes, headers: dict[str, str], status: int) -> None:
    found, _, answer = served.request("POST", COMPLETIONS, body, headers)
    assert_error((found, json.loads(answer)), status, json.loads(answer)["error"]["param"])


def test_random_bodies_never_break_it(served: Served) -> None:
    """Values of every type in every field, and bytes changed at random: an answer, or an error that is none of ours."""
    draw = random.Random(7)
    values: list[Any] = [None, True, -1, 0, 1.5, 1e308, "", "x", [], {}, [[]], [None], {"a": []}, "9" * 50, [1, "a"]]
    names = [
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stop",
        "seed",
        "stream",
    ]
    names += ["logprobs", "top_logprobs", "echo", "logit_bias", "tools", "tool_choice", "response_format", "model"]
    names += [
        "stream",
        "stream_options",
        "suffix",
        "best_of",
        "chat_template_kwargs",
        "repetition_penalty",
        "modalities",
    ]
    bodies: list[tuple[str, bytes]] = []
    for _ in range(150):
        path = draw.choice([COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
        body: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": QUESTION}
        body |= {"max_tokens": 1} | {draw.choice(names): draw.choice(values) for _ in range(draw.randint(1, 3))}
        raw = bytearray(json.dumps(body).encode())
        for _ in range(draw.choice([0, 0, 1, 5])):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        bodies.append((path, bytes(raw)))

    def status(path: str, body: bytes) -> int:
        return served.request("POST", path, body)[0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: status(*pair), bodies))
    wrong = [(code, body) for code, body in zip(found, bodies, strict=True) if code not in (200, 400, 404, 413, 429)]
    assert not wrong
    assert 400 in found
    assert 200 in found
    served.wait_until(lambda: served.statistic("running") == 0)
    assert served.request("GET", "/health")[0] == 200


def test_unknown_paths_and_methods(served: Served) -> None:
    assert_error(served.post("/v1/embeddings", {}), 404, None)
    status, _, answer = served.request("GET", CHAT)
    assert_error((status, json.loads(answer)), 405, None)


# --- who is let in -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_other_hosts_are_refused_on_loopback(served: Served, host: str) -> None:
    assert served.request("GET", "/v1/models", headers={"Host": host})[0] in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:80"])
def test_names_of_this_machine_are_let_in(served: Served, host: str) -> None:
    assert served.request("GET", "/v1/models", headers={"Host": host})[0] == 200


def test_pages_of_other_origins_are_refused(served: Served, model: Model) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        status, headers, _ = served.request("POST", CHAT, {"messages": QUESTION}, {"Origin": origin})
        assert status == 403
        assert "access-control-allow-origin" not in headers
    assert served.request("GET", "/v1/models", headers={"Origin": served.url})[0] == 200
    allowed = "https://chat.example"
    with serving(model, cors_origins=(allowed,)) as open_server:
        preflight = {"Origin": allowed, "Access-Control-Request-Method": "POST"}
        status, headers, _ = open_server.request("OPTIONS", CHAT, headers=preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, allowed)
        status, headers, _ = open_server.request("GET", "/v1/models", headers={"Origin": allowed})
        assert (status, headers["access-control-allow-origin"]) == (200, allowed)
        assert open_server.request("GET", "/v1/models", headers={"Host": "chat.example"})[0] == 200
        assert open_server.request("GET", "/v1/models", headers={"Origin": "https://evil.example"})[0] == 403


def test_a_key_is_asked_for(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(model, key=KEY, loopback=False) as closed:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
        ):
            for path in ("/v1/models", "/metrics"):
                status, found, answer = closed.request("GET", path, headers=headers)
                assert_error((status, json.loads(answer)), 401, None)
                assert found["www-authenticate"] == "Bearer"
        assert closed.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
        assert closed.request("GET", "/health")[0] == closed.request("GET", "/")[0] == 200
        assert closed.request("GET", "/health", headers={"Host": "server.example"})[0] == 200
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err


def test_every_answer_has_a_request_id(served: Served) -> None:
    assert re.fullmatch("[0-9a-f]{32}", served.request("GET", "/health")[1]["x-request-id"])
    for given, is_taken in (("my-id.7", True), ("two words", False), ("x" * 200, False)):
        found = served.request("GET", "/nothing", headers={"X-Request-Id": given})[1]["x-request-id"]
        assert (found == given) is is_taken


def test_the_page_may_load_nothing_else(served: Served) -> None:
    status, headers, page = served.request("GET", "/")
    assert status == 200
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    text = page.decode()
    assert not re.search(
        r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\sstyle=|\son\w+=", text
    )


# --- limits ------------------------------------------------------------------------------------


def test_a_full_queue_is_status_429(model: Model) -> None:
    with serving(model, scheduler=ScriptedScheduler([70] * 200, seconds=0.02, room=1)) as served:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(served.post, COMPLETIONS, {"prompt": "a", "max_tokens": 20})
            served.wait_until(lambda: served.statistic("running") == 1)
            status, headers, answer = served.request("POST", COMPLETIONS, {"prompt": "a"})
            assert_error((status, json.loads(answer)), 429, None)
            assert headers["retry-after"] == "3"
            assert first.result()[0] == 200
        served.wait_until(lambda: served.statistic("running") == 0)
        several = served.post(COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 20})  # one fits: none is written
        assert several[0] == 429
        served.wait_until(lambda: served.statistic("running") == 0, seconds=1)


def test_limits_of_tokens_and_context(model: Model) -> None:
    with serving(model, context=32, max_tokens_per_request=8) as served:
        assert_error(served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 9}), 400, "max_tokens")
        assert_error(served.post(COMPLETIONS, {"prompt": [70] * 32}), 400, "prompt", "the context holds 32")
        status, answer = served.post(COMPLETIONS, {"prompt": [70] * 28, "max_tokens": 8, "temperature": 0})
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 4
        chat = served.post(CHAT, {"messages": [{"role": "user", "content": "a"}], "temperature": 0})[1]
        assert chat["usage"]["completion_tokens"] == 8
        whole = served.post(COMPLETIONS, {"prompt": [70] * 32, "max_tokens": 0, "echo": True, "logprobs": 1})[1]
        assert len(whole["choices"][0]["logprobs"]["tokens"]) == 32


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_of_a_request_ends_its_text(model: Model, stream: bool) -> None:
    with serving(model, scheduler=ScriptedScheduler([70] * 4000, seconds=0.01), request_seconds=0.2) as served:
        body = {"prompt": "a", "max_tokens": 3000, "stream": stream}
        status, _, answer = served.request("POST", COMPLETIONS, body)
        assert status == 200
        if stream:
            lines = [line for line in answer.decode().split("\n\n") if line]
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        else:
            assert json.loads(answer)["choices"][0]["finish_reason"] == "length"
            assert 1 < json.loads(answer)["usage"]["completion_tokens"] < 100
        served.wait_until(lambda: served.statistic("running") == 0, seconds=2)
    with serving(model, scheduler=ScriptedScheduler([70], seconds=5), request_seconds=0.1) as served:
        status, headers, _ = served.request("POST", COMPLETIONS, {"prompt": "a"})
        assert (status, headers["retry-after"]) == (503, "30")


# --- clients that go away ----------------------------------------------------------------------


def open_stream(served: Served, stream: bool = True, **options: Any) -> socket.socket:
    """A connection on which a long text was asked for; a stream has begun."""
    host, port = served.address.split(":")
    connection = socket.create_connection((host, int(port)))
    body = json.dumps({**LONG, **options, "stream": stream}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    if stream:
        assert connection.recv(10) == b"HTTP/1.1 2"
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_text_ends_when_its_client_goes_away(served: Served, stream: bool, reset: bool) -> None:
    served.wait_until(lambda: served.statistic("running") == 0)
    before = served.statistic("generated_tokens")
    connection = open_stream(served, stream)
    served.wait_until(lambda: served.statistic("generated_tokens") > before + 5)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    served.wait_until(lambda: served.statistic("running") == 0)
    assert served.statistic("generated_tokens") < before + 2900


def test_waiting_texts_end_when_their_clients_go_away(served: Served) -> None:
    served.wait_until(lambda: served.statistic("running") == 0)
    connections = [open_stream(served, stream=False) for _ in range(5)]
    served.wait_until(lambda: served.statistic("running") + served.statistic("waiting") == 5)
    for connection in connections:
        connection.close()
    served.wait_until(lambda: served.statistic("running") + served.statistic("waiting") == 0)
    assert served.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_slow_reader_is_given_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not read is bounded: buffers of the system and the connection, then so many events."""
    monkeypatch.setattr(engines, "MOST_WAITING", 50)
    scheduler = ScriptedScheduler([70] * 4000)
    with serving(model, scheduler=scheduler, send_buffer=4096) as served:
        host, port = served.address.split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        body = json.dumps({"prompt": "a", "max_tokens": 4000, "n": 8, "stream": True}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        served.wait_until(lambda: bool(scheduler.threads))
        served.wait_until(lambda: served.statistic("running") == 0)
        assert served.request("GET", "/health")[0] == 200
        connection.close()
        page = served.request("GET", "/metrics")[2].decode()
        assert 'edgerazor_requests_ended_early_total{reason="slow"}' in page


def test_many_clients_at_once_get_what_one_gets(served: Served) -> None:
    """Some go away on the way; the others' texts are those of a quiet server."""
    body = {"prompt": "Nora took", "max_tokens": 24, "temperature": 0.9, "seed": 11}
    expected = served.post(COMPLETIONS, body)[1]["choices"][0]["text"]
    stop = threading.Event()

    def go_away() -> None:
        while not stop.is_set():
            connection = open_stream(served, max_tokens=200)
            time.sleep(0.02)
            connection.close()

    leaving = threading.Thread(target=go_away)
    leaving.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: served.post(COMPLETIONS, body), range(12)))
    finally:
        stop.set()
        leaving.join()
    assert {answer[1]["choices"][0]["text"] for answer in answers} == {expected}
    served.wait_until(lambda: served.statistic("running") + served.statistic("waiting") == 0)

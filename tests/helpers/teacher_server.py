"""A small stand-in for an OpenAI-compatible server that gives the log-probabilities of prompts, as vLLM does."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from edgerazor.models import PreTrainedModel, PreTrainedTokenizerBase


class StandIn:
    """What the server does.

    Args:
        model: that computes.
        tokenizer: of it.

    Attributes:
        requests: bodies of completions so far.
        keys: the `Authorization` of each request.
        answer_with: status for the next requests, by the number of the request; 200 where it gives None.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer_with: Callable[[int], int | None] = lambda number: None

    def choice(self, index: int, prompt: str | list[int], top: int) -> dict[str, Any]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].float()
        log_probs = torch.log_softmax(logits, -1)
        token_logprobs: list[float | None] = [None]
        tops: list[dict[str, float] | None] = [None]
        for position, token in enumerate(ids[1:]):
            values, likeliest = log_probs[position].topk(top)
            entries = {
                f"token_id:{number}": value for number, value in zip(likeliest.tolist(), values.tolist(), strict=True)
            }
            tops.append(entries | {f"token_id:{token}": float(log_probs[position, token])})
            token_logprobs.append(float(log_probs[position, token]))
        names = [f"token_id:{token}" for token in ids]
        return {
            "index": index,
            "text": "",
            "logprobs": {"tokens": names, "token_logprobs": token_logprobs, "top_logprobs": tops},
        }

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        assert (body["echo"], body["max_tokens"], body["return_tokens_as_token_ids"]) == (True, 0, True)
        choices = [self.choice(index, prompt, body["logprobs"]) for index, prompt in enumerate(prompts)]
        return {"choices": choices[::-1]}


@contextlib.contextmanager
def teaching(stand_in: StandIn) -> Iterator[str]:
    """The address of a stand-in that listens."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "larger"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stand_in.keys.append(self.headers["Authorization"])
            stand_in.requests.append(body)
            status = stand_in.answer_with(len(stand_in.requests))
            if status is None:
                self.answer(200, stand_in.complete(body))
            else:
                self.answer(status, {"error": {"message": "not now"}})

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()

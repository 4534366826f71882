"""A teacher that another machine computes: an OpenAI-compatible server that gives the log-probabilities of prompts.

Of every position it is asked for its likeliest tokens (`echo`, `logprobs`), by their numbers
(`return_tokens_as_token_ids`), as vLLM and `edgerazor serve` give them. All other tokens are one to the losses, so a
loss of logits is approximate, as from a recording of the likeliest tokens (`losses/README.md`); entropies, which decide
EAKLD's gate, are those of what is known, and what the teacher gives to the token of the text is exact. Hidden states
and attention stay on the server: losses that compare them are refused by name.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from edgerazor import data, untrusted
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.losses import LogitLoss, Outputs, RecordedTokens, prediction_mask
from edgerazor.models import PreTrainedTokenizerBase
from edgerazor.training.captured_states import Captures
from edgerazor.training.objective import Terms
from edgerazor.training.teachers import TeacherSource

#: The environment variable with the server's key, which is in no file and no command line.
KEY_VARIABLE = "EDGERAZOR_TEACHER_KEY"
#: Tokens of a distribution that are asked for; servers give no more unless they are told to.
TOP_TOKENS = 20
#: Seconds that an answer may take, and those before each further attempt.
TIMEOUT, WAITS = 300.0, (1.0, 2.0, 4.0, 8.0, 16.0)
#: Most bytes of an answer, and most entries of its lists and objects.
MOST_ANSWER_BYTES, MOST_ANSWER_ENTRIES = 1 << 30, 1 << 26
#: What is asked again: too many requests, and servers that are starting, ending or behind a proxy.
TRY_AGAIN = frozenset((408, 429, 500, 502, 503, 504))
#: Text whose tokens say whether two tokenizers are the same: words, numbers, blanks, scripts, a sign of four bytes.
PROBE = "Hello world, 2,047 x 3.5!\n\n\tdef f(x): return x**2  # Größe, naïve 你好 мир 🙂"
#: How vLLM and `edgerazor serve` write the number of a token.
TOKEN_NAME = "token_id:"


class TeacherGoneError(UserError):
    """The server does not answer any more; a training saves itself and can go on later."""


@dataclass
class Server:
    """An OpenAI-compatible server.

    Attributes:
        url: its base, such as `http://host:8000/v1`.
        model: the name of the model on it; empty for its only one.
        timeout: seconds that an answer may take.
        waits: seconds before each further attempt.
        sleep: waits; tests do not.
    """

    url: str
    model: str = ""
    timeout: float = TIMEOUT
    waits: Sequence[float] = WAITS
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise usage_error(
                f"{plain(self.url)} is no address of a server.", "Give one like http://host:8000/v1; no key in it."
            )
        self.model = self.model or self.only_model()

    def only_model(self) -> str:
        """The name of the one model that the server has.

        Raises:
            UserError: it has several, or none.
        """
        models = self.ask("GET", "/models").get("data")
        names = [str(model["id"]) for model in models] if isinstance(models, list) else []
        if len(names) != 1:
            listed = ", ".join(plain(name, 80) for name in names[:10]) or "none"
            raise usage_error(
                f"The server {self.url} has these models: {listed}.", "Name one with `distill.served_model`."
            )
        return names[0]

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, which is tried again where the server is busy or cannot be reached.

        Raises:
            TeacherGoneError: it stays so.
            UserError: the server refuses the request, or its answer cannot be read.
        """
        problem = ""
        for wait in (*self.waits, None):
            asked_to_wait = 0.0
            try:
                status, headers, answer = self._request(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                problem = plain(str(error) or type(error).__name__, 200)
            else:
                if status == 200:
                    return self._parsed(answer)
                problem = f"status {status}{_detail(answer)}"
                if status not in TRY_AGAIN:
                    raise UserError(f"The teacher's server {self.url} refuses to answer: {problem}.", _advice(status))
                asked_to_wait = _seconds(headers.get("retry-after", ""))
            if wait is not None:
                self.sleep(max(wait, asked_to_wait))
        raise TeacherGoneError(
            f"The teacher's server {self.url} does not answer ({problem.rstrip('.')}).",
            "Once it does, the same command goes on.",
        )

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        try:
            sent = None if body is None else json.dumps(body).encode()
            connection.request(method, parts.path.rstrip("/") + path, sent, headers)
            answer = connection.getresponse()
            content = answer.read(MOST_ANSWER_BYTES + 1)
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content
        finally:
            connection.close()

    def _parsed(self, answer: bytes) -> dict[str, Any]:
        try:
            if len(answer) > MOST_ANSWER_BYTES:
                raise ValueError("it is too long")
            parsed: dict[str, Any] = untrusted.parse_json(answer, dict, most_entries=MOST_ANSWER_ENTRIES)
        except ValueError as error:
            raise self.unreadable(str(error)) from None
        return parsed

    def unreadable(self, reason: str) -> UserError:
        """The sentence on an answer that says nothing."""
        return UserError(
            f"The answer of the teacher's server {self.url} cannot be used: {plain(reason, 200).rstrip('.')}.",
            "It must be OpenAI-compatible with log-probabilities of prompts by token numbers, as vLLM and `edgerazor "
            "serve` have them.",
        )

    def prompt_log_probs(self, prompts: Sequence[list[int]] | str, top: int) -> list[PromptLogProbs]:
        """The log-probabilities of the tokens of prompts, and of the likeliest in their places.

        Args:
            prompts: token numbers, or one text.
            top: how many of the likeliest.
        """
        body = {
            "model": self.model,
            "prompt": prompts,
            "max_tokens": 0,
            "echo": True,
            "logprobs": top,
            "return_tokens_as_token_ids": True,
        }
        choices = self.ask("POST", "/completions", body).get("choices")
        count = 1 if isinstance(prompts, str) else len(prompts)
        try:
            if not isinstance(choices, list) or len(choices) != count:
                raise ValueError("it has another number of texts than was asked for")
            ordered = sorted(choices, key=lambda choice: int(choice["index"]))
            return [PromptLogProbs.of(choice["logprobs"]) for choice in ordered]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.unreadable(str(error) or type(error).__name__) from None


@dataclass(frozen=True)
class PromptLogProbs:
    """What a server says of the tokens of a prompt.

    Attributes:
        tokens: their numbers.
        log_probs: of each of them, in nats; 0 of the first, which follows nothing.
        top: of each of them, token -> log-probability of the likeliest in its place; empty of the first.
    """

    tokens: list[int]
    log_probs: list[float]
    top: list[dict[int, float]]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> PromptLogProbs:
        """Of `logprobs` in an answer.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        tokens = [_token(name) for name in answer["tokens"]]
        log_probs = [0.0 if value is None else float(value) for value in answer["token_logprobs"]]
        top = [
            {_token(name): min(float(value), 0.0) for name, value in (likeliest or {}).items()}
            for likeliest in answer["top_logprobs"]
        ]
        if not len(tokens) == len(log_probs) == len(top):
            raise ValueError("its lists are of different lengths")
        if not all(map(math.isfinite, (*log_probs, *(value for one in top for value in one.values())))):
            raise ValueError("it holds numbers that are not finite")
        return cls(tokens, log_probs, top)


@dataclass(frozen=True)
class ServedTeacher(TeacherSource):
    """The teacher on a server.

    Attributes:
        server: that computes.
        vocab_size: entries of the student's distributions.
        device: of the tensors that the losses get.
        top: likeliest tokens that are asked for.
    """

    server: Server
    vocab_size: int
    device: torch.device
    top: int = field(default=TOP_TOKENS)

    def outputs(self, batch: data.Batch, needed: Captures, held_out: bool = False) -> Outputs:
        """See `TeacherSource`.

        Raises:
            UserError: the server's answer cannot be used.
            TeacherGoneError: it does not answer.
        """
        mask = prediction_mask(batch["labels"]).cpu()
        lengths = [int(row.nonzero().max()) + 2 if row.any() else 1 for row in mask]
        prompts = [ids[:length].tolist() for ids, length in zip(batch["input_ids"].cpu(), lengths, strict=True)]
        answers = self.server.prompt_log_probs(prompts, self.top)
        places: list[dict[int, float]] = []
        targets: list[float] = []
        for row, prompt, answer in zip(mask, prompts, answers, strict=True):
            if answer.tokens[: len(prompt)] != prompt:
                raise self.server.unreadable("it is of other tokens than was asked for")
            for position in row.nonzero().flatten().tolist():
                places.append(answer.top[position + 1])
                targets.append(answer.log_probs[position + 1])
        states = torch.empty(*batch["labels"].shape, 0, device=self.device)
        return Outputs(states, {}, recorded=self.tokens(places, targets))

    def tokens(self, places: Sequence[Mapping[int, float]], targets: Sequence[float]) -> RecordedTokens:
        """What the losses are given.

        Args:
            places: of each position, token -> log-probability of the likeliest.
            targets: log-probability of the token of the text.
        """
        count = min([self.top, *(len(place) for place in places)])
        if places and (count == 0 or any(not 0 <= token < self.vocab_size for place in places for token in place)):
            raise self.server.unreadable("it names no likeliest tokens, or some that the student does not have")
        likeliest = [sorted(place.items(), key=lambda entry: -entry[1])[:count] for place in places]
        shape = (len(places), count)
        ids = torch.tensor([[token for token, _ in place] for place in likeliest], dtype=torch.int64).view(shape)
        log_probs = torch.tensor([[value for _, value in place] for place in likeliest], dtype=torch.float32).view(
            shape
        )
        probs = log_probs.double().exp()
        tail = (1 - probs.sum(1)).clamp(min=0.0)
        others = max(self.vocab_size - count, 1)  # the tail's tokens, taken to be equally likely
        entropy = -(probs * log_probs).sum(1) - tail * (tail.clamp(min=1e-30) / others).log()
        return RecordedTokens(
            ids=ids.to(self.device),
            log_probs=log_probs.to(self.device),
            weights=torch.ones(shape, device=self.device),
            by_chance=torch.zeros(shape, dtype=torch.bool, device=self.device),
            tail=tail.float().to(self.device),
            entropy=entropy.float().to(self.device),
            target_log_probs=torch.tensor(list(targets), dtype=torch.float32).to(self.device),
            vocab_size=self.vocab_size,
        )

    def hidden_states(self, batches: Sequence[data.Batch], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """See `TeacherSource`; `check_served_losses` refuses what would ask for them."""
        raise UserError("A served teacher has no hidden states.", "Leave out the losses that compare them.")


def check_tokenizer(server: Server, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a server whose tokens are others than the student's.

    Args:
        server: of the teacher.
        tokenizer: of the student.
        name: of the student, for the message.

    Raises:
        UserError: how they differ.
    """
    theirs = server.prompt_log_probs(PROBE, 1)[0].tokens
    ours = [tokenizer.encode(PROBE, add_special_tokens=special) for special in (True, False)]
    if theirs not in ours:
        raise usage_error(
            f"The tokenizer of {plain(server.model, 100)} on {server.url} is another than that of {name}: a text of "
            f"{len(PROBE)} characters has {len(theirs)} tokens there that begin with {theirs[:4]}, and {len(ours[1])} "
            f"here that begin with {ours[1][:4]}.",
            "Name a served teacher that shares the student's tokenizer.",
        )


def check_served_losses(terms: Terms) -> None:
    """Refuse losses that a server's answers do not suffice for, by name.

    Raises:
        UserError: which, and why.
    """
    for term, loss in terms:
        if not loss.needs_teacher:
            continue
        if not isinstance(loss, LogitLoss):
            raise usage_error(
                f"The loss {term.name} compares what stays inside a served teacher.",
                "Leave it out of `distill.losses`: next-token losses (forward_kl, eakld ...) can be computed.",
            )
        temperature = getattr(loss, "temperature", 1.0)
        if temperature != 1.0:
            raise usage_error(
                f"The loss {term.name} is to have the temperature {temperature:g}, and servers give "
                "distributions at 1.",
                "Leave out its temperature.",
            )


def _token(name: str) -> int:
    if not name.startswith(TOKEN_NAME):
        raise ValueError("it gives tokens by text, which does not say which they are")
    return int(name.removeprefix(TOKEN_NAME))


def _detail(answer: bytes) -> str:
    """What a server says of an error, behind a colon."""
    try:
        error = untrusted.parse_json(answer[:100_000], dict)
        message = error["error"]["message"] if isinstance(error.get("error"), dict) else error.get("message")
    except (ValueError, KeyError, TypeError):
        return ""
    return f": {plain(str(message), 200).rstrip('.')}" if message else ""


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"Put its key into the environment variable {KEY_VARIABLE}."
    return "It must give log-probabilities of prompts, as vLLM (--max-logprobs 20) and `edgerazor serve` do."


def _seconds(header: str) -> float:
    """`Retry-After` in seconds, at most a minute; 0 where it says something else."""
    try:
        return min(max(float(header), 0.0), 60.0)
    except ValueError:
        return 0.0

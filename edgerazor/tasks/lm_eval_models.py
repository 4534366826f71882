"""lm-eval's model classes for models already in memory, with log-probabilities only where they count.

lm-eval's own `HFLM` computes logits and their softmax for every position of every prompt: with a vocabulary of
150,000 and 32 prompts of 200 tokens that is 4 GB, twice. Only the positions before the choice's tokens matter. And it
computes a prompt again for each of its choices. Both classes here are `HFLM` in everything that decides what a model
is given (tokens of context and continuation, the token that texts begin with, chat templates, truncation, windows of
long texts, stop strings), and compute less:

* `TransformersLM`, for models of transformers: prompts of about equal length share a batch, padded on the right, and
  the head runs on the last positions alone (`logits_to_keep`). Prompts with equal inputs run once: a one-token choice
  is not part of its own input, so all the one-word choices of an item cost one forward pass. * `EngineLM`, for engines
  that compute a prefix once for many continuations: what inputs share, a prompt or the examples before all prompts, is
  computed once (`shared_prefixes.py`).

`tests/tasks/test_tasks.py` compares both with `HFLM`.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torch.nn.functional import log_softmax

from edgerazor import devices
from edgerazor.console import Console, Tracker
from edgerazor.tasks.shared_prefixes import PrefixGroup, group_by_prefix
from edgerazor.untrusted import vocabulary

#: ((context, continuation), context's tokens, continuation's tokens)
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
#: Tokens behind their prefixes that an engine is given at once, at least; and how many times the prefix, at least, so
#: that computing a prefix again for the next ones costs little.
CALL_TOKENS, CALL_PREFIXES = 4096, 16
#: Greedy tokens that are generated before looking for a stop string among them.
GREEDY_TOKENS = 16
_T = TypeVar("_T")


class BaseLM(HFLM):
    """What both classes do: the tokens that a model is given, and the parts of several processes.

    Args:
        model: has `device` and `config`, as transformers' have.
        tokenizer: its tokenizer.
        batch_size: sequences in one forward pass.
        console: shows the progress.
        title: words before the progress.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, console: Console, title: str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.console, self.title, self.truncated = console, title, 0

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding would write.

        Several processes of a launcher score a part each.
        """
        return of_all_processes(self.scores(devices.share_of(requests), override_bs or self.batch_size))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that is written behind each prompt, likewise."""
        part = devices.share_of(requests)
        return of_all_processes(super().generate_until(part, disable_tqdm) if part else [])

    @abstractmethod
    def scores(self, requests: Sequence[TokenRequest], batch_size: int) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding would write."""

    def _by_input(self, requests: Sequence[TokenRequest]) -> dict[tuple[int, ...], list[int]]:
        """Input tokens, all but the last and no more than the model has positions for -> requests with these."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            vocabulary.check(self.tokenizer, [*context, *continuation])
            whole = (context + continuation)[-(self.max_length + 1) :]
            self.truncated += len(whole) < len(context) + len(continuation)
            groups.setdefault(tuple(whole[:-1]), []).append(index)
        return groups


class TransformersLM(BaseLM):
    """Scores a causal language model of transformers, on its device, in evaluation mode."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, console: Console, title: str) -> None:
        # HFLM ties weights, which a loaded model has done and a packed one, having no weights, cannot.
        model.tie_weights = lambda *_, **__: None
        try:
            super().__init__(model, tokenizer, batch_size, console, title)
        finally:
            del model.tie_weights
        self.keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def scores(self, requests: Sequence[TokenRequest], batch_size: int) -> list[tuple[float, bool]]:
        """See `BaseLM`."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        groups = self._by_input(requests)
        inputs = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        with self.console.track(f"Tasks of {self.title}", len(requests)) as tracker:
            for start in range(0, len(inputs), batch_size):
                self._score_batch(inputs[start : start + batch_size], groups, requests, answers, tracker)
        return answers

    def _score_batch(
        self,
        inputs: list[tuple[int, ...]],
        groups: dict[tuple[int, ...], list[int]],
        requests: Sequence[TokenRequest],
        answers: list[tuple[float, bool]],
        tracker: Tracker,
    ) -> None:
        """Fill in the answers of a batch of inputs, the longest first."""
        longest = len(inputs[0])
        counts = [max(len(requests[index][2]) for index in groups[tokens]) for tokens in inputs]
        counts = [min(count, len(tokens)) for count, tokens in zip(counts, inputs, strict=True)]
        first = min(len(tokens) - count for tokens, count in zip(inputs, counts, strict=True))
        padded = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in inputs], device=self.device)
        logits = self._last_logits(padded, longest - first)  # [B, longest - first, V]
        for row, (tokens, count) in enumerate(zip(inputs, counts, strict=True)):
            end = len(tokens) - first
            scores = log_softmax(logits[row, end - count : end].float(), dim=-1)  # [count, V]
            for index in groups[tokens]:
                targets = torch.tensor(requests[index][2][-count:], device=scores.device)  # [n], n <= count
                of_targets = scores[count - len(targets) :]  # [n, V]
                value = of_targets.gather(1, targets[:, None]).sum()
                answers[index] = (float(value), bool((of_targets.argmax(-1) == targets).all()))
            tracker.advance(len(groups[tokens]))

    def _last_logits(self, tokens: Tensor, count: int) -> Tensor:
        """Logits [B, count, V] of the last positions of tokens [B, T]."""
        with torch.inference_mode():
            if self.keeps_last:
                return self.model(tokens, logits_to_keep=count, use_cache=False).logits
            return self.model(tokens, use_cache=False).logits[:, -count:]


class EngineLM(BaseLM):
    """Scores a model that computes a prefix once for many continuations; it generates greedily.

    Args:
        model: with `config`, `generation_config`, `score` and `session`, as `edgerazor.runtime.Model` has them.
        tokenizer, batch_size, console, title: as of `TransformersLM`.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, console: Console, title: str) -> None:
        stand_in = SimpleNamespace(device=torch.device("cpu"), config=model.config)
        super().__init__(stand_in, tokenizer, batch_size, console, title)
        self.engine = model

    def scores(self, requests: Sequence[TokenRequest], batch_size: int) -> list[tuple[float, bool]]:
        """See `BaseLM`."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        by_input = self._by_input(requests)
        counts = {tokens: max(len(requests[index][2]) for index in same) for tokens, same in by_input.items()}
        inputs = [tokens for tokens in by_input if tokens and counts[tokens]]  # without, nothing is predicted
        groups = group_by_prefix(inputs, [max(1, len(tokens) + 1 - counts[tokens]) for tokens in inputs])
        with self.console.track(f"Tasks of {self.title}", len(requests)) as tracker:
            for call in _calls(groups, inputs):
                pairs = [_score_input(group, inputs, by_input, requests) for group in call]
                scores_by_group = self.engine.score([score_input for score_input, _ in pairs])
                for (_, indices), scores in zip(pairs, scores_by_group, strict=True):
                    for index, score in zip(indices, scores, strict=True):
                        answers[index] = (score.log_probability, score.greedy)
                    tracker.advance(len(indices))
        return answers

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Tokens [B, at most max_length]: the contexts, padded on the left, and greedy text behind each."""
        padding = options.pop("attention_mask") == 0  # [B, T]
        self.check_greedy(options)
        count = max_length - context.shape[1]
        rows = [
            self._generate_greedily(row[~padded].tolist(), count, stop)
            for row, padded in zip(context, padding, strict=True)
        ]
        longest = max(map(len, rows))
        filled = [[*row, *[self.tokenizer.pad_token_id] * (longest - len(row))] for row in rows]
        return torch.cat([context, torch.tensor(filled, dtype=context.dtype)], dim=1)

    def check_greedy(self, options: dict[str, Any]) -> None:
        """Raises ValueError where options of generation ask for more than greedy text."""
        if not is_greedy(options):
            raise ValueError("answers that are not plain greedy text are for models of transformers")

    def _generate_greedily(self, prompt: list[int], count: int, stop: list[str]) -> list[int]:
        """Greedy tokens: up to `count`, or to one that ends texts or completes one of the strings `stop`."""
        configured = self.engine.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        session = self.engine.session()
        session.feed(prompt)
        written: list[int] = []
        while len(written) < count and not (written and written[-1] in ends):
            before = len(written)
            written += session.greedy(min(GREEDY_TOKENS, count - before), ends)
            if self._has_stop(written, stop):
                return next(written[:n] for n in range(before, len(written) + 1) if self._has_stop(written[:n], stop))
        return written

    def _has_stop(self, written: list[int], stop: list[str]) -> bool:
        """Whether generated tokens hold one of the stop strings."""
        text = self.tok_decode(written, skip_special_tokens=False)
        return any(string in text for string in stop)


def of_all_processes(answers: list[_T]) -> list[_T]:
    """The answers of all processes, in the order of the requests."""
    return [answer for part in devices.all_values(answers) for answer in part]


def _calls(groups: list[PrefixGroup], inputs: list[tuple[int, ...]]) -> Iterator[list[PrefixGroup]]:
    """Groups that an engine is given in one call, those with very many members in pieces."""
    call: list[PrefixGroup] = []
    tokens = 0
    for group in groups:
        enough = max(CALL_TOKENS, CALL_PREFIXES * group.prefix)
        call.append(PrefixGroup(group.prefix, []))
        for member in group.members:
            if tokens >= enough and call[-1].members:
                yield call
                call, tokens = [PrefixGroup(group.prefix, [])], 0
            call[-1].members.append(member)
            tokens += len(inputs[member]) - group.prefix
        tokens += group.prefix
        if tokens >= CALL_TOKENS:
            yield call
            call, tokens = [], 0
    if call:
        yield call


def _score_input(
    group: PrefixGroup,
    inputs: list[tuple[int, ...]],
    by_input: dict[tuple[int, ...], list[int]],
    requests: Sequence[TokenRequest],
) -> tuple[tuple[list[int], list[list[int]], list[int]], list[int]]:
    """What an engine scores for a group, and for which requests.

    Returns:
        prefix, continuations and how many last tokens of each count; the index of the request of each continuation.
    """
    continuations: list[list[int]] = []
    counts: list[int] = []
    indices: list[int] = []
    for tokens in (inputs[member] for member in group.members):
        for index in by_input[tokens]:
            continuation = requests[index][2]
            continuations.append([*tokens[group.prefix :], continuation[-1]])
            counts.append(min(len(continuation), len(tokens)))
            indices.append(index)
    return (list(inputs[group.members[0]][: group.prefix]), continuations, counts), indices


def is_greedy(options: dict[str, Any]) -> bool:
    """Whether a task's options of generation ask for greedy decoding and nothing else."""
    normalized = normalize_gen_kwargs(options)
    sampling = {"do_sample", "temperature", "top_p", "top_k"}
    return not normalized["do_sample"] and normalized.keys() <= sampling | {"until", "max_gen_toks"}

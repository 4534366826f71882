"""lm-eval's model class for models already in memory, with log-probabilities only where they count.

lm-eval's own `HFLM` computes logits and their softmax for every position of every prompt: with a vocabulary of
150,000 and 32 prompts of 200 tokens that is 4 GB, twice. Only the positions before the choice's tokens matter. Here
prompts of about equal length share a batch, padded on the right, and the head runs on the last positions alone
(`logits_to_keep`). Prompts with equal inputs run once: a one-token choice is not part of its own input, so all the
one-word choices of an item cost one forward pass. `tests/test_tasks.py` compares both classes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.functional import log_softmax

from edgerazor.console import Console, Tracker

#: ((context, continuation), context's tokens, continuation's tokens)
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class Scorer(HFLM):
    """Scores a causal language model.

    Args:
        model: of transformers, on its device, in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: sequences in one forward pass.
        console: shows the progress.
        title: words before the progress.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, console: Console, title: str) -> None:
        # HFLM ties weights, which a loaded model has done and a packed one, having no weights, cannot.
        model.tie_weights = lambda *_, **__: None
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        finally:
            del model.tie_weights
        self.console, self.title, self.truncated = console, title, 0
        self.keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding would write."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = {}  # input tokens -> requests
        for index, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]
            self.truncated += len(whole) < len(context) + len(continuation)
            groups.setdefault(tuple(whole[:-1]), []).append(index)
        inputs = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        size = override_bs or self.batch_size
        with self.console.track(f"Tasks of {self.title}", len(requests)) as tracker:
            for start in range(0, len(inputs), size):
                self._score_batch(inputs[start : start + size], groups, requests, answers, tracker)
        return answers

    def _score_batch(
        self,
        inputs: list[tuple[int, ...]],
        groups: dict[tuple[int, ...], list[int]],
        requests: list[TokenRequest],
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
                wanted = torch.tensor(requests[index][2][-count:], device=scores.device)  # [n], n <= count
                found = scores[count - len(wanted) :]
                value = found.gather(1, wanted[:, None]).sum()
                answers[index] = (float(value), bool((found.argmax(-1) == wanted).all()))
            tracker.advance(len(groups[tokens]))

    def _last_logits(self, tokens: Tensor, count: int) -> Tensor:
        """Logits [B, count, V] of the last positions of tokens [B, T]."""
        with torch.inference_mode():
            if self.keeps_last:
                return self.model(tokens, logits_to_keep=count, use_cache=False).logits
            return self.model(tokens, use_cache=False).logits[:, -count:]

"""A sample of greedy text: a model that repeats one token has collapsed, whatever its scores say."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgerazor import data, models
from edgerazor.errors import UserError
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.evaluation.evaluated_model import EvaluatedModel

PROMPT_TOKENS, SAMPLE_TOKENS = 16, 48
#: Texts that must all have collapsed: behind one odd prompt, the middle of a number, a sound model repeats, too.
PROMPTS = 3
#: Share of one token in a greedy text from which it has collapsed.
COLLAPSED = 0.8


class Prompt(NamedTuple):
    """What is gone on from: token ids, and whether an answer begins behind them, which may end after any token."""

    ids: list[int]
    asks: bool


def add_sample(
    result: EvalResult,
    evaluated: EvaluatedModel,
    teacher: EvaluatedModel | None,
    text: data.TokenRows | None,
    gate: bool = True,
) -> None:
    """Write a greedy text into the result.

    Args:
        result: gets the sample; of a text that has collapsed, unlike the teacher's, a failure too.
        evaluated: the model that writes.
        teacher: the reference, or None.
        text: held-out rows, whose beginnings are the prompts; None for the token that texts begin with.
        gate: without it, a text that has collapsed is only noted.
    """
    prompts = _prompts(evaluated, text)
    prompt = prompts[0]
    try:
        written = greedy(evaluated, prompt)
        sound = not collapsed(written) or any(not collapsed(greedy(evaluated, other)) for other in prompts[1:])
    except UserError as error:  # logits that are no numbers
        result.failures.append(error.message)
        return
    words = [token for token in prompt.ids + written if token < models.FIRST]
    result.sample = evaluated.tokenizer.decode(words, skip_special_tokens=True)
    if sound:
        return
    token = evaluated.tokenizer.decode([max(set(written), key=written.count)])
    sentence = f"The model's greedy text has collapsed: it repeats {token!r}"
    if teacher is not None and collapsed(greedy(teacher, prompt)):
        result.notes.append(f"{sentence}, and so does the teacher's for the same prompt.")
    elif gate:
        result.failures.append(f"{sentence}.")
    else:
        result.notes.append(f"{sentence}.")


def _prompts(evaluated: EvaluatedModel, text: data.TokenRows | None) -> list[Prompt]:
    """The first tokens of held-out rows, else the token that texts begin with."""
    if text is not None:
        rows = data.sample_batches(text, PROMPTS, 1)
        return [beginning(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in rows]
    first = evaluated.tokenizer.bos_token_id
    if first is None:
        first = evaluated.tokenizer.eos_token_id
    return [Prompt([first or 0], False)]


def beginning(ids: list[int], labels: list[int], start: int = 0) -> Prompt:
    """`PROMPT_TOKENS` tokens of a row, from `start` on; where it shows a picture, all up to the first answer, since no
    picture is cut apart."""
    if all(token < models.FIRST for token in ids):
        return Prompt(ids[start : start + PROMPT_TOKENS], False)
    return Prompt(ids[: next(place for place, label in enumerate(labels) if label != data.MASKED)], True)


def greedy(evaluated: EvaluatedModel, prompt: Prompt) -> list[int]:
    """The most probable continuation of a prompt, token by token.

    It does not end at once: end-of-text tokens are passed over, so that a model that ends at once can be told from one
    that has nothing else to say. An answer ends where the model ends it after a word or more; what a model that learned
    answers of a word is made to say behind its end tells nothing.
    """
    ends = {evaluated.tokenizer.eos_token_id}
    configured = getattr(evaluated.model.generation_config, "eos_token_id", None)
    ends |= set(configured) if isinstance(configured, list) else {configured}
    forbidden = sorted(end for end in ends if end is not None and end < evaluated.vocab_size)
    feed = evaluated.model.session().feed if evaluated.is_native else _TransformersSession(evaluated.model)
    tokens = prompt.ids
    written: list[int] = []
    while len(written) < min(SAMPLE_TOKENS, evaluated.context_length - len(prompt.ids)):
        logits = feed(tokens).clone()  # [V]
        if prompt.asks and written and int(logits.argmax()) in ends:
            break
        logits[forbidden] = -torch.inf
        tokens = [int(logits.argmax())]
        written += tokens
    return written


class _TransformersSession:
    """A sequence that a model of transformers is given piece by piece."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> Tensor:
        """Logits float32 [V] after the last of the next tokens."""
        tokens = torch.tensor([ids], device=self.model.device)
        output = self.model(tokens, **models.with_cache(self.model, self.cache))
        self.cache = output[models.cache_name(self.model)]
        return output.logits[0, -1].float()


def collapsed(tokens: list[int]) -> bool:
    """Whether more than four fifths of a text are one token."""
    return len(tokens) > 1 and max(map(tokens.count, set(tokens))) > COLLAPSED * len(tokens)

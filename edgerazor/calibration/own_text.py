"""The text that the teacher writes for itself, where the user gave none."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import BaseModel

from edgerazor import data, devices, untrusted
from edgerazor.calibration.generated_text import Writer, written_with
from edgerazor.console import duration
from edgerazor.errors import UserError
from edgerazor.job import JobContext, LoadedModel, ModelOutline
from edgerazor.recipe import Sampling
from edgerazor.runtime.native_model import NativeModel
from edgerazor.training import MachineSpeed, cost_of, writing_seconds
from edgerazor.training.budget_defaults import FEWEST_WRITTEN, WRITING_SHARE
from edgerazor.workdir import digest_json, versions, write_json, write_text

#: Most tokens of a question or an answer of its own; what is longer is not taken.
ANSWER_TOKENS = 512
#: Share of a batch of conversations that has to come to an end, for there to be more of them.
LEAST_ANSWERED = 0.25

#: Opens the native engine's version of a teacher; it gives None where transformers computes the teacher.
OpenNative = Callable[[LoadedModel, JobContext], AbstractContextManager[NativeModel | None]]


class Progress(BaseModel):
    """What the teacher has written so far.

    Attributes:
        asked: digest of what decides it.
        lines: of the JSON lines file.
        batches: that were written.
        tokens: that were written, without what came to nothing.
        talked: those of them that are in conversations.
        seconds: that it took.
        finished: whether it is all.
        converses: whether enough of its latest conversations came to an end for there to be more.
    """

    asked: str
    lines: list[str] = []
    batches: int = 0
    tokens: int = 0
    talked: int = 0
    seconds: float = 0.0
    finished: bool = False
    converses: bool = True


def provide(context: JobContext, length: int, open_native: OpenNative) -> None:
    """Text that the teacher writes, or has written before this stage was interrupted, in `work.generated_text`.

    Args:
        context: of the job.
        length: most tokens of a document.
        open_native: opens the native engine's version of the teacher.

    Raises:
        UserError: the teacher writes no text by itself.
    """
    recipe, work = context.recipe, context.work
    tokens = recipe.data.generated_tokens
    identity = digest_json([context.teacher_fingerprint, recipe.seed, tokens, length, versions()])
    file = work.progress("calibrate", "generated.json")
    progress = _stored(file, identity)
    if not progress.finished:
        context.console.say(f"No --data was given, so the teacher writes {tokens:,} tokens itself.")
        teacher = context.load_teacher(context.device, devices.inference_dtype(context.device))
        own = writer_of(teacher, recipe.seed, length)
        with open_native(teacher, context) as native, written_with(own, native) as writer:
            write(context, writer, length, progress)
    write_text(work.generated_text, "\n".join(progress.lines) + "\n")


def _stored(file: Path, identity: str) -> Progress:
    """How far an earlier run came with the same text; none of it where there was none."""
    try:
        progress = untrusted.load_model(file, Progress)
    except (OSError, ValueError):
        return Progress(asked=identity)
    return progress if progress.asked == identity else Progress(asked=identity)


def write(context: JobContext, writer: Writer, length: int, progress: Progress) -> None:
    """Let the teacher write about `data.generated_tokens` tokens, in documents of at most `length`.

    Plain sampling at temperature 1 keeps the teacher's own distribution (data-free distillation as in LLM-QAT, arXiv
    2305.17888, section 2). A document ends where the teacher ends it, or where the time that it may take is over. Where
    the teacher was tuned to answer, half of it is conversations.

    Args:
        context: of the job.
        writer: the teacher.
        length: most tokens of a document.
        progress: from where it goes on; each batch is noted and kept.

    Raises:
        UserError: the teacher ends nearly every text at once.
    """
    total, limit = context.recipe.data.generated_tokens, time_limit(context)
    file = context.work.progress("calibrate", "generated.json")
    size = writer.sampling.batch_size
    can_ask = data.question_opening(writer.tokenizer) is not None
    talker = replace(writer, sampling=writer.sampling.model_copy(update={"answer_tokens": ANSWER_TOKENS}))
    began, before = time.monotonic(), progress.seconds

    def is_over(tokens: int) -> bool:
        """Whether the time is over, by so many tokens of the batch being written; a least number is written anyway."""
        progress.seconds = before + time.monotonic() - began
        return limit is not None and progress.seconds > limit and progress.tokens + tokens >= FEWEST_WRITTEN

    with context.console.track("the teacher writes", total, min(progress.tokens, total)) as tracker:
        while progress.tokens < total and not is_over(0):
            texts = min(size, math.ceil((total - progress.tokens) / mean_tokens(progress, length)))
            asks = can_ask and progress.converses and 2 * progress.talked < progress.tokens
            if asks:
                batch = talker.ask_and_answer(texts, progress.batches)
                progress.converses = sum(row.record is not None for row in batch) >= LEAST_ANSWERED * texts
            else:
                batch = writer.write([None] * texts, progress.batches, None if limit is None else is_over)
            progress.lines += [json.dumps(row.record) for row in batch if row.record]
            tokens = sum(row.tokens for row in batch if row.record)
            progress.batches += 1
            progress.tokens += tokens
            progress.talked += asks * tokens
            is_over(0)
            if tokens < 2 * texts and not asks:
                raise UserError(
                    f"{context.recipe.model} writes no text by itself.", "Give text to learn from: --data FILE."
                )
            tracker.advance(tokens)
            if progress.batches == 1:  # of texts
                say_how_long(context, progress, total, limit)
            write_json(file, progress.model_dump(mode="json"))
    progress.finished = True
    write_json(file, progress.model_dump(mode="json"))
    engine = "transformers" if writer.native is None else "the native engine, in 8 bits"
    said = f"The teacher has written {progress.tokens:,} tokens in {duration(progress.seconds)}, with {engine}."
    context.console.say(said)
    if progress.tokens < total:
        context.console.say(f"These are fewer than {total:,}, because writing may take {duration(limit or 0.0)}.")


def say_how_long(context: JobContext, progress: Progress, total: int, limit: float | None) -> None:
    """After the first batch: how long the rest will take, where that is more than a minute."""
    left = progress.seconds * (total - progress.tokens) / progress.tokens
    if min(left, limit or left) > 60:
        said = duration(min(left, limit or left))
        context.console.say(f"That will take about {said}; with --data FILE it would not be needed.")


def mean_tokens(progress: Progress, length: int) -> float:
    """Tokens that a document will have, by those so far; of the first ones, all that they may."""
    return progress.tokens / len(progress.lines) if progress.lines else length - 1


def time_limit(context: JobContext) -> float | None:
    """Seconds that writing may take: its share of the training's time, where the budget said how much is written."""
    is_chosen = "generated_tokens" in context.chosen.get("data", {})
    seconds = context.recipe.distill.max_time
    return WRITING_SHARE * seconds if is_chosen and seconds is not None else None


def estimate(outline: ModelOutline, tokens: int, machine: MachineSpeed, dtype: torch.dtype | None) -> tuple[float, int]:
    """Seconds and bytes of memory that a teacher takes to write so many tokens of its own, about.

    Args:
        outline: of the teacher.
        tokens: to write.
        machine: the speed of the device in the dtype.
        dtype: of the weights; None for the checkpoint's own.
    """
    size = Sampling().batch_size
    seconds = writing_seconds(cost_of(outline.structure, 1), machine, tokens)
    weights = sum(weight.numel() * (dtype or weight.dtype).itemsize for weight in outline.model.parameters())
    logits = size * outline.model.config.get_text_config().vocab_size * 4
    return seconds, weights + logits


def writer_of(teacher: LoadedModel, seed: int, length: int) -> Writer:
    """The teacher writing texts of at most `length` tokens, as it is."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, answer_tokens=length - 1)
    return Writer(teacher.model, teacher.tokenizer, sampling, seed, length)

"""The text that the teacher writes for itself, where the user gave none."""

from __future__ import annotations

import json
import time
from itertools import repeat

import torch

from edgerazor import devices, untrusted
from edgerazor.calibration.generated_text import Writer
from edgerazor.console import duration
from edgerazor.errors import UserError
from edgerazor.job import JobContext, LoadedModel, ModelOutline
from edgerazor.recipe import Sampling
from edgerazor.training import MachineSpeed, cost_of, writing_seconds
from edgerazor.workdir import digest_json, versions, write_json, write_text


def provide(context: JobContext, length: int) -> None:
    """Text that the teacher writes, or has written before this stage was interrupted, in `work.generated_text`.

    Args:
        context: of the job.
        length: most tokens of a document.

    Raises:
        UserError: the teacher writes no text by itself.
    """
    recipe, work = context.recipe, context.work
    tokens = recipe.data.generated_tokens
    identity = digest_json([context.teacher_fingerprint, recipe.seed, tokens, length, versions()])
    progress = work.progress("calibrate", "generated.json")
    try:
        before = untrusted.load_json(progress, most_bytes=untrusted.MOST_BYTES_OF_OURS)
    except (OSError, ValueError):
        before = {}
    if before.get("asked") == identity and isinstance(before.get("text"), str):
        write_text(work.generated_text, before["text"])
        return
    context.console.say(f"No --data was given, so the teacher writes {tokens:,} tokens itself.")
    teacher = context.load_teacher(context.device, devices.inference_dtype(context.device))
    write(context, teacher, length)
    write_json(progress, {"asked": identity, "text": work.generated_text.read_text(encoding="utf-8")})


def write(context: JobContext, teacher: LoadedModel, length: int) -> None:
    """Let the teacher write about `data.generated_tokens` tokens, in documents of at most `length`.

    Plain sampling at temperature 1 keeps the teacher's own distribution (data-free distillation as in LLM-QAT, arXiv
    2305.17888, section 2). A document ends where the teacher ends it.

    Raises:
        UserError: the teacher ends nearly every text at once.
    """
    writer = _writer(teacher, context.recipe.seed, length)
    total = context.recipe.data.generated_tokens
    lines: list[str] = []
    written, batches = 0, 0
    began = time.monotonic()
    with context.console.track("the teacher writes", total) as tracker:
        for batch in writer.batches(repeat(None)):
            lines += [json.dumps(row.record) for row in batch if row.record]
            tokens = sum(row.tokens for row in batch)
            written, batches = written + tokens, batches + 1
            if written < 2 * batches * writer.sampling.batch_size:
                raise UserError(
                    f"{context.recipe.model} writes no text by itself.", "Give text to learn from: --data FILE."
                )
            tracker.advance(min(tokens, total - written + tokens))
            left = (time.monotonic() - began) * max(total - written, 0) / written
            if batches == 1 and left > 60:
                context.console.say(f"That will take about {duration(left)}; with --data FILE it would not be needed.")
            if written >= total:
                break
    write_text(context.work.generated_text, "\n".join(lines) + "\n")


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


def _writer(teacher: LoadedModel, seed: int, length: int) -> Writer:
    """The teacher writing texts of at most `length` tokens, as it is."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, answer_tokens=length - 1)
    return Writer(teacher.model, teacher.tokenizer, sampling, seed, length)

"""A model's scores on tasks: lm-eval makes the prompts, counts and averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgerazor import data, devices
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.pictures import PictureReader
from edgerazor.tasks.catalog import LoadedTask, TaskRequest
from edgerazor.tasks.quiet import quiet_lm_eval

#: Resamplings for the standard error of metrics that have no formula for it.
BOOTSTRAP = 1000


@dataclass(frozen=True)
class TaskScore:
    """One task's main result: acc_norm where the task reports it, else acc, else its first metric."""

    value: float
    stderr: float | None
    metric: str
    higher_is_better: bool


def evaluate(
    model: Any,
    tokenizer: Any,
    loaded: Sequence[LoadedTask],
    request: TaskRequest,
    batch_size: int,
    console: Console,
    title: str,
    reader: PictureReader | None = None,
) -> tuple[dict[str, TaskScore], list[str]]:
    """Score a model.

    Args:
        model: a causal language model of transformers, in evaluation mode, or one that scores continuations itself, a
            `runtime.Model`, for tasks that are not `non_greedy`.
        tokenizer: its tokenizer.
        loaded: the tasks.
        request: for its limit, chat template and seed.
        batch_size: sequences in one forward pass.
        console: shows the progress.
        title: what the model is called in the progress and in messages.
        reader: reads pictures for the model; None where it sees none.

    Returns:
        task name -> score, and notes.

    Raises:
        UserError: a chat template is asked for that the tokenizer lacks, a task shows pictures that the model cannot
            see, or lm-eval fails on a task.
    """
    seeing = [entry.name for entry in loaded if getattr(entry.task, "MULTIMODAL", False)]
    if seeing and reader is None:
        raise UserError(
            f"The questions of {', '.join(seeing)} are about pictures, and {title} sees none.", "Leave them out."
        )
    if chosen := [entry.name for entry in loaded if entry.name in seeing and not is_generative(entry)]:
        raise UserError(f"{chosen[0]} lets choose among answers about pictures, which lm-eval cannot score.")
    if seeing and reader is not None:
        tokenizer = data.tokenizer_of(reader.processor)
    if request.chat and not tokenizer.chat_template:
        raise usage_error(f"The tokenizer of {title} has no chat template.", "Leave --apply-chat-template out.")
    from lm_eval.evaluator import evaluate as run

    from edgerazor.tasks import lm_eval_models, lm_eval_pictures

    with quiet_lm_eval():
        is_engine = hasattr(model, "score")
        if seeing and reader is not None:
            kind = lm_eval_pictures.SeeingEngineLM if is_engine else lm_eval_pictures.SeeingTransformersLM
            scored = kind(model, reader, batch_size, console, title)
        else:
            plain = lm_eval_models.EngineLM if is_engine else lm_eval_models.TransformersLM
            scored = plain(model, tokenizer, batch_size, console, title)
        for entry in loaded:
            entry.task.set_fewshot_seed(seed=request.seed)  # every model sees the same examples
        try:
            report = run(
                scored,
                {"tasks": {entry.name: entry.task for entry in loaded}, "groups": {}, "group_map": {}},
                limit=request.limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                apply_chat_template=request.chat,
                fewshot_as_multiturn=request.chat,
            )
        except (ValueError, AssertionError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            raise UserError(f"lm-eval could not run {', '.join(e.name for e in loaded)}: {reason}.") from error
    notes = []
    if truncated := sum(devices.all_values(scored.truncated)):
        notes.append(f"{title}: {truncated} prompts were longer than the model's context and lost their beginning.")
    return {entry.name: _main_score(report["results"][entry.name], entry.task) for entry in loaded}, notes


def non_greedy(loaded: Sequence[LoadedTask]) -> list[str]:
    """Names of the tasks whose answers are generated, but not by greedy decoding."""
    from edgerazor.tasks.lm_eval_models import is_greedy

    generative = [entry for entry in loaded if is_generative(entry)]
    return [entry.name for entry in generative if not is_greedy(entry.task.config.generation_kwargs or {})]


def is_generative(entry: LoadedTask) -> bool:
    """Whether a task's answers are generated, rather than chosen."""
    return bool(entry.task.OUTPUT_TYPE == "generate_until")


def _main_score(results: dict[str, Any], task: Any) -> TaskScore:
    """Pick the main metric; lm-eval's keys are "metric,filter" and "metric_stderr,filter"."""
    keys = [key for key in results if "," in key and "_stderr," not in key]
    preferred = [key for name in ("acc_norm", "acc") for key in keys if key.split(",")[0] == name] or keys
    if not preferred:
        raise UserError(f"lm-eval reports no metric for {task.config.task}.")
    metric, filtered = preferred[0].split(",", 1)
    stderr = results.get(f"{metric}_stderr,{filtered}")
    known = float(stderr) if isinstance(stderr, float | int) and math.isfinite(stderr) else None  # "N/A" for one item
    better = bool(task.higher_is_better().get(metric, True))
    name = metric if filtered == "none" else f"{metric},{filtered}"
    return TaskScore(float(results[preferred[0]]), known, name, better)

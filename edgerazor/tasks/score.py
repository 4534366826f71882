"""A model's scores on tasks: lm-eval does the asking, counting and averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.tasks.catalog import LoadedTask, Request
from edgerazor.tasks.quiet import quiet_lm_eval

#: Resamplings for the standard error of metrics that have no formula for it.
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Score:
    """One task's main result: acc_norm where the task reports it, else acc, else its first metric."""

    value: float
    stderr: float | None
    metric: str
    higher_is_better: bool


def evaluate(
    model: Any,
    tokenizer: Any,
    loaded: Sequence[LoadedTask],
    request: Request,
    batch_size: int,
    console: Console,
    title: str,
) -> tuple[dict[str, Score], list[str]]:
    """Score a model.

    Args:
        model: a causal language model of transformers, in evaluation mode, or one that scores continuations itself, a
            `runtime.Model`, for tasks that are not `beyond_greedy`.
        tokenizer: its tokenizer.
        loaded: the tasks.
        request: limit, chat template and seed.
        batch_size: sequences in one forward pass.
        console: shows the progress.
        title: who is being scored, for the progress.

    Returns:
        task name -> score, and notes.

    Raises:
        UserError: a chat template is asked for that the tokenizer lacks, or lm-eval fails on a task.
    """
    if request.chat and not tokenizer.chat_template:
        raise usage_error(f"The tokenizer of {title} has no chat template.", "Leave --apply-chat-template out.")
    from lm_eval.evaluator import evaluate as run

    from edgerazor.tasks.scorer import EngineScorer, Scorer

    with quiet_lm_eval():
        scorer = (EngineScorer if hasattr(model, "score") else Scorer)(model, tokenizer, batch_size, console, title)
        for entry in loaded:
            entry.task.set_fewshot_seed(seed=request.seed)  # every model sees the same examples
        try:
            report = run(
                scorer,
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
    if scorer.truncated:
        notes.append(
            f"{title}: {scorer.truncated} prompts were longer than the model's context and lost their beginning."
        )
    return {entry.name: _main(report["results"][entry.name], entry.task) for entry in loaded}, notes


def beyond_greedy(loaded: Sequence[LoadedTask]) -> list[str]:
    """Tasks whose answers are written, but not with the most probable tokens alone."""
    from edgerazor.tasks.scorer import is_greedy

    written = [entry for entry in loaded if writes(entry)]
    return [entry.name for entry in written if not is_greedy(entry.task.config.generation_kwargs or {})]


def writes(entry: LoadedTask) -> bool:
    """Whether a task's answers are written, rather than chosen."""
    return bool(entry.task.OUTPUT_TYPE == "generate_until")


def _main(results: dict[str, Any], task: Any) -> Score:
    """Pick the main metric; lm-eval's keys are "metric,filter" and "metric_stderr,filter"."""
    keys = [key for key in results if "," in key and "_stderr," not in key]
    wanted = [key for name in ("acc_norm", "acc") for key in keys if key.split(",")[0] == name] or keys
    if not wanted:
        raise UserError(f"lm-eval reports no metric for {task.config.task}.")
    metric, filtered = wanted[0].split(",", 1)
    stderr = results.get(f"{metric}_stderr,{filtered}")
    known = float(stderr) if isinstance(stderr, float | int) and math.isfinite(stderr) else None  # "N/A" for one item
    better = bool(task.higher_is_better().get(metric, True))
    name = metric if filtered == "none" else f"{metric},{filtered}"
    return Score(float(results[wanted[0]]), known, name, better)

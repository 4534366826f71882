"""What `eval` measured, as the section of a packed model's card."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edgerazor.evaluation.eval_result import Average, EvalResult, Measured, TaskResult
from edgerazor.packaging import model_card
from edgerazor.packaging.markdown import block, escaped, table
from edgerazor.workdir import WorkDir, alone

#: Characters of a note, and of the text that the model wrote.
LONGEST_NOTE, LONGEST_SAMPLE = 400, 1500


def refresh(work: WorkDir, result: EvalResult) -> bool:
    """Write what was measured of a job's packed model into its card; it stays as it is where it says so already.

    Args:
        work: of the job, whose lock the caller holds.
        result: of the packed model that lies there.

    Returns:
        false where there is no card, or it has no place for results any more.

    Raises:
        UserError: another process is writing the packed folder.
    """
    folder = work.folder("pack")
    with alone(folder):
        return model_card.update_section(folder, "results", text(result))


def text(result: EvalResult) -> str:
    """The section: tasks, held-out text, a sample, notes, and what failed. Numbers are those of the result."""
    parts = [f"Measured by `edgerazor eval` on this very folder{_engine(result)}."]
    if result.failures:
        parts.append(
            "**It fails a gate of quality:** " + " ".join(escaped(failure, LONGEST_NOTE) for failure in result.failures)
        )
    if result.tasks:
        parts += [tasks_table(result), _retention_explained(result.average)]
    if result.text:
        parts.append(text_table(result))
    parts.append(not_measured(result))
    if result.sample:
        parts += ["A greedy text of it, beginning with the prompt:", block(result.sample, "text", LONGEST_SAMPLE)]
    if result.notes:
        places = [task.data for measured in (result, *result.compared.values()) for task in measured.tasks.values()]
        parts.append("\n".join(f"- {escaped(without_places(note, places), LONGEST_NOTE)}" for note in result.notes))
    return "\n\n".join(part for part in parts if part)


def _engine(result: EvalResult) -> str:
    if result.engine is None:
        return ""
    return f", computed by the {escaped(result.engine, 40)} engine" + (
        f" ({escaped(result.kernel, 60)} kernels)" if result.kernel else ""
    )


def without_places(note: str, places: Iterable[str] = ()) -> str:
    """A note in which files and folders have their names alone: where they lie differs between equal runs.

    Args:
        note: a sentence.
        places: paths that may be in it, for those with spaces.
    """
    for place in places:
        note = note.replace(place, Path(place).name) if place.startswith("/") else note
    return re.sub(r"(?<![\w:/])(?:/[^\s/]+)+/(?=[^\s/])", "", note)


def percent(share: float | None) -> str:
    """As the card shows a share: 97.43 %; empty where it is not known."""
    return "" if share is None else f"{100 * share:.2f} %"


def with_error(share: float | None, stderr: float | None) -> str:
    """A share and its standard error."""
    return percent(share) + (f" ± {100 * stderr:.2f}" if share is not None and stderr is not None else "")


def retention_stderr(task: TaskResult) -> float | None:
    """The standard error of a task's retention above chance, the teacher's score taken as it is."""
    if None in (task.retention_above_chance, task.stderr, task.chance, task.teacher_score):
        return None
    assert task.stderr is not None
    assert task.teacher_score is not None
    assert task.chance is not None
    return task.stderr / (task.teacher_score - task.chance)


def tasks_table(result: Measured) -> str:
    """A row for each task, and one for their average."""
    rows = []
    for name, task in result.tasks.items():
        whole = {True: "all", False: "a part", None: ""}[task.full_set]
        rows.append(
            [
                escaped(name, 80),
                escaped(task.metric, 40),
                f"{task.items:,}" + (f" ({whole})" if whole else ""),
                with_error(task.score, task.stderr),
                percent(task.teacher_score),
                percent(task.chance),
                with_error(task.retention_above_chance, retention_stderr(task)),
            ]
        )
    if (mean := result.average) is not None:
        above = with_error(mean.retention_above_chance, mean.retention_stderr)
        rows.append(
            [
                "**average**",
                "",
                "",
                with_error(mean.score, mean.stderr),
                percent(mean.teacher_score),
                "",
                f"**{above}**",
            ]
            if above
            else ["**average**", "", "", with_error(mean.score, mean.stderr), percent(mean.teacher_score), "", ""]
        )
    columns = ["task", "metric", "items", "this model", "teacher", "chance", "retention above chance"]
    return table(columns, rows)


def _retention_explained(average: Average | None) -> str:
    if average is None or average.retention_above_chance is None:
        return ""
    return "Retention above chance is (score - chance) / (teacher - chance); ± is one standard error."


def text_table(result: Measured) -> str:
    """Perplexity, KL and agreement on held-out text."""
    measured = result.text
    assert measured is not None
    shown = [
        "" if value is None else f"{value:.4g}"
        for value in (measured.perplexity, measured.teacher_perplexity, measured.kl)
    ]
    columns = ["held-out text", "perplexity", "teacher's", "KL, nats per token", "top-1 agreement"]
    return table(columns, [[f"{measured.tokens:,} tokens", *shown, percent(measured.top1_agreement)]])


def not_measured(result: EvalResult) -> str:
    """What of it there is no number for."""
    missing = [] if result.tasks else ["no task"]
    missing += [] if result.text else ["no held-out text"]
    partial = [name for name, task in result.tasks.items() if task.full_set is False]
    sentences = [f"Measured was {' and '.join(missing)}."] if missing else []
    if partial:
        names = ", ".join(escaped(name, 80) for name in partial[:20])
        sentences.append(
            f"Of {names} only a part of the items was asked, so beware of comparing with published scores."
        )
    return " ".join(sentences)

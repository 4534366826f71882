"""Scores against the teacher's: retention of each task, their average, and the gate of `--min-retention`.

Raw retention, score / teacher, flatters where guessing already scores much; *retention above chance*,
(score - chance) / (teacher - chance), does not. Where the teacher itself is within two standard errors of chance there
is nothing to retain, and it is null.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from edgerazor import tasks
from edgerazor.console import percent
from edgerazor.evaluation.eval_result import Average, TaskResult

#: Standard errors above chance from which a teacher's score counts as knowledge.
ABOVE_CHANCE = 2.0


def compare(entry: tasks.LoadedTask, score: tasks.TaskScore, teacher: tasks.TaskScore | None) -> TaskResult:
    """One task's result; `teacher` is the teacher's score on the same items."""
    chance = entry.chance if score.metric in ("acc", "acc_norm") else None
    retention = above = None
    if teacher is not None and score.higher_is_better:
        retention = score.value / teacher.value if teacher.value > 0 else None
        if chance is not None and _knows(teacher.value - chance, teacher.stderr):
            above = (score.value - chance) / (teacher.value - chance)
    return TaskResult(
        score=score.value,
        stderr=score.stderr,
        chance=chance,
        teacher_score=teacher.value if teacher else None,
        teacher_stderr=teacher.stderr if teacher else None,
        retention=retention,
        retention_above_chance=above,
        metric=score.metric,
        items=entry.items,
        data=entry.data,
        full_set=entry.full_set,
        prompt_note=entry.note or None,
    )


def _knows(above_chance: float, stderr: float | None) -> bool:
    """Whether a score is so far above chance that it is not luck."""
    return stderr is not None and above_chance > ABOVE_CHANCE * stderr


def average(results: dict[str, TaskResult]) -> tuple[Average | None, list[str]]:
    """Means over the tasks with a chance level, with Σ(score - chance) / Σ(teacher - chance); notes on what is null."""
    with_chance = {name: result for name, result in results.items() if result.chance is not None}
    notes = []
    if len(with_chance) < len(results):
        notes.append("tasks without a chance level are not part of the average.")
    if not with_chance:
        return None, notes
    chance = _sum(result.chance for result in with_chance.values())
    score = _sum(result.score for result in with_chance.values())
    count, stderr = len(with_chance), _together(result.stderr for result in with_chance.values())
    mean = Average(score=score / count, teacher_score=None, retention_above_chance=None)
    mean.stderr = None if stderr is None else stderr / count
    if any(result.teacher_score is None for result in with_chance.values()):
        return mean, notes
    for name, result in with_chance.items():
        if result.retention_above_chance is None:
            notes.append(f"{name}: the teacher is within two standard errors of chance, so there is nothing to retain.")
    teacher = _sum(result.teacher_score for result in with_chance.values())
    mean.teacher_score = teacher / count
    if _knows(teacher - chance, _together(result.teacher_stderr for result in with_chance.values())):
        mean.retention_above_chance = (score - chance) / (teacher - chance)
        mean.retention_stderr = None if stderr is None else stderr / (teacher - chance)
    elif count > 1:
        notes.append("over all tasks the teacher is within two standard errors of chance.")
    return mean, notes


def _together(errors: Iterable[float | None]) -> float | None:
    """The standard error of a sum of independent scores; None where one has none."""
    squares = [None if error is None else error**2 for error in errors]
    return None if None in squares else math.sqrt(_sum(squares))


def _sum(values: Iterable[float | None]) -> float:
    return math.fsum(value for value in values if value is not None)


def retention_failure(average: Average | None, least: float | None) -> str | None:
    """What to say where the average retention above chance does not pass the gate of `--min-retention`.

    Args:
        average: over the tasks; None where none has a chance level.
        least: the gate, a share from 0 to 1; None where there is no gate.
    """
    if least is None:
        return None
    retention = average.retention_above_chance if average else None
    if retention is None:
        why = "no task with a chance level was run" if average is None else "the teacher is too near to chance"
        return f"At least {percent(least)} retention was asked for, but there is none: {why}."
    if retention < least:
        return f"Retention above chance is {percent(retention)}, below the {percent(least)} asked for."
    return None

"""What every model of a run is measured on, and beside which teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgerazor import data, tasks
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.evaluation import picture_tasks
from edgerazor.evaluation.eval_result import EvalResult, Measured
from edgerazor.evaluation.evaluated_model import EvaluatedModel
from edgerazor.evaluation.picture_tasks import PictureTask
from edgerazor.evaluation.scores import average, compare
from edgerazor.evaluation.text_metrics import batches_of, text_metrics
from edgerazor.job import RecipeContext
from edgerazor.pictures import PictureReader
from edgerazor.recipe import Eval, Source


@dataclass
class Evaluation:
    """Tasks, held-out text and the teacher, the same for every model.

    Attributes:
        settings: the recipe's `eval` section.
        request: of the tasks.
        loaded: the tasks, with their items.
        text: rows of held-out text, or None.
        sequence_length: tokens of a row.
        console: shows the progress.
        teacher: the reference, or None.
        teacher_scores: task -> its score.
        about_pictures: further tasks, questions about pictures.
        reader: reads pictures; None where the teacher sees none.
    """

    settings: Eval
    request: tasks.TaskRequest
    loaded: Sequence[tasks.LoadedTask]
    text: data.TokenRows | None
    sequence_length: int
    console: Console
    teacher: EvaluatedModel | None = None
    teacher_scores: dict[str, tasks.TaskScore] = field(default_factory=dict)
    about_pictures: Sequence[PictureTask] = ()
    reader: PictureReader | None = None

    def score_teacher(self) -> list[str]:
        """Ask the teacher all tasks; returns notes."""
        notes: list[str] = []
        if self.teacher is not None:
            self.teacher_scores, notes = self._scores(self.teacher)
        return notes

    def measure(self, evaluated: EvaluatedModel, measured: Measured) -> list[str]:
        """Fill in one model's scores and text metrics; returns notes."""
        scores, notes = self._scores(evaluated)
        for entry in self.entries:
            measured.tasks[entry.name] = compare(entry, scores[entry.name], self.teacher_scores.get(entry.name))
        if self.settings.blind:
            measured.blind = {name: score.value for name, score in self._of_pictures(evaluated, blind=True).items()}
        measured.average, more = average(measured.tasks)
        notes += [f"{evaluated.title}: {note}" for note in more]
        if self.text is None:
            return notes
        if self.teacher is not None and evaluated.tokenizer.get_vocab() != self.teacher.tokenizer.get_vocab():
            return [*notes, f"{evaluated.title}: another tokenizer than the teacher's, so no text metrics."]
        settings = self.settings
        batches = batches_of(self.text, evaluated, settings.text_sequences, self.sequence_length, settings.batch_size)
        measured.text = text_metrics(evaluated, self.teacher, batches, self.console)
        if measured.text.perplexity is None and isinstance(measured, EvalResult):
            measured.failures.append("The model's probabilities on held-out text are not finite numbers.")
        return notes

    @property
    def entries(self) -> list[tasks.LoadedTask]:
        """All tasks, those about pictures last."""
        return [*self.loaded, *(task.entry for task in self.about_pictures)]

    def _scores(self, evaluated: EvaluatedModel) -> tuple[dict[str, tasks.TaskScore], list[str]]:
        about_pictures = self._of_pictures(evaluated)
        if not self.loaded:
            return about_pictures, []
        model, tokenizer, title = evaluated.model, evaluated.tokenizer, evaluated.title
        size = self.settings.batch_size
        scores, notes = tasks.evaluate(
            model, tokenizer, self.loaded, self.request, size, self.console, title, self.reader
        )
        return {**scores, **about_pictures}, notes

    def _of_pictures(self, evaluated: EvaluatedModel, blind: bool = False) -> dict[str, tasks.TaskScore]:
        """Scores of questions about pictures."""
        if not self.about_pictures:
            return {}
        if self.reader is None:
            raise UserError("There are questions about pictures, but the model sees none.", "Leave out --pictures.")
        return {
            task.entry.name: picture_tasks.score(evaluated, task, self.reader, self.console, blind)
            for task in self.about_pictures
        }

    def notes_on_data(self) -> list[str]:
        """Where items are not the full set, and where there is no text."""
        notes = []
        for entry in self.entries:
            if entry.full_set is False:
                notes.append(f"{entry.name}: {entry.items} items of {entry.data}, not the full set.")
            elif entry.full_set is None:
                notes.append(
                    f"{entry.name}: {entry.items} items of {entry.data}; the size of the full set is not known."
                )
        if self.text is None:
            notes.append("No held-out text was given, so there are no text metrics (--data FILE).")
        return notes


def request_of(settings: Eval, seed: int) -> tasks.TaskRequest:
    """The tasks that a recipe asks for."""
    return tasks.TaskRequest(
        settings.tasks,
        settings.task_data,
        settings.limit,
        settings.num_fewshot,
        settings.apply_chat_template,
        seed,
    )


def load_tasks(
    request: tasks.TaskRequest, sources: tuple[Source, ...], about_pictures: Sequence[PictureTask] = ()
) -> list[tasks.LoadedTask]:
    """The tasks with their items.

    Args:
        request: names them.
        sources: of held-out text; without any, and without tasks, there is nothing to measure.
        about_pictures: further tasks.

    Raises:
        UserError: nothing to measure, unknown tasks, or items that are missing.
    """
    loaded = tasks.load(request) if request.names else []
    if not loaded and not sources and not about_pictures:
        raise nothing_to_measure()
    return loaded


def nothing_to_measure() -> UserError:
    return usage_error(
        "There is nothing to measure: no task was named and there is no held-out text.",
        "Name tasks (--tasks arc,hellaswag) or text (--data FILE).",
    )


def held_out_rows(
    context: RecipeContext, sources: tuple[Source, ...], evaluated: EvaluatedModel
) -> data.TokenRows | None:
    """Rows of held-out text, by a model's tokenizer and positions; None without sources."""
    if not sources:
        return None
    return context.open_held_out(sources, evaluated.tokenizer, context.sequence_length(evaluated.model))

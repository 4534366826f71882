"""What `eval` reports: scores, text metrics, and how much of the teacher is left."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskResult(Result):
    """One task. Scores are shares from 0 to 1 where the metric is an accuracy."""

    score: float
    stderr: float | None
    chance: float | None
    teacher_score: float | None
    teacher_stderr: float | None
    retention: float | None
    retention_above_chance: float | None
    metric: str
    items: int
    data: str
    full_set: bool | None
    prompt_note: str | None


class Average(Result):
    """Over the tasks that have a chance level.

    Standard errors are of the model's own scores, the tasks' together; the teacher's scores are taken as they are,
    because they are the same for every model. Null where a task has none, or where there is no retention.
    """

    score: float
    teacher_score: float | None
    retention_above_chance: float | None
    stderr: float | None = None
    retention_stderr: float | None = None


class TextResult(Result):
    """On held-out text; KL(teacher ‖ model) in nats per token. Null where there is no teacher, or not finite.

    Of conversations with pictures, all this is of the words that are learned; `picture_kl` is of the `picture_tokens`
    places that pictures take, where no word is predicted, and null where there are none.
    """

    perplexity: float | None
    teacher_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    tokens: int
    picture_kl: float | None = None
    picture_tokens: int = 0


class Measured(Result):
    """What was measured of one model; `blind` are its scores of questions about pictures without their features."""

    tasks: dict[str, TaskResult] = {}
    average: Average | None = None
    blind: dict[str, float] = {}
    text: TextResult | None = None


class EvalResult(Measured):
    """The packed model's measurements, those of the folders beside it, and what failed a gate.

    `engine` (native or transformers) computed the packed model, with the products of `kernel`; both are null where the
    model is not packed.
    """

    engine: str | None = None
    kernel: str | None = None
    compared: dict[str, Measured] = {}
    sample: str | None = None
    notes: list[str] = []
    failures: list[str] = []


class DryTask(Result):
    items: int | None
    tokens: int | None


class DryRun(Result):
    """What an evaluation would do; tokens are an estimate, null where items would have to be fetched first."""

    tasks: dict[str, DryTask]
    models: int
    text_sequences: int
    forward_tokens: int | None
    packed_bytes: int
    teacher_bytes: int
    seconds: float | None

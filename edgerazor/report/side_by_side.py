"""The same prompts, continued by teacher and student: where do they part, and does the student turn in circles?

Prompts are beginnings of held-out rows. Both go on greedily, so the first token that differs is where the student is of
another opinion. What was written is kept in the working directory, with a fingerprint of what it depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from edgerazor import data, models, untrusted
from edgerazor.errors import UserError
from edgerazor.evaluation.evaluated_model import EvaluatedModel, load_16_bit, load_packed
from edgerazor.evaluation.sample import PROMPT_TOKENS, SAMPLE_TOKENS, Prompt, beginning, greedy
from edgerazor.job import JobContext
from edgerazor.models import PreTrainedTokenizerBase
from edgerazor.workdir import alone, digest_json, write_json

PROMPTS = 10
#: Tokens at the end of a text that must repeat themselves, with a period of at most so many, to be a loop.
LOOP_TOKENS, LONGEST_PERIOD = 24, 12


class SideBySide(BaseModel):
    """A prompt and how both go on."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    teacher: str
    student: str
    equal_tokens: int = Field(description="before the first that differs")
    tokens: int = Field(description="that each wrote")
    teacher_loops: bool
    student_loops: bool


class Samples(BaseModel):
    """All of them; `fingerprint` of what they depend on."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    engine: str = Field(description="that computed the student")
    texts: list[SideBySide]


def samples_of(context: JobContext) -> Samples:
    """The texts of a job: those of before where they still hold, else written now and kept.

    Raises:
        UserError: a model or the held-out text is not at hand, or teacher and student have different tokenizers.
    """
    fingerprint = fingerprint_of(context)
    stored = read(context)
    if stored is not None and stored.fingerprint == fingerprint:
        return stored
    samples = write_samples(context, fingerprint)
    with alone(context.work.samples_file):
        write_json(context.work.samples_file, samples.model_dump(mode="json"))
    return samples


def read(context: JobContext) -> Samples | None:
    """What was written before; None where nothing was, or it is damaged."""
    try:
        return untrusted.load_model(context.work.samples_file, Samples)
    except (OSError, ValueError):
        return None


def fingerprint_of(context: JobContext) -> str:
    """Of student, teacher, and what the prompts are taken from.

    Raises:
        UserError: there is no packed model.
    """
    manifest = context.work.manifest("pack")
    if manifest is None:
        raise UserError("There is no packed model.", "Make one with `edgerazor pack`.")
    return digest_json(
        {
            "pack": manifest.fingerprint(),
            "teacher": manifest.inputs.get("model"),
            "data": context.recipe.data.model_dump(mode="json"),
            "seed": context.recipe.seed,
            "tokens": [PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS],
        }
    )


def write_samples(context: JobContext, fingerprint: str) -> Samples:
    """Let both write; the teacher leaves the memory before the student comes into it.

    Raises:
        UserError: as `samples_of`.
    """
    sources = context.held_out_sources
    if not sources:
        raise UserError("There is no held-out text to take prompts from.", "Name some with --held-out.")
    teacher = load_16_bit("teacher", context.recipe.model, context)
    rows = context.open_held_out(sources, teacher.tokenizer, context.sequence_length(teacher.model))
    prompts = list(prompts_of(rows, teacher.tokenizer))
    vocabulary = teacher.tokenizer.get_vocab()
    with context.console.track("texts", 2 * len(prompts)) as tracker:
        written: list[list[list[int]]] = []

        def let_write(model: EvaluatedModel) -> None:
            texts = []
            for prompt in prompts:
                texts.append(greedy(model, prompt))
                tracker.advance()
            written.append(texts)

        let_write(teacher)
        del teacher
        student, _ = load_packed("packed", context.work.folder("pack"), context.device, context.recipe.threads, [])
        if student.tokenizer.get_vocab() != vocabulary:
            raise UserError("Teacher and student have different tokenizers.", "Pack the student again.")
        let_write(student)
    texts = zip(prompts, *written, strict=True)
    pairs = [side_by_side(student.tokenizer, prompt.ids, *both) for prompt, *both in texts]
    return Samples(fingerprint=fingerprint, engine="native" if student.is_native else "transformers", texts=pairs)


def prompts_of(rows: data.TokenRows, tokenizer: PreTrainedTokenizerBase) -> Iterator[Prompt]:
    """Beginnings of rows in their training order, which mixes the text; of each from its first new line on."""
    count = min(PROMPTS, len(rows)) if len(rows) else 0
    chosen = (rows.row(index) for index in range(count)) if count else itertools.islice(rows.in_order(PROMPTS), PROMPTS)
    for row in chosen:
        ids = row["input_ids"].tolist()
        yield beginning(ids, row["labels"].tolist(), first_line(ids, tokenizer))


def first_line(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the first line or text of a row begins that is not cut, if it leaves room for a prompt; else 0."""
    special = set(tokenizer.all_special_ids)
    for index in range(1, len(ids) - PROMPT_TOKENS):
        before = ids[index - 1]
        if before in special or tokenizer.decode([before]).endswith("\n"):
            return index - 1 if before == tokenizer.bos_token_id else index
    return 0


def side_by_side(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], teacher: list[int], student: list[int]
) -> SideBySide:
    """A prompt's tokens and those that both wrote, as texts."""

    words = [token for token in prompt if token < models.FIRST]

    def text_of(tokens: list[int]) -> str:
        """What tokens add to the prompt; characters that are cut, and what decoding puts before a text, left out."""
        whole, before = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (words + tokens, words))
        return whole.removeprefix(before) if whole.startswith(before) else str(tokenizer.decode(tokens))

    equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(teacher, student, strict=False)))
    return SideBySide(
        prompt=str(tokenizer.decode(words, skip_special_tokens=True)),
        teacher=text_of(teacher),
        student=text_of(student),
        equal_tokens=equal,
        tokens=len(student),
        teacher_loops=loops(teacher),
        student_loops=loops(student),
    )


def loops(tokens: list[int]) -> bool:
    """Whether the end of a text repeats itself with a short period."""
    end = tokens[-LOOP_TOKENS:]
    if len(end) < LOOP_TOKENS:
        return False
    return any(end[period:] == end[:-period] for period in range(1, LONGEST_PERIOD + 1))

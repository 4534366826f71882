"""Distilled data: let the teacher write what the student is to learn from.

The assistant's turns of conversations are written anew, texts are continued, and without prompts the teacher begins
by itself. Pictures of a folder are described, or asked about with the texts of a file. What comes out is a JSON lines
file, a source of a recipe like any other. EdgeRazor trains on such data (arXiv 2605.04062): what the teacher says
itself is what the student can learn from it most surely.

Rows are appended a batch at a time. A run that was interrupted goes on: the last batch in the file is written again,
since it may be torn, and becomes the same; those before it are kept. The file `OUT.json` beside it says how it was
made.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor import data, devices, models, untrusted
from edgerazor.calibration import generated_text
from edgerazor.console import Console
from edgerazor.data import Conversation
from edgerazor.errors import UserError, usage_error
from edgerazor.job import LoadedModel, RecipeContext, context_length
from edgerazor.packaging.native_teacher import native_teacher
from edgerazor.recipe import Recipe, Source
from edgerazor.workdir import alone, record_of, sweep, sync, sync_open, versions, write_json

#: What a picture is asked where no question is given.
DESCRIBE = "Describe the picture."
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class DataResult(BaseModel):
    """What the teacher wrote."""

    out: str
    model: str
    rows: int
    prompts: int
    tokens: int
    seconds: float
    seed: int
    temperature: float
    top_p: float
    top_k: int


class Written(BaseModel):
    """Where a file stands: its whole batches, their rows and tokens, and the bytes they take."""

    batches: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Prompts:
    """What the teacher writes from.

    Attributes:
        source: conversations or texts; None for none.
        images: a folder of pictures, each of which is asked about with every text of the source, or described.
        out: the file that is written; paths of pictures in it start from its folder.
    """

    source: Source | None
    images: Path | None
    out: Path

    def __iter__(self) -> Iterator[generated_text.Prompt]:
        """In order; without anything to begin from, as many empty ones as are taken."""
        if self.images is not None:
            return self._about_pictures(pictures_of(self.images))
        if self.source is None:
            return repeat(None)
        return (self._beside(prompt) for prompt in data.documents(self.source))

    def fingerprint(self) -> dict[str, str]:
        """Identity of all that is in it."""
        inputs = {"prompts": data.fingerprint([self.source]) if self.source else "none"}
        if self.images is not None:
            files = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in pictures_of(self.images)]
            inputs["images"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return inputs

    def _about_pictures(self, files: Sequence[Path]) -> Iterator[Conversation]:
        questions = [DESCRIBE] if self.source is None else [*data.documents(self.source)]
        if not questions or not all(isinstance(question, str) for question in questions):
            raise UserError(f"{self.source and self.source.file} must hold texts: questions about the pictures.")
        for file in files:
            for question in questions:
                picture = {"type": "image", "path": os.path.relpath(file, self.out.parent)}
                content = [picture, {"type": "text", "text": question}]
                yield data.parse_conversation(
                    f"The picture {file.name}", [{"role": "user", "content": content}], None, self.out.parent
                )

    def _beside(self, prompt: generated_text.Prompt) -> generated_text.Prompt:
        """A prompt whose paths of pictures start from the folder of what is written."""
        if not isinstance(prompt, Conversation) or not prompt.pictures:
            return prompt
        messages = []
        for message in prompt.messages:
            parts = [
                {**part, "path": os.path.relpath(prompt.folder / part["path"], self.out.parent)}
                if part.get("type") == "image" and "path" in part
                else part
                for part in message["content"]
            ]
            messages.append({**message, "content": parts})
        return replace(prompt, messages=tuple(messages), folder=self.out.parent)


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        UserError: there are none.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise usage_error(f"There are no pictures in {folder}.", f"Give a folder of files {', '.join(SUFFIXES)}.")
    return files


def run(
    recipe: Recipe,
    out: Path,
    prompts: Path | None,
    tokens: int | None,
    console: Console,
    force: bool = False,
    images: Path | None = None,
) -> DataResult:
    """Let the teacher write into a file, from where an earlier run left it.

    Args:
        recipe: names the teacher, the seed and how to sample.
        out: the JSON lines file.
        prompts: conversations or texts to begin from, each used once; None for none.
        tokens: stop when the teacher has written so many; None for all prompts, or where there are none for the
            recipe's `generated_tokens`.
        console: shows the progress.
        force: write again what another command wrote to this file.
        images: a folder of pictures to describe, or to ask the texts of `prompts` about.

    Raises:
        UserError: the file holds something else, there is nothing to write from, or another process is writing it.
    """
    context = RecipeContext(recipe, console)
    begun = Prompts(None if prompts is None else Source(file=str(prompts)), images, out.absolute())
    inputs = inputs_of(context, begun)
    limit = tokens if prompts or images or tokens else recipe.data.generated_tokens
    with alone(out):
        sweep(record_of(out))
        return _run(context, out, begun, inputs, limit, force)


def _run(
    context: RecipeContext, out: Path, begun: Prompts, inputs: dict[str, str], limit: int | None, force: bool
) -> DataResult:
    """As `run`, by the only writer of the file; `inputs` and `limit` are what its record will say."""
    recipe, console, device = context.recipe, context.console, context.device
    if not force and (finished := check_record(out, inputs, limit)):
        console.say(f"{out} is up to date, skipping (--force to write it again)")
        return finished
    if next(iter(begun), "") == "":
        raise UserError(
            f"There are no prompts in {begun.source and begun.source.file}; expected texts or conversations."
        )
    began = time.monotonic()
    teacher = context.load_teacher(device, devices.inference_dtype(device))
    writer = writer_of(context, teacher)
    if force:
        out.unlink(missing_ok=True)  # before the record: killed in between, its rows are nobody's
    written = Written() if force else whole_batches(out, recipe.sampling.batch_size)
    if written.batches:
        console.say(f"{out} has {written.rows:,} rows, and is gone on with")
    with native_teacher(teacher, context) as native, generated_text.written_with(writer, native) as fastest:
        engine = check_engine(out, written, "transformers" if native is None else "native, int8")
        write_json(record_of(out), {"settings": inputs, "engine": engine, "versions": versions()})
        prompts = append(fastest, out, begun, written, limit, console)
    result = DataResult(
        out=str(out),
        model=recipe.model,
        rows=written.rows,
        prompts=prompts,
        tokens=written.tokens,
        seconds=round(time.monotonic() - began, 1),
        seed=recipe.seed,
        temperature=recipe.sampling.temperature,
        top_p=recipe.sampling.top_p,
        top_k=recipe.sampling.top_k,
    )
    if not written.rows:
        raise UserError(
            f"{recipe.model} finished no answer within {recipe.sampling.answer_tokens} tokens.",
            "Allow longer ones with --answer-tokens.",
        )
    record = {"settings": inputs, "engine": engine, "versions": versions(), "wanted": limit}
    record["result"] = result.model_dump()
    write_json(record_of(out), record)
    return result


def writer_of(context: RecipeContext, teacher: LoadedModel) -> generated_text.Writer:
    """The teacher writing as the recipe's `sampling` section says.

    Raises:
        UserError: its chat template does not take the recipe's options.
    """
    recipe, tokenizer = context.recipe, teacher.tokenizer
    data.check_options(tokenizer, recipe.data.template_kwargs)
    options = {**data.thinking_options(tokenizer, recipe.sampling.thinking), **recipe.data.template_kwargs}
    length = context_length(teacher.model)
    processor = None
    if models.sees(teacher.model.config) and models.has_processor(context.teacher_folder):
        processor = models.load_processor(context.teacher_folder)
    return generated_text.Writer(teacher.model, tokenizer, recipe.sampling, recipe.seed, length, options, processor)


def append(
    writer: generated_text.Writer,
    out: Path,
    begun: Prompts,
    written: Written,
    limit: int | None,
    console: Console,
) -> int:
    """Write batch after batch until there is enough; `written` counts on. Returns the prompts used so far."""
    size = writer.sampling.batch_size
    number = written.batches * size
    with open(out, "ab") as file, console.track("the teacher writes", limit or 0, written.tokens) as tracker:
        file.truncate(written.bytes)
        if limit is not None and written.tokens >= limit:
            return number
        for batch in writer.batches(iter(begun), written.batches):
            for row in batch:
                if row.record is not None:
                    line = {**row.record, "prompt": number, "tokens": row.tokens}
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    written.rows += 1
                    written.tokens += row.tokens
                number += 1
            file.flush()
            sync_open(file.fileno())
            tracker.note(f"{written.rows:,} rows")
            tracker.advance(sum(row.tokens for row in batch if row.record is not None))
            if limit is not None and written.tokens >= limit:
                break
            if begun.source is None and begun.images is None and written.tokens < 2 * number:
                raise UserError(f"{writer.teacher.name_or_path} writes no text by itself.", "Give it --prompts FILE.")
    sync(out)
    return number


def whole_batches(out: Path, size: int) -> Written:
    """What a file holds, without its last batch, which may be torn."""
    whole = before = Written()
    if not out.exists():
        return whole
    place = 0
    with open(out, "rb") as file:
        for line in file:
            try:
                row = untrusted.parse_json(line, dict)
                batch, tokens = int(row["prompt"]) // size, int(row["tokens"])
            except (ValueError, KeyError, TypeError):
                break
            if batch != whole.batches or place == 0:
                before = whole.model_copy(update={"batches": batch, "bytes": place})
            place += len(line)
            whole = Written(batches=batch, rows=whole.rows + 1, tokens=whole.tokens + tokens, bytes=place)
    return before


# --- how it was made ---------------------------------------------------------------------------


def inputs_of(context: RecipeContext, begun: Prompts) -> dict[str, str]:
    """What the rows depend on."""
    return {
        "model": context.teacher_fingerprint,
        **begun.fingerprint(),
        "seed": str(context.recipe.seed),
        **context.section_inputs("sampling"),
        **context.text_inputs,
    }


def check_record(out: Path, inputs: dict[str, str], limit: int | None) -> DataResult | None:
    """The result of an earlier run that wrote just this, and enough of it.

    Raises:
        UserError: the file was written otherwise, or by somebody else.
    """
    if not out.exists():
        return None
    try:
        record: dict[str, Any] = untrusted.load_json(record_of(out))
        stored = dict(record["settings"])
        result = DataResult.model_validate(record["result"]) if "result" in record else None
        record.setdefault("wanted")
    except (OSError, ValueError, KeyError, TypeError):
        raise usage_error(
            f"{out} exists, and there is no record that this command wrote it.", "Name another file with --out."
        ) from None
    for name, value in inputs.items():
        if stored.get(name) != value:
            short = [text[:12] if len(text) == 64 else text for text in map(str, (stored.get(name), value))]
            raise UserError(
                f"{out} was written otherwise: {name.removeprefix('sampling.')} was {short[0]}, and is {short[1]} now.",
                "Name another file with --out, or write it again with --force.",
            )
    enough = result is not None and (record["wanted"] is None or (limit is not None and result.tokens >= limit))
    return result if enough else None


def check_engine(out: Path, written: Written, engine: str) -> str:
    """The engine that writes a file; another one than has begun it would go on with other texts.

    Raises:
        UserError: the file was begun with another one.
    """
    if not written.batches:
        return engine
    try:
        before = untrusted.load_json(record_of(out)).get("engine", "transformers")
    except (OSError, ValueError, AttributeError):
        return engine
    if before != engine:
        raise UserError(
            f"{out} was begun with the engine {str(before)[:50]}, and {engine} would go on with it.",
            "Name another file with --out, or write it again with --force.",
        )
    return engine


def show(result: DataResult) -> list[RenderableType]:
    """The result, for people."""
    left = result.prompts - result.rows
    dropped = f"; {left:,} prompts gave no finished answer" if left else ""
    written = f"{result.rows:,} rows, {result.tokens:,} tokens written by {result.model} in {result.seconds:g} s"
    return [f"{result.out}: {written}{dropped}"]

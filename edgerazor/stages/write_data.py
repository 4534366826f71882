"""Distilled data: let the teacher write what the student is to learn from.

The assistant's turns of conversations are written anew, texts are continued, and without prompts the teacher begins
by itself. What comes out is a JSON lines file, a source of a recipe like any other. EdgeRazor trains on such data
(arXiv 2605.04062): what the teacher says itself is what the student can learn from it most surely.

Rows are appended a batch at a time. A run that was interrupted goes on: the last batch in the file is written again,
since it may be torn, and becomes the same; those before it are kept. The file `OUT.json` beside it says how it was
made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import RenderableType

from edgerazor import data, devices, untrusted
from edgerazor.calibration import generated_text
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.job import LoadedModel, RecipeContext, context_length
from edgerazor.packaging.native_teacher import native_teacher
from edgerazor.recipe import Recipe, Source
from edgerazor.workdir import alone, record_of, sweep, sync, sync_open, versions, write_json


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


def run(
    recipe: Recipe, out: Path, prompts: Path | None, tokens: int | None, console: Console, force: bool = False
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

    Raises:
        UserError: the file holds something else, there is nothing to write from, or another process is writing it.
    """
    context = RecipeContext(recipe, console)
    source = None if prompts is None else Source(file=str(prompts))
    inputs = inputs_of(context, source)
    limit = tokens if source or tokens else recipe.data.generated_tokens
    with alone(out):
        sweep(record_of(out))
        return _run(context, out, source, inputs, limit, force)


def _run(
    context: RecipeContext, out: Path, source: Source | None, inputs: dict[str, str], limit: int | None, force: bool
) -> DataResult:
    """As `run`, by the only writer of the file; `inputs` and `limit` are what its record will say."""
    recipe, console, device = context.recipe, context.console, context.device
    if not force and (finished := check_record(out, inputs, limit)):
        console.say(f"{out} is up to date, skipping (--force to write it again)")
        return finished
    first = next(begin_from(source), "") if source else None
    if first == "":
        raise UserError(f"There are no prompts in {source and source.file}; expected texts or conversations.")
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
        prompts = append(fastest, out, source, written, limit, console)
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
    return generated_text.Writer(teacher.model, tokenizer, recipe.sampling, recipe.seed, length, options)


def begin_from(source: Source | None) -> Iterator[generated_text.Prompt]:
    """The prompts in order; without a source, as many empty ones as are asked for."""
    return repeat(None) if source is None else iter(data.documents(source))


def append(
    writer: generated_text.Writer,
    out: Path,
    source: Source | None,
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
        for batch in writer.batches(begin_from(source), written.batches):
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
            if source is None and written.tokens < 2 * number:
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


def inputs_of(context: RecipeContext, source: Source | None) -> dict[str, str]:
    """What the rows depend on."""
    return {
        "model": context.teacher_fingerprint,
        "prompts": data.fingerprint([source]) if source else "none",
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

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

from edgerazor import data, job, untrusted
from edgerazor.calibration import generated_text
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
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
    source = None if prompts is None else Source(file=str(prompts))
    asked = settings(recipe, source)
    wanted = tokens if source or tokens else recipe.data.generated_tokens
    with alone(out):
        sweep(record_of(out))
        return _run(recipe, out, source, asked, wanted, console, force)


def _run(
    recipe: Recipe,
    out: Path,
    source: Source | None,
    asked: dict[str, str],
    wanted: int | None,
    console: Console,
    force: bool,
) -> DataResult:
    """The same as the only writer of the file; `asked` and `wanted` are what its record will say."""
    device = job.device_of(recipe)
    if not force and (finished := check_record(out, asked, wanted)):
        console.say(f"{out} is up to date, skipping (--force to write it again)")
        return finished
    first = next(begin_from(source), "") if source else None
    if first == "":
        raise UserError(f"There are no prompts in {source and source.file}; expected texts or conversations.")
    began = time.monotonic()
    teacher, tokenizer = job.load_teacher(recipe, device, job.reading_dtype(device))
    context = job.context(teacher)
    data.check_options(tokenizer, recipe.data.template_kwargs)
    options = {**data.thinking_options(tokenizer, recipe.sampling.thinking), **recipe.data.template_kwargs}
    writer = generated_text.Writer(teacher, tokenizer, recipe.sampling, recipe.seed, context, options)
    if force:
        out.unlink(missing_ok=True)  # before the record: killed in between, its rows are nobody's
    done = Written() if force else whole_batches(out, recipe.sampling.batch_size)
    if done.batches:
        console.say(f"{out} has {done.rows:,} rows, and is gone on with")
    write_json(record_of(out), {"settings": asked, "versions": versions()})
    count = append(writer, out, source, done, wanted, console)
    result = DataResult(
        out=str(out),
        model=recipe.model,
        rows=done.rows,
        prompts=count,
        tokens=done.tokens,
        seconds=round(time.monotonic() - began, 1),
        seed=recipe.seed,
        temperature=recipe.sampling.temperature,
        top_p=recipe.sampling.top_p,
        top_k=recipe.sampling.top_k,
    )
    if not done.rows:
        raise UserError(
            f"{recipe.model} finished no answer within {recipe.sampling.answer_tokens} tokens.",
            "Allow longer ones with --answer-tokens.",
        )
    finished_record = {"settings": asked, "versions": versions(), "wanted": wanted, "result": result.model_dump()}
    write_json(record_of(out), finished_record)
    return result


def begin_from(source: Source | None) -> Iterator[generated_text.Prompt]:
    """The prompts in order; without a source, as many empty ones as are asked for."""
    return repeat(None) if source is None else iter(data.documents(source))


def append(
    writer: generated_text.Writer, out: Path, source: Source | None, done: Written, wanted: int | None, console: Console
) -> int:
    """Write batch after batch until there is enough; `done` counts on. Returns the prompts used so far."""
    size = writer.sampling.batch_size
    number = done.batches * size
    with open(out, "ab") as file, console.track("the teacher writes", wanted or 0, done.tokens) as tracker:
        file.truncate(done.bytes)
        if wanted is not None and done.tokens >= wanted:
            return number
        for batch in writer.batches(begin_from(source), done.batches):
            for row in batch:
                if row.record is not None:
                    line = {**row.record, "prompt": number, "tokens": row.tokens}
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    done.rows += 1
                    done.tokens += row.tokens
                number += 1
            file.flush()
            sync_open(file.fileno())
            tracker.note(f"{done.rows:,} rows")
            tracker.advance(sum(row.tokens for row in batch if row.record is not None))
            if wanted is not None and done.tokens >= wanted:
                break
            if source is None and done.tokens < 2 * number:
                raise UserError(f"{writer.teacher.name_or_path} writes no text by itself.", "Give it --prompts FILE.")
    sync(out)
    return number


def whole_batches(out: Path, size: int) -> Written:
    """What a file holds, without its last batch, which may be torn."""
    done = before = Written()
    if not out.exists():
        return done
    place = 0
    with open(out, "rb") as file:
        for line in file:
            try:
                row = untrusted.parse_json(line, dict)
                batch, tokens = int(row["prompt"]) // size, int(row["tokens"])
            except (ValueError, KeyError, TypeError):
                break
            if batch != done.batches or place == 0:
                before = done.model_copy(update={"batches": batch, "bytes": place})
            place += len(line)
            done = Written(batches=batch, rows=done.rows + 1, tokens=done.tokens + tokens, bytes=place)
    return before


# --- how it was made ---------------------------------------------------------------------------


def settings(recipe: Recipe, source: Source | None) -> dict[str, str]:
    """What the rows depend on."""
    return {
        "model": job.teacher_fingerprint(recipe),
        "prompts": data.fingerprint([source]) if source else "none",
        "seed": str(recipe.seed),
        **job.settings("sampling", recipe.sampling),
        **job.text_settings(recipe),
    }


def check_record(out: Path, asked: dict[str, str], wanted: int | None) -> DataResult | None:
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
    for name, value in asked.items():
        if stored.get(name) != value:
            short = [str(each)[:12] if len(str(each)) == 64 else str(each) for each in (stored.get(name), value)]
            raise UserError(
                f"{out} was written otherwise: {name.removeprefix('sampling.')} was {short[0]}, and is {short[1]} now.",
                "Name another file with --out, or write it again with --force.",
            )
    enough = result is not None and (record["wanted"] is None or (wanted is not None and result.tokens >= wanted))
    return result if enough else None


def show(result: DataResult) -> list[RenderableType]:
    """The result, for people."""
    left = result.prompts - result.rows
    dropped = f"; {left:,} prompts gave no finished answer" if left else ""
    made = f"{result.rows:,} rows, {result.tokens:,} tokens written by {result.model} in {result.seconds:g} s"
    return [f"{result.out}: {made}{dropped}"]

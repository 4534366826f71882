"""Record a teacher: what the losses need of its outputs at every position of a text, so that trainings do without it.

The teacher reads each sequence once. Of each of its distributions a few tokens are kept (`recording/sampling.py`), with
the entropy and what it gives to the token of the text, and, if asked for, hidden states in 8 bits. Held-out sequences
are recorded first, with so many tokens that the KL divergence of a student is known to the fourth digit.

What is written depends on teacher, text, settings and seed alone: chance is a function of the seed and the sequence. A
shard is written when it is complete, so a run that was killed goes on with the first one that is not there and comes to
the same bytes; one that is damaged is made again. Several processes of a launcher make a shard each at a time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from rich.console import RenderableType
from torch import Tensor

from edgerazor import devices, models, recording
from edgerazor.console import is_main_process, megabytes, table
from edgerazor.data import Batch, TokenRows
from edgerazor.errors import INTERRUPTED, UserError, usage_error
from edgerazor.job import JobContext
from edgerazor.losses import prediction_mask
from edgerazor.recording import EVERYTHING, HELD_OUT, TRAINING, Description, Fields, Layout, Part, Shard, ShardRecord
from edgerazor.report.recording_summary import table_of_parts
from edgerazor.training import (
    Captures,
    Teacher,
    TeacherEnsemble,
    cost_of,
    fitting_inputs,
    forward_seconds,
    load_further_teachers,
    measure_machine,
    teacher_outlines,
    training_dtype,
)
from edgerazor.workdir import alone, hash_file, make_folder, versions, write_json

#: Logits that are computed together, and those that tokens are chosen from together, in elements.
CHUNK_ELEMENTS, BLOCK_ELEMENTS = 1 << 25, 1 << 20
#: Bytes of a position where nobody says how many tokens to keep: below 150 with the index of its sequence.
POSITION_BYTES = 148
#: Names of files that are being written.
TEMPORARY = re.compile(r"\.(recording\.json|(training|held-out)-[0-9]+\.safetensors)\.[0-9a-f]{8}\.tmp")


class RecordResult(BaseModel):
    """What was recorded. `seconds` are those of this run, which may have gone on from an earlier one."""

    folder: str
    model: str
    method: str
    draws: int
    covers: str
    hidden_layers: list[int]
    sequences: int
    tokens: int
    bytes: int
    bytes_per_token: float
    held_out_sequences: int
    held_out_tokens: int
    held_out_bytes: int
    fingerprint: str
    seconds: float


class RecordDryRun(BaseModel):
    """What would be recorded."""

    method: str
    draws: int
    covers: str
    sequences: int
    tokens: int
    bytes_per_token: float
    held_out_sequences: int
    memory_bytes: int
    result_bytes: int
    seconds: float


def run(context: JobContext, out: Path, force: bool = False) -> RecordResult:
    """Record into a folder, from where an earlier run left it.

    Args:
        context: of a job, whose recipe names the teacher, the text, the seed and what to keep; without a text of its
            own, what the teacher wrote into the working directory counts.
        out: the folder of the recording.
        force: throw away another recording that is there.

    Raises:
        UserError: there is something else in the folder, no text, another process is recording there, or interrupted.
    """
    began = time.monotonic()
    description = description_of(context)
    refuse_other(out, description, force)
    devices.join_processes(context.device)
    devices.wait_for_everyone()  # all of them have looked
    with alone(out) if is_main_process() else nullcontext():
        if is_main_process():
            prepare_folder(out, description, force)
        devices.wait_for_everyone()
        try:
            done = Recorder(context, out, description).record()
        except KeyboardInterrupt:
            raise UserError(
                "Interrupted; the files that were finished are kept.",
                "The same command goes on from there.",
                INTERRUPTED,
            ) from None
        if is_main_process():
            write_json(out / recording.FILE, done.model_dump(mode="json"))
    return result_of(done, out, context.recipe.model, time.monotonic() - began)


def result_of(done: Description, out: Path, model: str, seconds: float) -> RecordResult:
    """What a finished recording holds."""
    training, held_out = done.training, done.held_out
    return RecordResult(
        folder=str(out),
        model=model,
        method=training.method,
        draws=training.tokens,
        covers=done.covers,
        hidden_layers=list(training.hidden_layers),
        sequences=training.sequences,
        tokens=training.positions,
        bytes=training.bytes,
        bytes_per_token=round(training.bytes / max(training.positions, 1), 1),
        held_out_sequences=held_out.sequences,
        held_out_tokens=held_out.positions,
        held_out_bytes=held_out.bytes,
        fingerprint=done.fingerprint(),
        seconds=round(seconds, 1),
    )


def description_of(context: JobContext) -> Description:
    """What is to be recorded, as far as the recipe and the teacher's configuration say it; nothing is complete yet.

    Raises:
        UserError: there is no text, or no such layer.
    """
    recipe, settings = context.recipe, context.recipe.record
    outlines = teacher_outlines(context)
    length = min(context.sequence_length(model) for model in outlines)
    structure = context.teacher_outline.structure
    if highest := max((layer for layer in settings.hidden_layers if layer > structure.layer_count), default=0):
        raise usage_error(f"There is no layer {highest}: {recipe.model} has {structure.layer_count} layers.")
    if settings.tokens is None and any(source.streaming for source in recipe.data.train):
        raise usage_error(
            "A streamed data set has no end, so all of it cannot be recorded.", "Say how much with --tokens 20M."
        )
    vocab_size = min(int(model.get_submodule(models.find_head(model)).weight.shape[0]) for model in outlines)
    inputs = fitting_inputs(context, length) | {
        "seed": str(recipe.seed),
        "precision": str(training_dtype(recipe.distill, context.device)),
    }
    common = {"power": settings.power, "method": settings.method}
    wanted = settings.draws or recording.tokens_within(vocab_size, POSITION_BYTES)
    draws, held_out_draws = (min(count, vocab_size) for count in (wanted, settings.held_out_draws))
    return Description(
        complete=False,
        covers=EVERYTHING if settings.tokens is None else f"seed {recipe.seed}",
        inputs=inputs,
        vocab_size=vocab_size,
        hidden_size=structure.embedding.columns,
        training=Part(tokens=draws, temperature=settings.temperature, hidden_layers=settings.hidden_layers, **common),
        # evaluations are unbiased, and compare at temperature 1
        held_out=Part(tokens=held_out_draws, temperature=1.0, power=1.0, method="sample"),
        versions=versions(),
    )


# --- the folder --------------------------------------------------------------------------------


def refuse_other(out: Path, description: Description, force: bool) -> None:
    """Refuse a folder that holds something else.

    Raises:
        UserError: files of somebody else, or a recording of something else that `force` does not give up.
    """
    if not out.exists() or (out.is_dir() and all(TEMPORARY.fullmatch(file.name) for file in out.iterdir())):
        return
    if not out.is_dir() or not (out / recording.FILE).is_file():
        raise usage_error(f"{out} exists, and `edgerazor record` did not make it.", "Name another folder with --out.")
    if force:
        return
    stored = recording.read_description(out)
    for what, before, now in differences(stored, description):
        raise UserError(
            f"{out} holds another recording: {what} was {recording.shortened(before)}, and is "
            f"{recording.shortened(now)} now.",
            "Name another folder with --out, or record again with --force.",
        )


def prepare_folder(out: Path, description: Description, force: bool) -> None:
    """Make the folder, without what a run that was killed left half done."""
    if force:
        discard(out)
    make_folder(out)
    for file in out.iterdir():
        if TEMPORARY.fullmatch(file.name):
            file.unlink(missing_ok=True)
    if not (out / recording.FILE).exists():
        write_json(out / recording.FILE, description.model_dump(mode="json"))


def differences(stored: Description, wanted: Description) -> Iterator[tuple[str, str, str]]:
    """Name, value before and value now of what is not the same."""
    for name in sorted(stored.inputs.keys() | wanted.inputs.keys()):
        before, now = (inputs.get(name, "absent") for inputs in (stored.inputs, wanted.inputs))
        if before != now:
            yield name, before, now
    for prefix, part, other in (
        ("", stored.training, wanted.training),
        ("held_out ", stored.held_out, wanted.held_out),
    ):
        for name in ("method", "tokens", "power", "temperature", "hidden_layers"):
            before, now = (str(getattr(one, name)) for one in (part, other))
            if before != now:
                yield prefix + ("draws" if name == "tokens" else name), before, now
    if stored.format != wanted.format:
        yield "the format of its files", str(stored.format), str(wanted.format)
    if stored.covers != wanted.covers:
        yield "what it covers", stored.covers, wanted.covers
    if (stored.vocab_size, stored.hidden_size) != (wanted.vocab_size, wanted.hidden_size):
        yield "the model's size", str(stored.vocab_size), str(wanted.vocab_size)


def discard(out: Path) -> None:
    """Remove the files of a recording, and nothing else."""
    for name in (recording.FILE, f"{TRAINING}-*.safetensors", f"{HELD_OUT}-*.safetensors"):
        for file in out.glob(name):
            file.unlink(missing_ok=True)


# --- recording ---------------------------------------------------------------------------------


class ShardOfRows(NamedTuple):
    """What is said of a shard, and the keys of its sequences."""

    record: ShardRecord
    keys: list[bytes]

    @classmethod
    def of(cls, shard: Shard) -> ShardOfRows:
        return cls(record_of(shard), [shard.key(row) for row in range(len(shard))])


@dataclass
class Recorder:
    """One recording in the making.

    Attributes:
        context: of the job.
        out: the folder.
        description: of what is to be there.
    """

    context: JobContext
    out: Path
    description: Description

    @cached_property
    def rows(self) -> tuple[TokenRows, TokenRows]:
        """The rows to train on, and the held-out ones."""
        return open_rows(self.context)

    @cached_property
    def teachers(self) -> TeacherEnsemble:
        """The teachers, loaded when the first shard is to be made."""
        recipe, device = self.context.recipe, self.context.device
        dtype = training_dtype(recipe.distill, device)
        loaded = self.context.load_teacher(device, dtype)
        head_path = loaded.structure.head_path
        teacher = Teacher(loaded.model, loaded.structure, head_path, models.logit_shape(loaded.model, head_path))
        others = load_further_teachers(recipe.distill.teachers, recipe.trust_remote_code, device, dtype)
        return TeacherEnsemble((teacher, *others), recipe.distill.teacher_average)

    def record(self) -> Description:
        """Record what is not there yet; returns what is there then."""
        rows, held_out = self.rows
        settings = self.context.recipe.record
        held_out_rows = distinct(held_out.in_order(settings.held_out_sequences))
        parts = {
            "held_out": self.record_part(HELD_OUT, held_out_rows, settings.held_out_sequences),
            "training": self.record_part(
                TRAINING, training_rows(rows, settings.tokens), sequences_of(rows, settings.tokens)
            ),
        }
        return self.description.model_copy(update={"complete": True, **parts})

    def record_part(self, name: str, rows: Iterator[Batch], total: int) -> Part:
        """Record some rows, shard by shard; of several processes, each makes every so manieth shard.

        Args:
            name: of the part.
            rows: in their order, none of them twice.
            total: about how many there are, for the progress.
        """
        layout, size = self.description.layout(name), self.rows[0].length
        per_shard = max(1, self.context.recipe.record.shard_bytes // (layout.position_bytes * size))
        count, made = 0, dict[int, ShardOfRows]()
        with self.context.console.track(f"record {name}", total) as tracker:
            while some := list(islice(rows, per_shard)):
                if count % devices.process_count() == devices.process_index():
                    made[count] = ShardOfRows.of(self.shard(name, count, some))
                    tracker.note(f"{sum(shard.record.bytes for shard in made.values()) / 1e6:,.0f} MB")
                count += 1
                tracker.advance(len(some))
        for others in devices.all_values(made):
            made |= others
        shards = [made[number] for number in range(count)]
        if is_main_process():
            shards += self.further_shards(name, count)
        keys = [key for shard in shards for key in shard.keys]
        records = tuple(shard.record for shard in shards)
        update = {"order": recording.order_digest(keys), "shards": records}
        return devices.of_main_process(self.description.part(name).model_copy(update=update))

    def path(self, name: str, number: int) -> Path:
        """Of a shard of a part."""
        return self.out / f"{name}-{number:05d}.safetensors"

    def shard(self, name: str, number: int, rows: Sequence[Batch]) -> Shard:
        """A shard of a part, as it is there, or made of its rows."""
        path, layout, identity = self.path(name, number), self.description.layout(name), self.description.identity(name)
        wanted = [recording.sequence_key(row["input_ids"], row["labels"]) for row in rows]
        shard = self.stored(path, name, wanted)
        if shard is None:
            sequences = list(zip(wanted, self.outputs(name, wanted, rows), strict=True))
            recording.write_shard(path, sequences, layout, identity)
            shard = Shard(path, layout, identity)
        return shard

    def further_shards(self, name: str, number: int) -> Iterator[ShardOfRows]:
        """Shards of a larger --tokens before, from this number on."""
        while (path := self.path(name, number)).exists():
            shard = self.stored(path, name, [])
            if shard is None:
                path.unlink()
                return
            yield ShardOfRows.of(shard)
            number += 1

    def stored(self, path: Path, name: str, keys: Sequence[bytes]) -> Shard | None:
        """A shard that is there, whole, and begins with these sequences."""
        if not path.exists():
            return None
        with suppress(UserError):
            shard = Shard(path, self.description.layout(name), self.description.identity(name))
            shard.verify()
            if [shard.key(row) for row in range(min(len(shard), len(keys)))] == list(keys):
                return shard
        return None

    def outputs(self, name: str, keys: Sequence[bytes], rows: Sequence[Batch]) -> list[Fields]:
        """What is kept of each of some rows; those of like length are computed together."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        batches = self.rows[0].batches([rows[index] for index in order], self.context.recipe.record.batch_size)
        numbers = iter(order)
        fields: dict[int, Fields] = {}
        for batch in batches:
            places = list(islice(numbers, len(batch["labels"])))
            for place, kept_fields in zip(
                places, self.batch_fields(name, [keys[p] for p in places], batch), strict=True
            ):
                fields[place] = kept_fields
        return [fields[index] for index in range(len(rows))]

    def batch_fields(self, name: str, keys: Sequence[bytes], batch: Batch) -> list[Fields]:
        """What is kept of each sequence of a batch: `input_ids` and `labels`, `[B, T]` int64."""
        part, device = self.description.part(name), self.context.device
        batch = {key: value.to(device) for key, value in batch.items()}
        target = self.teachers.outputs(batch, Captures(hidden_layers=part.hidden_layers))
        assert target is not None
        mask = prediction_mask(batch["labels"])
        positions, counts = mask.flatten().nonzero().flatten(), mask.sum(1).tolist()
        next_tokens = batch["labels"].roll(-1, 1).flatten()[positions]
        seed = self.context.recipe.seed
        chances = [recording.random_numbers(key, seed, count) for key, count in zip(keys, counts, strict=True)]
        uniform = torch.from_numpy(np.concatenate(chances)).to(device)
        layout, pieces, begin = self.description.layout(name), [], 0
        vocab_size = layout.vocab_size
        for chunk in positions.split(max(1, CHUNK_ELEMENTS // vocab_size)):
            logits = target.logits(chunk)[:, :vocab_size].float()
            for block in torch.arange(len(chunk), device=device).split(max(1, BLOCK_ELEMENTS // vocab_size)):
                at = slice(begin + int(block[0]), begin + int(block[-1]) + 1)
                pieces.append(token_fields(logits[block], next_tokens[at], uniform[at], part, layout))
            begin += len(chunk)
        columns = layout.columns()
        whole = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        for layer in part.hidden_layers:
            levels, scales = recording.encode_states(target.hidden_states[layer][mask].float().cpu().numpy())
            whole |= {f"hidden.{layer}": levels, f"hidden.{layer}.scale": scales}
        whole = {key: values.astype(columns[key][0], copy=False) for key, values in whole.items()}
        ends = np.cumsum(counts)[:-1]
        split = {key: np.split(values, ends) for key, values in whole.items()}
        return [{key: values[number] for key, values in split.items()} for number in range(len(counts))]


def token_fields(logits: Tensor, next_tokens: Tensor, uniform: Tensor, part: Part, layout: Layout) -> Fields:
    """What is kept of the distributions of some positions, but for their hidden states.

    Args:
        logits: float32 `[n, V]`.
        next_tokens: int64 `[n]`, the tokens of the text.
        uniform: float64 `[n]`, from 0 to below 1.
        part: says which tokens are kept.
        layout: says how.

    Raises:
        UserError: the teacher's output is not finite.
    """
    own = torch.log_softmax(logits, dim=1)
    entropy = -torch.linalg.vecdot(own.exp(), own)
    if not bool(torch.isfinite(entropy).all()):
        raise UserError(
            "The teacher's output is not finite.", "Record with `distill.precision: float32` in the recipe."
        )
    log_probs = own if part.temperature == 1.0 else torch.log_softmax(logits / part.temperature, dim=1)
    if part.method == "sample":
        sample = recording.sample_tokens(log_probs, part.tokens, part.power, uniform)
    else:
        sample = recording.top_tokens(log_probs, part.tokens)
    # the last digits of what chose the tokens are as random as all of it
    chance = uniform.cpu().numpy() * 2**24 % 1
    return {
        **layout.encode(sample.ids.cpu().numpy(), sample.log_probs.cpu().numpy(), chance),
        "certain": sample.certain.cpu().numpy(),
        "tail": sample.tail.cpu().numpy(),
        "scale": sample.scale.cpu().numpy(),
        "entropy": entropy.cpu().numpy(),
        "target": own.gather(1, next_tokens[:, None])[:, 0].cpu().numpy(),
    }


def record_of(shard: Shard) -> ShardRecord:
    """What the description says of a file."""
    path = shard.path
    return ShardRecord(
        file=path.name,
        sequences=len(shard),
        positions=shard.positions,
        bytes=path.stat().st_size,
        sha256=hash_file(path),
    )


# --- which sequences ---------------------------------------------------------------------------


def open_rows(context: JobContext) -> tuple[TokenRows, TokenRows]:
    """The rows to train on, and the held-out ones, as `distill` will have them."""
    tokenizer = models.load_tokenizer(context.teacher_folder, context.recipe.trust_remote_code)
    outlines = teacher_outlines(context)
    length = min(context.sequence_length(model) for model in outlines)
    return context.open_text(tokenizer, length, context.sequence_length(outlines[0]))


def training_rows(rows: TokenRows, tokens: int | None) -> Iterator[Batch]:
    """All rows as they stand in the text; or the first so many tokens of them in the training order."""
    if tokens is None:
        yield from distinct(rows.in_order())
        return
    yield from distinct(rows.row(index) for index in range(rows_for(rows, tokens)))


def rows_for(rows: TokenRows, tokens: int) -> int:
    """How many rows of the training order take so many tokens."""
    return max(1, -(-tokens // max(1, round(rows.tokens_per_row))))


def sequences_of(rows: TokenRows, tokens: int | None) -> int:
    """About how many sequences will be recorded."""
    count = rows_for(rows, tokens) if tokens else len(rows)
    return min(count, len(rows)) if len(rows) else count


def distinct(rows: Iterable[Batch]) -> Iterator[Batch]:
    """The rows but for those that say what an earlier one said."""
    known: set[bytes] = set()
    for row in rows:
        key = recording.sequence_key(row["input_ids"], row["labels"])
        if key not in known:
            known.add(key)
            yield row


# --- dry run, and what people see --------------------------------------------------------------


def dry_run(context: JobContext, out: Path, force: bool = False) -> RecordDryRun:
    """What would be recorded, and about how long it would take; nothing is written.

    Raises:
        UserError: it would be refused.
    """
    recipe = context.recipe
    description, settings = description_of(context), recipe.record
    refuse_other(out, description, force)
    rows, held_out = open_rows(context)
    sequences = sequences_of(rows, settings.tokens)
    tokens = round(sequences * (rows.tokens / len(rows) if len(rows) else rows.tokens_per_row))
    held_out_sequences = min(settings.held_out_sequences, len(held_out))
    held_out_tokens = held_out_sequences * rows.length
    outline, dtype = context.teacher_outline, training_dtype(recipe.distill, context.device)
    machine = measure_machine(context.device, dtype)
    cost = cost_of(outline.structure, rows.length)
    sizes = {name: description.layout(name).position_bytes for name in (TRAINING, HELD_OUT)}
    weights = sum(weight.numel() for model in teacher_outlines(context) for weight in model.parameters())
    logits = min(CHUNK_ELEMENTS, settings.batch_size * rows.length * description.vocab_size) * 4
    return RecordDryRun(
        method=settings.method,
        draws=description.training.tokens,
        covers=description.covers,
        sequences=sequences,
        tokens=tokens,
        bytes_per_token=sizes[TRAINING],
        held_out_sequences=held_out_sequences,
        memory_bytes=weights * dtype.itemsize + 3 * logits + 2 * settings.shard_bytes,
        result_bytes=tokens * sizes[TRAINING] + held_out_tokens * sizes[HELD_OUT],
        seconds=float(f"{forward_seconds(cost, machine, tokens + held_out_tokens):.3g}"),
    )


def show(result: RecordResult) -> list[RenderableType]:
    """The result, for people."""
    layers = f"; hidden states of layers {', '.join(map(str, result.hidden_layers))}" if result.hidden_layers else ""
    what = "each sequence of the text" if result.covers == EVERYTHING else f"in the training order of {result.covers}"
    return [
        table(
            f"Recording {result.folder} of {result.model}",
            ["part", "sequences", "tokens", "size", "bytes a token"],
            table_of_parts(
                (result.sequences, result.tokens, result.bytes),
                (result.held_out_sequences, result.held_out_tokens, result.held_out_bytes),
            ),
            caption=f"{result.method}, {result.draws} tokens of each distribution, {what}{layers}; "
            f"{megabytes(result.bytes + result.held_out_bytes)} in {result.seconds:g} s",
        )
    ]

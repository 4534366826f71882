"""A teacher that was recorded: its outputs come out of a folder, and the model itself is never loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgerazor import calibrated, data, models, recording
from edgerazor.errors import UserError, usage_error
from edgerazor.job import JobContext
from edgerazor.losses import LogitLoss, Outputs, RecordedTokens, prediction_mask
from edgerazor.models import PreTrainedModel
from edgerazor.recording import EVERYTHING, Fields, Layout, Part, RecordedPart, Recording
from edgerazor.training import objective
from edgerazor.training.captured_states import Captures
from edgerazor.training.objective import Terms
from edgerazor.training.phase_schedule import make_phases
from edgerazor.training.teachers import TeacherSource
from edgerazor.workdir import hash_folder

#: Files of a model folder that decide what text becomes.
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
)


@dataclass(frozen=True)
class RecordedTeacher(TeacherSource):
    """The teachers of a recording.

    Attributes:
        recording: opened.
        device: of the tensors that the losses get.
    """

    recording: Recording
    device: torch.device

    def outputs(self, batch: data.Batch, needed: Captures, held_out: bool = False) -> Outputs:
        """See `TeacherSource`.

        Raises:
            UserError: a sequence was not recorded, or is damaged.
        """
        part = self.recording.held_out if held_out else self.recording.training
        sequences = self._sequences(part, batch)
        shape = batch["labels"].shape
        tokens = recorded_tokens(part.settings, part.layout, sequences, self.device)
        states = {layer: self._states(sequences, batch, layer) for layer in needed.hidden_layers}
        return Outputs(torch.empty(*shape, 0, device=self.device), states, recorded=tokens)

    def hidden_states(self, batches: Sequence[data.Batch], layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """See `TeacherSource`."""
        for batch in batches:
            sequences = self._sequences(self.recording.training, batch)
            yield {layer: self._states(sequences, batch, layer) for layer in layers}

    def _sequences(self, part: RecordedPart, batch: data.Batch) -> list[Fields]:
        rows = zip(batch["input_ids"].cpu(), batch["labels"].cpu(), strict=True)
        return [part.sequence(recording.sequence_key(ids, labels)) for ids, labels in rows]

    def _states(self, sequences: Sequence[Fields], batch: data.Batch, layer: int) -> Tensor:
        """`[B, T, H]` float32: the hidden states of a layer where a token is to be predicted, zeros elsewhere."""
        levels, scales = (
            np.concatenate([fields[name] for fields in sequences])
            for name in (f"hidden.{layer}", f"hidden.{layer}.scale")
        )
        states = torch.zeros(*batch["labels"].shape, levels.shape[1], device=self.device)
        states[prediction_mask(batch["labels"]).to(self.device)] = torch.from_numpy(
            recording.decode_states(levels, scales)
        ).to(self.device)
        return states


def recorded_tokens(part: Part, layout: Layout, sequences: Sequence[Fields], device: torch.device) -> RecordedTokens:
    """What the losses are given of some sequences, one behind the other.

    Args:
        part: says how they were recorded.
        layout: of what was kept of a position.
        sequences: what was kept of them.
        device: of the tensors.
    """

    def tensor(name: str, dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate([fields[name] for fields in sequences]).astype(dtype)).to(device)

    ids, log_probs = (
        torch.from_numpy(np.concatenate([read(fields) for fields in sequences]).astype(dtype)).to(device)
        for read, dtype in ((layout.ids, np.int64), (layout.log_probs, np.float32))
    )
    places = torch.arange(part.tokens, device=device)
    by_chance = places >= tensor("certain", np.int64)[:, None]
    inclusion = tensor("scale", np.float32)[:, None] * (part.power * log_probs).exp()
    weights = torch.where(by_chance, 1 / inclusion.clamp(min=torch.finfo(torch.float32).tiny, max=1.0), 1.0)
    return RecordedTokens(
        ids=ids,
        log_probs=log_probs,
        weights=weights,
        by_chance=by_chance,
        tail=tensor("tail", np.float32),
        entropy=tensor("entropy", np.float32),
        target_log_probs=tensor("target", np.float32),
        vocab_size=layout.vocab_size,
        temperature=part.temperature,
    )


# --- what it depends on ------------------------------------------------------------------------


def fitting_inputs(context: JobContext, length: int) -> dict[str, str]:
    """What a recording and a training that reads it have in common, by the names of `recording.check_fit`.

    Args:
        context: of the job.
        length: most tokens in a row.

    Raises:
        UserError: there is no text yet.
    """
    recipe, settings = context.recipe, context.recipe.data
    if not settings.train and not context.work.generated_text.exists():
        raise usage_error(
            "There is no text that could have been recorded.",
            "Give it with --data FILE, or let `edgerazor calibrate` write some in this working directory first.",
        )
    seed = recipe.seed if settings.held_out_seed is None else settings.held_out_seed
    average = f", averaged by {recipe.distill.teacher_average}" if recipe.distill.teachers else ""
    return {
        "tokenizer": hash_folder(context.teacher_folder, TOKENIZER_FILES),
        "model": context.teacher_fingerprint,
        "teachers": context.further_teachers_fingerprint + average,
        "data": data.fingerprint(context.training_sources),
        "held_out": data.fingerprint(settings.held_out)
        if settings.held_out
        else f"{settings.held_out_fraction:g} of it",
        **({} if settings.held_out else {"held_out_seed": str(seed)}),
        "data.sequence_length": str(length),
        "data.packing": settings.packing,
        **context.text_inputs,
    }


def teacher_outlines(context: JobContext) -> list[PreTrainedModel]:
    """All teachers without their weights, the recipe's model first."""
    recipe = context.recipe
    others = [models.outline(source, None, recipe.trust_remote_code) for source in recipe.distill.teachers]
    return [context.teacher_outline.model, *others]


# --- what is refused ---------------------------------------------------------------------------


def check_losses(terms: Terms, description: recording.Description, folder: Path, layers_known: bool) -> None:
    """Refuse losses that cannot be computed from a recording, by name.

    Args:
        terms: of the whole training.
        description: of the recording.
        folder: where it lies, for messages.
        layers_known: losses have chosen their layers by what calibrate measured, and not by made-up values.

    Raises:
        UserError: which loss, why, and what to do.
    """
    part = description.training
    for term, loss in terms:
        if not loss.needs_teacher:
            continue
        if not loss.from_recording:
            raise usage_error(
                f"The loss {term.name} cannot be computed from a recording, which does not hold what it compares.",
                "Leave it out of `distill.losses`, or leave out `distill.recording`.",
            )
        temperature = getattr(loss, "temperature", part.temperature)
        if isinstance(loss, LogitLoss) and temperature != part.temperature:
            raise usage_error(
                f"The loss {term.name} is to have the temperature {temperature:g}, and the recording {folder} was made "
                f"at {part.temperature:g}.",
                f"Ask for the same, or record with `record.temperature: {temperature:g}`.",
            )
        missing = sorted(set(loss.hidden_layers()) - set(part.hidden_layers))
        if missing and (layers_known or not part.hidden_layers):
            which = ",".join(map(str, loss.hidden_layers())) if layers_known else "N,N,N"
            finding = "" if layers_known else " (`edgerazor calibrate` finds out which they are)"
            raise usage_error(
                f"The loss {term.name} compares hidden states, and the recording {folder} holds "
                f"{'none' if not part.hidden_layers else f'those of layers {part.hidden_layers} alone'}.",
                f"Leave {term.name} out of `distill.losses`, or record with `--hidden-layers {which}`{finding}.",
            )


def check_sequences(
    recorded: Recording, rows: data.TokenRows, held_out: data.TokenRows, needed: int | None, evaluated: int
) -> None:
    """Refuse a recording that lacks sequences of a training.

    Args:
        recorded: the recording.
        rows: that are trained on.
        held_out: that are evaluated on.
        needed: the first so many rows of the training order; None where only the clock limits the training.
        evaluated: the first so many held-out rows.

    Raises:
        UserError: how many there are, how many are missing, and what to do.
    """
    folder, part = recorded.folder, recorded.training
    missing = recorded.held_out.missing(keys(held_out.in_order(evaluated)))
    if missing:
        raise usage_error(
            f"The recording {folder} holds {len(recorded.held_out)} held-out sequences, and of the {evaluated} that "
            f"this training evaluates {missing} are not among them.",
            f"Set `distill.evaluate_sequences` to at most {len(recorded.held_out)}, or `record.held_out_sequences` to "
            f"{evaluated} and record again.",
        )
    if recorded.description.covers == EVERYTHING and not part.missing(keys(rows.in_order())):
        return
    if needed is None:
        raise usage_error(
            f"The recording {folder} holds {len(part):,} sequences of the text and not all of it, and a training that "
            "only the clock limits may need any.",
            "Limit it by --steps or --tokens, or record without --tokens.",
        )
    missing = part.missing(keys(rows.row(index) for index in range(needed)))
    if missing:
        raise UserError(
            f"The recording {folder} holds {len(part):,} sequences ({recorded.description.covers}), and of the "
            f"{needed:,} that this training reads {missing:,} are not among them.",
            "Ask for fewer --steps or --tokens or for the seed of the recording, or record more with a larger "
            "`edgerazor record --tokens`, or everything by leaving that out.",
        )


def keys(rows: Iterable[data.Batch]) -> Iterable[bytes]:
    """The keys of some rows."""
    return (recording.sequence_key(row["input_ids"], row["labels"]) for row in rows)


def check_recording(context: JobContext) -> None:
    """Refuse a recording that does not fit the job, as far as that can be said without reading text or weights.

    Raises:
        UserError: there is none, it is of something else, or a loss cannot be computed from it.
    """
    recipe, settings, work = context.recipe, context.recipe.distill, context.work
    if settings.recording is None:
        return
    folder = Path(settings.recording)
    description = recording.read_description(folder)
    source = f"--work {work.path}" if work.recipe_file.exists() else f"{recipe.model} --data FILE"
    length = min(context.sequence_length(model) for model in teacher_outlines(context))
    inputs = fitting_inputs(context, length)
    recording.check_fit(description, folder, inputs, f"edgerazor record {source} --out NAME")
    measured = work.manifest("calibrate") is not None
    layer_count = context.teacher_outline.structure.layer_count
    plan = context.plan() if measured else None
    layer_metrics = calibrated.read_layer_metrics(work) if measured else objective.placeholder_metrics(layer_count)
    for phase in make_phases(settings, recipe.model, layer_count, layer_metrics, context.nominal_bits(plan)):
        check_losses(phase.terms, description, folder, measured)

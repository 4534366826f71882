"""Opens the source of a teacher's outputs that a recipe asks for: resident, recorded, streamed from disk, or served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from edgerazor import models
from edgerazor.errors import usage_error
from edgerazor.job import JobContext, ModelOutline
from edgerazor.models import PreTrainedModel, PreTrainedTokenizerBase, StreamedModel
from edgerazor.recipe import Distill
from edgerazor.recording import Recording
from edgerazor.training.recorded_teacher import RecordedTeacher, teacher_outlines
from edgerazor.training.served_teacher import ServedTeacher, Server, check_tokenizer
from edgerazor.training.streamed_teacher import StreamedTeacher
from edgerazor.training.teachers import Teacher, TeacherEnsemble, TeacherSource, load_further_teachers


@dataclass(frozen=True)
class PreparedTeacher:
    """What a training needs of its teachers before it starts.

    Attributes:
        source: of their outputs.
        outline: the recipe's model; its weights are missing but where it is the teacher and in memory.
        tokenizer: of the recipe's model.
        length: most tokens of a sequence that all teachers have positions for.
        is_loaded: whether `outline` has weights.
        other: the first teacher, where it is another model than that, or the same without its layers.
    """

    source: TeacherSource
    outline: ModelOutline
    tokenizer: PreTrainedTokenizerBase
    length: int
    is_loaded: bool = False
    other: PreTrainedModel | None = None


def open_teacher(context: JobContext, device: torch.device, dtype: torch.dtype) -> PreparedTeacher:
    """The teachers of a recipe, from wherever it takes them.

    Args:
        context: of the job.
        device: of the training.
        dtype: that teachers compute in.

    Raises:
        UserError: one of them cannot be read or reached, or is not understood.
    """
    settings = context.recipe.distill
    if settings.recording is not None:
        return recorded_teacher(context, device, Path(settings.recording))
    if settings.is_served:
        return served_teacher(context, device)
    if settings.teacher_source == "streamed":
        return streamed_teacher(context, device, dtype)
    return resident_teacher(context, device, dtype)


def resident_teacher(context: JobContext, device: torch.device, dtype: torch.dtype) -> PreparedTeacher:
    """The recipe's model, or the one that teaches in its place, and further teachers, loaded onto the device."""
    recipe, settings = context.recipe, context.recipe.distill
    others = load_further_teachers(settings.teachers, recipe.trust_remote_code, device, dtype)
    if settings.teacher is None:
        loaded = context.load_teacher(device, dtype)
        outline: ModelOutline = loaded
        model, structure, tokenizer = loaded.model, loaded.structure, loaded.tokenizer
    else:
        model, _ = models.load(settings.teacher, None, str(device), dtype, recipe.trust_remote_code)
        model.requires_grad_(False)
        outline, structure, tokenizer = context.teacher_outline, models.structure(model), own_tokenizer(context)
    teacher = Teacher(model, structure, structure.head_path, models.logit_shape(model, structure.head_path))
    ensemble = TeacherEnsemble((teacher, *others), settings.teacher_average)
    length = min(context.sequence_length(one) for one in (outline.model, *(teacher.model for teacher in ensemble)))
    is_loaded = settings.teacher is None
    return PreparedTeacher(ensemble, outline, tokenizer, length, is_loaded, None if is_loaded else model)


def streamed_teacher(context: JobContext, device: torch.device, dtype: torch.dtype) -> PreparedTeacher:
    """The same teachers, whose layers stay on disk."""
    recipe, settings = context.recipe, context.recipe.distill
    first = (settings.teacher, None) if settings.teacher is not None else (str(context.teacher_folder), recipe.revision)
    sources = (first, *((source, None) for source in settings.teachers))
    streamed = tuple(
        StreamedModel(source, revision, device, dtype, recipe.trust_remote_code) for source, revision in sources
    )
    outline = context.teacher_outline
    length = min(context.sequence_length(model) for model in (outline.model, *(one.model for one in streamed)))
    source = StreamedTeacher(streamed, settings.teacher_average)
    return PreparedTeacher(source, outline, own_tokenizer(context), length, other=streamed[0].model)


def served_teacher(context: JobContext, device: torch.device) -> PreparedTeacher:
    """The teacher on a server, whose tokenizer is the student's."""
    settings, outline, tokenizer = context.recipe.distill, context.teacher_outline, own_tokenizer(context)
    server = Server(settings.teacher_source, settings.served_model or "")
    check_tokenizer(server, tokenizer, context.recipe.model)
    vocab_size = int(outline.model.get_submodule(outline.structure.head_path).weight.shape[0])
    source = ServedTeacher(server, vocab_size, device)
    return PreparedTeacher(source, outline, tokenizer, context.sequence_length(outline.model))


def recorded_teacher(context: JobContext, device: torch.device, folder: Path) -> PreparedTeacher:
    """The teachers of a recording, of which only configuration and tokenizer are read."""
    length = min(context.sequence_length(model) for model in teacher_outlines(context))
    source = RecordedTeacher(Recording(folder), device)
    return PreparedTeacher(source, context.teacher_outline, own_tokenizer(context), length)


def own_tokenizer(context: JobContext) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe's model."""
    return models.load_tokenizer(context.teacher_folder, context.recipe.trust_remote_code)


def resident_bytes(context: JobContext, outline: ModelOutline, dtype: torch.dtype) -> int:
    """Bytes of weights that the teachers of a recipe take in memory.

    Args:
        context: of the job.
        outline: of the recipe's model.
        dtype: that teachers compute in.
    """
    recipe, settings = context.recipe, context.recipe.distill
    if settings.recording is not None or settings.is_served:
        return 0
    sources = [] if settings.teacher is None else [settings.teacher]
    others = [models.outline(source, None, recipe.trust_remote_code) for source in (*sources, *settings.teachers)]
    teachers = others if sources else [outline.model, *others]
    if settings.teacher_source == "streamed":
        return sum(streamed_weights(model) for model in teachers) * dtype.itemsize
    return sum(weight.numel() for model in teachers for weight in model.parameters()) * dtype.itemsize


def streamed_weights(model: PreTrainedModel) -> int:
    """Weights of a streamed model that are in memory: all but its layers, of which it has one and reads the next."""
    structure = models.structure(model)
    layers = list(model.get_submodule(structure.layers_path).children())
    in_layers = sum(weight.numel() for layer in layers for weight in layer.parameters())
    largest = max(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
    return sum(weight.numel() for weight in model.parameters()) - in_layers + min(2, len(layers)) * largest


def check_source(settings: Distill) -> None:
    """Refuse a source of the teacher's outputs that does not go with something else.

    Raises:
        UserError: which, and why.
    """
    elsewhere = settings.teacher is not None or settings.teacher_source != "resident"
    if settings.recording is not None and settings.reconstruct is not None:
        raise usage_error(
            "Layers are reconstructed from what the teacher's own layers give, which a recording does not hold.",
            "Leave out `distill.reconstruct` (--reconstruct), or `distill.recording` (--recording).",
        )
    if elsewhere and settings.reconstruct is not None:
        raise usage_error(
            "Layers are reconstructed from those of the recipe's own model in memory.",
            "Leave out `distill.reconstruct` (--reconstruct), or `distill.teacher` and `distill.teacher_source`.",
        )
    if elsewhere and settings.recording is not None:
        raise usage_error(
            "A recording takes the teacher's place, so no teacher computes.",
            "Leave out `distill.recording` (--recording), or `distill.teacher` and `distill.teacher_source`.",
        )
    if settings.is_served and (settings.teacher is not None or settings.teachers):
        raise usage_error(
            "A served teacher is the one that its server computes, and the only one.",
            "Name it with `distill.served_model`; leave out `distill.teacher` and `distill.teachers`.",
        )
    if settings.served_model is not None and not settings.is_served:
        raise usage_error(
            "`distill.served_model` names a model of a server, and there is none.",
            "Give its address: `distill.teacher_source: http://host:8000/v1`.",
        )

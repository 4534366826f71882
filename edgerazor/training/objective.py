"""The objective of a training: its weighted losses, and which of the teachers' outputs they need in a step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgerazor import losses, models
from edgerazor.errors import UserError, usage_error
from edgerazor.losses import LogitLoss, Loss, Outputs, StepTotals, prediction_mask, step_counts
from edgerazor.models import PreTrainedModel, Structure
from edgerazor.recipe import LossTerm, Recipe
from edgerazor.training.captured_states import Captures, captures

Terms = list[tuple[LossTerm, Loss]]

#: Most logits of the teachers that a step may keep in memory, in elements of 4 bytes: 512 MB.
CACHED_LOGITS = 1 << 27


# --- the losses --------------------------------------------------------------------------------


def active_terms(terms: Sequence[LossTerm], bits: float | None) -> list[LossTerm]:
    """The terms that count for a student of this many nominal bits; all of them where `bits` is None.

    Raises:
        UserError: none of them counts.
    """
    active = [term for term in terms if bits is None or term.counts_at(bits)]
    if not active:
        raise usage_error(
            f"None of the recipe's losses counts at {bits:g} bits.",
            "See `from_bits` and `below_bits` of `distill.losses`.",
        )
    return active


def make_terms(
    terms: Sequence[LossTerm],
    model: str,
    layer_count: int,
    layer_metrics: dict[str, list[float]],
    bits: float | None = None,
) -> Terms:
    """The losses of an objective, for a model with this many decoder layers.

    Args:
        terms: the recipe's `losses`.
        model: name of the model, for messages.
        layer_count: decoder layers of the model.
        layer_metrics: metric -> its value for each layer, as calibrate measured it.
        bits: nominal bits of the student, on which it may depend which terms count; None for all terms.

    Raises:
        UserError: a loss is not known, none counts, an option makes no sense, or there is no such layer.
    """
    made = [(term, losses.make(term.name, **loss_options(term))) for term in active_terms(terms, bits)]
    for _, loss in made:
        loss.choose_layers(layer_count, layer_metrics)
        highest = max((*loss.hidden_layers(), *loss.attention_layers()), default=0)
        if highest > layer_count:
            raise usage_error(f"A loss asks for layer {highest}, but {model} has {layer_count} layers.")
    return made


def loss_options(term: LossTerm) -> dict[str, object]:
    """Keyword arguments of a term's loss: its options, lists as tuples, and its temperature."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in term.options.items()}
    return options if term.temperature is None else {**options, "temperature": term.temperature}


def placeholder_metrics(layer_count: int) -> dict[str, list[float]]:
    """Zeros in the place of calibrate's layer metrics, where calibrate has not measured them yet."""
    return {metric: [0.0] * layer_count for metric in losses.METRICS}


def describe(terms: Sequence[LossTerm], bits: float) -> str:
    """The objective of a student of this many nominal bits as text: `0.1 ce + 2 eakld`."""
    return " + ".join(describe_term(term) for term in active_terms(terms, bits))


def describe_term(term: LossTerm) -> str:
    """One term as text: `2 eakld (k 8)`, `0.1 lafd, linear from 1 to 0 over 0.5 of the budget`."""
    options = dict(term.options) if term.temperature is None else {**term.options, "temperature": term.temperature}
    listed = ", ".join(f"{name} {value}" for name, value in sorted(options.items()))
    text = f"{term.weight:g} {term.name}" + (f" ({listed})" if listed else "")
    if term.schedule == "constant":
        return text
    duration = f" over {term.schedule_share:g} of the budget"
    return f"{text}, {term.schedule} from {term.start_factor:g} to {term.end_factor:g}{duration}"


# --- checks before a training ------------------------------------------------------------------


def check(recipe: Recipe) -> None:
    """Refuse unknown losses, wrong options and impossible layers, before anything that takes time.

    Raises:
        UserError: which loss or layer, and what is known instead; or further teachers have no use or another
            vocabulary.
    """
    folder = models.resolve(recipe.model, recipe.revision)
    config = models.load_config(folder, recipe.trust_remote_code)
    layer_count = int(config.get_text_config().num_hidden_layers)
    terms = make_terms(recipe.distill.losses, recipe.model, layer_count, placeholder_metrics(layer_count))
    if recipe.distill.teachers and not any(averages_teachers(loss) for _, loss in terms):
        raise usage_error(
            "The recipe names further teachers, but none of its losses compares next-token distributions with them."
        )
    for source in recipe.distill.teachers:
        if not same_vocabulary(folder, source, recipe):
            raise usage_error(
                f"The teachers {recipe.model} and {source} have different vocabularies, so their probabilities cannot "
                "be averaged."
            )
    other = recipe.distill.teacher
    if other is not None and not same_vocabulary(folder, other, recipe):
        raise usage_error(
            f"{recipe.model} and its teacher {other} have different vocabularies, so their probabilities cannot be "
            "compared.",
            "Name a teacher that shares the student's tokenizer.",
        )


def same_vocabulary(folder: Path, source: str, recipe: Recipe) -> bool:
    """Whether the model of a folder and that of another source have the same tokens by the same numbers."""
    own, other = (
        models.load_tokenizer(model, recipe.trust_remote_code).get_vocab() for model in (folder, models.resolve(source))
    )
    return own == other


def averages_teachers(loss: Loss) -> bool:
    """Whether a loss uses the mean next-token distribution of all teachers; other losses use the first teacher."""
    return isinstance(loss, LogitLoss) and loss.needs_teacher


def open_models(student: PreTrainedModel, teacher: PreTrainedModel | None, structure: Structure, terms: Terms) -> None:
    """Prepare both models so that the states that the losses need can be captured.

    Args:
        student: in training.
        teacher: that it is compared with; None where it was recorded.
        structure: of both.
        terms: the losses.

    Raises:
        UserError: the attention of a model cannot be captured, or hidden states or heads cannot be compared.
    """
    needed = captures(loss for _, loss in terms)
    if needed.routing and not any(listed.routers for listed in structure.experts):
        named = [term.name for term, loss in terms if loss.needs_routing]
        raise UserError(
            f"{type(student).__name__} has no routers for the loss {named[0]}, since it is no mixture of experts.",
            "Leave that loss out of `distill.losses`.",
        )
    if needed.attention_layers:
        for model in (student, *([teacher] if teacher is not None else [])):
            models.enable_attention_capture(model)
        models.check_attention_capture(teacher or student, structure, needed.attention_layers)
    if teacher is not None:
        check_comparable(student, teacher, captures(loss for _, loss in terms if loss.needs_teacher))


def open_other_teacher(student: PreTrainedModel, teacher: PreTrainedModel, terms: Terms) -> None:
    """Prepare a teacher that is another model than the student's own, or whose layers are not in memory.

    Args:
        student: after `open_models`.
        teacher: that it is compared with.
        terms: the losses.

    Raises:
        UserError: as `open_models`.
    """
    needed = captures(loss for _, loss in terms if loss.needs_teacher)
    if needed.attention_layers:
        models.enable_attention_capture(teacher)
    check_comparable(student, teacher, needed)


def check_comparable(student: PreTrainedModel, teacher: PreTrainedModel, needed: Captures) -> None:
    """Hidden states are compared feature by feature, attention head by head, both layer by layer.

    Raises:
        UserError: the models differ in what is compared.
    """
    compared_sizes = {
        "num_hidden_layers": needed.hidden_layers or needed.attention_layers,
        "hidden_size": needed.hidden_layers,
        "num_attention_heads": needed.attention_layers,
        "num_key_value_heads": needed.attention_layers,
    }
    for name, compared in compared_sizes.items():
        sizes = [getattr(model.config.get_text_config(), name, None) for model in (student, teacher)]
        if compared and sizes[0] != sizes[1]:
            raise UserError(
                f"A loss compares layers of student and teacher, but their {name} differ: {sizes[0]} and {sizes[1]}.",
                "Losses of next tokens (forward_kl, eakld ...) need no layers that are alike.",
            )


# --- the teachers' outputs in a step -----------------------------------------------------------


def batch_statistics(terms: Terms, labels: Tensor, target: Outputs | None) -> dict[str, Tensor]:
    """Counts and teacher statistics of a micro-batch, to be summed over the step.

    Args:
        terms: the objective.
        labels: `[B, T]` int64, -100 where masked.
        target: the teachers' outputs for the micro-batch; None where no loss needs them.

    Returns:
        name -> scalar tensor on the device of the labels: "samples", "tokens" and the losses' own statistics.
    """
    samples, tokens = step_counts(labels)
    statistics = {
        "samples": torch.tensor(samples, dtype=torch.float64, device=labels.device),
        "tokens": torch.tensor(tokens, dtype=torch.float64, device=labels.device),
    }
    for _, loss in terms:
        if target is not None:
            statistics |= loss.teacher_statistics(target, labels)
    return statistics


def cache_logits(target: Outputs, labels: Tensor, terms: Terms, micro_batches: int) -> None:
    """Compute the teachers' logits once where losses need them twice, before the student's forward pass and after it.

    Only where those of a step of `micro_batches` are at most `CACHED_LOGITS`; those of larger vocabularies and batches
    are computed again.
    """
    if any(loss.statistics_need_logits() for _, loss in terms):
        positions = prediction_mask(labels).flatten().nonzero().flatten()
        target.cache_logits(positions, CACHED_LOGITS // micro_batches)


def always_compared_layers(terms: Terms) -> set[int]:
    """Layers whose hidden states are compared in every step, whatever its statistics."""
    fixed = (loss for _, loss in terms if loss.needs_teacher and not loss.layers_vary_by_step())
    return {layer for loss in fixed for layer in loss.hidden_layers()}


def compared_layers(terms: Terms, totals: StepTotals) -> set[int]:
    """Layers whose hidden states are compared in a step with these statistics."""
    return {layer for _, loss in terms if loss.needs_teacher for layer in loss.compared_layers(totals)}


def drop_other_layers(target: Outputs, layers: Collection[int]) -> None:
    """Free a teacher's hidden states of all layers but these."""
    target.hidden_states = {layer: state for layer, state in target.hidden_states.items() if layer in layers}

"""The objective of a training: its losses, what they look at in the models, and the teachers they compare with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from edgerazor import losses, models
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.losses import Attention, Head, Loss, Outputs, RowLoss, StepTotals, predicting
from edgerazor.models import PreTrainedModel
from edgerazor.recipe import LossTerm, Recipe

Terms = list[tuple[LossTerm, Loss]]

#: Logits of the teachers that a step may keep, in elements of 4 bytes: 256 MB.
KEPT_LOGITS = 1 << 26


@dataclass(frozen=True)
class Captures:
    """What losses look at inside a model.

    Attributes:
        hidden: layers whose hidden states they need (see `Outputs.hidden`), ascending.
        attention: layers whose attention they need, counted from 1, ascending.
        parts: what they need of it.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass
class CapturedStates:
    """What a forward pass showed.

    Attributes:
        final: `[B, T, H]`, what entered the head.
        leaving: layer -> `[B, T, H]`, what left the layers that were asked for, but for the last.
        attention: of layers.
        last: number of the last layer, if it was asked for.
    """

    final: list[Tensor]
    leaving: dict[int, Tensor]
    attention: dict[int, Attention]
    last: int | None

    @property
    def hidden(self) -> dict[int, Tensor]:
        """What `Outputs.hidden` holds: the last layer's state is taken behind the final norm, as published."""
        return self.leaving if self.last is None else {**self.leaving, self.last: self.final[0]}


@dataclass(frozen=True)
class Teacher:
    """A model to compare with.

    Attributes:
        model: in evaluation mode, without gradients.
        structure: where its layers are; None for a further teacher, of which only next tokens are asked.
        head_path: where its head is.
        logit_shape: see `models.logit_shape`.
    """

    model: PreTrainedModel
    structure: models.Structure | None
    head_path: str
    logit_shape: tuple[float, float | None]

    @torch.no_grad()
    def outputs(self, input_ids: Tensor, needed: Captures) -> Outputs:
        """Its final hidden states [B, T, H], its head, and what the losses look at."""
        with watch(self.model, self.structure, self.head_path, needed) as seen:
            self.model(input_ids=input_ids, use_cache=False)
        head = self.model.get_submodule(self.head_path)
        scale, cap = self.logit_shape
        return Outputs(seen.final[0], seen.hidden, Head(head.weight, head.bias, scale, cap), seen.attention)


@contextmanager
def watch(
    model: PreTrainedModel, structure: models.Structure | None, head_path: str, needed: Captures
) -> Iterator[CapturedStates]:
    """See what enters the head, and what losses look at, in a forward pass inside; no logits are computed."""
    with ExitStack() as stack:
        leaving, attention, last = {}, {}, None
        if structure is not None:
            last = structure.layer_count if structure.layer_count in needed.hidden else None
            before = [layer for layer in needed.hidden if layer != last]
            leaving = stack.enter_context(models.capture_hidden(model, structure, before))
            captured = models.capture_attention(model, structure, needed.attention, needed.parts)
            attention = stack.enter_context(captured)
        yield CapturedStates(stack.enter_context(models.final_states(model, head_path)), leaving, attention, last)


# --- the losses --------------------------------------------------------------------------------


def counted(terms: Sequence[LossTerm], bits: float | None) -> list[LossTerm]:
    """Those that count for a student of so many nominal bits; all of them where that is None.

    Raises:
        UserError: none of them does.
    """
    found = [term for term in terms if bits is None or term.counts_at(bits)]
    if not found:
        raise usage_error(
            f"None of the recipe's losses counts at {bits:g} bits.",
            "See `from_bits` and `below_bits` of `distill.losses`.",
        )
    return found


def make_terms(recipe: Recipe, layers: int, measured: dict[str, list[float]], bits: float | None = None) -> Terms:
    """The recipe's losses, for a model with so many layers.

    Args:
        recipe: names them.
        layers: decoder layers of the model.
        measured: metric -> its value for each layer, as calibrate measured it.
        bits: nominal ones of the student, by which some may not count; None for all of them.

    Raises:
        UserError: a loss is not known, none counts, an option makes no sense, or there is no such layer.
    """
    terms = [(term, losses.make(term.name, **_options(term))) for term in counted(recipe.distill.losses, bits)]
    for _, loss in terms:
        loss.choose_layers(layers, measured)
        highest = max((*loss.hidden_layers(), *loss.attention_layers()), default=0)
        if highest > layers:
            raise usage_error(f"A loss asks for layer {highest}, but {recipe.model} has {layers} layers.")
    return terms


def _options(term: LossTerm) -> dict[str, object]:
    """A term's options, lists as tuples and its temperature among them."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in term.options.items()}
    return options if term.temperature is None else {**options, "temperature": term.temperature}


def unmeasured(layers: int) -> dict[str, list[float]]:
    """Stands for calibrate's measurements where they are not there yet."""
    return {metric: [0.0] * layers for metric in losses.METRICS}


def looks(found: Iterable[Loss]) -> Captures:
    """Everything that some losses look at."""
    all_of = list(found)
    return Captures(
        hidden=tuple(sorted({layer for loss in all_of for layer in loss.hidden_layers()})),
        attention=tuple(sorted({layer for loss in all_of for layer in loss.attention_layers()})),
        parts=tuple(sorted({part for loss in all_of for part in loss.attention_parts})),
    )


def in_words(terms: Sequence[LossTerm], bits: float) -> str:
    """`0.1 ce + 2 eakld`: the objective of a student of so many nominal bits."""
    return " + ".join(term_in_words(term) for term in counted(terms, bits))


def term_in_words(term: LossTerm) -> str:
    """`2 eakld (k 8)`, `0.1 lafd, linear from 1 to 0 over 0.5 of the budget`."""
    options = dict(term.options) if term.temperature is None else {**term.options, "temperature": term.temperature}
    listed = ", ".join(f"{name} {value}" for name, value in sorted(options.items()))
    words = f"{term.weight:g} {term.name}" + (f" ({listed})" if listed else "")
    if term.schedule == "constant":
        return words
    over = f" over {term.schedule_share:g} of the budget"
    return f"{words}, {term.schedule} from {term.start_factor:g} to {term.end_factor:g}{over}"


# --- what is refused at the start ----------------------------------------------------------------


def check(recipe: Recipe) -> None:
    """Refuse unknown losses, wrong options and impossible layers, before anything that takes time.

    Raises:
        UserError: which, and what is known instead; or further teachers have no use or another vocabulary.
    """
    folder = models.resolve(recipe.model, recipe.revision)
    config = models.load_config(folder, recipe.trust_remote_code)
    layers = int(config.get_text_config().num_hidden_layers)
    terms = make_terms(recipe, layers, unmeasured(layers))
    if recipe.distill.teachers and not any(averages(loss) for _, loss in terms):
        raise usage_error(
            "The recipe names further teachers, but none of its losses compares next-token distributions with them."
        )
    for source in recipe.distill.teachers:
        vocabularies = [
            models.load_tokenizer(each, recipe.trust_remote_code).get_vocab()
            for each in (folder, models.resolve(source))
        ]
        if vocabularies[0] != vocabularies[1]:
            raise usage_error(
                f"The teachers {recipe.model} and {source} have different vocabularies, so their probabilities cannot "
                "be averaged."
            )


def averages(loss: Loss) -> bool:
    """Whether a loss uses the mean of all teachers' next tokens; the others see the first teacher alone."""
    return isinstance(loss, RowLoss) and loss.needs_teacher


def open_models(student: PreTrainedModel, teacher: PreTrainedModel, structure: models.Structure, terms: Terms) -> None:
    """Make both models such that the losses can look at what they need.

    Raises:
        UserError: the attention of one cannot be seen, or hidden states or heads cannot be compared.
    """
    needed = looks(loss for _, loss in terms)
    if needed.attention:
        models.enable_attention_capture(student)
        models.enable_attention_capture(teacher)
        models.check_attention_capture(teacher, structure, needed.attention)
    check_alike(student, teacher, looks(loss for _, loss in terms if loss.needs_teacher))


def check_alike(student: PreTrainedModel, teacher: PreTrainedModel, needed: Captures) -> None:
    """Hidden states are compared feature by feature, attention head by head, both layer by layer.

    Raises:
        UserError: the models differ in what is compared.
    """
    sizes = {"num_hidden_layers": needed.hidden or needed.attention, "hidden_size": needed.hidden}
    sizes |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), needed.attention)
    for name, compared in sizes.items():
        ours, theirs = (getattr(each.config.get_text_config(), name, None) for each in (student, teacher))
        if compared and ours != theirs:
            raise UserError(
                f"A loss compares layers of student and teacher, but their {name} differ: {ours} and {theirs}.",
                "Losses of next tokens (forward_kl, eakld ...) need no layers that are alike.",
            )


# --- several teachers --------------------------------------------------------------------------


def load_others(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[Teacher]:
    """The further teachers, in evaluation mode, their weights without gradients, on a device in a dtype.

    Raises:
        UserError: one cannot be loaded, or its logits are not understood.
    """
    found = []
    for source in recipe.distill.teachers:
        model, _ = models.load(source, None, str(device), dtype, recipe.trust_remote_code)
        head_path = models.find_head(model)
        found.append(Teacher(model.requires_grad_(False), None, head_path, models.logit_shape(model, head_path)))
    return found


def say_who_teaches(recipe: Recipe, terms: Terms, teachers: Sequence[Teacher], console: Console) -> None:
    """With several teachers, say which losses do not see all of them, and where their vocabularies are padded."""
    sizes = [int(teacher.model.get_submodule(teacher.head_path).weight.shape[0]) for teacher in teachers]
    for source, size in zip(recipe.distill.teachers, sizes[1:], strict=False):
        if size != sizes[0]:
            console.say(
                f"The heads of {recipe.model} and {source} have {sizes[0]:,} and {size:,} entries; what only one of "
                "them has is padding, which no loss compares."
            )
    alone = [term.name for term, loss in terms if loss.needs_teacher and not averages(loss)]
    if recipe.distill.teachers and alone:
        console.say(
            f"Compared with {recipe.model} alone: {', '.join(alone)}; with the mean of all teachers: the others."
        )


def all_outputs(
    teachers: Sequence[Teacher], input_ids: Tensor, needed: Captures, averaging: str = "probabilities"
) -> Outputs | None:
    """What the teachers say: all of the first, next-token distributions of the others; None without teachers.

    Args:
        teachers: the model's own and further ones.
        input_ids: `[B, T]` int64.
        needed: what losses look at in the first.
        averaging: what of their next tokens is averaged (see `Outputs`).
    """
    if not teachers:
        return None
    outputs = teachers[0].outputs(input_ids, needed)
    outputs.others = tuple(each.outputs(input_ids, Captures()) for each in teachers[1:])
    outputs.averaging = averaging
    return outputs


def keep_logits(target: Outputs, labels: Tensor, terms: Terms, count: int) -> None:
    """Compute the teachers' logits once where losses look at them twice, before the student's pass and after it.

    Only where all of a step, of `count` micro-batches, are at most `KEPT_LOGITS`: those of large vocabularies and
    batches are made again.
    """
    if any(loss.looks_twice() for _, loss in terms):
        positions = predicting(labels).flatten().nonzero().flatten()
        target.keep_logits(positions, KEPT_LOGITS // count)


def sure_layers(terms: Terms) -> set[int]:
    """Layers whose hidden states are compared whatever the step's statistics are."""
    compared = (loss for _, loss in terms if loss.needs_teacher and not loss.chooses_anew())
    return {layer for loss in compared for layer in loss.hidden_layers()}


def compared_layers(terms: Terms, totals: StepTotals) -> set[int]:
    """Layers whose hidden states are compared in a step of these statistics."""
    return {layer for _, loss in terms if loss.needs_teacher for layer in loss.compared_layers(totals)}


def keep_layers(target: Outputs, layers: Collection[int]) -> None:
    """Let go of a teacher's hidden states of all other layers."""
    target.hidden = {layer: state for layer, state in target.hidden.items() if layer in layers}

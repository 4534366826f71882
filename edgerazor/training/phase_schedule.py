"""The phases of one training: what each of them trains, and which part of the budget is its own.

Cheap phases come first: scales alone need little memory and mend most of what rounding broke at 3 and 4 bits
(EfficientQAT's second phase, arXiv 2407.11062), and training everything then begins with a better loss. A training
without phases is a schedule of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel

from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Distill, Recipe
from edgerazor.training import objective
from edgerazor.training.objective import Terms

#: Less than any share of a budget that a step can take.
TINY = 1e-9


class PhaseResult(BaseModel):
    """What one phase reached.

    Attributes:
        phase: its number among the recipe's, from 1; 0 for what comes before them.
        what: `initialise`, `reconstruct`, `scales` or `all`.
        steps: optimizer steps; of `reconstruct`, those of all layers.
        seconds: of training and measuring.
        held_out: held-out loss at its end, in the training's measure.
    """

    phase: int
    what: str
    steps: int
    seconds: float
    held_out: float


class PhaseEstimate(BaseModel):
    """What a phase would take; None where only the clock limits it."""

    steps: int | None
    seconds: float | None


@dataclass(frozen=True)
class Training:
    """One phase.

    Attributes:
        settings: of distill, with the phase's own in their places.
        terms: its objective.
        end: share of the whole budget that is used when it ends, at most 1.
    """

    settings: Distill
    terms: Terms
    end: float

    def share(self, used: float, began: float) -> float:
        """How much of this phase's part is used, 0 to 1, when `used` of the whole is and it began at `began`."""
        return min(1.0, max(0.0, (used - began) / max(self.end - began, TINY)))

    def over(self, used: float) -> bool:
        """Whether its part is used up, when `used` of the whole budget is."""
        return used >= self.end - TINY


def trainings(recipe: Recipe, layers: int, measured: dict[str, list[float]], bits: float) -> list[Training]:
    """The phases of a recipe, or the one training where it has none; arguments and errors as `objective.make_terms`."""
    asked = recipe.distill
    whole = sum(phase.share for phase in asked.phases)
    found, used = [], 0.0
    for phase in asked.phases:
        own = phase.model_dump(include={"train", "learning_rate", "schedule"}, exclude_none=True)
        settings = asked.model_copy(update={**own, "losses": phase.losses or asked.losses})
        used += phase.share
        end = 1.0 if phase is asked.phases[-1] else used / whole
        found.append(Training(settings, _terms(recipe, settings, layers, measured, bits), end))
    return found or [Training(asked, _terms(recipe, asked, layers, measured, bits), 1.0)]


def _terms(recipe: Recipe, settings: Distill, layers: int, measured: dict[str, list[float]], bits: float) -> Terms:
    return objective.make_terms(recipe.model_copy(update={"distill": settings}), layers, measured, bits)


def steps_of(phases: list[Training], steps: int) -> list[int]:
    """How many of the steps each phase takes: it ends with the first step at which its share is used up."""
    ends = [math.ceil(steps * (phase.end - TINY)) for phase in phases]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def check(recipe: Recipe) -> None:
    """Refuse phases that cannot be, before anything that takes time.

    Raises:
        UserError: phases beside a training of scales alone, or without trained scales; losses as `objective.check`.
    """
    settings = recipe.distill
    if settings.phases and settings.train == "scales":
        raise usage_error(
            "`distill.train: scales` is for a training without phases; each phase has a `train` of its own.",
            "Leave out `distill.train`, or `distill.phases`.",
        )
    if settings.phases and recipe.calibrate.scales != "learned":
        raise usage_error(
            "Phases train scales, which `calibrate.scales: computed` does not keep.", "Set `calibrate.scales: learned`."
        )
    used = [settings.losses] if not settings.phases else [phase.losses or settings.losses for phase in settings.phases]
    every = tuple(term for terms in used for term in terms)
    objective.check(recipe.model_copy(update={"distill": settings.model_copy(update={"losses": every})}))


def check_steps(phases: list[Training], steps: int | None) -> None:
    """Refuse a budget that is too small.

    Raises:
        UserError: a phase would have no step.
    """
    if steps is None:
        return
    for number, taken in enumerate(steps_of(phases, steps), 1):
        if not taken:
            raise UserError(
                f"{steps} steps leave none for phase {number} of {len(phases)}.", "Give more steps, or fewer phases."
            )


def in_words(settings: Distill, bits: float) -> str:
    """What decides the phases at so many nominal bits: `1 scales, learning_rate 0.001; 3 all (1 forward_kl)`."""
    words = []
    for phase in settings.phases:
        losses = f" ({objective.in_words(phase.losses, bits)})" if phase.losses else ""
        own = {name: getattr(phase, name) for name in ("learning_rate", "schedule") if getattr(phase, name) is not None}
        words.append(", ".join([f"{phase.share:g} {phase.train}{losses}", *(f"{key} {own[key]}" for key in own)]))
    return "; ".join(words)

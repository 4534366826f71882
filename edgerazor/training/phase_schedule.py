"""The phases of one training: what each of them trains, and which share of the budget is its own.

Cheap phases come first: scales alone need little memory and repair most of what rounding broke at 3 and 4 bits
(EfficientQAT's second phase, arXiv 2407.11062), and training everything then begins with a lower loss. A training
without phases is a schedule of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Distill, Recipe
from edgerazor.training import objective
from edgerazor.training.objective import Terms

#: Less than any share of a budget that a step can take; absorbs the rounding of sums of shares.
TINY = 1e-9


@dataclass(frozen=True)
class ScheduledPhase:
    """One phase of a training.

    Attributes:
        settings: the `distill` section, with the phase's own values in their places.
        terms: its objective.
        end: share of the whole budget that is used when it ends, at most 1.
    """

    settings: Distill
    terms: Terms
    end: float

    def share_used(self, budget_share: float, begin: float) -> float:
        """How much of this phase is done, 0 to 1.

        Args:
            budget_share: share of the whole budget that is used.
            begin: share of the whole budget that was used when the phase began.
        """
        return min(1.0, max(0.0, (budget_share - begin) / max(self.end - begin, TINY)))

    def has_ended(self, budget_share: float) -> bool:
        """Whether its part is used up, when `budget_share` of the whole budget is."""
        return budget_share >= self.end - TINY


def make_phases(
    settings: Distill, model: str, layer_count: int, layer_metrics: dict[str, list[float]], bits: float
) -> list[ScheduledPhase]:
    """The phases of a training, or one for all of it where the recipe has none.

    Args:
        settings: the `distill` section.
        model: name of the model, for messages.
        layer_count: decoder layers of the model.
        layer_metrics: metric -> its value for each layer, as calibrate measured it.
        bits: nominal bits of the student.

    Raises:
        UserError: as `objective.make_terms`.
    """

    def scheduled(own_settings: Distill, end: float) -> ScheduledPhase:
        terms = objective.make_terms(own_settings.losses, model, layer_count, layer_metrics, bits)
        return ScheduledPhase(own_settings, terms, end)

    if not settings.phases:
        return [scheduled(settings, 1.0)]
    whole = sum(phase.share for phase in settings.phases)
    phases, used = [], 0.0
    for phase in settings.phases:
        own = phase.model_dump(include={"train", "learning_rate", "schedule"}, exclude_none=True)
        own_settings = settings.model_copy(update={**own, "losses": phase.losses or settings.losses})
        used += phase.share
        phases.append(scheduled(own_settings, 1.0 if phase is settings.phases[-1] else used / whole))
    return phases


def steps_per_phase(phases: Sequence[ScheduledPhase], steps: int) -> list[int]:
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
    if settings.phases:
        terms = tuple(term for phase in settings.phases for term in phase.losses or settings.losses)
        recipe = recipe.model_copy(update={"distill": settings.model_copy(update={"losses": terms})})
    objective.check(recipe)


def check_steps(phases: list[ScheduledPhase], steps: int | None) -> None:
    """Refuse a budget that is too small for the phases.

    Raises:
        UserError: a phase would have no step.
    """
    if steps is None:
        return
    for number, phase_steps in enumerate(steps_per_phase(phases, steps), 1):
        if not phase_steps:
            raise UserError(
                f"{steps} steps leave none for phase {number} of {len(phases)}.", "Give more steps, or fewer phases."
            )


def describe(settings: Distill, bits: float) -> str:
    """The phases at this many nominal bits as text: `1 scales, learning_rate 0.001; 3 all (1 forward_kl)`."""
    descriptions = []
    for phase in settings.phases:
        losses = f" ({objective.describe(phase.losses, bits)})" if phase.losses else ""
        own = {name: getattr(phase, name) for name in ("learning_rate", "schedule") if getattr(phase, name) is not None}
        options = [f"{name} {value}" for name, value in own.items()]
        descriptions.append(", ".join([f"{phase.share:g} {phase.train}{losses}", *options]))
    return "; ".join(descriptions)

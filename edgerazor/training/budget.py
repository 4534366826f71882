"""How long a training lasts: optimizer steps, tokens, seconds, or a default that depends on the amount of text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from edgerazor import data
from edgerazor.console import Console
from edgerazor.recipe import Distill

#: Steps where no budget is given; fewer of them where the data would be read more than this many times.
DEFAULT_STEPS, DEFAULT_PASSES = 1000, 16
#: Passes over the data up to which they are about as good as new data (Muennighoff et al., arXiv 2305.16264).
GOOD_PASSES = 4


@dataclass(frozen=True)
class Budget:
    """The limits of a training; it ends with the first one that is reached.

    Attributes:
        steps: optimizer steps; None where only the clock limits the training.
        seconds: of training, counted across resumes; None where only steps limit it.
    """

    steps: int | None
    seconds: float | None

    def steps_exhausted(self, step: int) -> bool:
        """Whether all optimizer steps have been taken."""
        return self.steps is not None and step >= self.steps

    def time_exhausted(self, seconds: float) -> bool:
        """Whether the time is used up."""
        return self.seconds is not None and seconds >= self.seconds

    def share_used(self, step: int, seconds: float, schedule_began: float) -> float:
        """How much of the budget is used, 0 to 1, all phases together.

        Args:
            step: optimizer steps taken.
            seconds: of training so far.
            schedule_began: seconds when the first step began: reconstruction has its own learning-rate schedule.
        """
        shares = [step / self.steps] if self.steps else []
        if self.seconds:
            shares.append((seconds - schedule_began) / max(self.seconds - schedule_began, 1e-9))
        return min(1.0, max(shares))


def make_budget(settings: Distill, rows: data.TokenRows | None, rows_per_step: int, tokens_per_step: int) -> Budget:
    """The budget of a `distill` section, for text of which a step takes this many rows and tokens.

    Where no limit is given it depends on the text, which may be None only where one is.
    """
    limits = [settings.steps] if settings.steps else []
    if settings.tokens:
        limits.append(math.ceil(settings.tokens / tokens_per_step))
    if not limits and not settings.max_time:
        assert rows is not None
        limits.append(default_steps(rows, rows_per_step))
    return Budget(min(limits) if limits else None, settings.max_time)


def clock(kind: Literal["wall", "cpu"]) -> float:
    """Seconds of a clock that only goes forward: real time, or CPU time of this process divided by its threads."""
    return time.monotonic() if kind == "wall" else time.process_time() / torch.get_num_threads()


def is_limited(settings: Distill) -> bool:
    """Whether steps, tokens or time limit the training, so that its length does not depend on the text."""
    return any((settings.steps, settings.tokens, settings.max_time))


def default_steps(rows: data.TokenRows, rows_per_step: int) -> int:
    """Steps where no budget is given: 1000, but no more than read the smallest source 16 times."""
    passes = rows.passes(DEFAULT_STEPS * rows_per_step)
    return DEFAULT_STEPS if passes <= DEFAULT_PASSES else max(1, int(DEFAULT_STEPS * DEFAULT_PASSES / passes))


def report_passes(steps: int | None, rows: data.TokenRows, rows_per_step: int, console: Console) -> None:
    """Say how often the training reads its data, with a warning where that is more than `GOOD_PASSES` times."""
    if not (steps and len(rows)):  # limited by the clock alone, or a stream
        return
    passes = rows.passes(steps * rows_per_step)
    sentence = f"{steps:,} steps read the {len(rows):,} sequences of the data {passes:.1f} times"
    if passes > GOOD_PASSES:
        console.warn(
            f"{sentence}; more text (--data FILE) would teach more than repeating it over {GOOD_PASSES} times."
        )
    elif passes > 1:
        console.say(f"{sentence}.")

"""What people read beside the bar while a training runs: losses and their trend, speed, time left."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from edgerazor.console import duration
from edgerazor.training.budget import Budget

#: The latest steps that speed is measured over.
STEPS = 50


@dataclass
class Pace:
    """The speed of a training since it was started or resumed, and what its evaluations said.

    Attributes:
        steps: seconds of training and tokens after each of the latest steps; evaluations and checkpoints count.
        measured: step and held-out loss of the latest two evaluations.
    """

    steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=STEPS + 1))
    measured: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=2))

    def tokens_per_second(self) -> float | None:
        """Over the latest steps; None before there are two."""
        if len(self.steps) < 2:
            return None
        (began, first), (ended, last) = self.steps[0], self.steps[-1]
        return (last - first) / max(ended - began, 1e-9)

    def seconds_left(self, budget: Budget, step: int) -> float | None:
        """Until the first limit of the budget is reached, at the speed of the latest steps; None if not known yet."""
        if len(self.steps) < 2:
            return None
        seconds = self.steps[-1][0]
        limits = [] if budget.seconds is None else [budget.seconds - seconds]
        if budget.steps is not None:
            per_step = (seconds - self.steps[0][0]) / (len(self.steps) - 1)
            limits.append((budget.steps - step) * per_step)
        return max(0.0, min(limits)) if limits else None

    def trend(self, metric: str) -> str:
        """The held-out loss, and how far it has moved since the evaluation before: `held-out kl 0.0412 (-8 % ...)`."""
        if not self.measured:
            return ""
        step, value = self.measured[-1]
        words = f"held-out {metric} {value:.4f} at step {step}"
        if len(self.measured) == 2 and self.measured[0][1] > 0:
            before, earlier = self.measured[0]
            words += f" ({100 * (value / earlier - 1):+.1f} % since step {before})"
        return words

    def line(self, loss: float | None, metric: str, budget: Budget, step: int) -> str:
        """All of it that is known, in one line."""
        speed, left = self.tokens_per_second(), self.seconds_left(budget, step)
        parts = (
            "" if loss is None else f"loss {loss:.4f}",
            self.trend(metric),
            "" if speed is None else f"{speed:,.0f} tokens/s",
            "" if left is None else f"{duration(left)} left",
        )
        return ", ".join(part for part in parts if part)

"""Settings of a training that fit its budget: batch, learning rate, schedule, objective and start.

A pure function: what is known of a job (its size, bits, tokens or seconds and speed) comes in, settings with their
reasons come out. What a recipe or an option sets is not touched (`edgerazor/training/budget_choice.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edgerazor.console import duration

#: Tokens of a step: so many times the square root of the budget, within these bounds.
ROOT_FACTOR, LEAST_STEP_TOKENS, MOST_STEP_TOKENS = 2.0, 512, 8192
#: Peak learning rate of a model of this width, at a budget up to so many tokens, and how it falls with larger ones.
RATE, RATE_WIDTH, RATE_TOKENS, RATE_EXPONENT = 1e-3, 256, 300_000, 0.15
#: Bounds of the peak learning rate.
LEAST_RATE, MOST_RATE = 2e-5, 1e-3
#: Share of the budget that evaluations may take, and most evaluations.
EVALUATION_SHARE, MOST_EVALUATIONS = 0.05, 10
#: Most bytes that the logits of a forward pass may take, in float32.
LOGIT_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class TrainingFacts:
    """What the choice depends on.

    Attributes:
        weights: of the whole model, tied ones counted once.
        width: features of the hidden states.
        vocabulary: rows of the head.
        sequence_length: tokens of a sequence.
        tokens: of the budget; None where time alone limits it.
        seconds: of the budget; None where tokens alone limit it.
        tokens_per_second: of a training here, measured or estimated; what is trained in `seconds` is their product.
        measured: whether that speed was measured.
        evaluate_sequences: of an evaluation.
        processes: that train together.
        device: `cpu` or `cuda`.
    """

    weights: int
    width: int
    vocabulary: int
    sequence_length: int
    tokens: int | None
    seconds: float | None
    tokens_per_second: float
    measured: bool = False
    evaluate_sequences: int = 32
    processes: int = 1
    device: str = "cpu"

    @property
    def budget_tokens(self) -> int:
        """Tokens that the budget allows."""
        limits = [self.tokens] if self.tokens is not None else []
        if self.seconds is not None:
            limits.append(max(1, int(self.seconds * self.tokens_per_second)))
        return min(limits)


@dataclass(frozen=True)
class BudgetDefaults:
    """Settings that fit a budget.

    Attributes:
        values: section of the recipe -> field -> value, as YAML has it.
        reasons: three lines for people: the steps, the learning rate, and where the student begins.
    """

    values: dict[str, dict[str, Any]]
    reasons: tuple[str, ...]


def choose(facts: TrainingFacts) -> BudgetDefaults:
    """The settings that fit."""
    tokens = facts.budget_tokens
    batch_size, accumulation = batch(facts)
    step_tokens = batch_size * accumulation * facts.processes * facts.sequence_length
    steps = max(1, math.ceil(tokens / step_tokens))
    rate = learning_rate(facts.width, tokens)
    evaluations = evaluation_count(facts)
    values = {
        "calibrate": {"scales": "learned", "init": "least_error"},
        "distill": {
            "batch_size": batch_size,
            "accumulation": accumulation,
            "learning_rate": rate,
            "schedule": "cosine",
            "warmup": 0.05,
            "losses": [{"name": "forward_kl"}],
            "evaluate_every": max(1, math.ceil(steps / evaluations)),
            "checkpoint_every": min(100, max(1, math.ceil(steps / 10))),
        },
    }
    speed = f"{facts.tokens_per_second:,.0f} tokens/s, {'measured' if facts.measured else 'an estimate'}"
    took = duration(tokens / facts.tokens_per_second)
    return BudgetDefaults(
        values,
        (
            f"{tokens:,} tokens (about {took} at {speed}) are spent in {steps:,} steps of {step_tokens:,} tokens: a "
            "step grows with the square root of the budget.",
            f"Learning rate {rate:g} with 5 % warm-up and a cosine to zero: it falls with the width ({facts.width}) "
            "and with budgets above 300,000 tokens; forward KL alone.",
            "Scales are trained, from those of least error.",
        ),
    )


def batch(facts: TrainingFacts) -> tuple[int, int]:
    """Sequences of a forward pass, and forward passes of a step on each process."""
    wanted = ROOT_FACTOR * math.sqrt(facts.budget_tokens)
    wanted = min(max(wanted, LEAST_STEP_TOKENS), MOST_STEP_TOKENS)
    rows = max(1, round(wanted / facts.sequence_length / facts.processes))
    at_once = max(1, LOGIT_BYTES[facts.device] // (4 * facts.vocabulary * facts.sequence_length))
    accumulation = math.ceil(rows / at_once)
    return math.ceil(rows / accumulation), accumulation


def learning_rate(width: int, tokens: int) -> float:
    """Peak learning rate, to two digits."""
    rate = RATE * RATE_WIDTH / width * min(1.0, (RATE_TOKENS / tokens) ** RATE_EXPONENT)
    return float(f"{min(max(rate, LEAST_RATE), MOST_RATE):.2g}")


def evaluation_count(facts: TrainingFacts) -> int:
    """Evaluations that a training can afford, at least the last one.

    One computes student and teacher forwards, which is half of what a trained token costs.
    """
    cost = facts.evaluate_sequences * facts.sequence_length / 2
    return int(min(max(EVALUATION_SHARE * facts.budget_tokens / cost, 1), MOST_EVALUATIONS))

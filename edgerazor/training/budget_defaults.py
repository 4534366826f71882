"""Settings of a training that fit its budget: batch, learning rate, schedule, objective and start.

A pure function: what is known of a job (its width, tokens or seconds and speed) comes in, settings with their reasons
come out. What a recipe or an option sets is not touched (`budget_choice.py`).

The rule was fitted to the sweep in `recipes/results/budget.md` (2 bits, held-out KL after the budget):

- *Tokens of a step.* With few tokens, many small steps learn more: 30,000 tokens of stories260K leave KL 1.48, 1.06,
  0.92 and 0.84 in steps of 4,096, 1,024, 512 and 256 tokens. So a step is the square root of the budget, which reaches
  the published batches of 8,192 tokens at 67 million. Sequences are no longer than a step, down to 256 tokens.
- *Learning rate.* The best peak at 30,000 tokens is about 1.3e-3 at a width of 64 (stories260K: KL 1.18, 0.92, 1.02 at
  3e-4, 1e-3, 3e-3) and 3e-4 at 256 (realtext-4m: 0.139, 0.117, 0.135 at 1e-4, 3e-4, 1e-3; the embedded teacher: 0.011
  at 3e-4, 0.044 at 1e-3): inversely proportional to the width. From 300,000 tokens on it falls slowly, so that a budget
  of a billion tokens has the published 2e-5 to 6e-5; that part is set by those and not by our sweep.
- *Small weights.* A step of AdamW moves every weight by about the rate, whatever its size. Gemma-3-270M, whose weights
  are smaller than those of the teachers above, has KL 0.44 at 4 bits before training, 1.01 after 50 steps of 256 tokens
  at the 1.2e-4 of its width, and 0.286 after 30 at 2e-5. So the rate also has a bound in units of the weights, which
  those teachers do not reach at 2 bits, and which is lower from 4 bits on, where little is to be moved.
- *Scales.* A step of a scale moves all weights of its group that lie near the edge of a code, and that is mostly noise:
  SmolLM2-135M at 2.4 real bits from GPTQ's codes ends with KL 0.617 where scales learn at a quarter of the rate, and
  0.638 at the whole (34,000 tokens); after 10,000 tokens it is at 0.84 and 0.89, and at 0.98 with five times the rate.
- *Schedule and objective.* A cosine to zero leaves 2 % less KL than a constant rate, forward KL alone 5 % less than
  CE + EAKLD + LAFD (stories260K, 30,000 tokens).
- *Start.* Computed scales (KL 0.905) and trained ones from those of least error (0.918) are one within the noise there;
  the latter need no search in every step, and gain with more tokens (see the results of methods). From GPTQ's codes
  SmolLM2-135M at 2.4 real bits has 8 to 9 % less KL after 10,000, 20,000 and 34,000 tokens (0.985, 0.756 and 0.708
  beside 1.077, 0.821 and 0.774). By the power of the tokens with which the KL falls there (-0.23) that is worth half as
  much training again, so GPTQ is chosen where it takes a quarter of the training's time. Narrow models lose by it:
  stories260K 2 and 4 % (30,000 and 100,000 tokens); the embedded teacher of 256 features ends with 0.0191 after 30,000
  tokens, and with 0.0104 from least error, and with 0.0090 and 0.0058 after 120,000. So it is chosen from 512 on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgerazor.allocate import FEWEST_TOKENS
from edgerazor.console import duration
from edgerazor.recipe import CHOSEN_BY_BUDGET

#: Tokens of a step: so many times the square root of the budget, within these bounds.
ROOT_FACTOR, LEAST_STEP_TOKENS, MOST_STEP_TOKENS = 1.0, 256, 8192
#: On a GPU a step of so many tokens takes hardly longer than one of a single sequence, where time is what counts.
LEAST_GPU_STEP_TOKENS = 4096
#: Peak learning rate of a model of this width, at a budget up to so many tokens, and how it falls with larger ones.
RATE, RATE_WIDTH, RATE_TOKENS, RATE_EXPONENT = 3e-4, 256, 300_000, 0.15
#: Most of the peak learning rate, times the width, in units of the weights' root mean square: up to so many bits, and
#: the share of it that is left for each more bit, of one.
MOST_OF_WEIGHTS, FULL_BITS, SHARE_FOR_A_BIT = 1.3, 3.0, 0.35
#: Bounds of the peak learning rate.
LEAST_RATE, MOST_RATE = 2e-5, 2e-3
#: Learning rate of scales, as a share of that of the weights.
SCALE_RATE = 0.25
#: Share of the training's time that the analysis of sensitivity may take on top, within the bounds of its tokens.
SENSITIVITY_SHARE = 0.25
#: Share of the training's time that GPTQ may take on top, for a better start.
GPTQ_SHARE = 0.25
#: Fewest features of the hidden states with which it is chosen: narrower models lose.
LEAST_GPTQ_WIDTH = 512
#: Share of the training's time that the teacher may write text for on top, and fewest and most tokens of that text.
#: SmolLM2-135M trained over 67,698 of its tokens 3.6 times has KL 0.27 on them and 0.51 on others (2.56 real bits).
WRITING_SHARE, FEWEST_WRITTEN, MOST_WRITTEN = 0.25, 4096, 1 << 20
#: Share of the steps with a rising learning rate.
WARMUP = 0.05
#: Share of the budget that evaluations may take, and most evaluations.
EVALUATION_SHARE, MOST_EVALUATIONS = 0.05, 10
#: Most bytes that the logits of a forward pass may take, in float32.
LOGIT_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class TrainingFacts:
    """What the choice depends on.

    Attributes:
        width: features of the hidden states.
        vocabulary: rows of the head.
        sequence_length: tokens of a sequence.
        tokens: of the budget; None where time alone limits it.
        seconds: of the budget; None where tokens alone limit it.
        tokens_per_second: of a training here, measured or estimated; what is trained in `seconds` is their product.
        measured: whether that speed was measured.
        evaluate_sequences: of an evaluation.
        given_batch: sequences of a step on each process, where the user says it.
        processes: that train together.
        device: `cpu` or `cuda`.
        long_sequences: they stay as long as they are, whatever a step has (pictures take many tokens).
        sensitivity_seconds: of the analysis of sensitivity for a token of its text; 0 where the plan measures nothing.
        sensitivity_tokens: that it reads where neither user nor budget says how many.
        gptq_seconds: of finding GPTQ's codes to begin with; None where they are no choice.
        writing_seconds: of the teacher for a token of the text that it writes; 0 where there is text.
        weight_size: root mean square of the model's largest matrix; None where it is not known.
        bits: of a weight, nominal or real, as they are asked for.
    """

    width: int
    vocabulary: int
    sequence_length: int
    tokens: int | None
    seconds: float | None
    tokens_per_second: float
    measured: bool = False
    evaluate_sequences: int = 32
    given_batch: int | None = None
    processes: int = 1
    device: str = "cpu"
    long_sequences: bool = False
    sensitivity_seconds: float = 0.0
    sensitivity_tokens: int = FEWEST_TOKENS
    gptq_seconds: float | None = None
    writing_seconds: float = 0.0
    weight_size: float | None = None
    bits: float = 2.0

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


def choose(facts: TrainingFacts, fields: Mapping[str, Collection[str]] = CHOSEN_BY_BUDGET) -> BudgetDefaults:
    """The settings that fit.

    Args:
        facts: what they depend on.
        fields: section -> its fields that are to be chosen; the user has set the others.
    """
    if "sequence_length" in fields.get("data", ()):
        facts = replace(facts, sequence_length=sequence_length(facts))
    tokens = facts.budget_tokens
    batch_size, accumulation = batch(facts)
    rows = (facts.given_batch or batch_size * accumulation) * facts.processes
    steps = max(1, math.ceil(tokens / (rows * facts.sequence_length)))
    fitting: dict[str, dict[str, Any]] = {
        "data": {
            "sequence_length": facts.sequence_length,
            **({"generated_tokens": written_tokens(facts)} if facts.writing_seconds else {}),
        },
        "calibrate": {
            "scales": "learned",
            "init": "gptq" if affords_gptq(facts) else "least_error",
            **({"sensitivity_tokens": sensitivity_tokens(facts)} if facts.sensitivity_seconds else {}),
        },
        "distill": {
            "batch_size": batch_size,
            "accumulation": accumulation,
            "learning_rate": learning_rate(facts.width, tokens, facts.weight_size, facts.bits),
            "scale_rate": SCALE_RATE,
            "schedule": "cosine",
            "warmup": WARMUP,
            "losses": [{"name": "forward_kl"}],
            "evaluate_every": max(1, math.ceil(steps / evaluation_count(facts))),
            "checkpoint_every": min(100, max(1, math.ceil(steps / 10))),
        },
    }
    chosen = {
        section: {name: value for name, value in settings.items() if name in fields.get(section, ())}
        for section, settings in fitting.items()
    }
    values = {section: settings for section, settings in chosen.items() if settings}
    return BudgetDefaults(values, tuple(reasons(facts, values, steps)))


def reasons(facts: TrainingFacts, values: Mapping[str, Mapping[str, Any]], steps: int) -> Iterator[str]:
    """Three lines: how the budget is spent, what is chosen of the training and why, and where the student begins."""
    tokens = facts.budget_tokens
    chosen = {name: value for settings in values.values() for name, value in settings.items()}
    speed = f"{facts.tokens_per_second:,.3g} tokens/s, {'measured' if facts.measured else 'an estimate'}"
    step_tokens = math.ceil(tokens / steps)
    why = "a step grows with the square root of the budget" if facts.given_batch is None else "the batch is given"
    yield (
        f"Budget: {tokens:,} tokens, about {duration(tokens / facts.tokens_per_second)} at {speed}; "
        f"{steps:,} steps of about {step_tokens:,} tokens, since {why}."
    )
    training = [
        f"sequences of {facts.sequence_length:,} tokens" if "sequence_length" in chosen else "",
        f"learning rate {chosen['learning_rate']:g}, lower for wider models (here {facts.width} features), small "
        f"weights and budgets above {RATE_TOKENS:,} tokens"
        if "learning_rate" in chosen
        else "",
        f"scales at {chosen['scale_rate']:g} of it" if "scale_rate" in chosen else "",
        f"warm-up {100 * WARMUP:g} %" if "warmup" in chosen else "",
        "cosine to zero" if "schedule" in chosen else "",
        "forward KL, which learns most from few tokens" if "losses" in chosen else "",
    ]
    yield f"Training: {'; '.join(filter(None, training)) or 'as given'}."
    start = [
        "scales are trained" if "scales" in chosen else "",
        beginning(facts, chosen.get("init")),
    ]
    beforehand = [analysis(facts, chosen), writing(facts, chosen)]
    yield f"Start: {', '.join(filter(None, [*start, *beforehand])) or 'as given'}; what is given stays."


def beginning(facts: TrainingFacts, init: str | None) -> str:
    """Where scales and codes begin, in words; empty where the budget does not decide it."""
    if init == "gptq":
        return f"from those of GPTQ with its codes, about {duration(facts.gptq_seconds or 0.0)} beforehand"
    return "from those of least error" if init else ""


def analysis(facts: TrainingFacts, chosen: Mapping[str, Any]) -> str:
    """What the analysis of sensitivity costs, in words; empty where the budget does not decide it."""
    tokens = chosen.get("sensitivity_tokens")
    if tokens is None:
        return ""
    return (
        f"bits by sensitivity from {tokens:,} tokens, about {duration(tokens * facts.sensitivity_seconds)} beforehand"
    )


def writing(facts: TrainingFacts, chosen: Mapping[str, Any]) -> str:
    """What the teacher's own text costs, in words; empty where there is text, or the user says how much."""
    tokens = chosen.get("generated_tokens")
    if tokens is None:
        return ""
    said = f"{tokens:,} tokens of text that the teacher writes"
    if facts.seconds is not None:
        return f"up to {said} in at most {duration(writing_limit(facts))}"
    return f"{said}, about {duration(tokens * facts.writing_seconds)}"


def step_tokens(facts: TrainingFacts) -> float:
    """Tokens that a step should have, of all processes together."""
    by_time_on_gpu = facts.device == "cuda" and facts.tokens is None
    least = LEAST_GPU_STEP_TOKENS if by_time_on_gpu else LEAST_STEP_TOKENS
    return min(max(ROOT_FACTOR * math.sqrt(facts.budget_tokens), least), MOST_STEP_TOKENS)


def sequence_length(facts: TrainingFacts) -> int:
    """Tokens of a sequence: the power of two that is nearest to a step, and no more than it is."""
    if facts.long_sequences:
        return facts.sequence_length
    nearest = 2 ** round(math.log2(step_tokens(facts) / facts.processes))
    return min(facts.sequence_length, max(nearest, LEAST_STEP_TOKENS))


def batch(facts: TrainingFacts) -> tuple[int, int]:
    """Sequences of a forward pass, and forward passes of a step on each process."""
    rows = max(1, round(step_tokens(facts) / facts.sequence_length / facts.processes))
    at_once = max(1, LOGIT_BYTES[facts.device] // (4 * facts.vocabulary * facts.sequence_length))
    accumulation = math.ceil(rows / at_once)
    return math.ceil(rows / accumulation), accumulation


def learning_rate(width: int, tokens: int, weight_size: float | None = None, bits: float = 2.0) -> float:
    """Peak learning rate, to two digits; arguments as in `TrainingFacts`."""
    rate = RATE * RATE_WIDTH / width
    if weight_size:
        share = SHARE_FOR_A_BIT ** min(max(bits - FULL_BITS, 0.0), 1.0)
        rate = min(rate, share * MOST_OF_WEIGHTS * weight_size / width)
    rate *= min(1.0, (RATE_TOKENS / tokens) ** RATE_EXPONENT)
    return float(f"{min(max(rate, LEAST_RATE), MOST_RATE):.2g}")


def affords_gptq(facts: TrainingFacts) -> bool:
    """Whether GPTQ can be had for a share of the training's time, and the model is one of those that gain by it."""
    seconds = facts.budget_tokens / facts.tokens_per_second
    affordable = facts.gptq_seconds is not None and facts.gptq_seconds <= GPTQ_SHARE * seconds
    return affordable and facts.width >= LEAST_GPTQ_WIDTH


def sensitivity_tokens(facts: TrainingFacts) -> int:
    """Tokens that sensitivity is estimated from, so that this takes a share of the training's time."""
    seconds = facts.budget_tokens / facts.tokens_per_second
    affordable = int(SENSITIVITY_SHARE * seconds / facts.sensitivity_seconds)
    return min(max(affordable, FEWEST_TOKENS), facts.sensitivity_tokens)


def written_tokens(facts: TrainingFacts) -> int:
    """Tokens that the teacher writes, no more than are trained.

    Without a time for the training they are as many as it writes, by the estimate, in a share of it; with one, writing
    ends when that share is over (`calibration/own_text.py`), so no estimate makes it less.
    """
    most = facts.budget_tokens
    if facts.seconds is None:
        most = min(most, int(writing_limit(facts) / facts.writing_seconds))
    return min(max(most, FEWEST_WRITTEN), MOST_WRITTEN)


def writing_limit(facts: TrainingFacts) -> float:
    """Seconds that the teacher may write for."""
    return WRITING_SHARE * (facts.seconds or facts.budget_tokens / facts.tokens_per_second)


def evaluation_count(facts: TrainingFacts) -> int:
    """Evaluations that a training can afford, at least the last one.

    One computes student and teacher forwards, which is half of what a trained token costs.
    """
    cost = facts.evaluate_sequences * facts.sequence_length / 2
    return int(min(max(EVALUATION_SHARE * facts.budget_tokens / cost, 1), MOST_EVALUATIONS))

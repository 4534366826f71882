"""What a loss sees and what it gives back.

An optimizer step is made of several micro-batches, perhaps on several processes, and its loss is a mean over all of
them. A mean of means would be wrong where micro-batches hold different numbers of tokens, so a loss returns its
*contribution*: its micro-batch's sum, divided by the count of the whole step. Contributions simply add up, over
micro-batches and processes, to exactly the loss of the one large batch. The counts, and whatever else the whole
step's teacher outputs decide (`teacher_statistics`), are known before the student's first backward pass.

Position `t` predicts token `t + 1`, so position `t` counts when `labels[t + 1]` is not -100, and the last position
of a row never counts. Every loss uses this one mask (`predicting`), with the two counts that `step_counts` gives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgerazor.errors import usage_error

#: Label of a position that is not to be predicted (the convention of PyTorch and transformers).
MASKED = -100


@dataclass(frozen=True)
class Head:
    """From final hidden states to logits: `z = cap·tanh(u / cap)`, `u = scale·(h Wᵀ + b)`; without a cap, `z = u`.

    Args:
        weight: `[V, H]`, any floating dtype: what the products are computed with.
        bias: `[V]` or None.
        scale: factor of the logits (Cohere, Granite).
        cap: largest size of a logit (Gemma), or None.
        master: where the gradient of the weight goes, `[V, H]` (straight through); None for nowhere.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    master: Tensor | None = None

    def logits(self, states: Tensor) -> Tensor:
        """`[n, H]` -> `[n, V]` float32 (float64 for float64 weights), without gradient."""
        weight = self.weight.detach()
        z = _exact_product(states.to(weight.dtype), weight)
        if self.bias is not None:
            z = z.add_(self.bias.detach())
        if self.scale != 1.0:
            z = z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def through_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to `h Wᵀ + b` from that with respect to `logits`, both `[n, V]`; works in place."""
        if self.cap is not None:
            gradient = gradient.sub_(gradient * (logits / self.cap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


#: Rows of a short head that are widened at a time, where products of short numbers cannot give long ones.
WIDENED_ROWS = 1 << 14


def _exact_product(states: Tensor, weight: Tensor) -> Tensor:
    """`states [n, H]` times `weight [V, H]` transposed, `[n, V]` float32 (float64 for float64 factors).

    Factors of 16 bits are multiplied as they are and added up in float32, and the sum is never rounded to 16 bits: a
    logit of 20 in bfloat16 is known to 1/16 only, which alone is a divergence of more than 1e-4 nats.
    """
    wide = exact(weight.dtype)
    if weight.dtype == wide:
        return states @ weight.T
    if weight.is_cuda:
        return torch.mm(states, weight.T, out_dtype=wide)
    states = states.to(wide)
    z = states.new_empty(len(states), len(weight))
    for start in range(0, len(weight), WIDENED_ROWS):
        part = slice(start, start + WIDENED_ROWS)
        torch.mm(states, weight[part].T.to(wide), out=z[:, part])
    return z


@dataclass
class Attention:
    """What entered one layer's attention, behind the rotary embedding and any rounding.

    Args:
        query: `[B, heads, T, d]`, any floating dtype; None where nobody asked for it.
        key: `[B, kv heads, T, d]`; query head `h` reads key head `h // (heads / kv heads)`.
        value: `[B, kv heads, T, d']`.
        scale: factor of the scores `q kᵀ`.
        cap: largest size of a score (Gemma 2), or None.
        mask: `[B or 1, 1, T, T]` bool, true where a query (row) may look at a key; None for every key up to its own.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    mask: Tensor | None = None

    def allowed(self, sample: int, rows: Tensor, length: int) -> Tensor:
        """Which of the first `length` keys the queries at positions `rows [n]` of a sample see, `[n, length]` bool."""
        if self.mask is not None:
            return self.mask[sample if len(self.mask) > 1 else 0, 0, rows, :length]
        return rows[:, None] >= torch.arange(length, device=rows.device)


@dataclass
class Outputs:
    """What a model said about one micro-batch.

    Args:
        states: `[B, T, H]`, the final hidden states, which `head` makes logits of; without a head they are the logits
            themselves, `[B, T, V]`. Any floating dtype.
        hidden: layer number -> `[B, T, H]`; 0 is the embedding's output, `l` the output of decoder layer `l`
            (counted from 1), that of the last layer behind the final norm, as `hidden_states` of transformers. Only the
            layers that were asked for are present.
        head: makes logits, see above.
        attention: layer number, counted from 1 -> what entered its attention, of the layers that were asked for.
        others: of further teachers. What they say of the next tokens is averaged with what this one says (EdgeQAT's
            ensemble); hidden states and attention are always the first teacher's alone.
        averaging: what of them is averaged: their "probabilities", or as EdgeQAT their "logits".
    """

    states: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    head: Head | None = None
    attention: dict[int, Attention] = field(default_factory=dict)
    others: tuple[Outputs, ...] = ()
    averaging: str = "probabilities"
    _kept: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def vocabulary(self) -> int:
        """Number of logits of a position: with further teachers, of those entries that all of them have."""
        own = self.states.shape[-1] if self.head is None else self.head.weight.shape[0]
        return min([own, *(other.vocabulary for other in self.others)])

    def at(self, positions: Tensor) -> Tensor:
        """The states `[n, H]` of positions `[n]` int64, counted through all samples."""
        return self.states.detach().flatten(0, 1).index_select(0, positions)

    def keep_logits(self, positions: Tensor, elements: int) -> None:
        """Compute the logits of positions `[n]` now and keep them, so that a second look at them costs nothing.

        Args:
            positions: all that will be asked for, ascending.
            elements: how many numbers may be kept; where there are more, nothing is.
        """
        if self._kept is None and 0 < len(positions) * self.vocabulary <= elements:
            place = torch.empty(self.states.shape[:2].numel(), dtype=torch.int64, device=positions.device)
            place[positions] = torch.arange(len(positions), device=positions.device)
            self._kept = place, self.logits(positions)

    def logits(self, positions: Tensor) -> Tensor:
        """The logits `[n, V]` of positions `[n]`, a new tensor without gradient.

        With further teachers it is the mean of all teachers' logits, or the logarithm of that of their probabilities,
        one model at a time.
        """
        if self._kept is not None:
            place, logits = self._kept
            return logits[place[positions]]
        states = self.at(positions)
        logits = states if self.head is None else self.head.logits(states)
        if not self.others:
            return logits
        entries = self.vocabulary
        if self.averaging == "logits":
            mean = logits[:, :entries].to(exact(logits.dtype)).clone()
            for other in self.others:
                mean += other.logits(positions)[:, :entries]
            return mean.div_(1 + len(self.others))
        total = log_probabilities(logits, entries)
        for other in self.others:
            total = torch.logaddexp(total, log_probabilities(other.logits(positions), entries))
        return total.sub_(math.log(1 + len(self.others)))


def log_probabilities(logits: Tensor, entries: int) -> Tensor:
    """`[n, V]` -> `[n, entries]`: log softmax over the first entries, float32 (float64 for float64 logits)."""
    return torch.log_softmax(logits[:, :entries].to(exact(logits.dtype)), dim=-1)


@dataclass(frozen=True)
class StepTotals:
    """Counts of the whole optimizer step: the sums of `step_counts` over its micro-batches and processes.

    Args:
        samples: rows with at least one position that counts.
        tokens: positions that count.
        statistics: the sums of every loss's `teacher_statistics`, divided by `samples`.
    """

    samples: int
    tokens: int
    statistics: dict[str, float] = field(default_factory=dict)


class Loss(ABC):
    """One thing the student is asked to match. A file of this folder offers one subclass as `LOSS`.

    The constructor takes the loss's options from a recipe as keyword arguments with defaults, and raises `UserError`
    for values that make no sense.
    """

    #: Whether `__call__` needs the teacher's outputs.
    needs_teacher: bool = True
    #: What it needs of each of its `attention_layers` (see `Attention`).
    attention_parts: tuple[str, ...] = ()

    def choose_layers(self, count: int, measured: Mapping[str, Sequence[float]]) -> None:  # noqa: B027 - most need none
        """Decide which layers it looks at; called once, before anything else is asked.

        Args:
            count: decoder layers of the model.
            measured: metric -> its value for each layer of the teacher, as calibrate measured it.
        """

    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention it needs of student and, where it needs one, teacher; counted from 1, ascending."""
        return ()

    def hidden_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states it needs of student and teacher, ascending (see `Outputs.hidden`)."""
        return ()

    def compared_layers(self, totals: StepTotals) -> tuple[int, ...]:
        """Those of them that it still needs when the step's statistics are known."""
        return self.hidden_layers()

    def chooses_anew(self) -> bool:
        """Whether that differs from step to step."""
        return False

    def looks_twice(self) -> bool:
        """Whether `teacher_statistics` looks at the teacher's next-token distributions, before `__call__` does."""
        return False

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Sums over the samples of a micro-batch, from the teacher alone.

        The training loop adds them up over micro-batches and processes and divides by the step's samples; the
        quotients arrive in `StepTotals.statistics` under the same names.

        Args:
            teacher: the teacher's outputs for the micro-batch.
            labels: `[B, T]` int64, -100 where masked.

        Returns:
            name -> scalar tensor, float32 or float64, without gradient.
        """
        return {}

    @abstractmethod
    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """This micro-batch's contribution to the step's loss.

        Args:
            student: the student's outputs; the gradient flows into these.
            teacher: the teacher's outputs for the same micro-batch, or None where `needs_teacher` is false.
            labels: `[B, T]` int64, -100 where masked.
            totals: counts and statistics of the whole step.

        Returns:
            scalar, float32 (float64 for float64 inputs); 0 with zero gradient where no position counts.

        Raises:
            ValueError: an input that the loss needs is missing, or shapes do not agree.
        """


def predicting(labels: Tensor) -> Tensor:
    """Which positions count: `[B, T]` bool, true at `t` where `labels[:, t + 1]` is not -100; `labels [B, T]` int64."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != MASKED
    return mask


def step_counts(labels: Tensor) -> tuple[int, int]:
    """`(samples, tokens)` of one micro-batch, to be added up into `StepTotals`; `labels [B, T]` int64.

    A sample without any position that counts is no sample: it changes neither sums nor counts.
    """
    mask = predicting(labels)
    return int(mask.any(dim=1).sum()), int(mask.sum())


def sample_weights(labels: Tensor, samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights `[B, T]` that turn a sum over positions into a mean per sample and then over the step's samples.

    Args:
        labels: `[B, T]` int64, -100 where masked.
        samples: samples of the whole step; 1 gives sums over samples of means over their positions.
        dtype: dtype of the result.
    """
    mask = predicting(labels).to(dtype)
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / max(samples, 1)


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype a loss is computed in: float64 for float64 inputs, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_teacher(teacher: Outputs | None, loss: Loss) -> Outputs:
    """The teacher's outputs, which a loss with `needs_teacher` must be given.

    Raises:
        ValueError: they are missing.
    """
    if teacher is None:
        raise ValueError(f"{type(loss).__name__} compares with the teacher, and no teacher outputs were given.")
    return teacher


def positive(name: str, value: float, above: float = 0.0) -> float:
    """`value`, when it is a finite number greater than `above`.

    Raises:
        UserError: it is not; `name` is the option's name in the message.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value < float("inf"):
        raise usage_error(f"The loss option {name} is {value!r}; it must be a number greater than {above:g}.")
    return float(value)

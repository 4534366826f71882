"""What a loss is given and what it returns.

An optimizer step is made of several micro-batches, perhaps on several processes, and its loss is a mean over all of
them. A mean of means would be wrong where micro-batches hold different numbers of tokens, so a loss returns its
*contribution*: its micro-batch's sum, divided by the count of the whole step. Contributions simply add up, over
micro-batches and processes, to exactly the loss of the one large batch. The counts, and whatever else the whole
step's teacher outputs decide (`teacher_statistics`), are known before the student's first backward pass.

Position `t` predicts token `t + 1`, so position `t` counts when `labels[t + 1]` is not -100, and the last position
of a sequence never counts. Every loss uses this one mask (`prediction_mask`), with the two counts of `step_counts`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgerazor.errors import usage_error
from edgerazor.losses.core.recorded import RecordedTokens

#: Label of a position that is not to be predicted (the convention of PyTorch and transformers).
MASKED = -100


@dataclass(frozen=True)
class Head:
    """From final hidden states to logits: `z = cap·tanh(u / cap)`, `u = scale·(h Wᵀ + b)`; without a cap, `z = u`.

    Args:
        weight: `[V, H]`, any floating dtype, as the products are computed with it.
        bias: `[V]` or None.
        scale: factor of the logits (Cohere, Granite).
        cap: soft cap, the largest absolute value of a logit (Gemma), or None.
        master: `[V, H]`, receives the straight-through gradient of the weight; None where it has no gradient.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    master: Tensor | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Hidden states `[n, H]` -> logits `[n, V]` float32 (float64 for float64 weights), without gradient."""
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


#: Rows of a 16-bit head that are converted to float32 at a time, where products of 16-bit factors give 16-bit sums.
WIDENED_ROWS = 1 << 14


def _exact_product(states: Tensor, weight: Tensor) -> Tensor:
    """`states [n, H]` times `weight [V, H]` transposed, `[n, V]` float32 (float64 for float64 factors).

    Factors of 16 bits are multiplied as they are and summed in float32, and the sum is never rounded to 16 bits: a
    logit of 20 in bfloat16 is exact to 1/16 only, which alone is a divergence of more than 1e-4 nats.
    """
    dtype = compute_dtype(weight.dtype)
    if weight.dtype == dtype:
        return states @ weight.T
    if weight.is_cuda:
        return torch.mm(states, weight.T, out_dtype=dtype)
    states = states.to(dtype)
    z = states.new_empty(len(states), len(weight))
    for start in range(0, len(weight), WIDENED_ROWS):
        part = slice(start, start + WIDENED_ROWS)
        torch.mm(states, weight[part].T.to(dtype), out=z[:, part])
    return z


@dataclass
class Attention:
    """The inputs of one layer's attention, behind the rotary embedding and any quantization.

    Args:
        query: `[B, heads, T, d]`, any floating dtype; None where it was not requested.
        key: `[B, kv heads, T, d]`; query head `h` attends to key head `h // (heads / kv heads)`.
        value: `[B, kv heads, T, d']`.
        scale: factor of the scores `q kᵀ`.
        cap: soft cap, the largest absolute value of a score (Gemma 2), or None.
        mask: `[B or 1, 1, T, T]` bool, true where a query (row) may attend to a key; None for the causal mask.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    mask: Tensor | None = None

    def allowed(self, sample: int, rows: Tensor, length: int) -> Tensor:
        """Which of the first `length` keys the queries at positions `rows [n]` of a sample attend to.

        Returns:
            `[n, length]` bool.
        """
        if self.mask is not None:
            return self.mask[sample if len(self.mask) > 1 else 0, 0, rows, :length]
        return rows[:, None] >= torch.arange(length, device=rows.device)


@dataclass
class Routing:
    """What a layer's router said of each token.

    Args:
        logits: `[B, T, experts]`, any floating dtype.
        chosen: `[B, T, k]` int64, the experts that compute the token.
    """

    logits: Tensor
    chosen: Tensor


@dataclass
class Outputs:
    """The outputs of a model for one micro-batch.

    Args:
        last_hidden_state: `[B, T, H]`, behind the final norm, from which `head` computes logits; without a head the
            logits themselves, `[B, T, V]`. Any floating dtype.
        hidden_states: layer number -> `[B, T, H]`; 0 is the embedding's output, `l` the output of decoder layer `l`
            (counted from 1), that of the last layer behind the final norm, as `hidden_states` of transformers. Only
            the requested layers are present.
        head: computes logits, see above.
        attention: layer number, counted from 1 -> inputs of its attention, of the requested layers.
        routing: layer number, counted from 1 -> what its router said, of all layers that have one, where it was
            requested.
        others: outputs of further teachers, whose next-token distributions are averaged with this one's (EdgeQAT's
            ensemble); hidden states and attention are always the first teacher's alone.
        averaging: what is averaged: "probabilities", or, as in EdgeQAT, "logits".
        recorded: of a teacher that was recorded, what is known of its next-token distributions at all positions that
            count, in their order; then there are no last hidden states (`[B, T, 0]`) and no logits.
        pictures: `[B, T]` bool, positions that pictures take; None where there are none, or it is not known.
    """

    last_hidden_state: Tensor
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    head: Head | None = None
    attention: dict[int, Attention] = field(default_factory=dict)
    routing: dict[int, Routing] = field(default_factory=dict)
    others: tuple[Outputs, ...] = ()
    averaging: str = "probabilities"
    recorded: RecordedTokens | None = None
    pictures: Tensor | None = None
    # index of each position among the cached ones, [B·T]; the cached logits, [n, V]
    _logits_cache: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of logits of a position: with further teachers, of those entries that all of them have."""
        if self.recorded is not None:
            return self.recorded.vocab_size
        own = self.last_hidden_state.shape[-1] if self.head is None else self.head.weight.shape[0]
        return min([own, *(other.vocab_size for other in self.others)])

    def states_at(self, positions: Tensor) -> Tensor:
        """Last hidden states `[n, H]` at positions `[n]` int64, counted through all samples, without gradient."""
        return self.last_hidden_state.detach().flatten(0, 1).index_select(0, positions)

    def cache_logits(self, positions: Tensor, max_elements: int) -> None:
        """Compute the logits at positions `[n]` now and cache them for later calls of `logits`.

        Args:
            positions: all positions of later calls, ascending.
            max_elements: how many numbers may be cached; where there are more, none is.
        """
        if self.recorded is not None:
            return
        if self._logits_cache is None and 0 < len(positions) * self.vocab_size <= max_elements:
            size = self.last_hidden_state.shape[:2].numel()
            index = torch.empty(size, dtype=torch.int64, device=positions.device)
            index[positions] = torch.arange(len(positions), device=positions.device)
            self._logits_cache = index, self.logits(positions)

    def logits(self, positions: Tensor) -> Tensor:
        """The logits `[n, V]` at positions `[n]`, a new tensor without gradient.

        With further teachers the mean of all teachers' logits, or the logarithm of the mean of their probabilities,
        one model at a time.
        """
        if self._logits_cache is not None:
            index, logits = self._logits_cache
            return logits[index[positions]]
        states = self.states_at(positions)
        logits = states if self.head is None else self.head.logits(states)
        if not self.others:
            return logits
        vocab_size = self.vocab_size
        if self.averaging == "logits":
            mean = logits[:, :vocab_size].to(compute_dtype(logits.dtype)).clone()
            for other in self.others:
                mean += other.logits(positions)[:, :vocab_size]
            return mean.div_(1 + len(self.others))
        total = log_probs(logits, vocab_size)
        for other in self.others:
            total = torch.logaddexp(total, log_probs(other.logits(positions), vocab_size))
        return total.sub_(math.log(1 + len(self.others)))


def log_probs(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits `[n, V]` -> `[n, vocab_size]`: log softmax over the first entries, float32 (float64 for float64)."""
    return torch.log_softmax(logits[:, :vocab_size].to(compute_dtype(logits.dtype)), dim=-1)


@dataclass(frozen=True)
class StepTotals:
    """Counts of the whole optimizer step: the sums of `step_counts` over its micro-batches and processes.

    Args:
        samples: sequences with at least one position that counts.
        tokens: positions that count.
        statistics: the sums of every loss's `teacher_statistics`, divided by `samples`.
    """

    samples: int
    tokens: int
    statistics: dict[str, float] = field(default_factory=dict)


class Loss(ABC):
    """One thing the student is asked to match. A file of `losses/` offers one subclass as `LOSS`.

    The constructor takes the loss's options from a recipe as keyword arguments with defaults, and raises `UserError`
    for values that make no sense.
    """

    #: Whether `__call__` needs the teacher's outputs.
    needs_teacher: bool = True
    #: What it is when a recording takes the teacher's place (see `core/recorded.py`): "unbiased" where its gradient is
    #: so from a sample, "approximate"; empty where a recording does not hold what it compares.
    from_recording: str = ""
    #: Which inputs of attention it needs of each of its `attention_layers`: fields of `Attention`.
    attention_parts: tuple[str, ...] = ()
    #: Whether it needs the routing of a mixture of experts.
    needs_routing: ClassVar[bool] = False

    def choose_layers(  # noqa: B027 - not abstract, because most losses have no layers to choose
        self, layer_count: int, layer_metrics: Mapping[str, Sequence[float]]
    ) -> None:
        """Decide which layers it compares; called once, before any other method.

        Args:
            layer_count: decoder layers of the model.
            layer_metrics: metric -> its value for each layer of the teacher, as calibrate measured it.
        """

    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention inputs it needs, of the student and, where it needs one, of the teacher.

        Returns:
            layer numbers counted from 1, ascending.
        """
        return ()

    def hidden_layers(self) -> tuple[int, ...]:
        """Layers whose hidden states it needs of student and teacher, ascending (see `Outputs.hidden_states`)."""
        return ()

    def compared_layers(self, totals: StepTotals) -> tuple[int, ...]:
        """Those of its hidden layers that `__call__` compares in a step with these statistics."""
        return self.hidden_layers()

    def layers_vary_by_step(self) -> bool:
        """Whether `compared_layers` differ from step to step."""
        return False

    def statistics_need_logits(self) -> bool:
        """Whether `teacher_statistics` computes the teacher's next-token distributions, as `__call__` does later."""
        return False

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Sums over the samples of a micro-batch, from the teacher alone.

        The training loop sums them over micro-batches and processes and divides by the step's samples; the means
        are given to `__call__` in `StepTotals.statistics`, under the same names.

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


def prediction_mask(labels: Tensor) -> Tensor:
    """Which positions count: `[B, T]` bool, true at `t` where `labels[:, t + 1]` is not -100; `labels [B, T]` int64."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != MASKED
    return mask


def step_counts(labels: Tensor) -> tuple[int, int]:
    """`(samples, tokens)` of one micro-batch, to be summed into `StepTotals`; `labels [B, T]` int64.

    A sample without any position that counts is not counted, and changes no sum.
    """
    mask = prediction_mask(labels)
    return int(mask.any(dim=1).sum()), int(mask.sum())


def sample_weights(labels: Tensor, samples: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Per-token weights `[B, T]`: a weighted sum is the mean over each sample's tokens, then over the step's samples.

    Args:
        labels: `[B, T]` int64, -100 where masked.
        samples: samples of the whole step; 1 gives the sum over samples of the mean over their tokens.
        dtype: dtype of the result.
    """
    mask = prediction_mask(labels).to(dtype)
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / max(samples, 1)


class GradientsInForward(torch.autograd.Function):
    """A scalar loss whose forward pass saves the gradients of all its inputs but the last, a tuple of arguments.

    Backward at most scales them: nothing of the forward pass has to be kept for it.
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients [...] of the inputs, for the gradient [] of the loss."""
        factor = float(upstream)
        return (*(grad if grad is None or factor == 1.0 else grad * factor for grad in ctx.saved_tensors), None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss is computed: float64 for float64 inputs, float32 for all others."""
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
    """Check an option of a loss and return it as a float.

    Args:
        name: of the option, for the message.
        value: of the option.
        above: it must be finite and greater than this.

    Raises:
        UserError: it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value < float("inf"):
        raise usage_error(f"The loss option {name} is {value!r}; it must be a number greater than {above:g}.")
    return float(value)

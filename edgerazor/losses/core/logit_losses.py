"""Losses of next-token distributions, computed a chunk of positions at a time, from hidden states to gradients.

Logits are by far the largest tensors of a training step: `[tokens, vocabulary]` in float32 is 1.2 GB for 2,048 tokens
of Qwen3, and autograd would keep several of that size for each loss and each model. So they are never whole in memory.
A chunk of positions goes from the last hidden states through the head of student and teacher, every loss gives its
value and its gradient with respect to the student's logits, the gradient goes back through the head at once, and the
logits are freed. What stays is one gradient for the hidden states `[tokens, hidden]` and one for the head.

A loss of this kind (`LogitLoss`) therefore gives its gradient itself; all those of this folder have a short closed
form. Within a chunk the losses are given a block of positions at a time, which stays in the processor's cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgerazor.losses.core.base import (
    GradientsInForward,
    Loss,
    Outputs,
    StepTotals,
    compute_dtype,
    prediction_mask,
    require_teacher,
    sample_weights,
)
from edgerazor.losses.core.recorded import RecordedTokens

#: Logits of one chunk of positions, in elements: enough for the products with the head to run at full speed.
CHUNK_ELEMENTS = 1 << 25
#: Logits that the losses are given at a time; on a CPU few enough for the cache, but positions enough for every thread.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_POSITIONS = 32
#: Rows of the head whose gradient is computed at a time.
HEAD_ROWS = 1 << 14


@dataclass
class TokenLogits:
    """Logits of both models at some positions that count. Losses must not overwrite any of its tensors.

    Attributes:
        student: float32 or float64 `[n, V]`, the student's logits; None where only the teacher's are needed.
        teacher: float32 or float64 `[n, V']`, the teacher's logits; None without a teacher, and where it was recorded.
        targets: int64 `[n]`, the tokens to predict.
        sample_weights: `[n]`, per-token weights: a weighted sum is the mean over each sample's tokens, then over the
            step's samples.
        token_weight: one over the step's tokens: a sum times this is the mean over the step's tokens.
        batch_weight: one over the step's samples: a sum times this is the sum over each sample's tokens, then the mean
            over the step's samples.
        recorded: what a recording knows of the teacher's distributions; None where the teacher computes.
    """

    student: Tensor | None
    teacher: Tensor | None
    targets: Tensor
    sample_weights: Tensor
    token_weight: float
    batch_weight: float
    recorded: RecordedTokens | None = None
    _cache: dict[tuple[str, int, float], Tensor] = field(default_factory=dict)

    def student_log_probs(self, temperature: float = 1.0) -> Tensor:
        """`log p_S = log softmax(z_S / T)`, `[n, V]`, computed once for all losses."""
        assert self.student is not None
        return self._log_softmax("student", self.student, self.student.shape[-1], temperature)

    def teacher_log_probs(self) -> Tensor:
        """`log p_T` at temperature 1, `[n, V']`, computed once for all losses."""
        assert self.teacher is not None
        return self._log_softmax("teacher", self.teacher, self.teacher.shape[-1], 1.0)

    def log_probs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """`log p_S` and `log p_T` over the entries that both vocabularies have, computed once for all losses.

        Models of one family pad their vocabularies differently (Qwen does); only padding lies beyond the shorter one.
        """
        assert self.student is not None
        assert self.teacher is not None
        vocab_size = min(self.student.shape[-1], self.teacher.shape[-1])
        return (
            self._log_softmax("student", self.student, vocab_size, temperature),
            self._log_softmax("teacher", self.teacher, vocab_size, temperature),
        )

    def student_beside(self, recorded: RecordedTokens) -> tuple[Tensor, Tensor]:
        """`log p_S` and `p_S` over the entries and at the temperature of what was recorded, computed once."""
        assert self.student is not None
        log_s = self._log_softmax("student", self.student, recorded.vocab_size, recorded.temperature)
        return log_s, self._exp("student", log_s, recorded.temperature)

    def student_probs(self) -> Tensor:
        """`p_S` at temperature 1, `[n, V]`, computed once for all losses."""
        return self._exp("student", self.student_log_probs(), 1.0)

    def probs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """`p_S` and `p_T` over the entries that both vocabularies have, computed once for all losses."""
        student_log_probs, teacher_log_probs = self.log_probs(temperature)
        return (
            self._exp("student", student_log_probs, temperature),
            self._exp("teacher", teacher_log_probs, temperature),
        )

    def _log_softmax(self, model: str, logits: Tensor, vocab_size: int, temperature: float) -> Tensor:
        def compute() -> Tensor:
            common = logits[:, :vocab_size]
            return torch.log_softmax(common if temperature == 1.0 else common / temperature, dim=-1)

        return self._cached((f"log {model}", vocab_size, temperature), compute)

    def _exp(self, model: str, log_probs: Tensor, temperature: float) -> Tensor:
        return self._cached((model, log_probs.shape[-1], temperature), log_probs.exp)

    def _cached(self, key: tuple[str, int, float], compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


class LogitLoss(Loss):
    """A loss that is a weighted sum over positions of a function of the position's logits."""

    @abstractmethod
    def value_and_grad(self, logits: TokenLogits, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """The contribution of some positions, and its gradient with respect to the student's logits.

        Args:
            logits: of both models at the positions, with their weights.
            statistics: of the whole step (`StepTotals.statistics`).

        Returns:
            scalar, and a new tensor `[n, entries]`; beyond `entries` (at most `V`) the gradient is zero.
        """

    def partial_statistics(self, logits: TokenLogits) -> dict[str, Tensor]:
        """What some positions add to `teacher_statistics`; `logits.sample_weights` are those of one sample."""
        return {}

    def statistics_need_logits(self) -> bool:
        """Whether `partial_statistics` has anything to add."""
        return type(self).partial_statistics is not LogitLoss.partial_statistics

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Sums over the samples of a micro-batch (see `Loss`)."""
        sums: dict[str, Tensor] = {}
        if not self.statistics_need_logits():
            return sums
        for chunk in logit_chunks(None, teacher, labels, StepTotals(1, 1)):
            for _, logits in chunk.blocks():
                for name, value in self.partial_statistics(logits).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`)."""
        return total_logit_loss([(1.0, self)], student, teacher, labels, totals)


@dataclass(frozen=True)
class LogitChunk:
    """The logits of a chunk of positions; `positions [n]` are counted through all `B·T` of a micro-batch."""

    positions: Tensor
    logits: TokenLogits

    def blocks(self) -> Iterator[tuple[slice, TokenLogits]]:
        """The logits of a block of positions at a time, and where these are in the chunk."""
        whole = self.logits
        logits = whole.student if whole.student is not None else whole.teacher
        if logits is None:  # of a recorded teacher alone there is nothing large
            yield slice(0, len(whole.targets)), whole
            return
        elements = BLOCK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS)
        height = max(BLOCK_POSITIONS, elements // logits.shape[1])
        for start in range(0, len(logits), height):
            block = slice(start, start + height)
            yield (
                block,
                TokenLogits(
                    None if whole.student is None else whole.student[block],
                    None if whole.teacher is None else whole.teacher[block],
                    whole.targets[block],
                    whole.sample_weights[block],
                    whole.token_weight,
                    whole.batch_weight,
                    None if whole.recorded is None else whole.recorded.part(block),
                ),
            )


def logit_chunks(
    student: Outputs | None, teacher: Outputs | None, labels: Tensor, totals: StepTotals
) -> Iterator[LogitChunk]:
    """The positions that count, with their logits, a chunk at a time; no gradient flows.

    Args:
        student: None where only the teacher's logits are needed.
        teacher: None where only the student's logits are needed.
        labels: `[B, T]` int64, -100 where masked.
        totals: counts of the whole step.

    Raises:
        ValueError: shapes do not agree.
    """
    models = [outputs for outputs in (student, teacher) if outputs is not None]
    for outputs in models:
        states = outputs.last_hidden_state
        if states.shape[:2] != labels.shape:
            raise ValueError(f"States {tuple(states.shape)} and labels {tuple(labels.shape)} do not agree.")
    dtype = compute_dtype(models[0].last_hidden_state.dtype)
    positions = prediction_mask(labels).flatten().nonzero().flatten()
    if not len(positions):
        return
    targets, weights = labels.roll(-1, 1).flatten(), sample_weights(labels, totals.samples, dtype).flatten()
    recorded = None if teacher is None else teacher.recorded
    if recorded is not None and len(recorded) != len(positions):
        raise ValueError(f"{len(recorded)} positions were recorded, and the labels count {len(positions)}.")
    begin = 0
    for chunk_positions in positions.split(max(1, CHUNK_ELEMENTS // models[0].vocab_size)):
        logits = TokenLogits(
            None if student is None else student.logits(chunk_positions).to(dtype),
            None if teacher is None or recorded is not None else teacher.logits(chunk_positions).to(dtype),
            targets[chunk_positions],
            weights[chunk_positions],
            1 / max(totals.tokens, 1),
            1 / max(totals.samples, 1),
            None if recorded is None else recorded.part(slice(begin, begin + len(chunk_positions))),
        )
        begin += len(chunk_positions)
        chunk = LogitChunk(chunk_positions, logits)
        del logits
        yield chunk
        del chunk  # whoever does likewise holds the logits of one chunk at a time


def total_logit_loss(
    terms: Sequence[tuple[float, LogitLoss]],
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor,
    totals: StepTotals,
) -> Tensor:
    """`Σ weight·loss` in one pass over the positions.

    Args:
        terms: (weight, loss); one pass serves all.
        student: the gradient flows into its last hidden state and its head.
        teacher: None where no loss needs it.
        labels: `[B, T]` int64, -100 where masked.
        totals: counts and statistics of the whole step.

    Returns:
        scalar, float32 (float64 for float64 states), differentiable once.

    Raises:
        ValueError: shapes do not agree, or a teacher is missing.
    """
    comparing = [loss for _, loss in terms if loss.needs_teacher]
    needed_teacher = require_teacher(teacher, comparing[0]) if comparing else None
    head = student.head
    master, bias = (head.master, head.bias) if head is not None else (None, None)
    arguments = (terms, student, needed_teacher, labels, totals)
    total: Tensor = _TotalLogitLoss.apply(student.last_hidden_state, master, bias, arguments)
    return total


class _TotalLogitLoss(GradientsInForward):
    """The pass over all chunks. Forward computes the gradients, too."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, master: Tensor | None, bias: Tensor | None, arguments: tuple) -> Tensor:
        terms, student, teacher, labels, totals = arguments
        total = states.new_zeros((), dtype=compute_dtype(states.dtype))
        gradients = _Gradients(student, ctx.needs_input_grad[:3])
        with torch.autocast(states.device.type, enabled=False):
            for chunk in logit_chunks(student, teacher, labels, totals):
                total.add_(_chunk_loss(chunk, terms, totals, gradients))
                del chunk  # before the next one is computed
        ctx.save_for_backward(gradients.states, gradients.weight, gradients.bias)
        return total


def _chunk_loss(
    chunk: LogitChunk, terms: Sequence[tuple[float, LogitLoss]], totals: StepTotals, gradients: _Gradients
) -> Tensor:
    """The contribution of a chunk of positions to `Σ weight·loss`, a scalar; its gradient is added to `gradients`."""
    student_logits = chunk.logits.student
    assert student_logits is not None
    total = student_logits.new_zeros(())
    logits_grad = gradients.buffer(student_logits) if gradients.needed else None  # [n, V]
    for block, logits in chunk.blocks():
        block_grad = None
        for weight, loss in terms:
            value, grad = loss.value_and_grad(logits, totals.statistics)
            total.add_(value, alpha=weight)
            if logits_grad is not None:
                block_grad = _add_weighted(block_grad, grad, weight, student_logits.shape[1])
        if logits_grad is not None:
            assert logits.student is not None
            assert block_grad is not None
            logits_grad[block] = gradients.through_head_(block_grad, logits.student)
    if logits_grad is not None:
        gradients.add(chunk, logits_grad)
    return total


def _add_weighted(total: Tensor | None, grad: Tensor, weight: float, entries: int) -> Tensor:
    """`total + weight·grad`, `[n, entries]`; both may be overwritten. Beyond the columns of `grad` it is zero."""
    if total is not None:
        total[:, : grad.shape[1]].add_(grad, alpha=weight)
        return total
    if grad.shape[1] == entries:
        return grad.mul_(weight)
    return torch.nn.functional.pad(grad.mul_(weight), (0, entries - grad.shape[1]))


class _Gradients:
    """Gradients of a step's loss with respect to the last hidden states and the head, summed over the chunks.

    Args:
        student: whose gradients they are.
        needed: whether the last hidden states, the head's weight and its bias need a gradient.
    """

    def __init__(self, student: Outputs, needed: Sequence[bool]) -> None:
        self.student = student
        self.needed = any(needed)
        self.states = self.weight = self.bias = None
        head, states = student.head, student.last_hidden_state
        dtype = compute_dtype(states.dtype)
        if needed[0]:
            self.states = torch.zeros_like(states, memory_format=torch.contiguous_format)
        if head is not None and needed[1]:
            self.weight = torch.zeros(head.weight.shape, dtype=dtype, device=states.device)
        if head is not None and head.bias is not None and needed[2]:
            self.bias = torch.zeros(head.bias.shape, dtype=dtype, device=states.device)

    def buffer(self, logits: Tensor) -> Tensor:
        """Where the gradient of a chunk's logits `[n, V]` is put together, in the dtype of the products with the head.

        Where that is the logits' own, it takes their place: a block of them is not needed once its gradient is known.
        """
        head = self.student.head
        dtype = logits.dtype if head is None else head.weight.dtype
        return logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)

    def through_head_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the product with the head for that of a block's logits, both `[n, V]`; overwrites it."""
        head = self.student.head
        if head is None:
            return grad
        grad = head.through_(grad, logits)
        if self.bias is not None:
            self.bias += grad.sum(0)
        return grad

    def add(self, chunk: LogitChunk, grad: Tensor) -> None:
        """Propagate the gradient of a chunk's products with the head, `[n, V]`, to the head and the states."""
        head = self.student.head
        if head is not None:
            if self.weight is not None:
                states = self.student.states_at(chunk.positions).to(head.weight.dtype)  # [n, H]
                for start in range(0, grad.shape[1], HEAD_ROWS):  # products in low precision, sums in high precision
                    part = slice(start, start + HEAD_ROWS)
                    self.weight[part] += grad[:, part].T @ states
            grad = grad @ head.weight  # [n, H]
        if self.states is not None:
            self.states.view(-1, self.states.shape[-1]).index_copy_(0, chunk.positions, grad.to(self.states.dtype))

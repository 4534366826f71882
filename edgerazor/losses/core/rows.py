"""Losses of next-token distributions, a chunk of positions at a time, from hidden states to gradients.

Logits are by far the largest tensors of a training step: `[tokens, vocabulary]` in float32 is 1.2 GB for 2,048 tokens
of Qwen3, and autograd would keep several of that size for each loss and each model. So they are never made whole. A
chunk of positions goes from the final hidden states through the head of student and teacher, every loss gives its
value and its gradient with respect to the student's logits, the gradient goes back through the head at once, and the
logits are forgotten. What stays is one gradient for the hidden states `[tokens, hidden]` and one for the head.

A loss of this kind (`RowLoss`) therefore gives its gradient itself; all those of this folder have a short closed form.
Within a chunk the losses see a few rows at a time, which stay in the processor's cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgerazor.losses.core.base import Loss, Outputs, StepTotals, exact, predicting, require_teacher, sample_weights

#: Logits of one chunk of positions, in elements: enough for the products with the head to run at full speed.
CHUNK_ELEMENTS = 1 << 25
#: Logits that the losses work on at a time; on a CPU few enough for the cache, but rows enough for every thread.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ROWS = 32
#: Rows of the head whose gradient is computed at a time.
HEAD_ROWS = 1 << 14


@dataclass
class Rows:
    """Some positions that count, and what is known about them. Losses must not overwrite any of it.

    Attributes:
        student: float32 or float64 `[n, V]`, the student's logits; None where only the teacher is looked at.
        teacher: the same `[n, V']`, the teacher's; None without a teacher.
        targets: int64 `[n]`, the tokens to predict.
        samples: `[n]`, weights that turn a sum over positions into a mean per sample, then over the step's samples.
        tokens: the factor that turns a sum over positions into the mean over the step's tokens.
        batch: the one that makes of it the sum over a sample's positions, then the mean over the step's samples.
    """

    student: Tensor | None
    teacher: Tensor | None
    targets: Tensor
    samples: Tensor
    tokens: float
    batch: float
    _kept: dict[tuple[str, int, float], Tensor] = field(default_factory=dict)

    def log_student(self, temperature: float = 1.0) -> Tensor:
        """`log p_S = log softmax(z_S / T)`, `[n, V]`, computed once for all losses."""
        assert self.student is not None
        return self._log("student", self.student, self.student.shape[-1], temperature)

    def log_teacher(self) -> Tensor:
        """The teacher's own log-probabilities, `[n, V']`."""
        assert self.teacher is not None
        return self._log("teacher", self.teacher, self.teacher.shape[-1], 1.0)

    def log_both(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """`log p_S` and `log p_T` over the entries both vocabularies have, likewise.

        Models of one family pad their vocabularies differently (Qwen does); only padding lies beyond the shorter one.
        """
        assert self.student is not None
        assert self.teacher is not None
        entries = min(self.student.shape[-1], self.teacher.shape[-1])
        return (
            self._log("student", self.student, entries, temperature),
            self._log("teacher", self.teacher, entries, temperature),
        )

    def p_student(self) -> Tensor:
        """`p_S`, `[n, V]`, likewise."""
        return self._exp("student", self.log_student(), 1.0)

    def p_both(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """`p_S` and `p_T` over the entries both vocabularies have, likewise."""
        log_s, log_t = self.log_both(temperature)
        return self._exp("student", log_s, temperature), self._exp("teacher", log_t, temperature)

    def _log(self, who: str, logits: Tensor, entries: int, temperature: float) -> Tensor:
        def compute() -> Tensor:
            scaled = logits[:, :entries]
            return torch.log_softmax(scaled if temperature == 1.0 else scaled / temperature, dim=-1)

        return self._once((f"log {who}", entries, temperature), compute)

    def _exp(self, who: str, log_p: Tensor, temperature: float) -> Tensor:
        return self._once((who, log_p.shape[-1], temperature), log_p.exp)

    def _once(self, key: tuple[str, int, float], compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]


class RowLoss(Loss):
    """A loss that is a weighted sum over positions of a function of the position's logits."""

    @abstractmethod
    def rows(self, rows: Rows, statistics: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """The contribution of some positions, and its gradient with respect to the student's logits.

        Args:
            rows: the positions, with their weights.
            statistics: of the whole step (`StepTotals.statistics`).

        Returns:
            scalar, and a new tensor `[n, entries]`; beyond `entries` (at most `V`) the gradient is zero.
        """

    def teacher_rows(self, rows: Rows) -> dict[str, Tensor]:
        """What some positions add to `teacher_statistics`; here `rows.samples` gives the mean of one sample."""
        return {}

    def looks_twice(self) -> bool:
        """Whether `teacher_rows` has anything to add."""
        return type(self).teacher_rows is not RowLoss.teacher_rows

    def teacher_statistics(self, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Sums over the samples of a micro-batch (see `Loss`)."""
        sums: dict[str, Tensor] = {}
        if not self.looks_twice():
            return sums
        for chunk in chunks(None, teacher, labels, StepTotals(1, 1)):
            for _, rows in chunk.blocks():
                for name, value in self.teacher_rows(rows).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Tensor:
        """The micro-batch's contribution (see `Loss`)."""
        return row_losses([(1.0, self)], student, teacher, labels, totals)


@dataclass(frozen=True)
class Chunk:
    """Some positions, `[n]` numbers among all `B·T` of a micro-batch, and their rows."""

    positions: Tensor
    rows: Rows

    def blocks(self) -> Iterator[tuple[slice, Rows]]:
        """The rows a few at a time, and where they are in the chunk."""
        whole = self.rows
        logits = whole.student if whole.student is not None else whole.teacher
        assert logits is not None
        elements = BLOCK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS)
        height = max(BLOCK_ROWS, elements // logits.shape[1])
        for start in range(0, len(logits), height):
            part = slice(start, start + height)
            student, teacher = (None if each is None else each[part] for each in (whole.student, whole.teacher))
            yield part, Rows(student, teacher, whole.targets[part], whole.samples[part], whole.tokens, whole.batch)


def chunks(student: Outputs | None, teacher: Outputs | None, labels: Tensor, totals: StepTotals) -> Iterator[Chunk]:
    """The positions that count, with their logits, a chunk at a time; no gradient flows.

    Args:
        student: None to look at the teacher only.
        teacher: None to look at the student only.
        labels: `[B, T]` int64, -100 where masked.
        totals: counts of the whole step.

    Raises:
        ValueError: shapes do not agree.
    """
    models = [each for each in (student, teacher) if each is not None]
    for each in models:
        if each.states.shape[:2] != labels.shape:
            raise ValueError(f"States {tuple(each.states.shape)} and labels {tuple(labels.shape)} do not agree.")
    dtype = exact(models[0].states.dtype)
    positions = predicting(labels).flatten().nonzero().flatten()
    if not len(positions):
        return
    targets, samples = labels.roll(-1, 1).flatten(), sample_weights(labels, totals.samples, dtype).flatten()
    for chosen in positions.split(max(1, CHUNK_ELEMENTS // models[0].vocabulary)):
        ours, theirs = (None if each is None else each.logits(chosen).to(dtype) for each in (student, teacher))
        factors = 1 / max(totals.tokens, 1), 1 / max(totals.samples, 1)
        yield Chunk(chosen, Rows(ours, theirs, targets[chosen], samples[chosen], *factors))


def row_losses(
    terms: Sequence[tuple[float, RowLoss]],
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor,
    totals: StepTotals,
) -> Tensor:
    """`Σ weight·loss` in one pass over the positions.

    Args:
        terms: (weight, loss); one pass serves all.
        student: the gradient flows into its states and its head.
        teacher: None where no loss needs it.
        labels: `[B, T]` int64, -100 where masked.
        totals: counts and statistics of the whole step.

    Returns:
        scalar, float32 (float64 for float64 states), differentiable once.

    Raises:
        ValueError: shapes do not agree, or a teacher is missing.
    """
    needing = [loss for _, loss in terms if loss.needs_teacher]
    seen = require_teacher(teacher, needing[0]) if needing else None
    head = student.head
    master, bias = (head.master, head.bias) if head is not None else (None, None)
    total: Tensor = _RowLosses.apply(student.states, master, bias, (terms, student, seen, labels, totals))
    return total


class _RowLosses(torch.autograd.Function):
    """The pass over all chunks. Gradients are made on the way; backward at most scales them."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, master: Tensor | None, bias: Tensor | None, job: tuple) -> Tensor:
        terms, student, teacher, labels, totals = job
        total = states.new_zeros((), dtype=exact(states.dtype))
        gradients = _Gradients(student, ctx.needs_input_grad[:3])
        with torch.autocast(states.device.type, enabled=False):
            for chunk in chunks(student, teacher, labels, totals):
                gradient = torch.zeros_like(chunk.rows.student) if gradients.wanted else None  # [n, V]
                for part, rows in chunk.blocks():
                    for weight, loss in terms:
                        value, found = loss.rows(rows, totals.statistics)
                        total.add_(value, alpha=weight)
                        if gradient is not None:
                            gradient[part, : found.shape[1]].add_(found, alpha=weight)
                if gradient is not None:
                    gradients.add(chunk, gradient)
        ctx.save_for_backward(gradients.states, gradients.weight, gradients.bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = float(upstream)
        found = (each if each is None or factor == 1.0 else each * factor for each in ctx.saved_tensors)
        return (*found, None)


class _Gradients:
    """What a step's loss says about the final hidden states and the head, added up over the chunks."""

    def __init__(self, student: Outputs, wanted: Sequence[bool]) -> None:
        self.student = student
        self.wanted = any(wanted)
        self.states = self.weight = self.bias = None
        head, device, dtype = student.head, student.states.device, exact(student.states.dtype)
        if wanted[0]:
            self.states = torch.zeros_like(student.states, memory_format=torch.contiguous_format)
        if head is not None and wanted[1]:
            self.weight = torch.zeros(head.weight.shape, dtype=dtype, device=device)
        if head is not None and head.bias is not None and wanted[2]:
            self.bias = torch.zeros(head.bias.shape, dtype=dtype, device=device)

    def add(self, chunk: Chunk, gradient: Tensor) -> None:
        """Send the gradient of a chunk's logits, `[n, V]`, back through the head; overwrites it."""
        head = self.student.head
        if head is not None:
            assert chunk.rows.student is not None
            gradient = head.through_(gradient, chunk.rows.student)
            if self.bias is not None:
                self.bias += gradient.sum(0)
            gradient = gradient.to(head.weight.dtype)
            if self.weight is not None:
                states = self.student.at(chunk.positions).to(head.weight.dtype)  # [n, H]
                for start in range(0, gradient.shape[1], HEAD_ROWS):  # products in low precision, sums in high
                    part = slice(start, start + HEAD_ROWS)
                    self.weight[part] += gradient[:, part].T @ states
            gradient = gradient @ head.weight  # [n, H]
        if self.states is not None:
            self.states.view(-1, self.states.shape[-1]).index_copy_(0, chunk.positions, gradient.to(self.states.dtype))

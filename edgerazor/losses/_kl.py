"""Forward and reverse KL divergence between teacher and student, their value and gradient in one pass.

For student logits `z`, `p_S = softmax(z / T)`, `p_T` the teacher's softmax at the same temperature, and
`d = log p_S - log p_T`, one token gives

    forward  KL(p_T ‖ p_S) = -Σ p_T·d       gradient with respect to z:  (p_S - p_T) / T
    reverse  KL(p_S ‖ p_T) =  Σ p_S·d       gradient with respect to z:  p_S·(d - KL(p_S ‖ p_T)) / T

Forward KL makes the student cover everything the teacher might say; reverse KL makes it avoid what the teacher would
not say. Both are multiplied by `T²`, so that gradients keep their size when the temperature changes (Hinton et al.,
arXiv 1503.02531, section 2).

Left to autograd, this would keep half a dozen `[tokens, V]` arrays alive. Here rows are taken in chunks that stay in
the processor's cache; each chunk's value and gradient are computed together, and the gradient is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from edgerazor.losses._base import exact

#: Elements of one chunk of rows: on a CPU small enough for the cache, elsewhere large enough to fill the device.
CHUNK_ELEMENTS = {"cpu": 1 << 18}
CHUNK_ELEMENTS_ELSEWHERE = 1 << 25

#: (chunk's logits [n, V], chunk's row numbers [n], gradient wanted) -> (sum over the chunk, gradient [n, V] or None)
ChunkFunction = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def common_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits `[..., V]` cut to the entries they share, as views.

    Models of one family pad their vocabularies differently (Qwen does); only padding lies beyond the shorter one.
    """
    entries = min(student.shape[-1], teacher.shape[-1])
    return student[..., :entries], teacher[..., :entries]


def chunks(weights: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """The row numbers with a weight other than 0, cut into chunks; `weights [N]` -> int64 tensors `[n]`."""
    rows = weights.nonzero().flatten()
    elements = CHUNK_ELEMENTS.get(weights.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    return rows.split(max(1, elements // vocabulary)) if len(rows) else ()


class _RowSum(torch.autograd.Function):
    """Sum over rows of a function of a row, whose gradient is computed along with its value."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, parts: tuple[Tensor, ...], function: ChunkFunction, differentiable: bool
    ) -> Tensor:
        total = logits.new_zeros((), dtype=exact(logits.dtype))
        gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format) if differentiable else None  # [N, V]
        for rows in parts:
            value, chunk_gradient = function(logits.index_select(0, rows), rows, differentiable)
            total += value
            if gradient is not None and chunk_gradient is not None:
                gradient.index_copy_(0, rows, chunk_gradient.to(gradient.dtype))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def row_sum(logits: Tensor, weights: Tensor, function: ChunkFunction) -> Tensor:
    """Sum of a function over the rows whose weight is not 0, a chunk of rows at a time.

    Args:
        logits: `[N, V]`, any floating dtype.
        weights: `[N]`; rows of weight 0 are not read. (The function itself multiplies by the weights.)
        function: gives a chunk's sum and, if wanted, its gradient with respect to the chunk's logits.

    Returns:
        scalar, float32 (float64 for float64 logits), differentiable once with respect to `logits`.
    """
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    total: Tensor = _RowSum.apply(logits, chunks(weights, logits.shape[-1]), function, differentiable)
    return total


def mixed_kl(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, gamma: float, temperature: float = 1.0
) -> Tensor:
    """`T² Σ_i w_i [γ·KL(p_S ‖ p_T) + (1 - γ)·KL(p_T ‖ p_S)]` over positions `i`.

    Source: the two terms of EdgeRazor's logits distillation (arXiv 2605.04062); γ = 0 is forward, γ = 1 reverse KL.

    Args:
        student_logits: `[..., V]`, any floating dtype; the gradient flows here only.
        teacher_logits: `[..., V']`; where `V'` differs, the entries both share count.
        weights: `[...]`, one per position; 0 leaves a position out.
        gamma: share of reverse KL, from 0 to 1.
        temperature: `T` > 0.

    Returns:
        scalar, float32 (float64 for float64 student logits).

    Raises:
        ValueError: shapes do not agree, or gamma or temperature are out of range.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1] or student_logits.shape[:-1] != weights.shape:
        shapes = f"{tuple(student_logits.shape)}, {tuple(teacher_logits.shape)} and {tuple(weights.shape)}"
        raise ValueError(f"Student logits, teacher logits and weights have shapes {shapes}, which do not agree.")
    if not 0 <= gamma <= 1 or not temperature > 0:
        raise ValueError(f"gamma is {gamma} and must be in [0, 1]; temperature is {temperature} and must be above 0.")
    student, teacher = common_vocabulary(student_logits, teacher_logits)
    student = student.reshape(-1, student.shape[-1])  # [N, V]
    teacher = teacher.detach().reshape(-1, teacher.shape[-1])  # [N, V]
    dtype = exact(student.dtype)
    weights = weights.reshape(-1).to(dtype)  # [N]

    def chunk(logits: Tensor, rows: Tensor, differentiable: bool) -> tuple[Tensor, Tensor | None]:
        target = teacher.index_select(0, rows)  # [n, V]
        log_s = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
        log_t = torch.log_softmax(target.to(dtype) / temperature, dim=-1)
        return _mixed_chunk(log_s, log_t, weights[rows, None], gamma, temperature, differentiable)

    return row_sum(student, weights, chunk)


def _mixed_chunk(
    log_s: Tensor, log_t: Tensor, weight: Tensor, gamma: float, temperature: float, differentiable: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum and gradient for `log_s, log_t [n, V]` and `weight [n, 1]`; overwrites both log-probabilities."""
    p_s, p_t = log_s.exp(), log_t.exp()  # [n, V]
    d = log_s.sub_(log_t)
    forward = -torch.linalg.vecdot(p_t, d)[:, None]  # [n, 1]
    reverse = torch.linalg.vecdot(p_s, d)[:, None]  # [n, 1]
    value = (weight * (gamma * reverse + (1 - gamma) * forward)).sum() * temperature**2
    if not differentiable:
        return value, None
    # T·w·[γ·p_S·(d - reverse) + (1 - γ)·(p_S - p_T)], which is exactly 0 where student equals teacher
    seek = d.sub_(reverse).mul_(p_s) if gamma else None  # before p_s is overwritten
    gradient = p_s.sub_(p_t)
    if seek is not None:
        gradient = seek.mul_(gamma).add_(gradient, alpha=1 - gamma)
    return value, gradient.mul_(temperature * weight)


def entropy_sum(logits: Tensor, weights: Tensor) -> Tensor:
    """`Σ_i w_i H(softmax(logits_i))` in nats, without gradient.

    Args:
        logits: `[..., V]`, any floating dtype.
        weights: `[...]`, one per position; 0 leaves a position out.
    """
    flat = logits.detach().reshape(-1, logits.shape[-1])  # [N, V]
    dtype = exact(flat.dtype)
    weights = weights.reshape(-1).to(dtype)  # [N]

    def chunk(part: Tensor, rows: Tensor, differentiable: bool) -> tuple[Tensor, None]:
        log_p = torch.log_softmax(part.to(dtype), dim=-1)
        return -(weights[rows] * torch.linalg.vecdot(log_p.exp(), log_p)).sum(), None

    return row_sum(flat, weights, chunk)

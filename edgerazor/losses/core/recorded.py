"""Next-token distributions as a recording keeps them, and the divergences of a student from them.

Of a teacher's distribution a recording keeps `n` tokens of some tens of thousands. The likeliest are kept for certain;
of the others, the tail, some are kept by chance: token `j` with the known probability `π_j`. What a sum over all tokens
is, then, is estimated without bias by the Horvitz-Thompson estimator: each kept token counts `1 / π_j` times (Random
Sampling Knowledge Distillation, arXiv 2503.16870, draws with replacement; here no token is drawn twice, so that the
same bytes say more). A recording of the likeliest tokens alone (`top_k`) has no such tokens.

For student `p_S`, teacher `p_T` at one temperature and `d = log p_S - log p_T`, every divergence is a sum over tokens
of a function of `p_S` and `p_T`. Where nothing is known of a tail token, the teacher is taken to share out its tail as
the student does its own: `d` is then `d̄ = log(m_S / m_T)` all over the tail, of which the student has `m_S` and the
teacher `m_T`. The kept tokens correct that:

    reverse   KL(p_S ‖ p_T) ≈  d̄ + Σ_kept p_S/π·(d - d̄)     gradient:  p_S·(d̄ - reverse) + [p_S/π·(d - d̄)]_kept
    forward   KL(p_T ‖ p_S) ≈ -d̄ - Σ_kept p_T/π·(d - d̄)     gradient:  p_S·Σ p̂ - p̂

where `p̂` is an estimate of `p_T`: with `b = λ·p_S·m_T / m_S` all over the tail, `p̂ = b + [(p_T - b)/π]_kept`. That is
unbiased for any `λ` that does not depend on which tokens of the tail were kept (a control variate): 0 is the plain
estimate, and 1 leaves no noise where the student is as its teacher, but much where it is not. The best is
`1 / (1 + χ²)` of the two tails, and what the tokens that were kept for certain say of it is
`λ = exp(-E_T[(d - d̄)²])`.

With a sample the forward KL and its gradient are unbiased, and so would the reverse be. But a student that likes what
its teacher hardly ever says meets such a token once in a thousand positions and then counts it a thousand times; so its
`p_S/π` is cut off at `MOST_RATIO` times `p_T/π`, which leaves a bias where a student is far from its teacher. Without a
sample (`top_k`; then `λ` is 1) both are those of the tokens that were kept and one more that stands for all others: the
student learns nothing about the tail but its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: A tail token that the student likes more than so many times as much as its teacher counts no more than that.
MOST_RATIO = 8.0


@dataclass(frozen=True)
class RecordedTokens:
    """What is known of a teacher's next-token distributions at `N` positions.

    Attributes:
        ids: int64 `[N, n]`, the tokens that were kept.
        log_probs: float32 `[N, n]`, their `log p_T` at `temperature`.
        weights: float32 `[N, n]`, `1 / π`: 1 for tokens that were kept for certain, more for those kept by chance.
        by_chance: bool `[N, n]`, which tokens those are; all of them are of the tail.
        tail: float32 `[N]`, probability of all tokens that were not kept for certain.
        entropy: float32 `[N]`, of the teacher's own distribution (temperature 1), in nats, exact.
        target_log_probs: float32 `[N]`, that the teacher gives to the token of the text (temperature 1), exact.
        vocab_size: entries of the teacher's distribution.
        temperature: of the distributions that `log_probs` and `tail` are of.
    """

    ids: Tensor
    log_probs: Tensor
    weights: Tensor
    by_chance: Tensor
    tail: Tensor
    entropy: Tensor
    target_log_probs: Tensor
    vocab_size: int
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, positions: slice) -> RecordedTokens:
        """What is known of some of the positions."""
        return RecordedTokens(
            self.ids[positions],
            self.log_probs[positions],
            self.weights[positions],
            self.by_chance[positions],
            self.tail[positions],
            self.entropy[positions],
            self.target_log_probs[positions],
            self.vocab_size,
            self.temperature,
        )


@dataclass(frozen=True)
class _Compared:
    """A student beside what is known of its teacher, at `n` positions of which `k` tokens were kept.

    Attributes:
        ratio: `d = log p_S - log p_T` of the kept tokens, `[n, k]`.
        tail_ratio: `d̄ = log(m_S / m_T)`, `[n, 1]`.
        student: how often a kept token of the student counts, `p_S / π`, `[n, k]`.
        teacher: the same of the teacher, `p_T / π`.
        student_probs: `p_S` of the kept tokens, `[n, k]`.
        student_certain: the same, 0 for those that were kept by chance.
        student_tail, teacher_tail: `m_S` and `m_T`, `[n, 1]`.
    """

    ratio: Tensor
    tail_ratio: Tensor
    student: Tensor
    teacher: Tensor
    student_probs: Tensor
    student_certain: Tensor
    student_tail: Tensor
    teacher_tail: Tensor

    def correction(self, function: Callable[[Tensor], Tensor], counts: Tensor) -> Tensor:
        """What the kept tokens add to a sum over all tokens in which all have the tail's ratio, `[n, k]`."""
        return counts * (function(self.ratio) - function(self.tail_ratio))


def _compare(log_s: Tensor, recorded: RecordedTokens) -> _Compared:
    dtype = log_s.dtype
    log_t, weights = recorded.log_probs.to(dtype), recorded.weights.to(dtype)
    kept_log_s = log_s.gather(1, recorded.ids)
    p_s, p_t = kept_log_s.exp(), log_t.exp()
    least = torch.finfo(dtype).eps
    certain_s = p_s.masked_fill(recorded.by_chance, 0.0)
    tail_s = (1 - certain_s.sum(1, keepdim=True)).clamp_(min=least)
    tail_t = recorded.tail.to(dtype)[:, None].clamp(min=least)
    teacher = p_t * weights
    student = torch.minimum(p_s, MOST_RATIO * p_t)
    student = torch.where(recorded.by_chance, student * weights, p_s)
    return _Compared(kept_log_s - log_t, tail_s.log() - tail_t.log(), student, teacher, p_s, certain_s, tail_s, tail_t)


def forward_kl(log_s: Tensor, recorded: RecordedTokens) -> Tensor:
    """An unbiased estimate of `KL(p_T ‖ p_S)` at each position, `[n]`, for `log p_S` `[n, V]`; of a sample only."""
    compared = _compare(log_s, recorded)
    return -compared.tail_ratio[:, 0] - compared.correction(lambda ratio: ratio, compared.teacher).sum(1)


def mixed_kl(
    log_s: Tensor, p_s: Tensor, recorded: RecordedTokens, gamma: float | Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """`T² Σ_i w_i [γ_i·KL(p_S ‖ p_T) + (1 - γ_i)·KL(p_T ‖ p_S)]` over positions, and its gradient (see above).

    Args:
        log_s, p_s: of the student at the recording's temperature, `[n, V]`.
        recorded: of the teacher.
        gamma: share of reverse KL, one for all positions or `[n]`.
        weights: `w`, `[n]`.

    Returns:
        scalar, and the gradient with respect to the student's logits `[n, V]`.
    """
    compared, temperature = _compare(log_s, recorded), recorded.temperature
    share: float | Tensor = gamma[:, None] if isinstance(gamma, Tensor) else gamma
    reverse_part = compared.correction(lambda ratio: ratio, compared.student)
    reverse = compared.tail_ratio + reverse_part.sum(1, keepdim=True)
    forward = -compared.tail_ratio - compared.correction(lambda ratio: ratio, compared.teacher).sum(1, keepdim=True)
    everywhere, estimate = _teacher_estimate(compared, recorded)
    total = everywhere * compared.student_tail + estimate.sum(1, keepdim=True)
    factor = share * (compared.tail_ratio - reverse) + (1 - share) * (total - everywhere)
    at_tokens = (1 - share) * (everywhere * compared.student_certain - estimate)
    gradient = (p_s * factor).scatter_add_(1, recorded.ids, share * reverse_part + at_tokens)
    weight = weights[:, None]
    value = (weight * (share * reverse + (1 - share) * forward)).sum() * temperature**2
    return value, gradient.mul_(temperature * weight)


def _teacher_estimate(compared: _Compared, recorded: RecordedTokens) -> tuple[Tensor, Tensor]:
    """An estimate of `p_T` of all tokens.

    Returns:
        so many times `p_S` all over the tail, `[n, 1]`; what the kept tokens have in its place, where they were kept
        for certain, or on top of it, `[n, k]`.
    """
    certain = ~recorded.by_chance
    distance = (compared.teacher * certain * (compared.ratio - compared.tail_ratio).square()).sum(1, keepdim=True)
    has_sample = recorded.by_chance.any(1, keepdim=True)
    factor = torch.where(
        has_sample, (-distance / (compared.teacher * certain).sum(1, keepdim=True).clamp(min=1e-3)).exp(), 1.0
    )
    everywhere = factor * compared.teacher_tail / compared.student_tail
    known = compared.student_probs * recorded.weights.to(compared.ratio.dtype) * everywhere
    return everywhere, compared.teacher - torch.where(certain, 0.0, known)


def jensen_shannon(
    log_s: Tensor, p_s: Tensor, recorded: RecordedTokens, beta: float, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """`T² Σ_i w_i [β·KL(p_T ‖ m) + (1 - β)·KL(p_S ‖ m)]`, `m = β·p_T + (1 - β)·p_S`, and its gradient.

    Args:
        log_s, p_s: of the student at the recording's temperature, `[n, V]`.
        recorded: of the teacher.
        beta: weight of the teacher in the mixture.
        weights: `w`, `[n]`.

    Returns:
        scalar, and the gradient with respect to the student's logits `[n, V]`.
    """
    compared, temperature = _compare(log_s, recorded), recorded.temperature

    def student_to_mixture(ratio: Tensor) -> Tensor:  # log p_S / m
        return -torch.logaddexp(math.log(beta) - ratio, ratio.new_tensor(math.log1p(-beta)))

    def teacher_to_mixture(ratio: Tensor) -> Tensor:  # log p_T / m
        return student_to_mixture(ratio) - ratio

    student_part = compared.correction(student_to_mixture, compared.student)
    tail_student = student_to_mixture(compared.tail_ratio)
    student = tail_student + student_part.sum(1, keepdim=True)
    teacher_part = compared.correction(teacher_to_mixture, compared.teacher)
    teacher = teacher_to_mixture(compared.tail_ratio) + teacher_part.sum(1, keepdim=True)
    weight = weights[:, None]
    value = (weight * (beta * teacher + (1 - beta) * student)).sum() * temperature**2
    gradient = (p_s * (tail_student - student)).scatter_add_(1, recorded.ids, student_part)
    return value, gradient.mul_((1 - beta) * temperature * weight)

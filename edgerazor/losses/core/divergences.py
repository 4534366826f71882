"""Divergences between teacher and student at each position, their value and gradient in one pass.

For student logits `z`, `p_S = softmax(z / T)`, `p_T` the teacher's softmax at the same temperature, and
`d = log p_S - log p_T`, one position gives

    forward  KL(p_T ‖ p_S) = -Σ p_T·d       gradient with respect to z:  (p_S - p_T) / T
    reverse  KL(p_S ‖ p_T) =  Σ p_S·d       gradient with respect to z:  p_S·(d - KL(p_S ‖ p_T)) / T

Forward KL makes the student cover everything the teacher might say; reverse KL makes it avoid what the teacher would
not say. Both are multiplied by `T²`, so that gradients keep their size when the temperature changes (Hinton et al.,
arXiv 1503.02531, section 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgerazor.losses.core import recorded as recordings
from edgerazor.losses.core.logit_losses import TokenLogits


def mixed_kl(
    logits: TokenLogits, gamma: float | Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`T² Σ_i w_i [γ_i·KL(p_S ‖ p_T) + (1 - γ_i)·KL(p_T ‖ p_S)]` over positions `i`, and its gradient.

    Source: the two terms of EdgeRazor's logits distillation (arXiv 2605.04062); γ = 0 is forward, γ = 1 reverse KL.

    Args:
        logits: of both models. Where their vocabularies differ, the entries that both have count.
        gamma: share of reverse KL, from 0 to 1, one for all positions or `[n]`.
        temperature: `T` > 0.
        weights: `w`, `[n]`; `logits.sample_weights` when absent.

    Returns:
        scalar, and the gradient with respect to the student's logits `[n, entries]`.
    """
    weights = logits.sample_weights if weights is None else weights
    if (recorded := _recorded_at(logits, temperature)) is not None:
        return recordings.mixed_kl(*logits.student_beside(recorded), recorded, gamma, weights)
    (log_s, log_t), (p_s, p_t) = logits.log_probs(temperature), logits.probs(temperature)  # [n, entries]
    weight = weights[:, None]  # [n, 1]
    share = gamma[:, None] if isinstance(gamma, Tensor) else gamma
    d = log_s - log_t
    forward = -torch.linalg.vecdot(p_t, d)[:, None]  # [n, 1]
    only_forward = isinstance(gamma, float) and gamma == 0.0
    reverse = forward if only_forward else torch.linalg.vecdot(p_s, d)[:, None]  # [n, 1]
    value = (weight * (share * reverse + (1 - share) * forward)).sum() * temperature**2
    # T·w·[γ·p_S·(d - reverse) + (1 - γ)·(p_S - p_T)], which is exactly 0 where student equals teacher
    gradient = p_s - p_t
    if not only_forward:
        gradient.mul_(1 - share).addcmul_(d.sub_(reverse).mul_(share), p_s)
    return value, gradient.mul_(temperature * weight)


def jensen_shannon(logits: TokenLogits, beta: float, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`T² Σ_i w_i [β·KL(p_T ‖ m) + (1 - β)·KL(p_S ‖ m)]`, `m = β·p_T + (1 - β)·p_S`, and its gradient.

    Source: generalized Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649, section 2); β = ½ is the usual one.
    The gradient with respect to `z` is `(1 - β)·p_S·(log p_S/m - KL(p_S ‖ m)) / T`.

    Args:
        logits: of both models. Where their vocabularies differ, the entries that both have count.
        beta: `0 < β < 1`, weight of the teacher in the mixture.
        temperature: `T` > 0.

    Returns:
        scalar, and the gradient with respect to the student's logits `[n, entries]`.
    """
    if (recorded := _recorded_at(logits, temperature)) is not None:
        return recordings.jensen_shannon(*logits.student_beside(recorded), recorded, beta, logits.sample_weights)
    (log_s, log_t), (p_s, p_t) = logits.log_probs(temperature), logits.probs(temperature)  # [n, entries]
    # log m is computed from the larger of both, so that nothing overflows and equal ones give exactly their own value
    d = log_s - log_t
    share = torch.where(d > 0, d.new_tensor(beta), d.new_tensor(1 - beta))
    log_m = torch.maximum(log_s, log_t) + d.abs_().neg_().expm1_().mul_(share).log1p_()
    teacher = torch.linalg.vecdot(p_t, log_t - log_m)[:, None]  # [n, 1]
    ratio = log_s - log_m
    student = torch.linalg.vecdot(p_s, ratio)[:, None]  # [n, 1]
    weight = logits.sample_weights[:, None]  # [n, 1]
    value = (weight * (beta * teacher + (1 - beta) * student)).sum() * temperature**2
    gradient = ratio.sub_(student).mul_(p_s)
    return value, gradient.mul_((1 - beta) * temperature * weight)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats, `[n]`, of log-probabilities `[n, V]`."""
    return -torch.linalg.vecdot(log_p.exp(), log_p)


def teacher_entropy(logits: TokenLogits) -> Tensor:
    """Entropy of the teacher's own distribution at each position, `[n]`, in nats; exact in a recording, too."""
    return entropy(logits.teacher_log_probs()) if logits.recorded is None else logits.recorded.entropy


def target_log_probs(logits: TokenLogits) -> Tensor:
    """The teacher's `log p_T` of the tokens to predict, `[n]`, at temperature 1; exact in a recording, too."""
    if logits.recorded is not None:
        return logits.recorded.target_log_probs
    return logits.teacher_log_probs().gather(1, logits.targets[:, None]).squeeze(1)


def sum_of_kl(logits: TokenLogits) -> Tensor:
    """`Σ KL(p_T ‖ p_S)` over the positions, a scalar, in nats, without gradient; of a sample an unbiased estimate."""
    if (recorded := _recorded_at(logits, 1.0)) is not None:
        return recordings.forward_kl(logits.student_beside(recorded)[0], recorded).sum()
    student_log_probs, teacher_log_probs = logits.log_probs()
    return (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum()


def _recorded_at(logits: TokenLogits, temperature: float) -> recordings.RecordedTokens | None:
    """What was recorded of the teacher, at this temperature; None where the teacher computes."""
    recorded = logits.recorded
    if recorded is not None and recorded.temperature != temperature:
        raise ValueError(f"The teacher was recorded at temperature {recorded.temperature:g}, not at {temperature:g}.")
    return recorded

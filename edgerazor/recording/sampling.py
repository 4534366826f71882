"""Which tokens of a teacher's distribution are kept, and how often each of them counts.

`sample`: an unbiased sample without replacement, after Random Sampling Knowledge Distillation (arXiv 2503.16870). A
token of probability `p` is proposed with `q ∝ p^t` and kept with the probability `π = min(1, c·q)`, where `c` is such
that just `n` tokens are kept; whatever is summed over tokens, a kept one counts `1 / π` times. So tokens above `1 / c`
are there for certain, with their own probability, and of the others a few stand for all of them, with the weight
`1 / c` each for `t = 1` (optimal resampling, Fearnhead and Clifford, 2003). They are taken by systematic sampling:
`m` points at equal distances on the line on which every token of the tail has its `π`, shifted by one random number.

`top_k`: the `n` likeliest tokens, all for certain, and the probability of all others together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Tokens of the vocabulary whose probabilities are added up, and whose largest is looked for, together.
BLOCK = 256


@dataclass(frozen=True)
class TokenSample:
    """The kept tokens of `n` positions, those that are kept for certain first, and likeliest first among these.

    Attributes:
        ids: int64 `[n, k]`.
        log_probs: `[n, k]`, their log-probabilities, of the dtype of the input.
        certain: int64 `[n]`, how many of them are kept for certain.
        tail: float64 `[n]`, probability of all tokens but these.
        scale: float64 `[n]`, `c`, by which `p^t` of another token is multiplied for its `π`; 0 where all are certain.
    """

    ids: Tensor
    log_probs: Tensor
    certain: Tensor
    tail: Tensor
    scale: Tensor


def top_tokens(log_probs: Tensor, count: int) -> TokenSample:
    """The likeliest tokens.

    Args:
        log_probs: `[n, V]`, float32 or float64.
        count: `k`, tokens to keep, at most `V`.
    """
    blocks = _in_blocks(log_probs.exp())
    _, ids = _largest(blocks, count)
    blocks.flatten(1).scatter_(1, ids, 0.0)
    tail = blocks.sum((1, 2), dtype=torch.float64)
    certain = torch.full((len(ids),), count, device=ids.device)
    return TokenSample(ids, log_probs.gather(1, ids), certain, tail, torch.zeros_like(tail))


def sample_tokens(log_probs: Tensor, count: int, power: float, uniform: Tensor) -> TokenSample:
    """A sample without replacement, of probabilities that are as proportional to `p^power` as probabilities can be.

    Args:
        log_probs: `[n, V]`, float32 or float64.
        count: `k`, tokens to keep, at most `V`.
        power: `t` > 0 of the proposal.
        uniform: float64 `[n]`, a random number from 0 to below 1 for each position, all that chance decides.
    """
    blocks = _in_blocks(log_probs.exp() if power == 1.0 else (log_probs * power).exp())
    values, top_ids = _largest(blocks, count)
    proposal = blocks.flatten(1)
    proposal.scatter_(1, top_ids, 0.0)
    # what is left when the first 0, 1 ... of the likeliest are taken out, [n, k + 1]
    rest = proposal.sum(1, keepdim=True, dtype=torch.float64)
    left = torch.cat([values.double(), rest], 1).flip(1).cumsum(1).flip(1)
    places = torch.arange(count, device=log_probs.device)
    fits = (count - places) * values < left[:, :-1]  # then no token that is left has a probability of 1 or more
    certain = torch.where(fits.any(1), fits.to(torch.uint8).argmax(1), count)
    chosen = count - certain  # how many of the others are kept
    others = left.gather(1, certain[:, None])[:, 0]
    least = torch.finfo(torch.float64).tiny
    scale = torch.where(chosen > 0, chosen / others.clamp(min=least), 0.0)
    is_certain = places < certain[:, None]
    proposal.scatter_(1, top_ids, values.masked_fill(is_certain, 0.0))
    steps = (places - certain[:, None]).clamp_(min=0) + uniform[:, None]
    by_chance = _tokens_at(blocks, steps / chosen.clamp(min=1)[:, None]).clamp_(max=log_probs.shape[1] - 1)
    ids = torch.where(is_certain, top_ids, by_chance)
    if power != 1.0:
        others = log_probs.exp().scatter_(1, top_ids, 0.0).sum(1, dtype=torch.float64)
        others += log_probs.gather(1, top_ids).exp().masked_fill_(is_certain, 0.0).sum(1)
    return TokenSample(ids, log_probs.gather(1, ids), certain, others, scale)


def _in_blocks(probs: Tensor) -> Tensor:
    """`[n, V]` as `[n, blocks, BLOCK]`, filled with zeros."""
    missing = -probs.shape[1] % BLOCK
    return (pad(probs, (0, missing)) if missing else probs).unflatten(1, (-1, BLOCK))


def _largest(blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of `[n, blocks, BLOCK]` and their places, `[n, count]`, descending: they lie in the blocks that have
    the largest maxima, so that most blocks are only read."""
    some = blocks.amax(2).topk(min(count, blocks.shape[1]), dim=1).indices  # [n, b]
    candidates = blocks.gather(1, some[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    values, places = candidates.topk(count, dim=1)
    return values, some.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def _tokens_at(blocks: Tensor, shares: Tensor) -> Tensor:
    """The tokens at some shares of the line that all of `[n, blocks, BLOCK]` make, one behind the other.

    Args:
        blocks: lengths on the line.
        shares: float64 `[n, k]`, from 0 to below 1.

    Returns:
        int64 `[n, k]`.
    """
    if shares.shape[1] >= blocks.shape[1]:
        line = blocks.flatten(1).double().cumsum(1)
        return torch.searchsorted(line, shares * line[:, -1:], right=True)
    ends = blocks.sum(2, dtype=torch.float64).cumsum(1)  # [n, blocks]
    points = shares * ends[:, -1:]
    block = torch.searchsorted(ends, points, right=True).clamp_(max=blocks.shape[1] - 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).double().cumsum(2)  # [n, k, BLOCK]
    begin = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    # the last cumulative sum of a block is its end, give or take the last digit
    share = (points - begin).clamp_(min=0.0) / (ends.gather(1, block) - begin).clamp_(
        min=torch.finfo(torch.float64).tiny
    )
    share.clamp_(max=1 - torch.finfo(torch.float64).eps)
    place = torch.searchsorted(inside, (share * inside[:, :, -1])[:, :, None], right=True)[:, :, 0]
    return block * BLOCK + place.clamp_(max=BLOCK - 1)

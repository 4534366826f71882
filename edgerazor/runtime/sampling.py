"""Which token comes next: the likeliest, or one drawn from the model's distribution, narrowed down on the way.

With a temperature above 0 these follow one another, each on what the one before it left. The order and meaning of 2
and of 4 to 7 are those of transformers' `generate`, of 1 and 3 those of the OpenAI interface:

1. *logit bias*: what the settings give for a token is added to its logit;
2. *repetition penalty* r (arXiv 1909.05858, section 4.1): a logit of a token that occurred, in the prompt or since, is
   divided by r where it is positive, and multiplied by r where it is negative;
3. *frequency and presence penalties* f and p: f times how often a token was written, and p if it was at all, are taken
   from its logit; the prompt does not count;
4. *temperature* T: logits / T;
5. *top-k*: tokens whose logit is below the k-th highest are out (equal ones stay);
6. *top-p* (nucleus, arXiv 1904.09751): the likeliest tokens stay, as few as have the probability p together;
7. *min-p* (arXiv 2407.01082): tokens less likely than p times the likeliest are out;
8. one of those that are left is drawn, by their probabilities. That takes one number of the generator for every token,
   whatever is left, so that a seed and the same logits always give the same tokens.

At temperature 0 it is the likeliest after 1 to 3, the first of equal ones, and nothing is drawn. A logit of -infinity,
as a grammar gives what must not come next, stays one, and its token is never drawn.

All of it is NumPy in one thread, a few passes over the logits: the threads of torch would wait, spinning, beside those
of the native engine. Nothing sorts the vocabulary: the k-th highest logit comes from a partition, the nucleus from a
histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Generate

#: Tokens whose weights are summed before one of them is looked for, and parts of the range of scores, likewise.
BLOCK, BINS = 1024, 4096
#: Neighbouring scores of which the highest one is found first.
NEIGHBOURS = 32
#: A range of scores too narrow to be divided.
EQUAL = 1e-6
#: The least divisor that float32 holds at full precision; a temperature below it would divide 0 by 0.
LEAST = float(np.finfo(np.float32).tiny)

Scores = NDArray[np.float32]


class Sampler:
    """Chooses the tokens of one text.

    Args:
        settings: how tokens are chosen.
        seed: of the random numbers.
        vocabulary: number of logits.

    Raises:
        UserError: the settings have a logit bias for a token that there is not.
    """

    def __init__(self, settings: Generate, seed: int, vocabulary: int) -> None:
        self.settings = settings
        self.random = np.random.default_rng(seed)
        self.seen = np.zeros(vocabulary, dtype=bool)  # in the prompt or since
        self.counts = np.zeros(vocabulary, dtype=np.int32)  # since the prompt
        self.prompt_seen = False
        strangers = [token for token in settings.logit_bias if token >= vocabulary]
        if strangers:
            raise usage_error(f"`logit_bias` names token {strangers[0]}, and the model knows {vocabulary:,}.")
        self.biased = np.fromiter(settings.logit_bias, dtype=np.int64)
        self.biases = np.fromiter(settings.logit_bias.values(), dtype=np.float32)

    @property
    def plain(self) -> bool:
        """Whether the next token is always the one of the highest logit."""
        return self.settings.temperature == 0 and self._changes_nothing

    @property
    def _changes_nothing(self) -> bool:
        """Whether logits stay as they are before the temperature."""
        settings = self.settings
        penalties = settings.repetition_penalty != 1 or settings.presence_penalty or settings.frequency_penalty
        return not penalties and not settings.logit_bias

    def reset(self) -> None:
        """Forget all tokens: another text begins. The random numbers go on."""
        self.seen[:], self.counts[:], self.prompt_seen = False, 0, False

    def see(self, ids: Sequence[int]) -> None:
        """Note that tokens have occurred, for the penalties; those of the first call are the whole prompt."""
        known = np.asarray(ids, dtype=np.int64)
        known = known[known < len(self.seen)]  # a tokenizer may have tokens that the head has no row for
        self.seen[known] = True
        if self.prompt_seen:
            np.add.at(self.counts, known, 1)
        self.prompt_seen = True

    def choose(self, logits: Any) -> int:
        """The next token; it is not noted as `see` does.

        Args:
            logits: float32 [vocabulary], an array or a tensor on the CPU; left as they are.

        Raises:
            UserError: they are not finite.
        """
        if self.settings.temperature == 0:
            scores = self._adjusted(logits)
            check(scores.max())
            return int(scores.argmax())
        ids, weights = self._candidates(logits)
        place = draw(weights, self.random.random())
        return place if ids is None else int(ids[place])

    def distribution(self, logits: Any) -> NDArray[np.float64]:
        """The probabilities [vocabulary] that the next token is drawn by; at temperature 0, 1 for the likeliest."""
        result = np.zeros(len(self.seen))
        if self.settings.temperature == 0:
            result[self.choose(logits)] = 1
            return result
        ids, weights = self._candidates(logits)
        result[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
        return result

    def _adjusted(self, logits: Any) -> Scores:
        """The logits with bias and penalties: themselves where there are none."""
        scores, settings = np.asarray(logits, dtype=np.float32), self.settings
        if self._changes_nothing:
            return scores
        scores = scores.copy()
        scores[self.biased] += self.biases
        if settings.repetition_penalty != 1:
            ids = np.flatnonzero(self.seen)
            known, penalty = scores[ids], settings.repetition_penalty
            scores[ids] = np.where(known < 0, known * penalty, known / penalty)
        if settings.presence_penalty or settings.frequency_penalty:
            ids = np.flatnonzero(self.counts)
            scores[ids] -= settings.frequency_penalty * self.counts[ids] + np.float32(settings.presence_penalty)
        return scores

    def _candidates(self, logits: Any) -> tuple[NDArray[np.int64] | None, Scores]:
        """The tokens left to draw from, ascending (None: all), and their probabilities, the highest of which is 1."""
        settings = self.settings
        scores = self._adjusted(logits)
        highest = scores.max()
        check(highest)
        with np.errstate(over="ignore"):  # to -inf, the limit of temperatures towards 0
            scores = (scores - highest) / np.float32(max(settings.temperature, LEAST))
        ids = None
        if 0 < settings.top_k < len(scores):
            ids = highest_of(scores, settings.top_k)
            scores = scores[ids]
        weights = np.exp(scores)
        if settings.top_p < 1:
            likely = nucleus(scores, weights, settings.top_p)
            ids, weights = likely if ids is None else ids[likely], weights[likely]
        if settings.min_p > 0:
            likely = np.flatnonzero(weights >= settings.min_p)
            ids, weights = likely if ids is None else ids[likely], weights[likely]
        return ids, weights


def check(highest: np.float32) -> None:
    """Refuse logits that are not finite, by the highest of them (which is NaN where any is).

    Raises:
        UserError: there is no likeliest token.
    """
    if not np.isfinite(highest):
        raise UserError("The model's logits are not finite, so no token is likelier than another.", "Pack it again.")


def highest_of(scores: Scores, count: int) -> NDArray[np.int64]:
    """Indices, ascending, of the scores [N] that are not below the highest but count - 1; 0 < count < N.

    The highest scores of that many blocks are as many, so none of those searched for is below the lowest of these.
    """
    blocks = np.arange(0, len(scores), min(NEIGHBOURS, len(scores) // count))
    of_blocks = np.maximum.reduceat(scores, blocks)
    lowest = np.partition(of_blocks, -count)[-count]
    candidates = np.flatnonzero(scores >= lowest)
    threshold = np.partition(scores[candidates], -count)[-count]
    return candidates[scores[candidates] >= threshold]


def draw(weights: Scores, share: float) -> int:
    """The index at which the cumulative sum of weights [N] exceeds a share (0 to below 1) of the total."""
    ends = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    target = share * ends[-1]
    block = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
    part = weights[block * BLOCK : (block + 1) * BLOCK]
    reached = np.cumsum(part, dtype=np.float64) + (ends[block - 1] if block else 0.0)
    last = int(np.flatnonzero(part)[-1])  # with a weight: sums of the same numbers may differ in their last digit
    return block * BLOCK + min(int(np.searchsorted(reached, target, side="right")), last)


def nucleus(scores: Scores, weights: Scores, share: float) -> NDArray[np.int64]:
    """The fewest of the likeliest tokens whose weights reach a share of the sum; of equal ones, the first.

    A token is in it when the weights of all likelier ones stay below that share. Those below (1 - share) / N of the sum
    are out: all of them together do not make up the rest. Of the others, the weights of each of `BINS` equal parts of
    the range of scores are summed, and only in the part where the share is reached are tokens looked at one by one.

    Args:
        scores: [N], from 0 for the likeliest downwards.
        weights: [N], rising with the scores.
        share: above 0, below 1.

    Returns:
        Indices, ascending.
    """
    total = weights.sum(dtype=np.float64)
    target = share * total
    likely = np.flatnonzero(weights > (1 - share) * total / len(weights))
    scores, weights = scores[likely], weights[likely]
    lowest = scores.min()
    bins = np.zeros(len(likely), dtype=np.int64)
    if lowest < -EQUAL:
        bins = (scores * np.float32((BINS - 1) / lowest)).astype(np.int64)
    reached = np.cumsum(np.bincount(bins, weights, BINS))
    last = int(np.searchsorted(reached, target))
    undecided = np.flatnonzero(bins == last)
    undecided = undecided[np.argsort(-scores[undecided], kind="stable")]
    of_undecided = weights[undecided].astype(np.float64)
    before = np.cumsum(of_undecided) - of_undecided + (reached[last - 1] if last else 0.0)
    in_nucleus = bins < last
    in_nucleus[undecided[before < target]] = True
    indices: NDArray[np.int64] = likely[in_nucleus]
    return indices

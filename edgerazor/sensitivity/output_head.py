"""The output head of the teacher: logits, their gradients and KL, a chunk of positions at a time.

The logits of all positions would be larger than the model, so none of these keeps more than a chunk of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.formats import MatrixSpec
from edgerazor.losses import Head
from edgerazor.models import PreTrainedModel, Structure

#: Number of logits in one chunk.
LOGITS = 1 << 24


class OutputHead:
    """The head of a model, and what is computed from its logits.

    Args:
        model: the teacher.
        structure: where its head is.
        shape: what the family does to logits, as `models.logit_shape` gives it before any pass through the model.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, shape: tuple[float, float | None]) -> None:
        module = model.get_submodule(structure.head_path)
        self.weight, self.bias = module.weight.detach(), module.bias
        self.shape = shape
        self.chunk_size = max(1, LOGITS // self.weight.shape[0])

    def logits(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """float32 [n, vocabulary] for inputs of the head, [n, H]; optionally with another weight."""
        return self._head(x.dtype, weight).logits(x).float()

    def _head(self, dtype: torch.dtype, weight: Tensor | None = None) -> Head:
        if weight is None and self.weight.dtype != dtype:
            self.weight = self.weight.to(dtype)  # once, and not for every chunk
        return Head((self.weight if weight is None else weight).to(dtype), self.bias, *self.shape)

    def fisher_gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient, with respect to x [n, H], of the log-probabilities of labels that are sampled from the model."""

        def logit_gradient(logits: Tensor, _chunk: slice) -> Tensor:
            p = logits.softmax(-1)
            labels = torch.multinomial(p.cpu(), 1, generator=generator).to(x.device)
            return p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))

        return self._gradient(x, logit_gradient)

    def kl_gradient(self, x: Tensor, teacher: Tensor) -> Tensor:
        """Gradient, with respect to x [n, H], of the sum of KL(teacher || model); both are inputs of the head."""
        return self._gradient(x, lambda logits, chunk: logits.softmax(-1).sub_(self.logits(teacher[chunk]).softmax(-1)))

    @torch.no_grad()
    def divergence(self, x: Tensor, teacher: Tensor) -> float:
        """The sum of KL(teacher || model) over positions, in nats; both are inputs of the head, [n, H]."""
        return float(sum(self._divergences(x[chunk], teacher[chunk]).double().sum() for chunk in self._chunks(x)))

    def _divergences(self, x: Tensor, teacher: Tensor) -> Tensor:
        log_t = self.logits(teacher).log_softmax(-1)
        p = log_t.exp()
        return p.mul_(log_t.sub_(self.logits(x).log_softmax(-1))).sum(-1)

    @torch.no_grad()
    def second_order(self, x: Tensor, specs: Sequence[MatrixSpec]) -> Tensor:
        """Half the variance of the change of logits under the model, summed over x [n, H]: float64 [formats].

        That is the KL to second order when the head alone is rounded, here without sampling labels.
        """
        sums = torch.zeros(len(specs), dtype=torch.float64)
        for index, spec in enumerate(specs):
            rounded = formats.rounded_weight(self.weight, spec, x.dtype)
            for chunk in self._chunks(x):
                sums[index] += float(self._variances(x[chunk], rounded).double().sum()) / 2
        return sums

    def _variances(self, x: Tensor, rounded: Tensor) -> Tensor:
        """Variance, under the model, of the change of logits that a rounded weight makes: float32 [n] for x [n, H]."""
        logits = self.logits(x)
        change, p = self.logits(x, rounded).sub_(logits), logits.softmax(-1)
        del logits  # as large as each of the others
        mean = (p * change).sum(-1)
        return (change.square_().mul_(p).sum(-1) - mean.square()).clamp(min=0)

    @torch.no_grad()
    def _gradient(self, x: Tensor, logit_gradient: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Gradient with respect to x [n, H], from that with respect to the logits of a chunk, float32 [chunk, V]."""
        gradient, head = torch.empty_like(x), self._head(x.dtype)
        for chunk in self._chunks(x):
            logits = self.logits(x[chunk])
            gradient[chunk] = head.through_(logit_gradient(logits, chunk), logits).to(x.dtype) @ head.weight
        return gradient

    def _chunks(self, x: Tensor) -> list[slice]:
        return [slice(start, start + self.chunk_size) for start in range(0, len(x), self.chunk_size)]

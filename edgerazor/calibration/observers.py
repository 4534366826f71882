"""What calibrate gathers while text passes through the teacher, layer by layer (see `models/layerwise.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.losses import METRICS, layer_metric
from edgerazor.models import Observer
from edgerazor.modules import attention

#: Prefix of the names of counts in a stored state.
TOKENS = "tokens/"


def rotated(x: Tensor, rotation: str | None) -> Tensor:
    """Inputs [n, in] as they are rounded under a rotation of that name."""
    found_rotation = formats.find_rotation(rotation, x.shape[-1])
    return x if found_rotation is None else found_rotation.rotate(x)


class SecondMoments(Observer):
    """Sums of squares of the inputs of linear layers: path -> float64 [in].

    Inputs of an expert are multiplied with the weights of its tokens first: an error of the expert's output counts as
    much as that output does.

    Args:
        rotation: of inputs before they are squared, as the recipe calls it.

    Attributes:
        tokens: path -> int64 [], how many positions passed through the linear layer.
    """

    def __init__(self, rotation: str | None = None) -> None:
        self.rotation = rotation
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def identity(self) -> str:
        return self.rotation or ""

    def linear(self, path: str, x: Tensor, weights: Tensor | None = None) -> None:
        self.tokens[path] = self.tokens.get(path, 0) + torch.tensor(len(x))
        x = rotated(x, self.rotation)
        if weights is not None:
            x = x.float() * weights[:, None].float()
        self.sums[path] = self.sums.get(path, 0) + x.float().square().sum(0, dtype=torch.float64)

    def means(self, tokens: int) -> dict[str, Tensor]:
        """Means over the positions that count, float32 [in] on the CPU."""
        return {path: (value / tokens).float().cpu() for path, value in self.sums.items()}

    def state(self) -> dict[str, Tensor]:
        return self.sums | {TOKENS + path: count for path, count in self.tokens.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sums = {path: value for path, value in state.items() if not path.startswith(TOKENS)}
        self.tokens = {path.removeprefix(TOKENS): value for path, value in state.items() if path.startswith(TOKENS)}


class LayerMetrics(Observer):
    """`METRICS` of decoder layers, summed over positions: metric -> float64 [layers].

    Args:
        layers: how many there are.
        final: makes what enters the head, [B, T, H], of what leaves the last one, whose state is the former (see
            `losses.Outputs.hidden`).
    """

    def __init__(self, layers: int, final: Callable[[Tensor], Tensor]) -> None:
        self.last, self.final_norm = layers - 1, final
        self.sums = {metric: torch.zeros(layers, dtype=torch.float64) for metric in METRICS}

    def layer(self, index: int, inputs: Tensor, outputs: Tensor, counts: Tensor) -> None:
        count = int(counts.sum())
        if count:
            state = outputs if index < self.last else self.final_norm(outputs)
            for metric, values in self.sums.items():
                values[index] += layer_metric(metric, {0: inputs, 1: state}, counts)[0].double().cpu() * count

    def means(self, tokens: int) -> dict[str, Tensor]:
        """Means over the positions that count, float32 [layers]."""
        return {metric: (values / tokens).float() for metric, values in self.sums.items()}

    def state(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)


class InputRanges(Observer):
    """How often inputs of linear layers and the head have which magnitude: path -> int64 [bins].

    Args:
        head_path: where the head is.
        rotation: of inputs before their magnitudes are counted, as the recipe calls it.
    """

    def __init__(self, head_path: str, rotation: str | None = None) -> None:
        self.head_path, self.rotation = head_path, rotation
        self.counts: dict[str, Tensor] = {}

    def linear(self, path: str, x: Tensor, weights: Tensor | None = None) -> None:
        magnitudes = formats.magnitude_counts(rotated(x, self.rotation))
        self.counts[path] = self.counts.get(path, 0) + magnitudes

    def identity(self) -> str:
        return self.rotation or ""

    def final(self, x: Tensor) -> None:
        self.linear(self.head_path, x)

    def state(self) -> dict[str, Tensor]:
        return dict(self.counts)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.counts = dict(state)


class Importance(Observer):
    """How important tokens are in each layer: layer -> float32 [n], over all batches.

    Args:
        tokens: what the model's attention tells it to.
    """

    def __init__(self, tokens: attention.ImportantTokens) -> None:
        self.tokens = tokens
        self.seen: dict[int, list[Tensor]] = {}

    def layer(self, index: int, inputs: Tensor, outputs: Tensor, counts: Tensor) -> None:
        self.seen.setdefault(index, []).append(self.tokens.importance[index][counts].cpu())

    def thresholds(self, share: float) -> Tensor:
        """The importance that this share of the tokens lies below, float32 [layers]."""
        return torch.stack([_quantile(self.seen[index], share) for index in sorted(self.seen)])

    def state(self) -> dict[str, Tensor]:
        return {str(index): torch.cat(values) for index, values in self.seen.items()}

    def combined(self, states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([state[name] for state in states if name in state]) for name in states[0]}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.seen = {int(index): [values] for index, values in state.items()}


def _quantile(values: Iterable[Tensor], share: float) -> Tensor:
    ordered = torch.cat(list(values)).sort().values
    return ordered[int(share * len(ordered))]

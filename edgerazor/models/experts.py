"""Mixtures of experts: every expert as linear layers of its own, and where the routers are.

transformers stacks the matrices of a layer's experts: `gate_up_proj`, [experts, 2 intermediate, hidden], the gate
before the up projection, and `down_proj`, [experts, hidden, intermediate]. `separate_experts` puts a list of experts in
their place, each with three `nn.Linear` whose weights are views of the stacked tensors: nothing is copied. What reads,
trains, quantizes or replaces linear layers then works expert by expert, and an expert's matrices have names of their
own, `...experts.3.down_proj`. Models that keep their experts in a list of modules already are left as they are.

A router is the matrix beside the experts that scores them. It stays in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: What transformers says of stacked experts that are understood here (`use_experts_implementation`).
UNDERSTOOD = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


class Routed(NamedTuple):
    """The tokens that an expert computes in a forward pass.

    Attributes:
        tokens: int64 [n], their numbers among all positions of the batch.
        weights: [n], what the expert's output for each of them is multiplied with.
    """

    tokens: Tensor
    weights: Tensor


class Expert(nn.Module):
    """A gated feed-forward network: `down(act(gate(x)) * up(x))`.

    Args:
        gate: weight [intermediate, hidden].
        up: likewise.
        down: weight [hidden, intermediate].
        act_fn: the activation function.

    Attributes:
        routed: the tokens that it computes at the moment, for hooks of its linear layers; None outside.
    """

    def __init__(self, gate: nn.Parameter, up: nn.Parameter, down: nn.Parameter, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn
        self.routed: Routed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [n, hidden] -> [n, hidden]."""
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result


class Experts(nn.ModuleList):
    """The experts of a layer. Takes the place of transformers' stacked ones, and is called like them."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts; an expert without tokens computes nothing (but for
        `_all_take_part`).

        Args:
            hidden_states: [n, hidden].
            top_k_index: int64 [n, k], numbers of experts.
            top_k_weights: [n, k].

        Returns:
            [n, hidden] in the dtype of the hidden states.
        """
        output = torch.zeros_like(hidden_states)
        for number in range(len(self)) if self._all_take_part() else top_k_index.unique().tolist():
            tokens, place = torch.where(top_k_index == number)
            weights = top_k_weights[tokens, place]
            expert: Any = self[number]
            expert.routed = Routed(tokens, weights.detach())
            try:
                outputs = expert(hidden_states[tokens]) * weights[:, None]
            finally:
                expert.routed = None
            output.index_add_(0, tokens, outputs.to(output.dtype))
        return output

    def _all_take_part(self) -> bool:
        """Whether experts without tokens are called, too: processes that train together wait for every gradient."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.training and torch.is_grad_enabled() and together and torch.distributed.get_world_size() > 1


def separate_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Put lists of experts in the place of stacked ones, in place; views of the same numbers.

    Stacked experts of a kind that is not understood stay; `structure` refuses them by name.

    Args:
        model: its weights may be missing (on the meta device).
    """
    for path, module in list(model.named_modules()):
        if is_understood(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _separated(module))
    return model


def is_understood(module: nn.Module) -> bool:
    """Whether a module is a layer's stacked experts as `separate_experts` takes them apart."""
    stacked: Any = module
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if names != {"gate_up_proj", "down_proj"} or stacked.gate_up_proj.ndim != 3 or not hasattr(stacked, "act_fn"):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":  # another way from gate and up to their product
        return False
    return all(getattr(stacked, name, value) == value for name, value in UNDERSTOOD.items())


def _separated(stacked: Any) -> Experts:
    """The experts of stacked matrices."""
    trained = stacked.down_proj.requires_grad

    def part(matrix: Tensor) -> nn.Parameter:
        return nn.Parameter(matrix, requires_grad=trained)

    experts = []
    for gate_up, down in zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True):
        gate, up = gate_up.chunk(2)
        experts.append(Expert(part(gate), part(up), part(down), stacked.act_fn))
    return Experts(experts).train(stacked.training)


def _linear(weight: nn.Parameter) -> nn.Linear:
    """A linear layer without bias around a weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


# --- where they are ----------------------------------------------------------------------------


class ExpertList(NamedTuple):
    """The experts of a layer.

    Attributes:
        path: of the list of experts.
        size: how many there are.
        routers: paths of the modules beside the list that score experts.
    """

    path: str
    size: int
    routers: tuple[str, ...]


def expert_lists(model: nn.Module) -> list[ExpertList]:
    """Every list of experts in a model: those of `separate_experts`, and lists that a model has anyway."""
    return [
        ExpertList(path, len(module), tuple(_routers(model, path, len(module))))
        for path, module in model.named_modules()
        if _is_list(path, module)
    ]


def _is_list(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return isinstance(module, Experts) or (
        isinstance(module, nn.ModuleList) and name.endswith("experts") and "shared" not in name
    )


def _routers(model: nn.Module, path: str, count: int) -> Iterator[str]:
    """Paths of the modules beside a list of experts that hold a matrix with a row per expert, or with one row alone."""
    parent = path.rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_modules():
        full_path = f"{parent}.{name}" if name else parent
        weight = getattr(module, "weight", None)
        inside = full_path == path or full_path.startswith(f"{path}.")
        if not inside and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] in (1, count):
            yield full_path


def expert_of(model: nn.Module, path: str) -> Expert | None:
    """The expert that a linear layer is part of, by its path; None where it is part of none of ours."""
    module = model.get_submodule(path.rpartition(".")[0])
    return module if isinstance(module, Expert) else None


def at_tokens(expert: Expert | None, values: Tensor) -> Tensor:
    """Values [B, T] of all positions as the linear layers see them: those of the tokens that the expert computes, [n].

    Outside an expert, [B, T] as they are.
    """
    return values if expert is None or expert.routed is None else values.flatten()[expert.routed.tokens]

"""Mixtures of experts: experts as linear layers of their own compute what the stacked ones do, and are described."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor import models
from edgerazor.errors import UserError
from edgerazor.models.experts import Experts, expert_lists
from helpers.tiny_experts import CHOSEN, EXPERTS, MIXTURES, make_mixture, mixture_config

IDS = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_separate_experts_compute_what_stacked_ones_do(model_type: str) -> None:
    stacked = make_mixture(model_type, separated=False)
    separate = models.separate_experts(copy.deepcopy(stacked))
    with torch.no_grad():
        torch.testing.assert_close(separate(IDS).logits, stacked(IDS).logits, rtol=1e-5, atol=1e-5)
    layers = [layer for layer in separate.modules() if isinstance(layer, Experts)]
    assert len(layers) == (1 if model_type == "lfm2_moe" else 2)
    assert len({p.untyped_storage().data_ptr() for p in layers[0].parameters()}) == 2  # views


@pytest.mark.parametrize("model_type", MIXTURES)
def test_structure_of_a_mixture(model_type: str) -> None:
    model = make_mixture(model_type)
    found = models.structure(model)
    in_experts = [target for target in found.linears if target.experts]
    listed = found.experts
    assert len(in_experts) == 3 * EXPERTS * len(listed)
    assert {target.token_share for target in in_experts} == {CHOSEN / EXPERTS}
    assert {target.token_share for target in found.linears if not target.experts} == {1.0}
    assert [len(layer.routers) for layer in listed] == [1] * len(listed)
    assert not {router for layer in listed for router in layer.routers} & {target.name for target in found.targets}
    quantized = sum(target.weights for target in in_experts)
    stacked = make_mixture(model_type, separated=False)
    assert quantized == sum(p.numel() for name, p in stacked.named_parameters() if p.ndim == 3 and "expert" in name)


class ListedBlock(nn.Module):
    """A layer's mixture as older transformers and models with code of their own write it."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(block.gate.weight.shape[1], EXPERTS, bias=False)
        self.gate.weight = block.gate.weight
        self.experts = nn.ModuleList([copy.deepcopy(expert) for expert in block.experts])
        for expert in self.experts:
            expert.__class__ = ListedExpert

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(CHOSEN, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            if len(tokens):
                output.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, place, None])
        return output.view_as(x)


class ListedExpert(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


def with_lists(model: Any) -> Any:
    """The same model with a list of modules in the place of each layer's experts, and routers that are `nn.Linear`."""
    listed = copy.deepcopy(model)
    for layer in listed.model.layers:
        layer.mlp = ListedBlock(layer.mlp)
    return listed


def test_a_models_own_lists_of_experts() -> None:
    model = make_mixture("qwen3_moe")
    listed = with_lists(model)
    with torch.no_grad():
        torch.testing.assert_close(listed(IDS).logits, model(IDS).logits)
    ours, theirs = models.structure(model), models.structure(listed)
    assert theirs.experts == ours.experts
    assert theirs.linears == ours.linears


def test_experts_of_another_kind_are_refused_by_name() -> None:
    values = {"num_local_experts": 4, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = CONFIG_MAPPING["gpt_oss"](**values, vocab_size=64, num_attention_heads=2, num_key_value_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"GptOssForCausalLM stacks its experts .* not understood \(0.mlp.experts"):
        models.structure(models.separate_experts(model))


def test_outline_without_weights_has_the_same_structure() -> None:
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(mixture_config("olmoe"))
    assert models.structure(models.separate_experts(outline)) == models.structure(make_mixture("olmoe"))


def test_an_expert_that_is_never_chosen() -> None:
    model = make_mixture("qwen3_moe", never=2)
    called: list[str] = []
    for listed in expert_lists(model):
        for name, expert in model.get_submodule(listed.path).named_children():
            expert.register_forward_hook(lambda *_, name=f"{listed.path}.{name}": called.append(name))
    model(torch.randint(2, 300, (4, 100)))
    assert "model.layers.1.mlp.experts.2" not in called
    assert len(set(called)) >= 2 * EXPERTS - 1


def test_processes_that_train_together_have_gradients_of_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mixture("qwen3_moe", never=2).train()
    expert: Any = model.get_submodule("model.layers.1.mlp.experts.2")
    model(IDS).logits.sum().backward()
    assert expert.up_proj.weight.grad is None
    alone = model(IDS).logits
    monkeypatch.setattr(Experts, "_all_take_part", lambda _: True)
    together = model(IDS).logits
    assert torch.equal(together, alone)
    together.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in expert.parameters())

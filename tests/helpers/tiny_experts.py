"""Tiny mixtures of experts, whose routers are spread: random ones send tokens nearly everywhere alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgerazor.models import separate_experts
from helpers.tiny_models import VOCABULARY

EXPERTS, CHOSEN = 6, 2
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": CHOSEN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
#: model type -> what is special about its configuration
MIXTURES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": 32},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    "granitemoe": {
        "num_local_experts": EXPERTS,
        "intermediate_size": 32,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "granitemoehybrid": {
        **{"num_local_experts": EXPERTS, "intermediate_size": 32, "shared_intermediate_size": 40},
        **{"residual_multiplier": 0.7, "logits_scaling": 2.0, "layer_types": ["linear_attention", "full_attention"]},
        **{"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 20, "mamba_chunk_size": 8},
    },
    "lfm2_moe": {
        "num_experts": EXPERTS,
        "intermediate_size": 56,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
}


def mixture_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of a mixture of `MIXTURES`."""
    return CONFIG_MAPPING[model_type](**{**SHAPE, **MIXTURES[model_type], **overrides})


def make_mixture(
    model_type: str, seed: int = 1, never: int | None = None, separated: bool = True, **overrides: Any
) -> PreTrainedModel:
    """A random float32 mixture.

    Args:
        model_type: of `MIXTURES`.
        seed: of its weights.
        never: an expert of the last layer that no token is routed to.
        separated: whether its experts are linear layers of their own, as `models.load` leaves them.
        overrides: of its configuration.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(mixture_config(model_type, **overrides), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
            if is_router(name):
                parameter.copy_(torch.randn_like(parameter))
    if never is not None:
        shut(model, never)
    return (separate_experts(model) if separated else model).eval()


def is_router(name: str) -> bool:
    """Whether a parameter is a router's matrix, by its name."""
    return name.endswith(("gate.weight", "router.weight"))


def shut(model: PreTrainedModel, expert: int) -> None:
    """Let the router of the last layer choose an expert never.

    Its scores are always 0, and two of the others are always positive, as their rows are others' negated ones.
    """
    router: Any = [module for name, module in model.named_modules() if is_router(f"{name}.weight")][-1]
    first, second, third, fourth = [number for number in range(EXPERTS) if number != expert][:4]
    with torch.no_grad():
        router.weight[second] = -router.weight[first]
        router.weight[fourth] = -router.weight[third]
        router.weight[expert] = 0


def write_mixture(
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    model_type: str,
    dtype: torch.dtype = torch.float32,
    never: int | None = None,
    **overrides: Any,
) -> nn.Module:
    """Write a random mixture and its tokenizer as transformers saves them; returns the model."""
    model = make_mixture(model_type, never=never, separated=False, **overrides).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model

"""Tiny models of every family: their shapes, the text that their tokenizer is made from, and tokens for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 300


#: Awkward on purpose: neither rows of 96 nor of 101 are whole groups of 40.
GROUP_SIZE = 40


SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


GRANITE: dict[str, Any] = {
    **{"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
}
LFM2: dict[str, Any] = {
    **{"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_multiple_of": 8},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
LFM3: dict[str, Any] = {
    **{"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"], "sliding_window": 5},
}
OLMO3: dict[str, Any] = {
    **{"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "original_max_position_embeddings": 32,
        },
    },
}
MINISTRAL3: dict[str, Any] = {
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0},
        **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
        "original_max_position_embeddings": 8,
    },
}
#: Mamba-2 layers beside attention without positions, and no experts but the shared one.
GRANITE_HYBRID: dict[str, Any] = {
    **{**GRANITE, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    **{"shared_intermediate_size": 101, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_groups": 2},
    **{"mamba_n_heads": 12, "mamba_d_head": 16, "mamba_d_state": 20, "mamba_chunk_size": 8},
}
#: Inputs of single layers, heads of two widths, and two layers that use the keys and values of others.
GEMMA4: dict[str, Any] = {
    **{"num_hidden_layers": 5, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "sliding_window": 8},
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
    **{"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 32},
    "final_logit_softcapping": 3.0,
}
QWEN3_5: dict[str, Any] = {
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 12},
    **{"linear_value_head_dim": 20, "linear_conv_kernel_dim": 4},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


#: family -> model type of transformers, and what is special about it beyond `SHAPE`
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),  # biases of q, k and v
    "qwen3": ("qwen3", {}),  # norms of q and k
    "mistral": ("mistral", {"sliding_window": 8}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),  # a layer without positions
    "gemma": ("gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma4": ("gemma4_text", GEMMA4),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),  # LayerNorm, biases everywhere, also of the head
    "phi3": ("phi3", {}),  # fused q, k, v and fused gate, up
    "olmo2": ("olmo2", {}),  # norms behind attention and MLP
    "granite": ("granite", GRANITE),  # factors of scores, embeddings, residuals and logits
    "granite-hybrid": ("granitemoehybrid", GRANITE_HYBRID),
    "hunyuan": ("hunyuan_v1_dense", {}),  # norms of q and k behind RoPE
    "olmo3": ("olmo3", OLMO3),  # windows, and positions by kind of layer
    "exaone4": ("exaone4", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "ministral3": ("ministral3", MINISTRAL3),  # queries that grow with their position
    "starcoder2": ("starcoder2", {"sliding_window": 6, "use_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "lfm2": ("lfm2", LFM2),  # short convolutions beside attention
    "lfm3": ("lfm3", LFM3),  # the same with norms behind, gates of heads and windows
    "qwen3.5": ("qwen3_5_text", QWEN3_5),  # the gated delta rule beside attention, whose result has a gate
}
#: Those of which only some layers have attention.
RECURRENT = ("lfm2", "lfm3", "qwen3.5", "granite-hybrid")
#: Those of more than two layers, as their `layer_types` say.
LAYERED = (*RECURRENT, "gemma4")


ModelMaker = Callable[..., PreTrainedModel]


def sentences(count: int, seed: int = 0) -> str:
    """Lines of a small invented world, different for each seed."""
    draw = random.Random(seed)
    people, things = ["Nora", "Ben", "Ida", "Tom", "Mia"], ["ball", "lamp", "book", "coin", "rope"]
    places = ["mill", "barn", "cave", "tower", "garden"]
    lines = []
    for _ in range(count):
        person, other = draw.sample(people, 2)
        thing, place = draw.choice(things), draw.choice(places)
        lines.append(
            f"{person} took the {thing} to the {place}. Then {other} found {draw.randint(2, 9)} of them there."
        )
    return "\n".join(lines) + "\n"


def mostly_slow(values: Iterable[Any], *usual: Any) -> list[Any]:
    """Parameters of a test that takes seconds for each: `make test` runs the usual ones, `make test-all` the others."""
    return [value if value in usual else pytest.param(value, marks=pytest.mark.slow) for value in values]


def family_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of a family of `FAMILIES`."""
    model_type, special = FAMILIES[family]
    return CONFIG_MAPPING[model_type](**{**SHAPE, **special, **overrides})


def some_batches() -> list[tuple[Tensor, Tensor]]:
    """Three batches, padded on the right, with positions that do not count."""
    draw = torch.Generator().manual_seed(5)
    batches = []
    for rows, length in ((2, 19), (2, 11), (1, 19)):
        counts = torch.ones(rows, length, dtype=torch.bool)
        counts[0, length - 3 :] = False
        counts[-1, :2] = False
        batches.append((torch.randint(2, 60, (rows, length), generator=draw), counts))
    return batches


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `VOCABULARY` entries, trained on `sentences`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    raw.train_from_iterator(sentences(200).splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def write_tiny_model(
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    config: PreTrainedConfig | str,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """Write a random model of a configuration or family, and its tokenizer; returns the model."""
    if isinstance(config, str):
        config = family_config(config, **overrides)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # everything matters: biases and norms are not left at 0 and 1
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.add_(torch.randn_like(buffer) * 0.3)
        for name, parameter in model.named_parameters():
            # Gemma 4 divides scores by nothing, so that gains keep attention from choosing one token alone.
            if config.model_type == "gemma4_text" and name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(parameter.shape[0] ** -0.25)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model

"""What llama.cpp calls the families it knows: their metadata and the names and row orders of their tensors.

llama.cpp rebuilds a model from code of its own for each architecture, so whatever a configuration says beyond what that
code can do must be refused: it would be left out without a word. Sources: llama.cpp's `src/models/*.cpp` (which tensors
an architecture reads) and `conversion/` (how configurations become metadata).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from edgerazor.errors import UserError

#: Parts of a decoder layer -> llama.cpp's names.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
#: Everything outside the layers, in the order of the file.
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
ATTENTION_BIAS = frozenset({"attn_q", "attn_k", "attn_v"})
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """A model type of transformers as llama.cpp knows it.

    Attributes:
        architecture: llama.cpp's name.
        interleaved: it rotates neighbouring rows of q and k together, where transformers rotates the halves of a head.
        biases: names of the parts whose bias it reads.
        norms: whether it reads norms of q and k.
        check: says what it cannot do of a configuration, or nothing.
    """

    architecture: str
    interleaved: bool
    biases: frozenset[str]
    norms: bool = False
    check: Callable[[dict[str, Any]], str] = lambda config: ""


def _check_heads(config: dict[str, Any]) -> str:
    """Its code takes the width of all heads to be that of the model."""
    if head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        return "its heads together are not as wide as the model"
    return ""


def _check_no_rope(config: dict[str, Any]) -> str:
    """Its code leaves positions out of every fourth layer."""
    expected = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    return "" if config.get("no_rope_layers") == expected else "its layers without positions are not every fourth one"


EVERY_BIAS = ATTENTION_BIAS | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
#: `model_type` of transformers -> what llama.cpp makes of it.
FAMILIES = {
    "llama": Family("llama", interleaved=True, biases=EVERY_BIAS),
    "mistral": Family("llama", interleaved=True, biases=EVERY_BIAS),
    "qwen2": Family("qwen2", interleaved=False, biases=ATTENTION_BIAS, check=_check_heads),
    "qwen3": Family("qwen3", interleaved=False, biases=ATTENTION_BIAS, norms=True),
    "smollm3": Family("smollm3", interleaved=True, biases=ATTENTION_BIAS, check=_check_no_rope),
}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a complete configuration.

    Raises:
        UserError: llama.cpp has no such architecture as we know of, or cannot do something that the configuration asks.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise _refused(f"its family {model_type!r} is not among {', '.join(sorted(FAMILIES))}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _refused(f"its activation {config['hidden_act']!r} is not silu")
    if problem := family.check(config) or _bias_problem(family, config) or _rope_problem(family, rope(config)):
        raise _refused(problem)
    return family


def _bias_problem(family: Family, config: dict[str, Any]) -> str:
    fields = {"attention_bias": "attn_output", "mlp_bias": "ffn_up"}
    asked = [field for field, part in fields.items() if config.get(field) and part not in family.biases]
    return f"llama.cpp's {family.architecture} reads no biases as {asked[0]} asks" if asked else ""


def _refused(reason: str) -> UserError:
    return UserError(
        f"The model cannot be exported as GGUF: {reason}.", "Use the packed model, or an export of another format."
    )


def head_size(config: dict[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


# Positions --------------------------------------------------------------------------------------------------------


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of rotary positions."""
    found = config.get("rope_parameters") or {}
    return {"rope_type": "default", "rope_theta": 10000.0, **found}


def _rope_problem(family: Family, parameters: dict[str, Any]) -> str:
    kind = parameters["rope_type"]
    known = ("default", "linear", "yarn", *(("llama3",) if family.architecture == "llama" else ()))
    if kind not in known:
        return f"its rotary positions are scaled in the way {kind!r}, which its architecture does not know"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated"
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    other = [name for name, value in usual.items() if parameters.get(name, value) not in (value, None)]
    other += [name for name in ("mscale", "mscale_all_dim", "attention_factor") if parameters.get(name) is not None]
    if kind == "yarn" and other:
        return f"its YaRN scaling has {', '.join(other)}"
    return ""


def rope_factors(config: dict[str, Any]) -> Tensor | None:
    """What divides the frequencies, float32 [head size / 2], where they are scaled as in Llama 3; else None."""
    parameters = rope(config)
    if parameters["rope_type"] != "llama3":
        return None
    size, factor = head_size(config), parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context = parameters["original_max_position_embeddings"]
    frequencies = parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = context * frequencies / (2 * math.pi)  # in the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


# Metadata ---------------------------------------------------------------------------------------------------------


def context_length(config: dict[str, Any]) -> tuple[int, str]:
    """Longest context in which llama.cpp computes the same, and a note where it is shorter than the model's own."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    layers = config.get("layer_types") or []
    slides = config["model_type"] == "mistral" or "sliding_attention" in layers
    if slides and window and window < longest:
        note = (
            f"llama.cpp has no sliding window for this architecture, so the context is given as {window} tokens (the "
            f"window) instead of {longest}."
        )
        return int(window), note
    return longest, ""


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Shapes, norms and positions."""
    size = head_size(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(context_length(config)[0])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    parameters = rope(config)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )


# Tensors ----------------------------------------------------------------------------------------------------------


def target_name(family: Family, name: str) -> str:
    """llama.cpp's name of a tensor (`model.layers.0.mlp.up_proj.weight`).

    Raises:
        UserError: its code does not read such a tensor.
    """
    module, _, part = name.rpartition(".")
    inside = IN_LAYER.fullmatch(module)
    found = LAYER.get(inside[2]) if inside else OUTSIDE.get(module)
    known = found is not None and part in ("weight", "bias")
    if known and part == "bias":
        known = found in family.biases
    if known and found in ("attn_q_norm", "attn_k_norm"):
        known = family.norms
    if not known:
        raise _refused(f"llama.cpp's {family.architecture} reads no tensor {name}")
    return f"blk.{inside[1]}.{found}.{part}" if inside else f"{found}.{part}"


def place(target: str) -> tuple[int, int, str]:
    """Sorts tensors into the order of the file: embedding, layers, final norm, head."""
    if target.startswith("blk."):
        return 1, int(target.split(".")[1]), target
    return (0 if target.startswith("token_embd") else 2), 0, target


def row_order(family: Family, config: dict[str, Any], target: str) -> Tensor | None:
    """Which row of q or k stands at each place, int64 [rows]; None where all stay.

    transformers rotates row i of a head with row i + half; llama.cpp's `llama` rotates neighbours. Sorting the rows is
    exact, whatever they are made of.
    """
    part = target.split(".")[2] if target.startswith("blk.") else ""
    if not family.interleaved or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads"]
    if part == "attn_k":
        heads = config.get("num_key_value_heads") or heads
    size = head_size(config)
    return torch.arange(heads * size).reshape(heads, 2, size // 2).transpose(1, 2).reshape(-1)

"""What GGUF files say about a model: its architecture, sizes and positions.

llama.cpp rebuilds a model from code of its own for each architecture, so whatever a configuration says beyond what that
code can do must be refused: it would be left out without a word. What is special about an architecture is in its file
in `edgerazor/families`. Sources: llama.cpp's `src/models/*.cpp` (which tensors an architecture reads) and `conversion/`
(how configurations become metadata).
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import torch
from torch import Tensor

from edgerazor import families
from edgerazor.errors import UserError
from edgerazor.families import GgufArchitecture, GgufValue, head_size
from edgerazor.models.gguf_configuration import ROPE_FACTORS, llama3_factors

#: Keys whose values are decimals, whole ones too.
DECIMALS = ("rope.freq_base", "rope.scaling.factor", "attention.layer_norm_rms_epsilon")


def gguf_architecture(config: dict[str, Any]) -> GgufArchitecture:
    """The llama.cpp architecture of a complete configuration.

    Raises:
        UserError: llama.cpp has no such architecture as we know of, or cannot do something that the configuration asks.
    """
    model_type = config.get("model_type")
    family = families.find(str(model_type))
    if family is None or family.gguf is None or not family.gguf.exported:
        raise refused(f"its family {model_type!r} is not among {', '.join(families.with_gguf())}")
    architecture = family.gguf.instead(config) or family.gguf
    activation = config.get("hidden_activation") or config.get("hidden_act") or architecture.activation
    if activation != architecture.activation and (activation, architecture.activation) != ("swish", "silu"):
        raise refused(f"its activation {activation!r} is not {architecture.activation}")
    if problem := (
        architecture.unsupported(config)
        or _head_problem(architecture, config)
        or _bias_problem(architecture, config)
        or _rope_problem(architecture, config)
    ):
        raise refused(problem)
    return architecture


def _head_problem(architecture: GgufArchitecture, config: dict[str, Any]) -> str:
    tied = bool(config.get("tie_word_embeddings"))
    if architecture.head == "never" and not tied:
        return f"llama.cpp's {architecture.name} takes the embedding for the head, and this model has a head of its own"
    if architecture.head == "always" and tied:
        return f"llama.cpp's {architecture.name} wants a head of its own, and this model's is the embedding"
    return ""


def _bias_problem(architecture: GgufArchitecture, config: dict[str, Any]) -> str:
    fields = {"attention_bias": "attn_output", "mlp_bias": "ffn_up"}
    unread = [field for field, part in fields.items() if config.get(field) and part not in architecture.biases]
    return f"llama.cpp's {architecture.name} reads no biases as {unread[0]} asks" if unread else ""


def refused(reason: str) -> UserError:
    """The error for a model that GGUF files cannot hold; `reason` follows a colon."""
    return UserError(
        f"The model cannot be exported as GGUF: {reason}.", "Use the packed model, or an export of another format."
    )


# Positions --------------------------------------------------------------------------------------------------------


def rope_parameters(architecture: GgufArchitecture, config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of rotary positions as llama.cpp knows them, with transformers' defaults."""
    return {"rope_type": "default", "rope_theta": 10000.0, **architecture.rope(config)}


def _rope_problem(architecture: GgufArchitecture, config: dict[str, Any]) -> str:
    parameters = rope_parameters(architecture, config)
    rope_type = parameters["rope_type"]
    if rope_type not in architecture.rope_types:
        return f"its rotary positions are scaled in the way {rope_type!r}, which its architecture does not know"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0 and not architecture.partial_rope:
        return "only a part of each head is rotated"
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    other = [name for name, value in usual.items() if parameters.get(name, value) not in (value, None)]
    other += [name for name in ("mscale", "mscale_all_dim") if parameters.get(name) is not None]
    factor = parameters.get("attention_factor")
    if rope_type == "yarn" and factor is not None:
        other += [] if math.isclose(factor, 0.1 * math.log(parameters["factor"]) + 1) else ["attention_factor"]
    if rope_type == "yarn" and other:
        return f"its YaRN scaling has {', '.join(other)}"
    return ""


def rope_factors(architecture: GgufArchitecture, config: dict[str, Any]) -> dict[str, Tensor]:
    """What divides the frequencies of positions: llama.cpp's name of the tensor -> float32 [rotated width / 2]."""
    factors = {name: torch.tensor(values) for name, values in architecture.rope_factors(config).items()}
    parameters = rope_parameters(architecture, config)
    if parameters["rope_type"] == "llama3":
        factors[ROPE_FACTORS] = llama3_factors(parameters, head_size(config))
    return factors


# Metadata ---------------------------------------------------------------------------------------------------------


def context_length(architecture: GgufArchitecture, config: dict[str, Any]) -> tuple[int, str]:
    """Longest context in which llama.cpp computes the same, and a note where it is shorter than the model's own."""
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    layers = config.get("layer_types") or []
    slides = architecture.all_layers_slide or "sliding_attention" in layers
    if slides and window and window < longest and not architecture.windows:
        note = (
            f"llama.cpp has no sliding window for this architecture, so the context is given as {window} tokens (the "
            f"window) instead of {longest}."
        )
        return int(window), note
    return longest, ""


def add_metadata(writer: gguf.GGUFWriter, architecture: GgufArchitecture, config: dict[str, Any]) -> None:
    """Write shapes, norms and positions into a file."""
    for key, value in _metadata(architecture, config).items():
        name = f"{architecture.name}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float) or key in DECIMALS:
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)


def _metadata(architecture: GgufArchitecture, config: dict[str, Any]) -> dict[str, GgufValue]:
    """Keys without the architecture's name -> what a file says."""
    size, heads = head_size(config), config["num_attention_heads"]
    parameters = rope_parameters(architecture, config)
    values: dict[str, GgufValue] = {
        "vocab_size": config["vocab_size"],
        "context_length": context_length(architecture, config)[0],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": int(size * parameters.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": parameters["rope_theta"],
    }
    if "rms_norm_eps" in config:
        values["attention.layer_norm_rms_epsilon"] = config["rms_norm_eps"]
    if architecture.experts:
        values["expert_count"] = config.get("num_experts") or config["num_local_experts"]
        values["expert_used_count"] = config["num_experts_per_tok"]
        if "moe_intermediate_size" in config:
            values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if parameters["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"] = parameters["rope_type"]
        values["rope.scaling.factor"] = parameters["factor"]
    if parameters["rope_type"] == "yarn":
        original = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
        values["rope.scaling.original_context_length"] = original
    return {**values, **architecture.metadata(config)}

"""What GGUF files say about a model: its architecture, sizes and positions.

llama.cpp rebuilds a model from code of its own for each architecture, so whatever a configuration says beyond what that
code can do must be refused: it would be left out without a word. What is special about an architecture is in its file
in `edgerazor/families`. Sources: llama.cpp's `src/models/*.cpp` (which tensors an architecture reads) and `conversion/`
(how configurations become metadata).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
from torch import Tensor

from edgerazor import families
from edgerazor.errors import UserError
from edgerazor.families import GgufArchitecture, head_size
from edgerazor.models.gguf_configuration import llama3_factors


def gguf_architecture(config: dict[str, Any]) -> GgufArchitecture:
    """The llama.cpp architecture of a complete configuration.

    Raises:
        UserError: llama.cpp has no such architecture as we know of, or cannot do something that the configuration asks.
    """
    model_type = config.get("model_type")
    family = families.find(str(model_type))
    if family is None or family.gguf is None or not family.gguf.exported:
        raise refused(f"its family {model_type!r} is not among {', '.join(families.with_gguf())}")
    architecture = family.gguf
    activation = config.get("hidden_activation") or config.get("hidden_act") or architecture.activation
    if activation != architecture.activation and (activation, architecture.activation) != ("swish", "silu"):
        raise refused(f"its activation {activation!r} is not {architecture.activation}")
    if problem := (
        architecture.unsupported(config) or _bias_problem(architecture, config) or _rope_problem(architecture, config)
    ):
        raise refused(problem)
    return architecture


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


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of rotary positions, with transformers' defaults; those of layers without a window, where layers
    with one have their own."""
    parameters = config.get("rope_parameters") or {}
    return {"rope_type": "default", "rope_theta": 10000.0, **parameters.get("full_attention", parameters)}


def _rope_problem(architecture: GgufArchitecture, config: dict[str, Any]) -> str:
    parameters = rope_parameters(config)
    rope_type = parameters["rope_type"]
    if rope_type not in architecture.rope_types:
        return f"its rotary positions are scaled in the way {rope_type!r}, which its architecture does not know"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated"
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    other = [name for name, value in usual.items() if parameters.get(name, value) not in (value, None)]
    other += [name for name in ("mscale", "mscale_all_dim", "attention_factor") if parameters.get(name) is not None]
    if rope_type == "yarn" and other:
        return f"its YaRN scaling has {', '.join(other)}"
    return ""


def rope_factors(config: dict[str, Any]) -> Tensor | None:
    """What divides the frequencies, float32 [head size / 2], where they are scaled as in Llama 3; else None."""
    parameters = rope_parameters(config)
    if parameters["rope_type"] != "llama3":
        return None
    return llama3_factors(parameters, head_size(config))


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
    size = head_size(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(context_length(architecture, config)[0])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    if architecture.experts:
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    for key, value in architecture.metadata(config).items():
        add: Callable[[str, Any], None] = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{architecture.name}.{key}", value)
    parameters = rope_parameters(config)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )

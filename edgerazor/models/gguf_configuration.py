"""From the metadata of a GGUF file to a configuration of transformers, family by family.

llama.cpp computes each architecture with code of its own, and what that code takes for granted stands in no file: how
Gemma scales its attention, which layers see a window, that SmolLM 3 leaves positions out of every fourth layer. It is
said here. What a file asks for beyond that is refused by name.

Sources: `src/models/*.cpp` (what llama.cpp computes) and `conversion/*.py` (how configurations became metadata) of
llama.cpp; `configuration_*.py` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgerazor.errors import UserError, plain
from edgerazor.untrusted.gguf_file import GgufFile

#: The tensor that divides the frequencies of rotary positions scaled as in Llama 3.
ROPE_FACTORS = "rope_freqs.weight"
#: Those of Phi 3: for contexts beyond the original one, and within it.
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
#: Original contexts of models whose positions are scaled as in Llama 3.
LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)
#: Keys of things that a family computes only where it says so here, and the value that leaves them out.
SPECIAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
}


class Metadata:
    """Metadata whose keys begin with the architecture, checked by type and range."""

    def __init__(self, file: GgufFile) -> None:
        self.file, self.architecture = file, str(file.metadata.get("general.architecture"))
        self.read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return f"{self.architecture}.{key}" in self.file.metadata

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key.

        Raises:
            UserError: there is none, and no default.
        """
        self.read.add(key)
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.file.damaged(f"it does not say {self.architecture}.{key}")
        return value

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number."""
        value = self.value(key, default)
        if type(value) is not int or not least <= value < 1 << 31:
            raise self.file.damaged(f"its {self.architecture}.{key} is {plain(repr(value), 40)}")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A positive float32 number as it was written in decimals."""
        value = self.value(key, default)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise self.file.damaged(f"its {self.architecture}.{key} is {plain(repr(value), 40)}")
        return float(f"{value:.7g}")

    def refuse_unread(self) -> None:
        """Refuse what the file asks for and the family does not compute.

        Raises:
            UserError: the first such key.
        """
        for key, neutral in SPECIAL.items():
            value = self.file.metadata.get(f"{self.architecture}.{key}")
            if key not in self.read and value is not None and value not in neutral:
                raise UserError(
                    f"{self.file.path} says {self.architecture}.{key} {plain(value, 40)}, which is not read here for "
                    f"models of the architecture {self.architecture}.",
                    "Give the original model's folder or hub id.",
                )


# Families -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufFamily:
    """What stands in no file.

    Attributes:
        model_type: of transformers.
        configure: the fields of its configuration beyond those of all, from the metadata.
        interleaved_rope: rows of q and k lie as llama.cpp rotates them, neighbours together.
        norm_offset: what was added to the gains of norms.
    """

    model_type: str
    configure: Callable[[Metadata], dict[str, Any]]
    interleaved_rope: bool = False
    norm_offset: float = 0.0


def _rms(get: Metadata) -> dict[str, Any]:
    return {"rms_norm_eps": get.decimal("attention.layer_norm_rms_epsilon", 1e-6)}


def _llama(get: Metadata) -> dict[str, Any]:
    parts = {"attention_bias": "attn_output", "mlp_bias": "ffn_up"}
    biases = {field: f"blk.0.{part}.bias" in get.file.tensors for field, part in parts.items()}
    return {**_rms(get), **biases, "rope_parameters": rope_parameters(get)}


def _qwen(get: Metadata) -> dict[str, Any]:
    return {**_rms(get), "use_sliding_window": False, "rope_parameters": rope_parameters(get)}


def _smollm3(get: Metadata) -> dict[str, Any]:
    """SmolLM 3: every fourth layer has no positions."""
    return {**_llama(get), "no_rope_layer_interval": 4, "use_sliding_window": False}


def _olmo(get: Metadata) -> dict[str, Any]:
    """OLMo 1: its norms have no gains, and one epsilon for all models."""
    if get.decimal("attention.layer_norm_epsilon", 1e-5) != 1e-5:
        raise get.file.damaged("its norms have another epsilon than OLMo's 1e-5")
    clipped = get.decimal("attention.clamp_kqv") if get.value("attention.clamp_kqv", 0.0) else None
    return {"clip_qkv": clipped, "rope_parameters": rope_parameters(get)}


def _stablelm(get: Metadata) -> dict[str, Any]:
    """StableLM 2: LayerNorm, positions in a part of each head."""
    size = _head_size(get)
    part = get.number("rope.dimension_count", size) / size
    return {
        "layer_norm_eps": get.decimal("attention.layer_norm_epsilon", 1e-5),
        "use_qkv_bias": "blk.0.attn_q.bias" in get.file.tensors,
        "use_parallel_residual": False,
        "qk_layernorm": False,
        "partial_rotary_factor": part,
        "rope_parameters": {**rope_parameters(get), "partial_rotary_factor": part},
    }


def _granite(get: Metadata) -> dict[str, Any]:
    """Granite 3: Llama with four factors."""
    keys = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale"}
    keys |= {"residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
    factors = {field: get.decimal(key) for field, key in keys.items() if get.has(key)}
    factors.setdefault("attention_multiplier", _head_size(get) ** -0.5)
    return {**_llama(get), **factors}


def _phi3(get: Metadata) -> dict[str, Any]:
    """Phi 3: q, k, v in one matrix, gate and up in another; long contexts have factors of their own."""
    parameters = rope_parameters(get)
    size, context = _head_size(get), get.number("context_length")
    original = get.number("rope.scaling.original_context_length", context)
    if LONG_FACTORS in get.file.tensors and SHORT_FACTORS in get.file.tensors:
        factors = {"long_factor": _factors(get, LONG_FACTORS), "short_factor": _factors(get, SHORT_FACTORS)}
        parameters = {"rope_theta": parameters["rope_theta"], "rope_type": "longrope", **factors}
        parameters |= {"factor": context / original, "original_max_position_embeddings": original}
    part = get.number("rope.dimension_count", size) / size
    parameters["partial_rotary_factor"] = part
    window = get.number("attention.sliding_window", 0, least=0)
    return {
        **_rms(get),
        "partial_rotary_factor": part,
        "rope_parameters": parameters,
        "original_max_position_embeddings": original,
        "sliding_window": window or None,
    }


def _factors(get: Metadata, name: str) -> list[float]:
    return [float(f"{value:.7g}") for value in _float32(get.file, name).tolist()]


def _gemma(get: Metadata) -> dict[str, Any]:
    activation = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return {**_rms(get), **activation, "rope_parameters": rope_parameters(get)}


def _gemma2(get: Metadata) -> dict[str, Any]:
    """Gemma 2: every second layer sees a window, and logits and scores are capped; 27B scales by its width."""
    caps = {key: get.decimal(key, 0.0) if get.value(key, 0.0) else None for key in SPECIAL if "softcapping" in key}
    layers = get.number("block_count")
    return {
        **_gemma(get),
        **caps,
        "sliding_window": get.number("attention.sliding_window", 4096),
        "layer_types": _layer_types(get, layers, 2),
        "query_pre_attn_scalar": _query_scalar(get, layers == 46),
    }


def _gemma3(get: Metadata) -> dict[str, Any]:
    """Gemma 3: five layers with a window and positions of their own, one without; 27B scales by its width."""
    layers, window = get.number("block_count"), get.number("attention.sliding_window", 0, least=0)
    cap = get.decimal("final_logit_softcapping") if get.value("final_logit_softcapping", 0.0) else None
    local = {"rope_type": "default", "rope_theta": get.decimal("rope.freq_base_swa", 10000.0)}
    return {
        **_rms(get),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": {"full_attention": rope_parameters(get, 1e6), "sliding_attention": local},
        "sliding_window": window or None,
        "layer_types": _layer_types(get, layers, 6) if window else ["full_attention"] * layers,
        "query_pre_attn_scalar": _query_scalar(get, layers == 62),
        "final_logit_softcapping": cap,
        "attn_logit_softcapping": None,
    }


def _layer_types(get: Metadata, layers: int, usual: int) -> list[str]:
    """Which layers see a window: all but each n-th, or as a list says."""
    pattern = get.value("attention.sliding_window_pattern", usual)
    if isinstance(pattern, list) and len(pattern) >= layers:
        slides = [bool(value) for value in pattern[:layers]]
    elif type(pattern) is int and pattern > 0:
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        raise get.file.damaged(f"its {get.architecture}.attention.sliding_window_pattern is {plain(pattern, 40)}")
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _query_scalar(get: Metadata, by_width: bool) -> int:
    if by_width:
        return get.number("embedding_length") // get.number("attention.head_count")
    return _head_size(get)


#: llama.cpp's names of architectures.
FAMILIES: dict[str, GgufFamily] = {
    "gemma": GgufFamily("gemma", _gemma, norm_offset=1.0),
    "gemma2": GgufFamily("gemma2", _gemma2, norm_offset=1.0),
    "gemma3": GgufFamily("gemma3_text", _gemma3, norm_offset=1.0),
    "granite": GgufFamily("granite", _granite, interleaved_rope=True),
    "llama": GgufFamily("llama", _llama, interleaved_rope=True),
    "olmo": GgufFamily("olmo", _olmo, interleaved_rope=True),
    "olmo2": GgufFamily("olmo2", _llama),
    "phi3": GgufFamily("phi3", _phi3),
    "qwen2": GgufFamily("qwen2", _qwen),
    "qwen3": GgufFamily("qwen3", _qwen),
    "smollm3": GgufFamily("smollm3", _smollm3, interleaved_rope=True),
    "stablelm": GgufFamily("stablelm", _stablelm),
}


def find_family(file: GgufFile) -> GgufFamily:
    """The family of a file.

    Raises:
        UserError: it is not known.
    """
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in FAMILIES:
        raise UserError(
            f"{file.path} is of the architecture {plain(architecture, 50)}, and only {', '.join(FAMILIES)} can be read "
            "from GGUF.",
            "Give the original model: the folder or hub id that the file was made of.",
        )
    return FAMILIES[architecture]


def gguf_configuration(file: GgufFile) -> dict[str, Any]:
    """The configuration of a file's model, as config.json has it.

    Raises:
        UserError: of a family that is not known, incomplete, or with something that its family does not compute.
    """
    family, get = find_family(file), Metadata(file)
    heads = get.number("attention.head_count")
    if get.number("block_count") > len(file.tensors):
        raise file.damaged("it has fewer tensors than layers")
    if EMBEDDING not in file.tensors:
        raise file.damaged(f"it lacks {EMBEDDING}")
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "hidden_size": get.number("embedding_length"),
        "intermediate_size": get.number("feed_forward_length"),
        "num_hidden_layers": get.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.number("attention.head_count_kv", heads),
        "head_dim": _head_size(get),
        "max_position_embeddings": get.number("context_length"),
        "tie_word_embeddings": HEAD not in file.tensors,
        **family.configure(get),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    get.refuse_unread()
    return config


def _head_size(get: Metadata) -> int:
    """Width of a head; a number of rotated rows is not that where only a part is rotated."""
    whole = get.number("embedding_length") // get.number("attention.head_count")
    partial = get.architecture in ("stablelm", "phi3")
    return get.number("attention.key_length", whole if partial else get.number("rope.dimension_count", max(whole, 1)))


# Positions ------------------------------------------------------------------------------------------------------------


def rope_parameters(get: Metadata, usual_base: float = 10000.0) -> dict[str, Any]:
    """The parameters of rotary positions.

    Raises:
        UserError: they are scaled in a way that is not known.
    """
    kind = get.value("rope.scaling.type", "none")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": get.decimal("rope.freq_base", usual_base)}
    if get.has("rope.scale_linear") and not get.has("rope.scaling.type"):  # of files of 2023
        kind, scale = "linear", get.decimal("rope.scale_linear")
        parameters |= {"rope_type": kind, "factor": scale} if scale != 1 else {}
    elif kind in ("linear", "yarn"):
        parameters |= {"rope_type": kind, "factor": get.decimal("rope.scaling.factor")}
    elif kind not in ("none", "longrope"):
        raise UserError(
            f"{get.file.path} scales its rotary positions in the way {plain(kind, 40)!r}, which is not known here.",
            "Give the original model's folder or hub id.",
        )
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = get.number("rope.scaling.original_context_length")
    if ROPE_FACTORS in get.file.tensors:
        return _llama3_parameters(get, parameters)
    return parameters


def _llama3_parameters(get: Metadata, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the Llama 3 models, restored from the factors of their frequencies; others are refused."""
    stored = _float32(get.file, ROPE_FACTORS)
    scaling = {"factor": float(f"{stored.max().item():.6g}"), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for context in LLAMA3_CONTEXTS:
        candidate = {**parameters, **scaling, "original_max_position_embeddings": context, "rope_type": "llama3"}
        factors = llama3_factors(candidate, _head_size(get))
        if factors.shape == stored.shape and torch.allclose(factors, stored, rtol=1e-5):
            return candidate
    raise UserError(
        f"{get.file.path} scales its rotary positions by factors that are not those of the Llama 3 models.",
        "Give the original model's folder or hub id.",
    )


def llama3_factors(parameters: dict[str, Any], size: int) -> Tensor:
    """What divides the frequencies of positions that are scaled as in Llama 3, float32 [size / 2].

    Args:
        parameters: of rotary positions, as configurations have them.
        size: width of an attention head.
    """
    factor, context = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    frequencies = parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = context * frequencies / (2 * math.pi)  # in the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _float32(file: GgufFile, name: str) -> Tensor:
    if file.type_name(name) != "F32":
        raise file.damaged(f"{name} is not F32")
    return torch.from_numpy(np.array(file.blocks(name))).view(torch.float32).flatten()

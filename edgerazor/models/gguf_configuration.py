"""From the metadata of a GGUF file to a configuration of transformers.

llama.cpp computes each architecture with code of its own, and what that code takes for granted stands in no file: how
Gemma scales its attention, which layers see a window, that SmolLM 3 leaves positions out of every fourth layer. The
family's file in `edgerazor/families` says it. What a GGUF file asks for beyond that is refused by name.

Sources: `src/models/*.cpp` (what llama.cpp computes) and `conversion/*.py` (how configurations became metadata) of
llama.cpp; `configuration_*.py` of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgerazor import families
from edgerazor.errors import UserError, plain
from edgerazor.families import GGUF_LONG_FACTORS, GGUF_SHORT_FACTORS, GgufArchitecture
from edgerazor.untrusted.gguf_file import GgufFile

#: The tensor that divides the frequencies of rotary positions scaled as in Llama 3.
ROPE_FACTORS = "rope_freqs.weight"
#: Tensors that are no weights: their content is in the configuration.
POSITIONS = {ROPE_FACTORS, GGUF_LONG_FACTORS, GGUF_SHORT_FACTORS}
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
    """Metadata whose keys begin with the architecture, checked by type and range (a `families.GgufMetadata`).

    Args:
        file: that they are in.
        family: of the file.
    """

    def __init__(self, file: GgufFile, family: GgufArchitecture) -> None:
        self.file, self.family, self.architecture = file, family, family.name
        self.read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return f"{self.architecture}.{key}" in self.file.metadata

    def has_tensor(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.file.tensors

    def damaged(self, reason: str) -> UserError:
        """The error for a file that contradicts itself; `reason` follows a colon."""
        return self.file.damaged(reason)

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

    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.file.tensors[EMBEDDING].shape[0])

    def head_size(self) -> int:
        """Width of a head; a number of rotated rows is not that where only a part is rotated."""
        whole = self.number("embedding_length") // self.number("attention.head_count")
        usual = whole if self.family.partial_rope else self.number("rope.dimension_count", max(whole, 1))
        return self.number("attention.key_length", usual)

    def layer_types(self, usual: int) -> list[str]:
        """Which layers see a window: all but each n-th, or as a list says."""
        layers, pattern = self.number("block_count"), self.value("attention.sliding_window_pattern", usual)
        if isinstance(pattern, list) and len(pattern) >= layers:
            slides = [bool(value) for value in pattern[:layers]]
        elif type(pattern) is int and pattern > 0:
            slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
        else:
            raise self.damaged(f"its {self.architecture}.attention.sliding_window_pattern is {plain(pattern, 40)}")
        return ["sliding_attention" if has_window else "full_attention" for has_window in slides]

    def rope_parameters(self, usual_base: float = 10000.0) -> dict[str, Any]:
        """The parameters of rotary positions.

        Raises:
            UserError: they are scaled in a way that is not known.
        """
        return rope_parameters(self, usual_base)

    def rope_factors(self, name: str) -> list[float]:
        """What divides the frequencies of rotary positions, from a tensor."""
        return [float(f"{value:.7g}") for value in _float32(self.file, name).tolist()]

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


# The configuration --------------------------------------------------------------------------------------------------


def find_family(file: GgufFile) -> tuple[str, GgufArchitecture]:
    """The model type of a file, and what stands in no file.

    Raises:
        UserError: it is not known.
    """
    architecture, known = str(file.metadata.get("general.architecture")), families.from_gguf()
    model_type = known.get(architecture)
    family = families.find(model_type)
    if model_type is None or family is None or family.gguf is None:
        raise UserError(
            f"{file.path} is of the architecture {plain(architecture, 50)}, and only {', '.join(known)} can be read "
            "from GGUF.",
            "Give the original model: the folder or hub id that the file was made of.",
        )
    return model_type, family.gguf


def gguf_configuration(file: GgufFile) -> dict[str, Any]:
    """The configuration of a file's model, as config.json has it.

    Raises:
        UserError: of a family that is not known, incomplete, or with something that its family does not compute.
    """
    model_type, family = find_family(file)
    get = Metadata(file, family)
    assert family.configure is not None
    heads = get.number("attention.head_count")
    if get.number("block_count") > len(file.tensors):
        raise file.damaged("it has fewer tensors than layers")
    if EMBEDDING not in file.tensors:
        raise file.damaged(f"it lacks {EMBEDDING}")
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": get.vocabulary(),
        "hidden_size": get.number("embedding_length"),
        "intermediate_size": get.value("feed_forward_length"),
        "num_hidden_layers": get.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.value("attention.head_count_kv", heads),
        "head_dim": get.head_size(),
        "max_position_embeddings": get.number("context_length"),
        "tie_word_embeddings": HEAD not in file.tensors,
        **family.configure(get),
    }
    for field, key in (
        ("num_key_value_heads", "attention.head_count_kv"),
        ("intermediate_size", "feed_forward_length"),
    ):
        if type(config[field]) is not int or not 0 < config[field] < 1 << 31:
            get.number(key)  # which is refused, unless the family has numbers for each layer
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    get.refuse_unread()
    return config


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
        factors = llama3_factors(candidate, get.head_size())
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

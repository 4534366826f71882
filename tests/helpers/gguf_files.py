"""GGUF files of tiny models, with names, orders and gains as llama.cpp's converter has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgerazor.exporters.core.gguf_vocabulary import build_vocabulary

#: Model types whose converter sorts the rows of q and k.
PERMUTED = ("llama", "olmo", "smollm3", "granite")
ARCHITECTURES = {"gemma3_text": "gemma3"}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's converter."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    kind: str = "F32",
    **metadata: Any,
) -> Path:
    """Write a model; matrices get a type, all else is F32.

    Args:
        model: of a family of `FAMILIES`.
        tokenizer: byte-level BPE, or SentencePiece.
        file: where to.
        kind: type of ggml that the package quantizes to.
        metadata: further keys, without the architecture, dots written as two underscores.
    """
    config = model.config.to_dict()
    model_type = config["model_type"]
    name = ARCHITECTURES.get(model_type, model_type)
    [number] = [number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name]
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, name)
    add_shape(writer, config)
    for key, value in metadata.items():
        add_value(writer, f"{name}.{key.replace('__', '.')}", value)
    build_vocabulary(tokenizer, config["vocab_size"], []).add_to(writer)
    for tensor, value in model.state_dict().items():
        if tensor == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        module, _, parameter = tensor.rpartition(".")
        array = value.float().numpy()
        if model_type in PERMUTED and module.endswith(("q_proj", "k_proj")):
            array = permute(array, config["num_attention_heads" if "q_proj" in module else "num_key_value_heads"])
        if model_type.startswith("gemma") and tensor.endswith("norm.weight"):
            array = array + np.float32(1)
        target, type_ = f"{names.get_name(module)}.{parameter}", gguf.GGMLQuantizationType[kind]
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(target, np.ascontiguousarray(array))
        else:
            writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(array), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The metadata that every architecture has."""
    parameters = config["rope_parameters"]
    parameters = parameters.get("full_attention", parameters)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_rope_dimension_count(int(size * parameters.get("partial_rotary_factor", 1.0)))
    if config["hidden_size"] // config["num_attention_heads"] != size or "gemma" in config["model_type"]:
        writer.add_key_length(size)
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Metadata of whatever type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def quantized_model(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model in place, its matrices quantized and dequantized by the package `gguf`, all weights rounded to a dtype."""
    type_ = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for value in model.parameters():
            array = value.float().numpy()
            if array.ndim > 1:
                array = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(array), type_), type_)
            value.copy_(torch.from_numpy(array).to(dtype))
    return model

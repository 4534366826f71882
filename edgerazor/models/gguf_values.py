"""What llama.cpp's converter changes in tensors: numbers that are not quantized, and places of rows and columns.

Gains of norms that a model stores less one are whole in files; the kernels of convolutions over single features are
matrices [features, kernel] instead of [features, 1, kernel]; the logarithm of a state's decay is the decay itself,
negated; some vectors are matrices of one column. The family's file in `edgerazor/families` says which tensors these
are.

Source: `conversion/*.py` of llama.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgerazor.families import GgufArchitecture, head_size


def to_gguf(architecture: GgufArchitecture, name: str, tensor: Tensor) -> Tensor:
    """A tensor as files have it, from one of a model.

    Args:
        architecture: of the model.
        name: of the tensor in a checkpoint (`model.layers.0.conv.conv.weight`).
        tensor: of any shape.
    """
    if _in_layer(name) in architecture.decays:
        tensor = -tensor.float().exp()
    if _in_layer(name) in architecture.upright:
        return tensor.unsqueeze(1)
    if offset := _offset(architecture, name):
        return tensor.float() + offset
    return tensor.squeeze(1) if tensor.dim() == 3 and tensor.shape[1] == 1 else tensor


def from_gguf(architecture: GgufArchitecture, name: str, tensor: Tensor) -> Tensor:
    """The same backwards, but for the shape of the kernels of convolutions."""
    if _in_layer(name) in architecture.upright:
        tensor = tensor.flatten()
    if _in_layer(name) in architecture.decays:
        return (-tensor.float()).log()
    if offset := _offset(architecture, name):
        return tensor.float() - offset
    return tensor


def row_order(architecture: GgufArchitecture, config: dict[str, Any], target: str) -> Tensor | None:
    """Which row of the model stands at each place of the file, int64 [rows]; None where all stay in place.

    transformers rotates row i of a head with row i + half; llama.cpp's `llama` rotates neighbours. Sorting the rows is
    exact, whatever they are made of. Other orders are the family's.

    Args:
        architecture: of the model.
        config: of the model, complete.
        target: llama.cpp's name of the tensor (`blk.0.attn_q.weight`).
    """
    part = _part(target)
    if (order := architecture.row_orders(config).get(part)) is not None:
        return torch.tensor(order)
    if not architecture.interleaved_rope or part not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads"]
    if part == "attn_k":
        heads = config.get("num_key_value_heads") or heads
    size = head_size(config)
    return torch.arange(heads * size).reshape(heads, 2, size // 2).transpose(1, 2).reshape(-1)


def column_order(architecture: GgufArchitecture, config: dict[str, Any], target: str) -> Tensor | None:
    """The same of columns, int64 [columns]."""
    order = architecture.column_orders(config).get(_part(target))
    return None if order is None else torch.tensor(order)


def _part(target: str) -> str:
    """Part of a layer (`attn_q`) that a tensor belongs to, by llama.cpp's name; empty outside layers."""
    return target.split(".")[2] if target.startswith("blk.") else ""


def _offset(architecture: GgufArchitecture, name: str) -> float:
    """What files have more of a tensor."""
    whole = not name.endswith("norm.weight") or _in_layer(name).removesuffix(".weight") in architecture.whole_norms
    return 0.0 if whole else architecture.norm_offset


def _in_layer(name: str) -> str:
    """The name of a tensor within its decoder layer: `conv.conv.weight`; others keep theirs."""
    parts = name.split(".")
    return ".".join(parts[3:]) if parts[:2] == ["model", "layers"] else name

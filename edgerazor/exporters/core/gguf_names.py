"""llama.cpp's names of tensors, and their order in a file."""

from __future__ import annotations

import re

from edgerazor.exporters.core.gguf_metadata import refused
from edgerazor.families import EMBEDDING, FINAL_NORM, HEAD, GgufArchitecture

#: Parts of a decoder layer -> llama.cpp's names.
LAYER_PARTS = {
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
#: llama.cpp's name of a router.
ROUTER = "ffn_gate_inp"
#: Tensors that llama.cpp wants in float32 although they are matrices: routers, the kernels of convolutions, and what
#: Mamba-2 has a number of for each head.
FLOAT32 = (ROUTER, "shortconv.conv", "ssm_conv1d", "ssm_a", "ssm_d")
#: Parts of a mixture of experts: its router, and what `expert_stack` makes of the matrices of its experts.
EXPERT_PARTS = {
    f"{block}.{name}": part
    for block in ("mlp", "block_sparse_moe", "feed_forward")
    for name, part in (
        ("gate", ROUTER),
        ("router", ROUTER),
        ("experts.gate_proj", "ffn_gate_exps"),
        ("experts.up_proj", "ffn_up_exps"),
        ("experts.down_proj", "ffn_down_exps"),
    )
}
#: Path of the matrix of an expert: list of experts, number, name of the matrix.
OF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
#: Modules outside the decoder layers, in the order of the file.
OTHER_PARTS = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}
IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(architecture: GgufArchitecture, name: str) -> str:
    """llama.cpp's name of a tensor (`model.layers.0.mlp.up_proj.weight`).

    Raises:
        UserError: its code does not read such a tensor.
    """
    module, _, parameter = name.rpartition(".")
    in_layer = IN_LAYER.fullmatch(module)
    if (whole := IN_LAYER.fullmatch(name)) and whole[2] in architecture.parameters:
        return f"blk.{whole[1]}.{architecture.parameters[whole[2]]}"
    parts = {**LAYER_PARTS, **(EXPERT_PARTS if architecture.experts else {}), **architecture.parts}
    part = parts.get(in_layer[2]) if in_layer else {**OTHER_PARTS, **architecture.parts}.get(module)
    is_read = part is not None and parameter in ("weight", "bias")
    if is_read and parameter == "bias":
        is_read = part in architecture.biases
    if is_read and part in ("attn_q_norm", "attn_k_norm"):
        is_read = architecture.qk_norms
    if not is_read:
        raise refused(f"llama.cpp's {architecture.name} reads no tensor {name}")
    return f"blk.{in_layer[1]}.{part}.{parameter}" if in_layer else f"{part}.{parameter}"


def half_names(architecture: GgufArchitecture, name: str) -> tuple[str, str] | None:
    """llama.cpp's names of the upper and the lower rows of a tensor that are two there; None for all others."""
    module, _, parameter = name.rpartition(".")
    in_layer = IN_LAYER.fullmatch(module)
    halves = architecture.halves.get(in_layer[2]) if in_layer and parameter == "weight" else None
    if halves is None or in_layer is None:
        return None
    upper, lower = (f"blk.{in_layer[1]}.{part}.weight" for part in halves)
    return upper, lower


def expert_stack(matrix: str) -> tuple[str, int] | None:
    """The tensor that a matrix is a part of, where it is an expert's, and its number there.

    llama.cpp keeps a layer's experts as one tensor for each of their matrices, [experts, rows, columns].

    Args:
        matrix: path of its module, `model.layers.0.mlp.experts.3.up_proj`.

    Returns:
        the name without the expert's number, `model.layers.0.mlp.experts.up_proj`, and the number; None elsewhere.
    """
    place = OF_EXPERT.fullmatch(matrix)
    return (f"{place[1]}.{place[3]}", int(place[2])) if place else None


def file_order(target: str) -> tuple[int, int, str]:
    """Sort key of a tensor, by llama.cpp's name: embedding, layers, final norm, head."""
    if target.startswith("blk."):
        return 1, int(target.split(".")[1]), target
    return (0 if target.startswith("token_embd.") else 2), 0, target

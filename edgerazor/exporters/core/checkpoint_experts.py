"""The experts of a mixture as the checkpoints of its family have them, which other programs read.

Most keep every expert's matrices apart, some under other names than ours; what is left is written as transformers has
it in memory, gate and up projections of all experts in one tensor: it reads that of every family.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgerazor import untrusted
from edgerazor.exporters.core import hf_folder
from edgerazor.exporters.core.gguf_names import OF_EXPERT
from edgerazor.packed import PackedModel

#: Names of an expert's matrices in checkpoints that keep experts apart, by model type.
OURS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
APART: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), OURS),
    "lfm2_moe": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
}
#: Tensor of all experts of a layer -> our matrices that are in it, one below the other.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def names(model: PackedModel) -> dict[str, str]:
    """Path of each matrix -> name of the tensor of a checkpoint that it is, or is a part of."""
    experts = {path: OF_EXPERT.fullmatch(path) for path in model.header.matrices}
    apart = _apart(model) if any(experts.values()) else None
    targets = {}
    for path, expert in experts.items():
        if expert is None:
            targets[path] = f"{path}.weight"
        elif apart is not None:
            targets[path] = f"{expert[1]}.{expert[2]}.{apart.get(expert[3], expert[3])}.weight"
        else:
            stack = next((stack for stack, parts in STACKED.items() if expert[3] in parts), None)
            targets[path] = f"{expert[1]}.{stack}" if stack else f"{path}.weight"
    return targets


def pieces(model: PackedModel, dtype: str) -> list[hf_folder.Piece]:
    """All matrices, dequantized, under the names of a checkpoint.

    Args:
        model: the packed model.
        dtype: of the weights, by its name in a safetensors file.
    """
    together: dict[str, list[str]] = {}
    for path, target in names(model).items():
        together.setdefault(target, []).append(path)
    return [_piece(model, target, paths, dtype) for target, paths in together.items()]


def _piece(model: PackedModel, target: str, paths: list[str], dtype: str) -> hf_folder.Piece:
    """A tensor of a checkpoint: a matrix, or those of all experts."""
    listed, _, stack = target.rpartition(".")
    if stack not in STACKED:
        [path] = paths
        shape = model.header.matrices[path].shape
        return hf_folder.Piece({target: (dtype, shape)}, lambda: {target: hf_folder.decoded(model, path, dtype)})
    count = len(paths) // len(STACKED[stack])
    rows = [f"{listed}.{{}}.{part}" for part in STACKED[stack]]
    height = sum(model.header.matrices[row.format(0)].shape[0] for row in rows)
    width = model.header.matrices[rows[0].format(0)].shape[1]

    def make() -> dict[str, Tensor]:
        experts = [
            torch.cat([hf_folder.decoded(model, row.format(number), dtype) for row in rows]) for number in range(count)
        ]
        return {target: torch.stack(experts)}

    return hf_folder.Piece({target: (dtype, (count, height, width))}, make)


def _apart(model: PackedModel) -> Mapping[str, str] | None:
    """Names of an expert's matrices where checkpoints keep experts apart; None where they do not."""
    return APART.get(str(untrusted.read_configuration(model.folder).get("model_type")))

"""GPTQ's layout for 2, 3, 4 and 8 bits, as AutoGPTQ, GPTQModel, vLLM and SGLang read it.

A linear layer [rows, cols] at path P becomes

- `P.qweight`, int32 [cols * bits / 32, rows]: integer + 2^(bits-1); each column holds one row of ours as a stream of
  bits, low bits and words first (with 3 bits numbers lie across words);
- `P.qzeros`, int32 [groups, rows * bits / 32]: the zero point of each group and row, packed likewise along the rows;
- `P.scales`, float16 [groups, rows];
- `P.g_idx`, int32 [cols]: the group of each column.

`weight = scale * (q - zero)`. The zero point is always 2^(bits-1). It is stored *minus one*, as the first GPTQ code
did: this is `checkpoint_format: gptq`, version 1, which all of those programs read. `gptq_v2` stores it as it is, which
gains nothing where all integers are symmetric. Source: `pack` of AutoGPTQ's and GPTQModel's linear layers.

Layers with another width or group size than most are named in `dynamic`, which GPTQModel and vLLM know, and AutoGPTQ
does not. `int2` has levels half way between integers and takes 3 bits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgerazor import __version__, formats
from edgerazor.exporters.core import integers
from edgerazor.exporters.core.grouped import GroupedExporter, Layout
from edgerazor.exporters.core.integers import Integers
from edgerazor.packed import PackedModel, TensorSpec


class Gptq(GroupedExporter):
    """Integers are packed along the columns, zero points along the rows, so both fill whole words."""

    name = "gptq"
    describe = "GPTQ's layout (2, 3, 4 and 8 bits) for GPTQModel, vLLM and SGLang"
    widths = (2, 3, 4, 8)
    multiple = 32
    settings_file = "quantize_config.json"

    def specs(self, name: str, shape: tuple[int, int], layout: Layout) -> dict[str, TensorSpec]:
        """Packed integers, packed zero points, scales and the groups of the columns."""
        rows, columns = shape
        groups = formats.group_count(columns, layout.group_size)
        return {
            f"{name}.qweight": ("I32", (columns * layout.bits // 32, rows)),
            f"{name}.qzeros": ("I32", (groups, rows * layout.bits // 32)),
            f"{name}.scales": ("F16", (groups, rows)),
            f"{name}.g_idx": ("I32", (columns,)),
        }

    def tensors(self, name: str, matrix: Integers, layout: Layout) -> dict[str, Tensor]:
        """The tensors of `specs`, from integers in groups of the layout's size."""
        zero = 2 ** (layout.bits - 1)
        zeros = torch.full(matrix.scales.T.shape, zero - 1)
        columns = torch.arange(matrix.values.shape[1], dtype=torch.int32)
        return {
            f"{name}.qweight": integers.words(matrix.values.int() + zero, layout.bits).T,
            f"{name}.qzeros": integers.words(zeros, layout.bits),
            f"{name}.scales": matrix.scales.T,
            f"{name}.g_idx": columns // layout.group_size,
        }

    def settings(self, model: PackedModel, layouts: Mapping[str, Layout]) -> dict[str, Any]:
        """The commonest layout, and under `dynamic` the layers that have another, or none."""
        described = {name: _described(layout, model.header.matrices[name].shape[1]) for name, layout in layouts.items()}
        most = Counter(described.values()).most_common(1)[0][0]
        dynamic: dict[str, Any] = {}
        for name, entry in model.header.matrices.items():
            if entry.kind == "linear" and name not in described:
                dynamic[f"-:^{re.escape(name)}$"] = {}
            elif entry.kind == "linear" and described[name] != most:
                dynamic[f"+:^{re.escape(name)}$"] = dict(described[name])
        return {
            **dict(most),
            **({"dynamic": dynamic} if dynamic else {}),
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "true_sequential": True,
            "meta": {"quantizer": [f"edgerazor:{__version__}"]},
        }


def _described(layout: Layout, columns: int) -> tuple[tuple[str, int], ...]:
    """A layout in GPTQ's words, where -1 stands for whole rows."""
    group = layout.known_group(columns)
    return ("bits", layout.bits), ("group_size", -1 if group is None else group)


EXPORTER = Gptq()

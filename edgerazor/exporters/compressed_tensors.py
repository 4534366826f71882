"""compressed-tensors, layout `pack-quantized`, for vLLM, SGLang and transformers: integers of 2 to 8 bits in groups.

A linear layer [rows, cols] at path P becomes

- `P.weight_packed`, int32 [rows, ceil(cols * bits / 32)]: integer + 2^(bits-1), low bits and words first, row by row;
- `P.weight_scale`, float16 [rows, groups], or [rows, 1] for one scale a row;
- `P.weight_shape`, int64 [2]: rows and cols.

Source: `PackedQuantizationCompressor` of the compressed-tensors package, version 0.20: 32 integers fill exactly `bits`
words, whatever the width. vLLM takes group sizes of 32, 64, 128 or whole rows; it has had kernels for widths of 4 and 8
for long, and since June 2026 for 2, 3, 5, 6 and 7, too (its pull requests 34556 and 46389). Scales are exact where the
model computes in float16 (config.json asks for it) or float32; bfloat16 would round them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgerazor import formats
from edgerazor.exporters.core import integers
from edgerazor.exporters.core.grouped import GroupedExporter, Layout
from edgerazor.exporters.core.integers import Integers
from edgerazor.packed import PackedModel, TensorSpec


class CompressedTensors(GroupedExporter):
    """Layers of one layout form one config group."""

    name = "compressed-tensors"
    describe = "compressed-tensors (pack-quantized, 2 to 8 bits) for vLLM and transformers"
    widths = (2, 3, 4, 5, 6, 7, 8)

    def specs(self, name: str, shape: tuple[int, int], layout: Layout) -> dict[str, TensorSpec]:
        """Packed integers, scales and shape."""
        rows, columns = shape
        return {
            f"{name}.weight_packed": ("I32", (rows, -(-columns * layout.bits // 32))),
            f"{name}.weight_scale": ("F16", (rows, formats.group_count(columns, layout.group_size))),
            f"{name}.weight_shape": ("I64", (2,)),
        }

    def tensors(self, name: str, matrix: Integers, layout: Layout) -> dict[str, Tensor]:
        """The tensors of `specs`, from integers in groups of the layout's size."""
        return {
            f"{name}.weight_packed": integers.words(matrix.values.int() + 2 ** (layout.bits - 1), layout.bits),
            f"{name}.weight_scale": matrix.scales,
            f"{name}.weight_shape": torch.tensor(matrix.values.shape),
        }

    def settings(self, model: PackedModel, layouts: Mapping[str, Layout]) -> dict[str, Any]:
        """One config group for each layout; layers are named where there are several."""
        schemes: dict[tuple[int, int | None], list[str]] = {}
        for name, layout in layouts.items():
            group = layout.known_group(model.header.matrices[name].shape[1])
            schemes.setdefault((layout.bits, group), []).append(name)
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(schemes) == 1 else names,
                "weights": _weights(*scheme),
                "input_activations": None,
                "output_activations": None,
            }
            for number, (scheme, names) in enumerate(sorted(schemes.items(), key=str))
        }
        matrices = {name for name, entry in model.header.matrices.items() if entry.kind != "embedding"}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted((matrices | model.header.tied.keys()) - layouts.keys()),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _weights(bits: int, group_size: int | None) -> dict[str, Any]:
    """The `QuantizationArgs` of weights, as the package writes them."""
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
    }


EXPORTER = CompressedTensors()

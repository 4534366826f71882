"""Why a GGUF file is larger than the packed model, in numbers, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgerazor.console import megabytes
from edgerazor.exporters.core.base import PlannedTensor
from edgerazor.exporters.core.gguf_blocks import SIZES, NewType, ggml_type
from edgerazor.packed import MatrixEntry, PackedModel

#: Bits a weight that a type may take beyond the format's nominal bits and scales without an explanation: Q2_K takes
#: 0.56 more than int2 with scales for 256 weights.
USUAL = 0.6
#: Weights that share an fp16 number in types of few bits, and in all others.
LARGE, SMALL = 256, 32


def size_causes(model: PackedModel, tensors: Sequence[PlannedTensor], metadata: int) -> Iterator[str]:
    """Why the file is larger than the packed model, a sentence for each reason, the costliest first.

    Args:
        model: the packed model.
        tensors: of the plan.
        metadata: bytes before the first tensor.
    """
    groups: dict[tuple[str, str], list[PlannedTensor]] = {}
    for tensor in tensors:
        name = tensor.name.removesuffix(".weight")
        # Of the experts of a layer, which are one tensor, the first.
        entry = model.header.matrices.get(name) or model.header.matrices.get(name.replace(".experts.", ".experts.0."))
        if entry is not None and 8 * tensor.bytes / tensor.weights > tensor.packed_bits + USUAL:
            groups.setdefault(_cause(entry, tensor.type), []).append(tensor)
    for (cause, remedy), affected in sorted(groups.items(), key=lambda item: -_excess(item[1])):
        weights = sum(tensor.weights for tensor in affected)
        bits = 8 * sum(tensor.bytes for tensor in affected) / weights
        packed = sum(tensor.weights * tensor.packed_bits for tensor in affected) / weights
        types = ", ".join(sorted({tensor.type for tensor in affected}))
        yield (
            f"{len(affected)} matrices take {types}, {bits:.2f} bits a weight instead of {packed:.2f}, because "
            f"{cause}{remedy}."
        )
    data = sum(tensor.bytes for tensor in tensors)
    if metadata > 0.05 * data:
        yield f"The vocabulary and other metadata take {megabytes(metadata)} in the same file."


def _excess(tensors: Sequence[PlannedTensor]) -> float:
    """Bits that tensors take beyond those of the packed model."""
    return sum(8 * tensor.bytes - tensor.packed_bits * tensor.weights for tensor in tensors)


def _cause(entry: MatrixEntry, chosen: str) -> tuple[str, str]:
    """Why a matrix needs that type, and what helps."""
    cols = entry.shape[1]
    group = min(entry.group_size, cols)
    if SIZES[ggml_type(chosen)][0] == 1 and (cols % SMALL or group % SMALL):
        what = f"rows of {cols} weights" if cols % SMALL else f"groups of {group} weights"
        return f"{what} are no multiple of {SMALL}", "" if cols % SMALL else " (--group-size 256 helps)"
    if len(entry.formats) > 1:
        mixed = " and ".join(entry.formats)
        return f"a tensor of GGUF has one type, but these mix {mixed}", " (--granularity tensor helps)"
    if chosen == "Q2_0":
        return "it has two bits for a trit, and a scale for 64 weights", ""
    short = SIZES[NewType.Q2_0][0]
    fits = entry.formats[0] in ("ternary", "int2z") and cols % short == group % short == 0
    other = "--export gguf-q2" if fits else ""
    if cols % LARGE:
        remedy = f" ({other} helps)" if fits else ""
        return f"rows of {cols} weights are no multiple of {LARGE}, as types of fewer bits need", remedy
    if group % LARGE:
        remedy = f" (--group-size 256 helps{f', and {other}' if fits else ''})"
        return f"types of fewer bits have one scale for {LARGE} weights, not {group}", remedy
    return "no smaller type holds all of their codes and scales", ""

"""Experts in what calibrate measures: how many tokens go to each, and what is said of those that none went to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgerazor.models import Structure

#: Prefix of the counts of a layer's experts in the file of statistics.
EXPERT_TOKENS = "expert_tokens/"
#: Experts that are named; of more, their number is.
NAMED = 4


def tokens_of(structure: Structure, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How many tokens went to each expert, by the names of the file of statistics: int64 [experts] for each layer.

    Args:
        structure: where the experts are.
        tokens: path of a linear layer -> tokens that passed through it; none where there were none.
    """
    counts = {listed.path: torch.zeros(listed.size, dtype=torch.int64) for listed in structure.experts}
    for target in structure.linears:
        if target.experts:
            number = int(target.name.removeprefix(f"{target.experts}.").partition(".")[0])
            reached = torch.as_tensor(tokens.get(target.name, 0))
            counts[target.experts][number] = torch.maximum(counts[target.experts][number], reached)
    return {EXPERT_TOKENS + path: count for path, count in counts.items()}


def counts_of(structure: Structure, counts: Mapping[str, Tensor], path: str) -> Tensor:
    """How often inputs of a linear layer or the head have which magnitude: of an expert that no token went to, those of
    the same linear layers of the other experts together.

    Args:
        structure: where the linear layers are.
        counts: path -> int64 [bins].
        path: of the linear layer or the head.
    """
    if path in counts:
        return counts[path]
    experts = next(target.experts for target in structure.linears if target.name == path)
    part = path.rpartition(".")[2]
    others = [
        counts[target.name]
        for target in structure.linears
        if target.experts == experts and target.name.endswith(f".{part}") and target.name in counts
    ]
    return torch.stack(others).sum(0)


def unreached(tensors: Mapping[str, Tensor]) -> str:
    """One sentence that names the experts that no token of calibration went to; empty where there are none.

    Args:
        tensors: the file of statistics.
    """
    names = [
        f"{name.removeprefix(EXPERT_TOKENS)}.{number}"
        for name, counts in tensors.items()
        if name.startswith(EXPERT_TOKENS)
        for number in (counts == 0).nonzero().flatten().tolist()
    ]
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"Calibration never reached {'the expert' if len(names) == 1 else f'{len(names)} experts,'} "
        f"{', '.join(names[:NAMED])}{more}; {'it gets' if len(names) == 1 else 'they get'} the plan's average bits."
    )

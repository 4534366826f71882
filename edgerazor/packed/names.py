"""Folded names: names that differ only in numbers, written as one, such as `model.layers.0-27.mlp.up_proj`.

A name is cut at its dots. A piece `first-last` stands for all whole numbers from the first to the last, and a folded
name for all combinations of what its pieces stand for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_RANGE = re.compile(rf"({_NUMBER.pattern})-({_NUMBER.pattern})")

_Pieces = tuple[str, ...]


def fold(names: Iterable[str]) -> list[str]:
    """Folded names that stand for exactly these, sorted; `unfold` gives these again, in some order.

    Raises:
        ValueError: one of them looks folded already.
    """
    split = [tuple(name.split(".")) for name in names]
    for name in split:
        if any(map(_RANGE.fullmatch, name)):
            raise ValueError(f"nothing can be called {'.'.join(name)}: it looks like a range of names")
    for position in range(max(map(len, split), default=0)):
        split = list(_folded(split, position))
    return sorted(map(".".join, split))


def _folded(names: Iterable[_Pieces], position: int) -> Iterator[_Pieces]:
    """The names with those that differ only in the number at one position folded into one."""
    numbers: dict[tuple[_Pieces, _Pieces], list[int]] = {}
    for name in names:
        if _NUMBER.fullmatch("".join(name[position : position + 1])):
            numbers.setdefault((name[:position], name[position + 1 :]), []).append(int(name[position]))
        else:
            yield name
    for (before, after), values in numbers.items():
        for piece in _ranges(sorted(values)):
            yield (*before, piece, *after)


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Ascending numbers as pieces of a name: runs of neighbours as ranges."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        yield str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def unfold(folded: Iterable[str], most: int) -> Iterator[str]:
    """All names that folded ones stand for, one at a time, since few letters can stand for more than memory holds.

    Raises:
        ValueError: they are more than `most`, or a range does not ascend.
    """
    for name in folded:
        pieces, count = [_values(piece) for piece in name.split(".")], 1
        for piece in pieces:
            count *= len(piece)
            if count > most:
                raise ValueError("it names more tensors than there are")
        most -= count
        yield from (".".join(map(str, values)) for values in itertools.product(*pieces))


def _values(piece: str) -> Sequence[str] | range:
    match = _RANGE.fullmatch(piece)
    if not match:
        return (piece,)
    first, last = map(int, match.groups())
    if first >= last:
        raise ValueError(f"{piece:.50} is no range of numbers")
    return range(first, last + 1)

"""Names that differ only in numbers, written as one: `model.layers.0-27.mlp.up_proj`.

A name is cut at its points. A piece `first-last` stands for all whole numbers from the first to the last, so a folded
name stands for all combinations of what its pieces stand for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_RANGE = re.compile(rf"({_NUMBER.pattern})-({_NUMBER.pattern})")

_Pieces = tuple[str, ...]


def fold(names: Iterable[str]) -> list[str]:
    """As few names as stand for all of these, sorted; `unfold` gives these again, in some order.

    Raises:
        ValueError: one of them looks folded already.
    """
    cut = [tuple(name.split(".")) for name in names]
    for name in cut:
        if any(map(_RANGE.fullmatch, name)):
            raise ValueError(f"nothing can be called {'.'.join(name)}: it looks like a range of names")
    for position in range(max(map(len, cut), default=0)):
        cut = list(_folded(cut, position))
    return sorted(map(".".join, cut))


def _folded(names: Iterable[_Pieces], position: int) -> Iterator[_Pieces]:
    """Those that differ only in the number at one position, in one."""
    numbers: dict[tuple[_Pieces, _Pieces], list[int]] = {}
    for name in names:
        if _NUMBER.fullmatch("".join(name[position : position + 1])):
            numbers.setdefault((name[:position], name[position + 1 :]), []).append(int(name[position]))
        else:
            yield name
    for (before, after), found in numbers.items():
        for each in _ranges(sorted(found)):
            yield (*before, each, *after)


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Ascending numbers, neighbours in ranges."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda each: each[1] - each[0]):
        values = [value for _, value in run]
        yield str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def unfold(folded: Iterable[str], most: int) -> Iterator[str]:
    """All names that folded ones stand for, one at a time: a few letters can stand for more than there is memory.

    Raises:
        ValueError: they are more than `most`, or a range does not ascend.
    """
    for each in folded:
        pieces, count = [_values(piece) for piece in each.split(".")], 1
        for piece in pieces:
            count *= len(piece)
            if count > most:
                raise ValueError("it names more tensors than there are")
        most -= count
        yield from (".".join(map(str, name)) for name in itertools.product(*pieces))


def _values(piece: str) -> Sequence[str] | range:
    found = _RANGE.fullmatch(piece)
    if not found:
        return (piece,)
    first, last = map(int, found.groups())
    if first >= last:
        raise ValueError(f"{piece:.50} is no range of numbers")
    return range(first, last + 1)

"""Which inputs of a model begin alike, so that what they share is computed once.

The choices of an item share its prompt; items of a task may share a description or examples, which are longer than all
the rest. An engine computes a *prefix* once and lets many *continuations* see it, but a continuation sees one prefix
only. So the inputs are divided into groups, each with one prefix, such that the tokens to compute, prefixes and what
lies behind them, are few. Inputs in the order of a dictionary form a tree whose inner nodes are the beginnings that
neighbours share (the interval tree of longest common prefixes). From the leaves up, each node decides: its children
keep their groups, or those that gain by it give them up and share the node's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class PrefixGroup(NamedTuple):
    """Inputs that share their first tokens, by their indices."""

    prefix: int
    members: list[int]


@dataclass
class _Node:
    """Inputs below a node of the tree: their groups, and the tokens that these save."""

    groups: list[PrefixGroup]
    saved: int
    inputs: int


def group_by_prefix(inputs: Sequence[Sequence[int]], limits: Sequence[int]) -> list[PrefixGroup]:
    """Divide inputs into groups with a common prefix.

    Args:
        inputs: tokens of every input, at least one.
        limits: for every input the longest prefix that it may share, at least 1.

    Returns:
        every input in one group; prefixes have at least one token.
    """
    order = sorted(range(len(inputs)), key=lambda index: tuple(inputs[index]))
    open_nodes: list[tuple[int, list[_Node]]] = []  # above the last input: depths, increasing, and children
    node = None
    for last, index in zip([None, *order], order, strict=False):
        if last is not None and node is not None:
            depth = min(_common(inputs[last], inputs[index]), limits[last], limits[index])
            while open_nodes and open_nodes[-1][0] > depth:
                above, children = open_nodes.pop()
                node = _node_above(above, [*children, node])
            if not open_nodes or open_nodes[-1][0] < depth:
                open_nodes.append((depth, []))
            open_nodes[-1][1].append(node)
        node = _Node([PrefixGroup(limits[index], [index])], 0, 1)
    for above, children in reversed(open_nodes):
        assert node is not None
        node = _node_above(above, [*children, node])
    return node.groups if node else []


def _node_above(depth: int, children: list[_Node]) -> _Node:
    """The node above some children, with a beginning of `depth` tokens; those children share it that gain by it."""
    gaining = [child.inputs * depth > child.saved for child in children]
    gain = sum(child.inputs * depth - child.saved for child, gains in zip(children, gaining, strict=True) if gains)
    together: list[int] = []
    groups: list[PrefixGroup] = []
    for child, gains in zip(children, gaining, strict=True):
        if gains and gain > depth:
            together += [member for group in child.groups for member in group.members]
        else:
            groups += child.groups
    saved = sum(child.saved for child in children)
    if together:
        groups, saved = [PrefixGroup(depth, together), *groups], saved + gain - depth
    return _Node(groups, saved, sum(child.inputs for child in children))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

"""YAML of strangers: plain values (text, numbers, lists, mappings), of bounded size however often they are repeated.

YAML can name a node (`&a`) and repeat it (`*a`): ten lines that each repeat the one above ten times are ten thousand
million values. So each node's size counts with all that it repeats, and a node that repeats itself has none.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from edgerazor.errors import plain

#: Of a node with all that it repeats, of levels, and of characters of a number.
MOST_NODES, MOST_LEVELS, MOST_DIGITS = 1 << 14, 32, 40
#: What JSON has, and merging (`<<`).
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
_TEXT = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `2e-5` is a number (in YAML 1.1 it is text), a date is text, and a field given twice is a
    mistake."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.level = 0
        self.extents: dict[int, tuple[int, int]] = {}  # id of a composed node -> its nodes and levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        repeated = self.check_event(yaml.AliasEvent)
        self.level += 1
        if self.level > MOST_LEVELS:
            raise _mistake(f"it is nested deeper than {MOST_LEVELS} levels", mark)
        node: Any = super().compose_node(parent, index)
        self.level -= 1
        if repeated and id(node) not in self.extents:  # it is still being composed
            raise _mistake("a part of it repeats itself", mark)
        if id(node) not in self.extents:
            self.extents[id(node)] = self.extent(node, mark)
        return node

    def extent(self, node: yaml.Node, mark: Any) -> tuple[int, int]:
        """Nodes and levels of a node that has just been composed, all that it repeats included."""
        if node.tag not in _TAGS:
            raise _mistake(f"the tag {plain(node.tag, 80)} is not understood here", mark)
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
            return 1, 1
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        extents = [self.extents[id(child)] for child in children]
        count, levels = 1 + sum(nodes for nodes, _ in extents), 1 + max((deep for _, deep in extents), default=0)
        if count > MOST_NODES:
            raise _mistake(f"it has more than {MOST_NODES:,} values", mark)
        if levels > MOST_LEVELS:
            raise _mistake(f"it is nested deeper than {MOST_LEVELS} levels", mark)
        return count, levels

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            shown = plain(node.value, 50) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            raise _mistake(f"{shown!r} is no {kind}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(result) < len(node.value):
            seen = set()
            for key, _ in node.value:
                name = self.construct_object(key, deep=True)
                if name in seen:
                    raise _mistake(f"`{plain(name, 80)}` is given twice", node.start_mark)
                seen.add(name)
        return result


def _mistake(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)


def _check_scalar(node: yaml.ScalarNode) -> None:
    """Refuse numbers that take long to read or print, and text that no file or tokenizer could have."""
    if node.tag != _TEXT and len(node.value) > MOST_DIGITS:
        raise _mistake(f"it has a number of {len(node.value):,} characters", node.start_mark)
    if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise _mistake("it has a text with a zero byte or half of a surrogate pair", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [resolver for resolver in _resolvers if resolver[0] in _TAGS]


class YamlError(ValueError):
    """Why something is no YAML that we read, and in which line, counted from 1, if it is a line's fault."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def parse_yaml(text: str) -> Any:
    """Parse YAML, within bounds: nested dict, list, text, numbers, true, false and None.

    Raises:
        YamlError: it is something else, too deep or too large.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise YamlError(plain(problem, 200).rstrip("."), mark.line + 1 if mark else None) from None

"""A recipe for people: its fields explained, its values as YAML, its JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from edgerazor.recipe.schema import CHOSEN_BY_BUDGET, CHOSEN_BY_MODEL, Recipe, Strict, as_section, section_at


def set_values(recipe: Recipe) -> dict[str, Any]:
    """Everything that differs from the defaults, and what was set although the job would choose it, as JSON values."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    for chosen in (CHOSEN_BY_MODEL, CHOSEN_BY_BUDGET if recipe.distill.has_open_budget() else {}):
        for section, names in chosen.items():
            settings: Strict = getattr(recipe, section)
            said = settings.model_dump(mode="json", include=settings.model_fields_set & set(names), exclude_unset=True)
            if said:
                values[section] = {**values.get(section, {}), **said}
    return values


def dump(recipe: Recipe) -> str:
    """YAML of `set_values`."""
    return str(yaml.safe_dump(set_values(recipe), sort_keys=False))


def explain(flags: Mapping[str, str] | None = None) -> str:
    """All fields with their defaults and explanations, as YAML with comments.

    Args:
        flags: field (`calibrate.bits`) -> its option on the command line, to be named behind the explanation.
    """
    return "\n".join(_lines(Recipe, (), flags or {}))


def _lines(section: type[Strict], location: tuple[str, ...], flags: Mapping[str, str]) -> Iterator[str]:
    indent = "  " * len(location)
    for name, field in section.model_fields.items():
        if inner := as_section(field.annotation):
            yield f"{indent}{name}:  # {(inner.__doc__ or '').strip().splitlines()[0]}"
            yield from _lines(inner, (*location, name), flags)
            continue
        path = ".".join((*location, name))
        inside = (flags[field] for field in flags if field == path or field.startswith(f"{path}."))
        flag = next((f" [{flag}]" for flag in inside), "")
        yield f"{indent}{name}: {default_of(field)}  # {field.description}{flag}"


def default_of(field: FieldInfo) -> str:
    """A field's default in one line of YAML."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        default = [
            item.model_dump(mode="json", exclude_defaults=True) if isinstance(item, Strict) else item
            for item in default
        ]
    return yaml.safe_dump(default, default_flow_style=True, width=1000).strip().removesuffix("...").strip()


def values_of(field: FieldInfo) -> str:
    """The values that a field takes, in words: its choices or its range; empty where neither limits it."""
    if get_origin(field.annotation) is Literal:
        *others, last = map(str, get_args(field.annotation))
        return f"{', '.join(others)} or {last}"
    bounds: dict[str, Any] = {}
    for constraint in field.metadata:
        bounds |= {key: getattr(constraint, key) for key in ("ge", "gt", "le", "lt") if hasattr(constraint, key)}
    number = "a whole number" if "int" in str(field.annotation) else "a number"
    if set(bounds) == {"ge", "le"}:
        return f"{number} from {bounds['ge']:g} to {bounds['le']:g}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    limits = " and ".join(f"{words[key]} {value:g}" for key, value in bounds.items())
    return f"{number} {limits}" if limits else ""


def json_schema(flags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON schema of a recipe; `flags` as for `explain`."""
    schema = Recipe.model_json_schema()
    for path, flag in (flags or {}).items():
        *parents, name = path.split(".")
        section = section_at(tuple(parents))
        properties = (schema if section is Recipe else schema["$defs"][section.__name__])["properties"]
        properties[name]["description"] += f" [{flag}]"
    return schema

"""From values to a recipe: find a file, read it, resolve its paths, merge layers, validate.

Values come from, later ones winning: the defaults, the recipe of the working directory (what earlier commands
were given), `--recipe FILE`, the options of the command line. A `--recipe` replaces that of the working directory; it
may be the bare name of one that comes with edgerazor (`--recipe phases`).
Paths in a recipe file are relative to the file; on the command line, to the current folder. In the working directory
they are stored absolute, so that later commands work from any folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from edgerazor import untrusted
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.recipe.explain import set_values, values_of
from edgerazor.recipe.schema import (
    RETIRED_FIELDS,
    RETIRED_VALUES,
    Recipe,
    RecipePath,
    Strict,
    as_section,
    option_at,
    section_at,
    section_in,
)
from edgerazor.registry import unknown

#: Most bytes of a recipe.
MOST_BYTES = 1 << 20
#: Whose record says where an installation put the recipes that come with it (`data-files` of pyproject.toml).
DISTRIBUTION = "edgerazor-toolchain"


# Files ------------------------------------------------------------------------------------------------------------


def find(path: Path) -> Path:
    """The recipe file that a path or a bare name stands for.

    A file of that name in the current folder, with or without `.yaml`, wins over one that comes with edgerazor.

    Raises:
        UserError: a bare name that is neither; the message names the closest ones.
    """
    if path.name != str(path) or path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    here = Path(f"{path}.yaml")
    if here.is_file():
        return here
    known = shipped()
    if str(path) not in known:
        raise unknown("recipe", str(path), sorted(known))
    return known[str(path)]


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with edgerazor: those of the checkout, or of the installed package."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").exists():
        return {file.stem: file for file in (checkout / "recipes").glob("*.yaml")}
    try:
        recorded = metadata.files(DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        return {}
    files = [Path(str(file.locate())) for file in recorded if file.match("share/edgerazor/recipes/*.yaml")]
    return {file.stem: file.resolve() for file in files}


def load(path: Path) -> dict[str, Any]:
    """Read a recipe file into plain values, its relative paths taken from the folder that it lies in.

    Raises:
        UserError: not there, not YAML, or not a mapping.
    """
    try:
        values = untrusted.parse_yaml(untrusted.read_bytes(path, MOST_BYTES, pipes=True).decode())
    except untrusted.YamlError as error:
        where = f" (line {error.line})" if error.line else ""
        raise usage_error(f"The recipe {path} is not valid YAML{where}: {error}.") from None
    except OSError as error:
        raise usage_error(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise usage_error(f"The recipe {path} cannot be read: {reason}.") from None
    if values is None:
        raise usage_error(f"The recipe {path} is empty.", "See `edgerazor show recipe` for its fields.")
    if not isinstance(values, dict):
        raise usage_error(f"The recipe {path} must be a mapping of fields to values.", "See `edgerazor show recipe`.")
    return anchor(values, path.parent)


# Paths ------------------------------------------------------------------------------------------------------------


def anchor(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with their relative paths made absolute, taken from a folder.

    Which fields are paths is marked in the schema (`RecipePath`). Malformed parts stay as they are.

    Raises:
        UserError: a path begins with the home folder of a user who does not exist.
    """

    def absolute(text: str, mark: RecipePath) -> str:
        if mark.program and text == "none":
            return text
        path = os.path.abspath(folder / _expand_home(text))
        return text if mark.or_hub_id and not Path(path).exists() else path

    result: dict[str, Any] = _replace_paths(values, Recipe, (), absolute)
    return result


def with_values(recipe: Recipe, values: Mapping[str, Mapping[str, Any]], source: str) -> Recipe:
    """A recipe with other values in fields of its sections, checked as if they stood in a file.

    Args:
        recipe: stays as it is.
        values: section -> field -> value.
        source: where the values come from, for the error.

    Raises:
        UserError: a value is not allowed.
    """
    checked = build(dict(values), source)
    sections = {
        section: getattr(recipe, section).model_copy(
            update={name: getattr(getattr(checked, section), name) for name in settings}
        )
        for section, settings in values.items()
    }
    return recipe.model_copy(update=sections)


def dump_without_places(recipe: Recipe, fields: Iterable[str], skip: Iterable[str] = ()) -> str:
    """YAML of some fields and sections of a recipe, as `dump` has it, local files and folders by their names alone.

    Args:
        recipe: with absolute paths, as `load` gives them.
        fields: that are written: `model`, `calibrate` ...
        skip: fields in them that are not: `calibrate.batch_size` ...
    """

    def name(text: str, mark: RecipePath) -> str:
        return text if mark.or_hub_id and not Path(text).exists() else Path(text).name

    values = set_values(recipe)
    chosen = {field: values[field] for field in fields if field in values}
    for path in skip:
        section, _, field = path.partition(".")
        if field and isinstance(chosen.get(section), dict):
            chosen[section].pop(field, None)
        elif not field:
            chosen.pop(section, None)
    chosen = {field: value for field, value in chosen.items() if value != {}}
    return str(yaml.safe_dump(_replace_paths(chosen, Recipe, (), name), sort_keys=False))


def foreign_code(recipe: Recipe) -> list[str]:
    """What a recipe makes run that is not edgerazor, in words: programs, and Python code that comes with models."""
    code = []

    def note(text: str, mark: RecipePath) -> str:
        if mark.program and text != "none":
            code.append(f"the program {plain(text, 200)}")
        return text

    _replace_paths(recipe.model_dump(), Recipe, (), note)
    return [*code, *(["the Python code that comes with its models"] if recipe.trust_remote_code else [])]


def _replace_paths(value: Any, annotation: Any, marks: Iterable[Any], change: Callable[[str, RecipePath], str]) -> Any:
    """A copy of a value of the schema in which `change` has replaced every text that is marked as a path."""
    mark = next((mark for mark in marks if isinstance(mark, RecipePath)), None)
    if mark is not None and isinstance(value, str) and value:
        return change(value, mark)
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _replace_paths(value, arguments[0], arguments[1:], change)
    if kind in (Union, UnionType):
        for argument in arguments:
            value = _replace_paths(value, argument, (), change)
    elif kind is tuple and isinstance(value, list | tuple):
        return [_replace_paths(item, arguments[0], (), change) for item in value]
    elif kind is dict and isinstance(value, dict):
        return {key: _replace_paths(item, arguments[1], (), change) for key, item in value.items()}
    elif (section := as_section(annotation)) and isinstance(value, dict):
        fields = section.model_fields.items()
        changed = {
            name: _replace_paths(value[name], field.annotation, field.metadata, change)
            for name, field in fields
            if name in value
        }
        return {**value, **changed}
    return value


def _expand_home(path: str) -> Path:
    """A path in which `~` or `~name` at the beginning is the home folder that it stands for.

    Raises:
        UserError: there is no user of that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise usage_error(
            f"{plain(path, 100)} begins with the home folder of nobody who is known here.", "Write the whole path."
        ) from None


# Layers -----------------------------------------------------------------------------------------------------------


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """One mapping of several: later layers win.

    Sections are merged field by field; every other value replaces the earlier one as a whole. Of fields that exclude
    each other (`EXCLUSIVE` of a section) those of the last layer that sets one stay.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        result = _merge_section(Recipe, result, layer)
    return result


def _merge_section(section: type[Strict], lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    replaced = section.EXCLUSIVE if any(upper.get(name) is not None for name in section.EXCLUSIVE) else ()
    result = {name: value for name, value in lower.items() if name not in replaced}
    for name, value in upper.items():
        field = section.model_fields.get(name)
        inner = section_in(field.annotation) if field else None
        if inner and isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = _merge_section(inner, result[name], value)
        else:
            result[name] = value
    return result


# Validation -------------------------------------------------------------------------------------------------------


def build(values: dict[str, Any], where: str | None = None) -> Recipe:
    """Validate plain values.

    Args:
        values: as `load` gives them.
        where: what they come from (`The recipe x.yaml`); None for the options of the command line.

    Raises:
        UserError: the first mistake, with the field's name and, for an unknown field, the closest one.
    """
    try:
        return Recipe.model_validate(_as_tuples(values))
    except ValidationError as error:
        raise _first_mistake(error, where) from None


def _as_tuples(value: Any) -> Any:
    """YAML lists as tuples, which strict frozen models want."""
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_as_tuples(item) for item in value)
    return value


def _first_mistake(error: ValidationError, where: str | None) -> UserError:
    """One sentence on the first mistake: which field, its value, and what is expected."""
    mistake = error.errors()[0]
    location, kind, value = mistake["loc"], mistake["type"], mistake["input"]
    path = ".".join(str(part) for part in location)
    subject = f"{where}: `{path}`" if where else option_at(location)
    section = section_at(location[:-1])
    if kind == "extra_forbidden":
        return _unknown_field(location, section, where or "The recipe")
    if kind == "missing":
        return usage_error(f"{subject} is missing.", "See `edgerazor show recipe`.")
    if kind == "value_error":
        if not where and len(location) == 1:  # several fields of a section together
            subject = "The command line"
        return usage_error(
            f"{subject}: {mistake['msg'].removeprefix('Value error, ')}.", "See `edgerazor show recipe`."
        )
    if (retired := RETIRED_VALUES.get((path, value) if isinstance(value, str) else ("", ""))) is not None:
        return usage_error(f"{subject} is {value!r}, which is called `{retired}` now.", "Write the new name.")
    name = next((part for part in reversed(location) if isinstance(part, str)), "")
    field = section.model_fields.get(name) if location and location[-1] == name else None
    shown = repr(list(value) if isinstance(value, tuple) else value)
    return usage_error(f"{subject} is {shown[:80]}; expected {_expectation(kind, mistake.get('ctx', {}), field)}.")


def _unknown_field(location: tuple[int | str, ...], section: type[Strict], where: str) -> UserError:
    """The sentence on a field that there is not: its new name if it was renamed, else the closest one."""
    path = ".".join(str(part) for part in location)
    if path in RETIRED_FIELDS:
        return usage_error(f"{where}: `{path}` is called `{RETIRED_FIELDS[path]}` now.", "Write the new name.")
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Known fields there: {', '.join(known)}."
    return usage_error(f"{where} has an unknown field `{path}`.", hint)


#: pydantic's names of mistakes of type -> what is expected.
EXPECTATIONS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "fields with values",
    "model_type": "fields with values",
    "too_short": "at least one entry",
}


def _expectation(kind: str, context: dict[str, Any], field: FieldInfo | None) -> str:
    """What a field expects, in words: its type, or its range."""
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if field and kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return values_of(field) or kind.replace("_", " ")
    return EXPECTATIONS.get(kind, kind.replace("_", " "))

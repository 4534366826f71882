"""Python code that comes with a model: named by its JSON files, and never run or offered unless it was asked for.

transformers runs what `auto_map` names (in the configuration, of the tokenizer, of a processor), what lies in
`custom_generate/`, and kernels of the hub that a configuration names as its attention. Where it is not told whether to,
it asks; a reader of ours must not even do that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgerazor.errors import UserError, plain
from edgerazor.untrusted.documents import read_json

#: Files of a model folder in which transformers looks for names of code.
FILES = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)
#: Fields that name it, wherever in the file.
FIELDS = ("auto_map", "custom_generate", "custom_pipelines")
#: Beginnings of fields that name a kernel, which is fetched from the hub where it has the form of an id.
KERNELS = ("attn_implementation", "experts_implementation")


def names_code(name: str, value: Any) -> bool:
    """Whether a field of a configuration names code."""
    if name.lstrip("_").startswith(KERNELS):
        return _is_fetched(value)
    return name in FIELDS and bool(value)


def _is_fetched(value: Any) -> bool:
    """Whether the name of an implementation, or one of several, is that of a repository."""
    if isinstance(value, dict):
        return any(map(_is_fetched, value.values()))
    return isinstance(value, str) and "/" in value


def code_fields(values: Any) -> Iterator[str]:
    """Names of all fields that name code, in whatever depth of a configuration."""
    if isinstance(values, list):
        for element in values:
            yield from code_fields(element)
    elif isinstance(values, dict):
        for name, value in values.items():
            if names_code(name, value):
                yield name
            yield from code_fields(value)


def refuse_code(folder: Path, hint: str) -> None:
    """Make sure that no file of a model folder names code of its own.

    Args:
        folder: of a model, packed or not.
        hint: what to do about it.

    Raises:
        UserError: one does, or cannot be read.
    """
    for name in FILES:
        path = folder / name
        if not path.exists():
            continue
        field = next(code_fields(read_json(path, None, hint="Copy the model again.")), "")
        if field:
            raise UserError(
                f"{folder} needs Python code of its own ({plain(field)} in {name}), which is not run unless you ask.",
                hint,
            )


def without_code(values: Any) -> Any:
    """A configuration without the fields that name code, in whatever depth."""
    if isinstance(values, list):
        return [without_code(element) for element in values]
    if not isinstance(values, dict):
        return values
    return {name: without_code(value) for name, value in values.items() if not names_code(name, value)}

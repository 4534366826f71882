"""A model's config.json: its fields have the types that transformers takes for granted, and sizes that models have.

transformers makes lists, modules and tables as large as a configuration says before anyone can object, so a number of
layers that is a mistake, or a joke, would be an answer that never comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgerazor.errors import UserError, plain
from edgerazor.untrusted.documents import read_json

#: Endings of fields that count what transformers makes one by one, and the most that any model has of it.
COUNTS = {"_layers": 1 << 12, "n_layer": 1 << 12, "_experts": 1 << 14, "_heads": 1 << 14, "n_head": 1 << 14}
COUNTS |= {"_labels": 1 << 16, "_levels": 1 << 16, "_groups": 1 << 16}
#: Endings of fields that are sizes of tensors, and the most of it.
SIZES = ("_size", "_dim", "n_embd", "n_inner", "_positions", "_embeddings", "_width", "_rank", "d_model", "d_ff")
MOST_SIZE = 1 << 24
#: Any other whole number; tokens and windows, say.
MOST_NUMBER = 1 << 53
#: Names that must be lists of text, text, or objects, if they are there.
LISTS_OF_TEXT, TEXTS = ("architectures", "layer_types"), ("model_type", "torch_dtype", "hidden_act", "_name_or_path")
OBJECTS = ("text_config", "auto_map", "id2label", "label2id", "rope_scaling", "rope_parameters")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
#: Sizes that some tensor of every such model has as one of its dimensions.
DIMENSIONS = ("vocab_size", "hidden_size", "head_dim", "n_embd")
#: Those that count layers.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
#: Parts of a configuration that describe the language model.
TEXT_PARTS = ("text_config", "llm_config", "language_config")


def read_configuration(folder: Path, hint: str = "Download the model again.") -> dict[str, Any]:
    """Read and check config.json of a model folder.

    Raises:
        UserError: it cannot be read, or says what no model can be.
    """
    path = folder / "config.json"
    values: dict[str, Any] = read_json(path, hint=hint)
    check_configuration(path, values, hint)
    return values


def check_configuration(path: Path, values: Any, hint: str = "Download the model again.") -> None:
    """Make sure that a configuration asks for nothing that no model has.

    Args:
        path: where it is from.
        values: JSON of bounded depth.
        hint: what to do where it does.

    Raises:
        UserError: it does; the first such field.
    """
    for name, value in _fields(values):
        if problem := _problem(name, value):
            raise UserError(f"{path} says {plain(name, 50)} {_shown(value)}; expected {problem}.", hint)


def check_shapes(path: Path, values: dict[str, Any], shapes: Iterable[Sequence[int]]) -> None:
    """Make sure that a configuration asks for no more than there are weights of.

    Args:
        path: where it is from.
        values: as `check_configuration` has checked them.
        shapes: of all stored tensors; nothing is checked where there are none.

    Raises:
        UserError: more layers than tensors, or a size that no tensor has.
    """
    known = list(shapes)
    if not known:
        return
    largest = max((size for shape in known for size in shape), default=0)
    parts = [values, *(values[name] for name in TEXT_PARTS if isinstance(values.get(name), dict))]
    for part in parts:
        for names, most in ((LAYERS, len(known)), (DIMENSIONS, largest)):
            for name in names:
                value = part.get(name)
                if type(value) is int and value > most:
                    raise UserError(
                        f"{path} says {name} {value}, but the weights are not those of such a model.",
                        "Undo the change, or download the model again.",
                    )


def _fields(values: Any) -> Iterator[tuple[str, Any]]:
    """Every named value, in whatever depth."""
    if isinstance(values, list):
        for element in values:
            yield from _fields(element)
    elif isinstance(values, dict):
        for name, value in values.items():
            yield name, value
            yield from _fields(value)


def _problem(name: str, value: Any) -> str:
    """What a field should be instead, or an empty string."""
    if value is None:
        return ""
    if name in LISTS_OF_TEXT and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return "a list of names"
    if name in TEXTS and not isinstance(value, str):
        return "a name"
    if name in OBJECTS and not isinstance(value, dict):
        return "fields with values"
    if name in TOKENS and not _are_tokens(value):
        return "a token, or a list of tokens"
    most = next((most for ending, most in COUNTS.items() if name.endswith(ending)), None)
    if most is None and name.endswith(SIZES):
        most = MOST_SIZE
    if most is not None and isinstance(value, str):
        return "a number"
    numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int | float)]
    if any(not abs(number) <= (most or MOST_NUMBER) for number in numbers if most or isinstance(number, int)):
        return f"at most {most or MOST_NUMBER:,}"
    return ""


def _are_tokens(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(type(token) is int and abs(token) <= MOST_NUMBER for token in listed)


def _shown(value: Any) -> str:
    """A value as a part of a sentence."""
    return plain(repr(value) if isinstance(value, str) else value, 50)

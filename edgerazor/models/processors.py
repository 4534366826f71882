"""Processors: what makes a model's inputs of pictures and text, from its folder."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

from transformers import PROCESSOR_MAPPING, AutoImageProcessor, AutoProcessor, ProcessorMixin

from edgerazor import untrusted
from edgerazor.errors import UserError
from edgerazor.models.loading import auto_config, companions, error_summary, load_tokenizer, quiet_transformers

#: Either says that there is a processor.
PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def has_processor(folder: Path) -> bool:
    """Whether a model folder has what makes inputs of pictures."""
    return any((folder / name).exists() for name in PROCESSORS)


def load_processor(folder: Path) -> ProcessorMixin:
    """What makes a model's inputs of pictures and text. Without trust: no code of the folder is run.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    if not has_processor(folder):
        raise UserError(
            f"{folder} has no processor ({' or '.join(PROCESSORS)}), so it cannot be given pictures.",
            "Copy the processor files of the original model into the folder.",
        )
    companions(folder)
    for name in PROCESSORS:
        if (folder / name).exists():
            untrusted.read_json(folder / name)
    untrusted.refuse_code(folder, "A processor with code of its own is not run.")
    try:
        with quiet_transformers():
            return _open_processor(folder)
    except Exception as error:
        raise UserError(f"transformers cannot load the processor of {folder}: {error_summary(error)}.") from None


def _open_processor(folder: Path) -> ProcessorMixin:
    """The processor of a folder; one that sees videos, too, without that part, which needs torchvision."""
    kind: Any = PROCESSOR_MAPPING.get(type(auto_config(folder)), None)
    names = inspect.signature(kind.__init__).parameters if kind is not None else {}
    if "video_processor" not in names or importlib.util.find_spec("torchvision"):
        processor: ProcessorMixin = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        return processor
    pictures = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    stored = untrusted.read_json(folder / PROCESSORS[0]) if (folder / PROCESSORS[0]).exists() else {}
    settings = {name: stored[name] for name in names if name in stored and isinstance(stored[name], int)}
    tokenizer = load_tokenizer(folder)
    without_video = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_arguments: None})
    made: ProcessorMixin = without_video(
        image_processor=pictures,
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
        **settings,
    )
    return made

"""Which command made a result: written from what its manifest says was set."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgerazor.recipe import Recipe
from edgerazor.workdir import DEFAULT, Manifest

#: Command -> field of a recipe -> its option; the table of the command line, which lies above this room.
Flags = Mapping[str, Mapping[str, str]]


def stage_command(stage: str, folder: Path, manifest: Manifest | None = None, flags: Flags | None = None) -> str:
    """The command of a stage in a working directory, with the options that differ from their defaults.

    What has no option is in the recipe of the working directory, which the command reads.

    Args:
        stage: its name.
        folder: the working directory, as the user called it.
        manifest: what the finished stage was asked for; None for one that is still to be run.
        flags: options of the command line.
    """
    words = ["edgerazor", stage]
    defaults = getattr(Recipe(), stage).model_dump(mode="json")
    for field, value in (manifest.section if manifest else {}).items():
        flag = (flags or {}).get(stage, {}).get(f"{stage}.{field}")
        if flag is not None and value is not None and value != defaults.get(field):
            words += option(flag, value)
    return shlex.join([*words, *at(folder)])


def option(flag: str, value: Any) -> list[str]:
    """An option as the command line has it; nothing where it has no word for the value."""
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, ",".join(map(str, value))] if value and not isinstance(value[0], dict | list) else []
    return [flag, f"{value:g}" if isinstance(value, float) else str(value)]


def at(folder: Path) -> list[str]:
    """`--work FOLDER`, unless it is the one that commands take by themselves."""
    return [] if folder == DEFAULT else ["--work", str(folder)]

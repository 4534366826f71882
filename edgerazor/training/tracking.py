"""Hands the figures of a training to TensorBoard or to Weights & Biases, through accelerate's trackers.

`metrics.jsonl` has every evaluation in any case; a tracker shows every step as well, while it happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgerazor.errors import usage_error
from edgerazor.recipe import Distill

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Under which trackers list trainings.
PROJECT = "edgerazor"


def check(settings: Distill) -> None:
    """Refuse a tracker whose package is not there, since accelerate would pass over it in silence.

    Raises:
        ModuleNotFoundError: it is a package of ours, which the command line explains.
        UserError: it is somebody else's.
    """
    if settings.track == "tensorboard" and find_spec("tensorboard") is None:
        import tensorboardX  # noqa: F401  # it writes the same files
    if settings.track == "wandb" and find_spec("wandb") is None:
        raise usage_error(
            "Weights & Biases is not installed.", "Install it: `pip install wandb`, or leave out --track."
        )


def start(accelerator: Accelerator, settings: Distill, identity: str, step: int) -> None:
    """Begin to track a training, or go on with it.

    Args:
        accelerator: made with `log_with` and a project folder.
        settings: the `distill` section, of which plain values are shown.
        identity: of the training; equal for all its resumes.
        step: from which it goes on. What was shown of later steps, before a kill, is taken back.
    """
    if settings.track == "none":
        return
    values = {name: value for name, value in settings.model_dump().items() if isinstance(value, int | float | str)}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": identity, "resume": "allow"},
    }
    accelerator.init_trackers(PROJECT, values, {settings.track: options[settings.track]})


@contextmanager
def tracked(accelerator: Accelerator) -> Iterator[None]:
    """What is tracked is complete on the disk, or sent, when this ends; its processes stay joined."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def destination(settings: Distill, stage_folder: Path) -> dict[str, Any]:
    """What an accelerator must be told when it is made, so that it tracks; nothing where nothing is tracked."""
    return {} if settings.track == "none" else {"log_with": settings.track, "project_dir": str(stage_folder)}

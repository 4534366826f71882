"""How a training fits into memory: what is given up for it, first what costs the least time.

Everything that is chosen here leaves the result as it is, but for the last digits of sums. What would change it
(`optimizer: adafactor`) or has to be made first (a recording) is proposed and never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from edgerazor import devices
from edgerazor.console import Console, megabytes
from edgerazor.errors import UserError
from edgerazor.recipe import Distill


def fit(settings: Distill, device: torch.device, estimate: Callable[[Distill], int], console: Console) -> Distill:
    """The settings with as little changed as fits into `settings.memory`; says what is changed.

    Args:
        settings: the `distill` section; without `memory` it stays as it is.
        device: that trains.
        estimate: the peak of a training's memory in bytes.
        console: where it is said.

    Raises:
        UserError: nothing fits; says what would take less.
    """
    if settings.memory is None:
        return settings
    limit = devices.free_memory(device) if settings.memory == "auto" else settings.memory
    if not limit:
        raise UserError("This system does not say how much memory is free.", "Give --memory a size, such as 16GB.")
    least, given_up, values = 0, "", dict[str, Any]()
    for given_up, values in candidates(settings):
        changed = settings.model_copy(update=values)
        least = estimate(changed)
        if least <= limit:
            if values:
                console.say(f"memory: about {megabytes(least)} of {megabytes(limit)}, {given_up}")
            return changed
    words = f"The training takes about {megabytes(least)}, {given_up}, and may take {megabytes(limit)}."
    raise UserError(words, proposal(settings.model_copy(update=values), estimate, limit))


def proposal(settings: Distill, estimate: Callable[[Distill], int], limit: int) -> str:
    """What would fit, and changes the result or has to be made first; where nothing of that does, what takes less.

    Args:
        settings: with all given up that leaves the result as it is.
        estimate: the peak of a training's memory in bytes.
        limit: bytes that there are.
    """
    in_place = {"optimizer": "adafactor", "accumulation": 1, "batch_size": 1}
    recorded = {"recording": "recording", "teacher": None, "teacher_source": "resident", "teachers": ()}
    ways: list[tuple[str, dict[str, Any]]] = []
    if settings.optimizer != "adafactor":
        ways.append(("--optimizer adafactor --batch-size 1 --accumulation 1", in_place))
    if settings.recording is None:
        ways.append(("a recording of the teacher (`edgerazor record`)", recorded))
    if len(ways) > 1:
        ways.append((f"{ways[0][0]} and a recording", {**in_place, **recorded}))
    sizes = {way: estimate(settings.model_copy(update=update)) for way, update in ways}
    if fitting := [f"{way} ({megabytes(size)})" for way, size in sizes.items() if size <= limit][:2]:
        return f"It fits with {' or '.join(fitting)}."
    shorter = "Less takes a shorter --sequence-length or a smaller model."
    return f"{shorter} Even with {ways[-1][0]} it takes {megabytes(sizes[ways[-1][0]])}." if ways else shorter


def candidates(settings: Distill) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may be given up, each on top of what was before it: in words, and as values of settings."""
    words: dict[str, str] = {}
    values: dict[str, Any] = {}
    yield "with all that is fast", {}
    for what, update in steps_down(settings):
        words[next(iter(update))] = what
        values |= update
        yield "with " + ", ".join(words.values()), dict(values)


def steps_down(settings: Distill) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each thing that may be given up, in this order."""
    if settings.cache_rounding:
        yield "weights rounded anew in each pass", {"cache_rounding": False}
    if not settings.gradient_checkpointing:
        yield "recomputed activations", {"gradient_checkpointing": True}
    batch = settings.batch_size
    in_place = settings.optimizer == "adafactor"  # more micro-batches would bring all gradients back
    while batch % 2 == 0 and not in_place:
        batch //= 2
        accumulation = settings.accumulation * settings.batch_size // batch
        yield f"{batch} sequences a pass", {"batch_size": batch, "accumulation": accumulation}
    resident = settings.teacher_source == "resident" and settings.recording is None
    if resident and settings.reconstruct is None:
        yield "a teacher streamed from disk", {"teacher_source": "streamed"}

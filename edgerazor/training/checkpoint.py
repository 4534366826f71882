"""The resumable state of a distillation, without pickle.

One folder: `state.safetensors` (master weights and AdamW's moments; where codes are frozen, also the master weights and
scales that they were made from), `state.json` (counters, the inputs of the training, random state). Each process of a
sharded training writes a file of its own parts instead (`sharded_checkpoint.py`); any number of processes goes on with
either. A new checkpoint replaces the previous one only when it is complete on the disk.
"""

from __future__ import annotations

import base64
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from edgerazor import devices, modules, untrusted
from edgerazor.errors import UserError, plain
from edgerazor.training import sharded_checkpoint, sharding, zero3
from edgerazor.training.results import PhaseResult
from edgerazor.training.sharded_checkpoint import UnreadableError
from edgerazor.workdir import replace_folder, write_atomically

#: Tensors of the optimizers' states: of AdamW and of Adafactor.
MOMENTS = ("exp_avg", "exp_avg_sq", "row_var", "col_var", "variance")


class Progress(BaseModel):
    """Counters of a training. The position in the data is `step`, since the order of the data is a function of it.

    Attributes:
        step: optimizer steps taken.
        tokens: trained on so far.
        seconds: of training so far, resumes included.
        best, best_step: lowest held-out loss, and the step at which it was measured.
        loss: of the last step that was taken.
        recent_losses: of the latest steps that were taken.
        skipped: steps that were skipped one after the other until now (`stability.py`).
        rate_factor: what the learning rate is multiplied with, because of steps that were skipped.
        metrics_lines: lines of the metrics file that belong to this state.
        block_errors: relative error of each reconstructed layer, before and after.
        block_seconds: the time that passed before the first step.
        phase: number of the current phase, 0 before the first.
        phase_step, phase_share, phase_seconds: step, share of the budget and time at which it began.
        phases: those that have ended.
        on_target: whether the requested quality was reached.
        streams: position of each streamed source, so that it need not be read again from the beginning.
    """

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    loss: float | None = None
    recent_losses: list[float] = []
    skipped: int = 0
    rate_factor: float = 1.0
    metrics_lines: int = 0
    block_errors: list[tuple[float, float]] = []
    block_seconds: float = 0.0
    phase: int = 0
    phase_step: int = 0
    phase_share: float = 0.0
    phase_seconds: float = 0.0
    phases: list[PhaseResult] = []
    on_target: bool = False
    streams: dict[str, Any] = {}


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    inputs: dict[str, str],
    writes: bool = True,
) -> None:
    """Replace the checkpoint. Of a sharded model, all processes have to call, and each writes what it has.

    Args:
        folder: of the checkpoint.
        model: the student, with training modules.
        optimizer: AdamW over its trainable parameters.
        progress: counters.
        inputs: everything that the training depends on, by name.
        writes: whether this is the process that writes what is no part of a tensor.

    Raises:
        UserError: a process could not write.
    """
    tensors = _frozen_masters(model)
    for name, parameter in model.named_parameters():
        if zero3.is_part(parameter):
            state_tensors = {"weight": zero3.whole(parameter), **zero3.moments(parameter)}
            state_tensors = {key: tensor.cpu() for key, tensor in state_tensors.items() if writes}
        else:
            state_tensors = {"weight": parameter.detach()}
            state_tensors |= {key: value for key, value in optimizer.state[parameter].items() if key in MOMENTS}
        tensors |= {f"{key}/{name}": tensor for key, tensor in state_tensors.items()}
    state = {"progress": progress.model_dump(), "inputs": inputs, "random": _random_state()}
    with replace_folder(folder) if writes else nullcontext(folder) as new:
        if sharding.is_sharded(model):
            common = Path(devices.of_main_process(str(new)))
            state["files"] = sharded_checkpoint.write(common, tensors)
        elif writes:
            stored = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            write_atomically(new / "state.safetensors", lambda path: save_file(stored, path))
        if writes:
            (new / "state.json").write_text(json.dumps(state), encoding="utf-8")


def _frozen_masters(model: nn.Module) -> dict[str, Tensor]:
    """Master weights and scales that frozen codes were made from, by their names in the checkpoint."""
    tensors = {}
    for name, matrix in modules.fake_quant_weights(model).items():
        if matrix.master is not None:
            tensors[f"master/{name}"] = matrix.master.weight.detach()
            tensors[f"start/{name}"] = matrix.master.scales
    return tensors


def stored_inputs(folder: Path) -> dict[str, str] | None:
    """The inputs of the training that wrote the checkpoint, or None where there is none.

    Raises:
        UserError: the checkpoint is damaged.
    """
    return dict(_state(folder)["inputs"]) if folder.exists() else None


def stored_progress(folder: Path) -> Progress | None:
    """How far the checkpoint is, or None where there is none.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if not folder.exists():
        return None
    try:
        return Progress.model_validate(_state(folder)["progress"])
    except ValueError as error:
        raise _damaged(folder, error) from None


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Load the checkpoint into model and optimizer, which must be those of its phase; None where there is none.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if not folder.exists():
        return None
    state = _state(folder)
    try:
        progress = Progress.model_validate(state["progress"])
        if state["files"]:
            sharded_checkpoint.verify(folder, state["files"])
        with sharding.ended_with_others(devices.process_count()):
            _read(folder, model, optimizer, progress.step - progress.phase_step)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, UnreadableError) as error:
        raise _damaged(folder, error) from None
    try:
        _set_random_state(state["random"])
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise _damaged(folder, error) from None
    return progress


def _read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Read all tensors of a checkpoint into model and optimizer, which has taken so many steps."""
    with sharded_checkpoint.opened(folder) as reader:
        tensors = _frozen_masters(model)
        for name, parameter in model.named_parameters():
            weight = parameter.detach()
            if zero3.is_part(parameter):
                weight = torch.empty(reader.shapes[f"weight/{name}"], dtype=weight.dtype, device=weight.device)
            stored = [key for key in MOMENTS if f"{key}/{name}" in reader.shapes]  # none before its first gradient
            moments = {key: _empty(reader.shapes[f"{key}/{name}"], weight) for key in stored}
            if moments and not zero3.is_part(parameter):
                count = torch.tensor(float(step), device=parameter.device)
                optimizer.state[parameter] = {"step": count, **moments}
            tensors |= {f"{key}/{name}": tensor for key, tensor in {"weight": weight, **moments}.items()}
        reader.read(tensors)
    for name, parameter in model.named_parameters():
        if zero3.is_part(parameter):
            moments = {key: tensors[f"{key}/{name}"] for key in MOMENTS if f"{key}/{name}" in tensors}
            zero3.overwrite(parameter, tensors[f"weight/{name}"], moments, step)


def _empty(shape: torch.Size, parameter: Tensor) -> Tensor:
    """A moment of a parameter, to be read: like the parameter, or of a shape of its own."""
    if shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False)
    return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(_decode(state["cpu"]))
    for device, encoded in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_decode(encoded), device)


def _decode(encoded: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": _encode(torch.get_rng_state()), "cuda": [_encode(state) for state in cuda]}


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = untrusted.load_json(folder / "state.json", most_bytes=untrusted.MOST_BYTES_OF_OURS)
        parts = {key: state[key] for key in ("progress", "inputs", "random")}
        parts["files"] = state.get("files", {})  # of several processes
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from None
    for key, value in parts.items():
        if not isinstance(value, dict):
            raise _damaged(folder, ValueError(f"its {key} is {plain(value, 50)}"))
    return parts


def _damaged(folder: Path, error: BaseException) -> UserError:
    reason = plain(error).split("\n")[0].rstrip(".") or type(error).__name__
    return UserError(
        f"The checkpoint {folder} is damaged and cannot be resumed ({reason}).",
        "Start the training again with `edgerazor distill --force`.",
    )

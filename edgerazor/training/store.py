"""The files of a training: its checkpoint, the two students that `pack` reads, and the metrics of every evaluation.

The checkpoint is the state of the training. The students beside it are `last`, and `best`, the one with the lowest
held-out loss so far.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from edgerazor import untrusted
from edgerazor.errors import UserError
from edgerazor.models import PreTrainedModel
from edgerazor.training import checkpoint, sharding, zero3
from edgerazor.training.checkpoint import Progress
from edgerazor.workdir import replace_folder, write_atomically, write_text

STUDENT_FILES = ("model.safetensors", "digests.json", "measured.json")


@dataclass(frozen=True)
class TrainingStore:
    """Where a training keeps its files.

    Attributes:
        checkpoint: folder of the resumable state.
        best: folder of the student with the lowest held-out loss.
        last: folder of the student that was evaluated last.
        metrics: file with one JSON object per evaluation and line.
        inputs: everything that the training depends on, by name; stored in the checkpoint.
    """

    checkpoint: Path
    best: Path
    last: Path
    metrics: Path
    inputs: dict[str, str]

    def stored_progress(self) -> Progress | None:
        """How far the checkpoint is, or None where there is none.

        Raises:
            UserError: the checkpoint is damaged.
        """
        return checkpoint.stored_progress(self.checkpoint)

    def save_checkpoint(
        self, student: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Progress, writes: bool = True
    ) -> None:
        """Replace the checkpoint; see `checkpoint.save`."""
        checkpoint.save(self.checkpoint, student, optimizer, progress, self.inputs, writes)

    def restore_checkpoint(self, student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Bring student and optimizer to the state of the checkpoint; None where there is none.

        Raises:
            UserError: the checkpoint is damaged.
        """
        return checkpoint.restore(self.checkpoint, student, optimizer)

    def has_students(self) -> bool:
        """Whether both students are complete."""
        return is_complete(self.best) and is_complete(self.last)

    def best_measurement(self) -> tuple[float, int]:
        """Held-out loss of the best student, and the step at which it was measured.

        Raises:
            UserError: the student's files are damaged.
        """
        try:
            measured = untrusted.load_json(self.best / "measured.json")
            return float(measured["value"]), int(measured["step"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"The student {self.best} is damaged, so the training cannot go on.",
                "Start again with `edgerazor distill --force`.",
            ) from None

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one evaluation to the metrics."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def trim_metrics(self, lines: int) -> None:
        """Drop what was measured after the checkpoint from which the training goes on."""
        stored = self.metrics.read_text(encoding="utf-8") if self.metrics.exists() else ""
        write_text(self.metrics, "".join(stored.splitlines(keepends=True)[:lines]))


def is_complete(folder: Path) -> bool:
    """Whether a student's folder holds all its files."""
    return all((folder / name).exists() for name in STUDENT_FILES)


def student_tensors(model: PreTrainedModel, keeps: bool = True) -> dict[str, Tensor]:
    """The tensors of a student on the CPU, those that share memory once.

    Args:
        model: with training modules; of a sharded one, all processes have to ask.
        keeps: whether this process wants them; else nothing is returned.
    """
    stored: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_part = isinstance(tensor, DTensor) or zero3.is_part(tensor)
        identity = id(tensor) if is_part else tensor.data_ptr()
        if identity not in stored:
            stored.add(identity)
            whole = sharding.whole(tensor).detach()
            if keeps:
                tensors[name] = whole.contiguous().cpu()
    return tensors


def save_student(folder: Path, tensors: dict[str, Tensor], digests: dict[str, str], measured: dict[str, Any]) -> None:
    """Replace a student by what was trained.

    Master weights are float32 under the teacher's own names, trained scales lie beside them (`P.scales` of `P.weight`);
    where only scales were trained, `P.weight` is the codes, int8. Tensors that share memory are stored once.

    Args:
        folder: of the student.
        tensors: of the student, see `student_tensors`.
        digests: module path -> digest of the codes and scales of its last forward pass.
        measured: step, measure and value of the held-out loss.
    """
    with replace_folder(folder) as new:
        write_atomically(new / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        (new / "digests.json").write_text(json.dumps(digests, indent=1), encoding="utf-8")
        (new / "measured.json").write_text(json.dumps(measured), encoding="utf-8")

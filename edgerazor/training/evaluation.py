"""Held-out loss of the student as it would be packed: cross entropy with the text, KL divergence from the teachers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch

from edgerazor import data, losses, modules
from edgerazor.losses import Outputs, StepTotals, step_counts
from edgerazor.training import sharding
from edgerazor.training.captured_states import Captures
from edgerazor.training.student import Student
from edgerazor.training.teachers import TeacherSource

#: Batches that a teacher is given together, for those that read their weights from disk in each pass.
BATCHES_AT_ONCE = 16


def selection_metric(teachers: TeacherSource) -> str:
    """The held-out loss that decides which student is the best: "kl" where there is a teacher, else "cross_entropy"."""
    return "kl" if teachers else "cross_entropy"


@torch.no_grad()
def held_out_losses(
    student: Student, teachers: TeacherSource, batches: Iterable[data.Batch], keep: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Evaluate the student on held-out text.

    Args:
        student: computes with frozen codes, in evaluation mode; is in training mode afterwards.
        teachers: compared with; may be empty.
        batches: `input_ids [B, T]` and `labels [B, T]`, int64.
        keep: keep all decoded weights meanwhile, in float32; else they are decoded in each forward pass, as those of a
            sharded student always are.

    Returns:
        `cross_entropy` and, where there is a teacher, `kl`, in nats per token; module path -> digest of the codes and
        scales that were used.
    """
    student.model.eval()
    sums = {"cross_entropy": 0.0, "kl": 0.0, "tokens": 0.0}
    device, remaining = student.accelerator.device, iter(batches)
    keep = keep and not student.sharded
    with sharding.gathering(student.model) as whole, modules.encoded_once(student.model, keep, whole) as digests:
        while some := list(islice(remaining, BATCHES_AT_ONCE)):
            some = [{key: value.to(device) for key, value in batch.items()} for batch in some]
            for batch, target in zip(some, teachers.outputs_of(some, Captures(), held_out=True), strict=True):
                for name, value in batch_sums(student, target, batch).items():
                    sums[name] += value
    student.model.train()
    tokens = sums["tokens"]
    means = {"cross_entropy": sums["cross_entropy"] / tokens}
    if teachers:
        means["kl"] = sums["kl"] / tokens
    return means, digests


def batch_sums(student: Student, teacher_outputs: Outputs | None, batch: data.Batch) -> dict[str, float]:
    """Sums over the predicted tokens of a batch, in nats: cross entropy, KL(teacher || student); and their count.

    Args:
        student: computes with frozen codes.
        teacher_outputs: for the batch; None where nothing is compared.
        batch: on the device.
    """
    labels = batch["labels"]
    student_outputs = student.outputs(batch["input_ids"], Captures(), wrapped=False)
    cross_entropy = torch.zeros((), dtype=torch.float64, device=labels.device)
    kl = torch.zeros_like(cross_entropy)
    for chunk in losses.logit_chunks(student_outputs, teacher_outputs, labels, StepTotals(1, 1)):
        for _, logits in chunk.blocks():
            cross_entropy -= logits.student_log_probs().gather(1, logits.targets[:, None]).sum()
            if teacher_outputs is not None:
                kl += losses.sum_of_kl(logits)
    _, tokens = step_counts(labels)
    sums = {"tokens": float(tokens), "cross_entropy": float(cross_entropy)}
    return sums if teacher_outputs is None else {**sums, "kl": float(kl)}

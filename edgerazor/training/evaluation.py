"""Held-out loss of the student as it would be packed: cross entropy with the text, KL divergence from the teachers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from edgerazor import data, losses, modules
from edgerazor.losses import StepTotals, step_counts
from edgerazor.training.captured_states import Captures
from edgerazor.training.student import Student
from edgerazor.training.teachers import TeacherSource


def selection_metric(teachers: TeacherSource) -> str:
    """The held-out loss that decides which student is the best: "kl" where there is a teacher, else "cross_entropy"."""
    return "kl" if teachers else "cross_entropy"


@torch.no_grad()
def held_out_losses(
    student: Student, teachers: TeacherSource, batches: Iterable[data.Batch]
) -> tuple[dict[str, float], dict[str, str]]:
    """Evaluate the student on held-out text.

    Args:
        student: computes with frozen codes, in evaluation mode; is in training mode afterwards.
        teachers: compared with; may be empty.
        batches: `input_ids [B, T]` and `labels [B, T]`, int64.

    Returns:
        `cross_entropy` and, where there is a teacher, `kl`, in nats per token; module path -> digest of the codes and
        scales that were used.
    """
    student.model.eval()
    sums = {"cross_entropy": 0.0, "kl": 0.0, "tokens": 0.0}
    with modules.encoded_once(student.model) as digests:
        for batch in batches:
            for name, value in batch_sums(student, teachers, batch).items():
                sums[name] += value
    student.model.train()
    tokens = sums["tokens"]
    means = {"cross_entropy": sums["cross_entropy"] / tokens}
    if teachers:
        means["kl"] = sums["kl"] / tokens
    return means, digests


def batch_sums(student: Student, teachers: TeacherSource, batch: data.Batch) -> dict[str, float]:
    """Sums over the predicted tokens of a batch, in nats: cross entropy, KL(teacher || student); and their count."""
    device = student.accelerator.device
    batch = {key: value.to(device) for key, value in batch.items()}
    labels = batch["labels"]
    student_outputs = student.outputs(batch["input_ids"], Captures(), wrapped=False)
    teacher_outputs = teachers.outputs(batch, Captures(), held_out=True)
    cross_entropy = torch.zeros((), dtype=torch.float64, device=device)
    kl = torch.zeros_like(cross_entropy)
    for chunk in losses.logit_chunks(student_outputs, teacher_outputs, labels, StepTotals(1, 1)):
        for _, logits in chunk.blocks():
            cross_entropy -= logits.student_log_probs().gather(1, logits.targets[:, None]).sum()
            if teacher_outputs is not None:
                kl += losses.sum_of_kl(logits)
    _, tokens = step_counts(labels)
    sums = {"tokens": float(tokens), "cross_entropy": float(cross_entropy)}
    return sums if teacher_outputs is None else {**sums, "kl": float(kl)}

"""Held-out text: perplexity, KL(teacher || model) per token in nats, and how often both prefer the same token.

These see damage long before task scores do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from edgerazor import data, devices, models, runtime
from edgerazor.console import Console
from edgerazor.evaluation.eval_result import TextResult
from edgerazor.evaluation.evaluated_model import EvaluatedModel

#: Largest number of logits of one forward pass, and of one chunk of rows.
BATCH_LOGITS, CHUNK_LOGITS = 1 << 26, 1 << 22


def batches_of(
    text: data.TokenRows, evaluated: EvaluatedModel, sequences: int, sequence_length: int, batch_size: int
) -> Iterator[data.Batch]:
    """The first rows of the text, so many at once that their logits fit.

    Args:
        text: held-out rows.
        evaluated: the model that will read them.
        sequences: how many rows.
        sequence_length: tokens of a row, if the model has so many positions.
        batch_size: most rows at once.
    """
    length = min(sequence_length, evaluated.context_length)
    fitting = BATCH_LOGITS // (length * evaluated.vocab_size)
    return data.sample_batches(text, sequences, max(1, min(batch_size, fitting)))


def text_metrics(
    evaluated: EvaluatedModel, teacher: EvaluatedModel | None, batches: Iterable[data.Batch], console: Console
) -> TextResult:
    """Perplexity, and KL divergence and agreement with the teacher, over the tokens that are predicted.

    Several processes of a launcher read a part of the batches each.

    Args:
        evaluated: the model that is measured.
        teacher: the reference, or None.
        batches: `input_ids` and `labels` int64 [B, T]; labels are -100 where there is no text.
        console: shows the progress.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # model's and teacher's negative log-likelihood, KL, agreements
    of_pictures = torch.zeros(4, dtype=torch.float64)
    tokens = picture_tokens = 0
    listed = devices.share_of(list(batches))
    with console.track(f"Held-out text, {evaluated.title}", len(listed)) as tracker, torch.inference_mode():
        for batch in listed:
            labels = batch["labels"][:, 1:]  # [B, T - 1]: position t predicts token t + 1
            predicting = labels != data.MASKED
            seeing = models.picture_mask(batch["input_ids"][:, :-1])
            both = predicting | seeing
            tokens += int(predicting.sum())
            picture_tokens += int(seeing.sum())
            logits = [_logits(model, batch["input_ids"], both) for model in (evaluated, teacher) if model]
            words = predicting[both].to(logits[0].device)
            sums += _sums([part[words] for part in logits], labels[predicting])
            if not bool(words.all()):
                places = [part[~words] for part in logits]
                of_pictures += _sums(places, torch.zeros(len(places[0]), dtype=torch.int64))
            tracker.advance()
    totals = devices.all_values((sums, of_pictures, tokens, picture_tokens))
    sums, of_pictures, tokens, picture_tokens = map(sum, zip(*totals, strict=True))  # type: ignore[assignment]
    mean = [_finite(value / max(tokens, 1)) for value in sums.tolist()]
    compared = teacher is not None
    return TextResult(
        perplexity=_perplexity(mean[0]),
        teacher_perplexity=_perplexity(mean[1]) if compared else None,
        kl=mean[2] if compared else None,
        top1_agreement=mean[3] if compared else None,
        tokens=tokens,
        picture_kl=_finite(float(of_pictures[2]) / picture_tokens) if compared and picture_tokens else None,
        picture_tokens=picture_tokens,
    )


def _logits(evaluated: EvaluatedModel, input_ids: Tensor, predicting: Tensor) -> Tensor:
    """Logits [N, V] at the N positions [B, T - 1] that predict a token."""
    if isinstance(evaluated.model, runtime.Model):
        rows = zip(input_ids, predicting, strict=True)
        return torch.cat([_logits_of_row(evaluated.model, ids, positions) for ids, positions in rows])
    device = evaluated.model.device
    logits = evaluated.model(input_ids.to(device), use_cache=False).logits  # [B, T, V]
    return logits[:, :-1][predicting.to(device)]


def _logits_of_row(model: runtime.Model, ids: Tensor, predicting: Tensor) -> Tensor:
    """Logits [N, V] of a sequence [T] at the N positions [T - 1] that predict a token, from the first to the last."""
    positions = predicting.nonzero().flatten()
    if not len(positions):
        return torch.empty(0, model.vocabulary)
    first, end = int(positions[0]), int(positions[-1]) + 1
    logits = model.logits(ids[:end], last=end - first)
    return logits if len(positions) == end - first else logits[positions - first]


def _sums(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Sums [4] over rows; `logits` are the model's [N, V] and perhaps the teacher's, `targets` int64 [N]."""
    entries = min(part.shape[-1] for part in logits)  # models of a family pad their vocabularies differently
    sums = torch.zeros(4, dtype=torch.float64)
    targets = targets.to(logits[0].device)
    for rows in torch.arange(len(targets), device=targets.device).split(max(1, CHUNK_LOGITS // entries)):
        chosen = targets[rows, None]  # [n, 1]
        chunks = [log_softmax(part[rows, :entries].float(), dim=-1) for part in logits]  # each [n, V]
        for index, chunk in enumerate(chunks):
            sums[index] -= chunk.gather(1, chosen).double().sum().cpu()
        if len(chunks) == 2:
            model, teacher = chunks
            probability = teacher.exp()
            terms = torch.where(probability > 0, probability * (teacher - model), 0.0)
            sums[2] += terms.sum(-1).double().sum().cpu()
            sums[3] += (model.argmax(-1) == teacher.argmax(-1)).sum().cpu()
    return sums


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(mean: float | None) -> float | None:
    return None if mean is None or mean > 700 else math.exp(mean)

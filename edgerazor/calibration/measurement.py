"""What is measured of a teacher while calibration text passes through it, one decoder layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgerazor import data, devices, formats, models, student_plan
from edgerazor.allocate import affordable_tokens, candidates_of, estimates_of, measures, sequences_of
from edgerazor.calibration import experts, observers, statistics
from edgerazor.job import JobContext, ModelOutline
from edgerazor.modules import attention
from edgerazor.recipe import Calibrate
from edgerazor.sensitivity import PER_MATRIX, SensitivityAnalysis
from edgerazor.workdir import digest_json

#: Micro-batches: token ids int64 [B, T] and the positions that count, bool [B, T].
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Measurement:
    """A teacher and some text.

    Attributes:
        context: of the job.
        teacher: on the CPU; a layer-by-layer pass leaves a model that cannot compute as a whole. In a dry run its
            outline.
        length: tokens of a sequence.
        rows: the text; None in a dry run, where it is not read.
        logit_shape: what the teacher's family does to logits, see `models.logit_shape`.
    """

    context: JobContext
    teacher: ModelOutline
    length: int
    rows: data.TokenRows | None = None
    logit_shape: tuple[float, float | None] = (1.0, None)

    @property
    def settings(self) -> Calibrate:
        return self.context.recipe.calibrate

    def batches(self, sequences: int | None = None) -> Batches:
        """Some sequences of the text, by default all that calibration reads, on all processes together."""
        assert self.rows is not None
        count = sequences or self.settings.sequences
        batches = data.sample_batches(self.rows, count, self.settings.batch_size)
        return [(batch["input_ids"], batch["labels"] != data.MASKED) for batch in batches]

    @property
    def sensitivity_sequences(self) -> int:
        """How many sequences sensitivity is to be estimated from; of little text there are fewer."""
        weights = sum(weight.numel() for weight in self.teacher.model.parameters())
        tokens = self.settings.sensitivity_tokens or affordable_tokens(weights, self.context.device)
        return sequences_of(tokens, self.length)

    def layerwise_pass(
        self, name: str, batches: Sequence[tuple[Tensor, Tensor]], change: models.WeightTransform | None = None
    ) -> models.LayerwisePass:
        """A pass of batches through the teacher, which goes on where one of the same name was killed.

        Args:
            name: of the pass and of the folder of its progress.
            batches: what passes.
            change: gives what takes the place of the weights of linear layers.
        """
        context, model = self.context, self.teacher.model
        return models.LayerwisePass(
            model,
            self.teacher.structure,
            batches,
            self.progress(name),
            devices.gradient_dtype(model.dtype, context.device),
            context.device,
            f"{context.teacher_fingerprint} {name}",
            context.console,
            change,
        )

    def progress(self, name: str) -> Path:
        """The folder of what this process computes in parts."""
        count = devices.process_count()
        own = name if count == 1 else f"{name}-{devices.process_index() + 1}-of-{count}"
        return self.context.work.progress("calibrate", own)

    @functools.cached_property
    def analysis(self) -> SensitivityAnalysis:
        """The teacher, ready to be analysed on some of the text."""
        settings = self.settings
        assert self.rows is not None
        most = self.sensitivity_sequences
        batches = self.batches(min(most, len(self.rows) or most))

        def layerwise_pass(name: str, change: models.WeightTransform | None) -> models.LayerwisePass:
            return self.layerwise_pass(f"sensitivity/{name}", devices.share_of(batches), change)

        return SensitivityAnalysis(
            model=self.teacher.model,
            structure=self.teacher.structure,
            logit_shape=self.logit_shape,
            batches=batches,
            make_pass=layerwise_pass,
            folder=self.context.work.progress("calibrate", "sensitivity"),
            names=candidates_of(settings),
            group_size=settings.group_size,
            points=settings.sensitivity_points,
            seed=self.context.recipe.seed,
            identity=digest_json(statistics.identity_of(self.context)),
            console=self.context.console,
            published=settings.init == "rtn",
            rotation=settings.rotation,
        )


def measure(measurement: Measurement) -> dict[str, Tensor]:
    """Everything in the file of statistics, by the names it has there."""
    settings, batches = measurement.settings, measurement.batches()
    tensors = observe(measurement.layerwise_pass("walk", devices.share_of(batches)), settings)
    if measures(settings):
        analysis = measurement.analysis
        for estimate in estimates_of(settings):
            paths = [site.name for site in measurement.teacher.structure.linears]
            moments = {path: tensors[f"input_second_moment/{path}"] for path in paths}
            of_rows = analysis.estimate(estimate, moments)
            tensors |= {f"damage/{estimate}/{path}": value.float().contiguous() for path, value in of_rows.items()}
        tensors |= {PER_MATRIX + path: value.float() for path, value in analysis.per_matrix().items()}
    if settings.adaptive_tokens == "causal":
        tensors["importance_threshold"] = importance_thresholds(measurement, batches)
    return tensors


def pass_forward(layerwise: models.LayerwisePass, observers: Sequence[models.Observer], title: str) -> None:
    """A pass whose observers have seen the batches of all processes then."""
    layerwise.forward(*observers, keep_inputs=False, title=title)
    if devices.process_count() > 1:
        for observer in observers:
            observer.restore(observer.combined(devices.all_values(observer.state())))


def observe(layerwise: models.LayerwisePass, settings: Calibrate) -> dict[str, Tensor]:
    """Second moments of linear inputs, metrics of layers, and stored scales of inputs, as the file names them; of the
    batches of all processes, each of which has a pass of its own."""
    structure = layerwise.structure
    moments = observers.SecondMoments(settings.rotation)
    metrics = observers.LayerMetrics(structure.layer_count, layerwise.final)
    ranges = observers.InputRanges(structure.head_path, settings.rotation)
    scales = student_plan.input_scale_names(settings, layerwise.model, structure)
    pass_forward(layerwise, [moments, metrics, *([ranges] if scales else [])], "calibrate")
    tokens = sum(devices.all_values(sum(int(counts.sum()) for _, counts in layerwise.batches)))
    means = moments.means(tokens)
    tensors = {
        f"input_second_moment/{target.name}": means.get(target.name, torch.zeros(target.columns))
        for target in structure.linears
    }
    tensors |= experts.tokens_of(structure, moments.tokens)
    tensors |= {f"layer_{metric}": values for metric, values in metrics.means(tokens).items()}
    for scale, (path, bits) in scales.items():
        counts = experts.counts_of(structure, ranges.counts, path)
        tensors[scale] = torch.tensor(formats.calibrated_scale(counts, bits))
    return tensors


def importance_thresholds(measurement: Measurement, batches: Batches) -> Tensor:
    """The importance that the unimportant share of calibration tokens lies below, float32 [layers].

    A pass of its own, since attention that shows its probabilities computes otherwise; the teacher keeps that.
    """
    model = measurement.teacher.model
    attention.deciding_layers(model)
    tokens = attention.ImportantTokens(None)
    attention.attach_important_tokens(model, tokens)
    attention.quantize_attention(model, 16)
    importance = observers.Importance(tokens)
    layerwise = measurement.layerwise_pass("importance", devices.share_of(batches))
    pass_forward(layerwise, [importance], "importance of tokens")
    return importance.thresholds(attention.UNIMPORTANT_SHARE)

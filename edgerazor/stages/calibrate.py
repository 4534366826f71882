"""Look at the teacher, then decide what the student will be.

Walks calibration text through the teacher, one decoder layer at a time, and keeps, in `stats.safetensors`,

* `input_second_moment/<module>`, float32 [in]: mean of x squared over tokens, for the input of every linear layer
  (the diagonal of the Hessian of its squared output error; GPTQ's and imatrix's quantity);
* `layer_cosine`, float32 [layers]: mean cosine similarity of each decoder layer's output and input;
* `layer_l2` and `layer_variance`, float32 [layers]: mean norm of its output, and its variance over positions;
* `<module>.input_scale`, float32 [], where activations have stored scales: the one with the least squared error for
  the input of a linear layer or the head, and `<module>.low_input_scale` at the bits of unimportant tokens;
* `importance_threshold`, float32 [layers], where tokens have bits of their own: see `attention.py`;
* `damage/<estimate>/<module>`, float32 [formats, rows], nats of KL per token: see `analysis.py`; its metadata names
  the formats;
* `alone/<module>`, float32 [formats], the same of the whole module when nothing else is rounded;

and writes the plan: a format for every row, tensor or block of every matrix (`allocate/`), with a summary of what was
measured in `sensitivity.json`. What was measured serves every budget.
Where training is to start from codes that take text to find, they are made then (`initialization.py`).
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import RenderableType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgerazor import data, formats, models, sensitivity, untrusted
from edgerazor import job as jobs
from edgerazor.allocate import Plan, SensitivityTable, candidates_of, measures, shortfall
from edgerazor.calibration import generated_text, initialization, observers
from edgerazor.console import Console, duration, megabytes, table
from edgerazor.errors import INTERRUPTED, UserError
from edgerazor.models import PreTrainedModel, PreTrainedTokenizerBase
from edgerazor.modules import attention
from edgerazor.recipe import Recipe, Sampling
from edgerazor.workdir import (
    WorkDir,
    digest_json,
    make_folder,
    share,
    versions,
    write_atomically,
    write_json,
    write_text,
)

NAME = "calibrate"

#: Files of an earlier calibration that may serve another plan.
CARRIED = ("stats.safetensors", "generated.jsonl")
#: Steps of generation that an estimate of its time is taken from.
GENERATE_PROBE = 8


class CalibrateResult(BaseModel):
    """What calibrate decided."""

    model: str
    notation: str
    nominal_bits: float
    real_bits: float
    bytes: int
    formats: dict[str, int]
    tokens: int
    layer_similarity: list[float]
    text: str
    estimate: str | None = None
    predicted_kl: float | None = None
    measured_kl: float | None = None


class CalibrateDryRun(BaseModel):
    """What calibrate would do.

    `memory_bytes` is what it needs at once besides the program itself; `mapped_bytes` the weights that are read in
    place from the model's files, one layer after the other: memory that is given back where it is short.
    """

    notation: str
    nominal_bits: float
    real_bits: float
    bytes: int
    tokens: int
    generated_tokens: int
    memory_bytes: int
    mapped_bytes: int
    disk_bytes: int
    seconds: float | None


def inputs(recipe: Recipe, work: WorkDir) -> dict[str, str]:
    """Everything the result depends on."""
    return {
        "model": jobs.teacher_fingerprint(recipe),
        "data": jobs.data_fingerprint(recipe),
        "data.sequence_length": str(recipe.data.sequence_length),
        "data.packing": recipe.data.packing,
        **jobs.row_settings(recipe),
        "seed": str(recipe.seed),
        **jobs.settings("calibrate", recipe.calibrate, skip=("batch_size",)),
    }


def run(recipe: Recipe, work: WorkDir, console: Console) -> CalibrateResult:
    """Write statistics and plan into the working directory.

    Raises:
        UserError: interrupted; the same command goes on from there.
    """
    device = jobs.device_of(recipe)
    teacher, tokenizer = jobs.load_teacher(recipe, torch.device("cpu"))
    found = models.structure(teacher)
    jobs.check_attention(teacher, recipe.calibrate)
    length = jobs.sequence_length(recipe, teacher)
    make_folder(work.folder(NAME))
    tensors = stored_statistics(recipe, work)
    text = "the recipe's data"
    if not recipe.data.train:
        text = "written by the teacher, since no --data was given"
        if tensors is None or not work.generated_text.exists():
            provide_own_text(recipe, work, device, length, console)
    rows, _ = jobs.open_text(recipe, work, tokenizer, length)
    shape = models.logit_shape(teacher, found.head_path)  # a walk leaves a model that cannot compute as a whole
    job = Job(recipe, work, teacher, found, rows, length, device, console, shape)
    try:
        if tensors is None:
            tensors = measure(job)
            write_statistics(recipe, work, tensors)
        else:
            console.say("What was measured of the teacher for another plan serves this one too.")
        plan, study = decide(job, tensors)
    except KeyboardInterrupt:
        raise UserError(
            "Interrupted; the layers that were finished are saved.",
            "The same command goes on from there.",
            code=INTERRUPTED,
        ) from None
    if below := shortfall(plan, recipe.calibrate):
        console.say(below)
    write_text(work.plan_file, plan.model_dump_json(indent=1) + "\n")
    if study:
        write_json(work.sensitivity_file, study)
    else:  # of an earlier plan
        work.sensitivity_file.unlink(missing_ok=True)
    if recipe.calibrate.init in jobs.MADE_INITS:
        initialization.write(recipe, work, plan, rows, console)
    result = result_of(job, plan, study, tensors, text)
    write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


def result_of(job: Job, plan: Plan, study: dict[str, Any], tensors: dict[str, Tensor], text: str) -> CalibrateResult:
    """What was decided, from the plan, what `sensitivity.json` says, and the statistics."""
    size = jobs.packed_size(job.recipe, job.teacher, job.found, work=job.work)(plan)
    return CalibrateResult(
        model=job.recipe.model,
        notation=plan.notation(),
        nominal_bits=round(plan.nominal_bits(), 4),
        real_bits=round(size.real_bits, 4),
        bytes=size.bytes,
        formats=weights_by_format(plan),
        tokens=sum(int(counts.sum()) for _, counts in job.batches()),
        layer_similarity=[round(float(value), 5) for value in tensors["layer_cosine"]],
        text=text,
        estimate=plan.estimate,
        predicted_kl=plan.predicted_kl,
        measured_kl=study["measured_kl"].get(plan.estimate) if study else None,
    )


@dataclass(frozen=True)
class Job:
    """What the parts of a calibration share; `rows` is None where no text is read, and so is `logit_shape` made up."""

    recipe: Recipe
    work: WorkDir
    teacher: PreTrainedModel
    found: models.Structure
    rows: data.TokenRows | None
    length: int
    device: torch.device
    console: Console
    logit_shape: tuple[float, float | None] = (1.0, None)

    def batches(self, sequences: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Some of the text, by default all that calibration reads, as `batches_of`."""
        assert self.rows is not None
        return batches_of(self.recipe, self.rows, sequences)

    @property
    def studied_sequences(self) -> int:
        """How many sequences sensitivity is asked to be estimated from; of little text there are fewer."""
        weights = sum(p.numel() for p in self.teacher.parameters())
        tokens = self.recipe.calibrate.sensitivity_tokens
        return sensitivity.sequences_of(tokens or sensitivity.affordable_tokens(weights, self.device), self.length)

    @functools.cached_property
    def study(self) -> sensitivity.SensitivityAnalysis:
        """The teacher, ready to be studied on some of the text."""
        settings = self.recipe.calibrate
        assert self.rows is not None
        batches = self.batches(min(self.studied_sequences, len(self.rows) or self.studied_sequences))

        def walk(name: str, change: models.WeightTransform | None) -> models.LayerwisePass:
            return walk_of(self, f"sensitivity/{name}", batches, change)

        return sensitivity.SensitivityAnalysis(
            model=self.teacher,
            structure=self.found,
            logit_shape=self.logit_shape,
            batches=batches,
            make_pass=walk,
            folder=self.work.progress(NAME, "sensitivity"),
            names=candidates_of(settings),
            group_size=settings.group_size,
            points=settings.sensitivity_points,
            seed=self.recipe.seed,
            identity=digest_json(statistics_identity(self.recipe)),
            console=self.console,
            published=settings.init == "rtn",
        )


# --- what is measured, for every budget --------------------------------------------------------


def stored_statistics(recipe: Recipe, work: WorkDir) -> dict[str, Tensor] | None:
    """What an earlier calibration measured, or this one before it was interrupted, if it is what this one needs."""
    kept = work.progress(NAME, work.statistics_file.name)
    found = statistics_in(work.statistics_file, recipe)
    if found is None and (found := statistics_in(kept, recipe)) is not None:
        share(kept, work.statistics_file)
    return found


def statistics_in(path: Path, recipe: Recipe) -> dict[str, Tensor] | None:
    """What a file of statistics holds, if it is what the recipe needs."""
    wanted = statistics_identity(recipe)
    try:
        with safe_open(path, framework="pt") as file:
            measured = untrusted.parse_json((file.metadata() or {})["measured"], dict)
            if measured["identity"] != wanted["identity"]:
                return None
            needed = [measured["formats"].index(name) for name in wanted["formats"]]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (
        OSError,
        SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # among them a format that was not measured
        return None
    of_formats = ("damage/", sensitivity.PER_MATRIX)
    return {name: value[needed] if name.startswith(of_formats) else value for name, value in tensors.items()}


def write_statistics(recipe: Recipe, work: WorkDir, tensors: dict[str, Tensor]) -> None:
    metadata = {"measured": json.dumps(statistics_identity(recipe))}  # one key: safetensors keeps no order of several
    kept = work.progress(NAME, work.statistics_file.name)
    write_atomically(kept, lambda path: save_file(tensors, path, metadata))
    share(kept, work.statistics_file)


def statistics_identity(recipe: Recipe) -> dict[str, Any]:
    """What decides the statistics, for the metadata of their file: budgets and plans do not."""
    settings = recipe.calibrate
    measured = measures(settings)
    names = ["group_size", "activation_bits", "activation_scales", "adaptive_tokens", "sequences", "batch_size"]
    names += ["sensitivity", "sensitivity_tokens", "sensitivity_points"] if measured else []
    asked = {
        "model": jobs.teacher_fingerprint(recipe),
        "data": [jobs.data_fingerprint(recipe), recipe.data.sequence_length, recipe.data.packing],
        **jobs.row_settings(recipe),
        "seed": recipe.seed,
        "settings": {name: getattr(settings, name) for name in names},
        "published": measured and settings.init == "rtn",
        "holds": ["damage", "alone"] if measured else [],
        "versions": versions(),
    }
    return {"identity": digest_json(asked), "formats": candidates_of(settings) if measured else ()}


def measure(job: Job) -> dict[str, Tensor]:
    """Everything in the file of statistics, by the names it has there."""
    recipe, batches = job.recipe, job.batches()
    tensors = observe(recipe, walk_of(job, "walk", batches))
    if measures(recipe.calibrate):
        study = job.study
        for estimate in estimates_of(recipe):
            moments = {site.name: tensors[f"input_second_moment/{site.name}"] for site in job.found.linears}
            damages = study.estimate(estimate, moments)
            tensors |= {f"damage/{estimate}/{name}": value.float().contiguous() for name, value in damages.items()}
        tensors |= {sensitivity.PER_MATRIX + name: value.float() for name, value in study.per_matrix().items()}
    if recipe.calibrate.adaptive_tokens == "causal":
        tensors["importance_threshold"] = find_thresholds(job, batches)
    return tensors


def estimates_of(recipe: Recipe) -> tuple[str, ...]:
    """The estimates of damage to make; that of embedding and head is always `fisher`."""
    asked = recipe.calibrate.sensitivity
    return ("fisher", "integrated") if asked == "auto" else tuple(dict.fromkeys(("fisher", asked)))


# --- what is decided, for this budget ----------------------------------------------------------


def decide(job: Job, tensors: dict[str, Tensor]) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what `sensitivity.json` says of it (nothing where the plan measures nothing)."""
    recipe = job.recipe
    if not measures(recipe.calibrate):
        return jobs.new_plan(recipe, job.teacher, job.found), {}
    choices = damages_of(recipe, tensors)
    plans = {each.estimate: jobs.new_plan(recipe, job.teacher, job.found, each) for each in choices}
    study = job.study
    measured = {estimate: study.measure(linear_specs(plan)) for estimate, plan in plans.items()}
    best = min(measured, key=lambda estimate: measured[estimate])
    chosen = next(each for each in choices if each.estimate == best)

    def by_format(values: Tensor) -> dict[str, float]:
        return {name: float(f"{value:.5g}") for name, value in zip(chosen.formats, values, strict=True)}

    tensors_said = [
        {
            "name": site.name,
            "kind": site.kind,
            "rows": site.rows,
            "columns": site.columns,
            "damage": by_format(chosen.rows[site.name].sum(1)),
            "alone": by_format(tensors[sensitivity.PER_MATRIX + site.name]),
        }
        for site in job.found.targets
    ]
    said = {
        "version": 1,
        "estimate": best,
        "tokens": study.tokens,
        "model": recipe.model,
        "tensors": tensors_said,
        "kv": study.measure_kv_caches(),
        "measured_kl": {estimate: float(f"{value:.5g}") for estimate, value in measured.items()},
    }
    return plans[best], said


def damages_of(recipe: Recipe, tensors: dict[str, Tensor]) -> list[SensitivityTable]:
    """The estimates to plan with."""
    metadata = candidates_of(recipe.calibrate)
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("damage/"):
            _, estimate, module = name.split("/", 2)
            found.setdefault(estimate, {})[module] = value.double()
    asked = recipe.calibrate.sensitivity
    if asked == "auto":
        found["combined"] = sensitivity.combined(found["fisher"], found["integrated"])
    others = {name: value for name, value in found["fisher"].items() if len(value[0]) == 1}
    names = [asked] if asked != "auto" else ["fisher", "integrated", "combined"]
    return [SensitivityTable(name, metadata, {**others, **found[name]}, name != "hessian") for name in names]


def linear_specs(plan: Plan) -> dict[str, formats.MatrixSpec]:
    """Module path -> formats of the decoder's linear layers."""
    return {matrix.name: matrix.spec() for matrix in plan.matrices if matrix.kind == "linear"}


# --- walks -------------------------------------------------------------------------------------


def batches_of(recipe: Recipe, rows: data.TokenRows, sequences: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """The calibration text: token ids int64 [B, T] and the positions that count, bool [B, T]."""
    count = sequences or recipe.calibrate.sequences
    batches = data.sample_batches(rows, count, recipe.calibrate.batch_size)
    return [(batch["input_ids"], batch["labels"] != data.MASKED) for batch in batches]


def walk_of(
    job: Job, name: str, batches: list[tuple[Tensor, Tensor]], change: models.WeightTransform | None = None
) -> models.LayerwisePass:
    """A walk of batches through the teacher, which goes on where one of the same name was killed."""
    dtype, folder = jobs.walking_dtype(job.teacher, job.device), job.work.progress(NAME, name)
    identity = f"{jobs.teacher_fingerprint(job.recipe)} {name}"
    return models.LayerwisePass(
        job.teacher, job.found, batches, folder, dtype, job.device, identity, job.console, change
    )


def observe(recipe: Recipe, walk: models.LayerwisePass) -> dict[str, Tensor]:
    """Second moments of linear inputs, metrics of layers, and stored scales of inputs, as the file names them."""
    moments, metrics = observers.SecondMoments(), observers.LayerMetrics(walk.structure.layer_count, walk.final)
    ranges = observers.InputRanges(walk.structure.head_path)
    wanted = jobs.stored_input_scales(recipe.calibrate, walk.model, walk.structure)
    walk.forward(moments, metrics, *([ranges] if wanted else []), keep_inputs=False, title="calibrate")
    tokens = sum(int(counts.sum()) for _, counts in walk.batches)
    tensors = {f"input_second_moment/{name}": value for name, value in moments.means(tokens).items()}
    tensors |= {f"layer_{metric}": values for metric, values in metrics.means(tokens).items()}
    for scale, (name, bits) in wanted.items():
        tensors[scale] = torch.tensor(formats.calibrated_scale(ranges.counts[name], bits))
    return tensors


def find_thresholds(job: Job, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The importance that the unimportant share of calibration tokens lies below, float32 [layers].

    A walk of its own, since attention that shows its probabilities computes otherwise; the teacher keeps that.
    """
    attention.deciding_layers(job.teacher)
    tokens = attention.ImportantTokens(None)
    attention.attach_important_tokens(job.teacher, tokens)
    attention.quantize_attention(job.teacher, 16)
    importance = observers.Importance(tokens)
    walk_of(job, "importance", batches).forward(importance, keep_inputs=False, title="importance of tokens")
    return importance.thresholds(attention.UNIMPORTANT_SHARE)


def provide_own_text(recipe: Recipe, work: WorkDir, device: torch.device, length: int, console: Console) -> None:
    """Text that the teacher writes, or has written before this stage was interrupted."""
    asked = [jobs.teacher_fingerprint(recipe), recipe.seed, recipe.data.generated_tokens, length, versions()]
    kept = work.progress(NAME, "generated.json")
    try:
        before = untrusted.load_json(kept, most_bytes=untrusted.MOST_BYTES_OF_OURS)
    except (OSError, ValueError):
        before = {}
    if before.get("asked") == digest_json(asked) and isinstance(before.get("text"), str):
        write_text(work.generated_text, before["text"])
        return
    console.say(f"No --data was given, so the teacher writes {recipe.data.generated_tokens:,} tokens itself.")
    teacher, tokenizer = jobs.load_teacher(recipe, device, jobs.reading_dtype(device))
    write_own_text(recipe, work, teacher, tokenizer, length, console)
    write_json(kept, {"asked": digest_json(asked), "text": work.generated_text.read_text(encoding="utf-8")})


def write_own_text(
    recipe: Recipe,
    work: WorkDir,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    console: Console,
) -> None:
    """Let the teacher write about `data.generated_tokens` tokens, in documents of at most `length`.

    Plain sampling at temperature 1 keeps the teacher's own distribution (data-free distillation as in LLM-QAT, arXiv
    2305.17888, section 2). A document ends where the teacher ends it.

    Raises:
        UserError: the teacher ends nearly every text at once.
    """
    writer = own_writer(recipe, teacher, tokenizer, length)
    wanted = recipe.data.generated_tokens
    lines: list[str] = []
    written, rounds = 0, 0
    began = time.monotonic()
    with console.track("the teacher writes", wanted) as tracker:
        for batch in writer.batches(repeat(None)):
            lines += [json.dumps(row.record) for row in batch if row.record]
            now = sum(row.tokens for row in batch)
            written, rounds = written + now, rounds + 1
            if written < 2 * rounds * writer.sampling.batch_size:
                raise UserError(f"{recipe.model} writes no text by itself.", "Give text to learn from: --data FILE.")
            tracker.advance(min(now, wanted - written + now))
            left = (time.monotonic() - began) * max(wanted - written, 0) / written
            if rounds == 1 and left > 60:
                console.say(f"That will take about {duration(left)}; with --data FILE it would not be needed.")
            if written >= wanted:
                break
    write_text(work.generated_text, "\n".join(lines) + "\n")


def own_writer(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int
) -> generated_text.Writer:
    """The teacher writing texts of at most `length` tokens, as it is."""
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, answer_tokens=length - 1)
    return generated_text.Writer(teacher, tokenizer, sampling, recipe.seed, length)


def weights_by_format(plan: Plan) -> dict[str, int]:
    """Format -> weights of the decoder's linear layers that have it."""
    counts: dict[str, int] = {}
    for matrix in plan.matrices:
        if matrix.kind == "linear":
            for name, count in matrix.spec().weights_by_format((matrix.rows, matrix.columns)).items():
                counts[name] = counts.get(name, 0) + count
    return counts


def dry_run(recipe: Recipe, work: WorkDir, console: Console) -> CalibrateDryRun:
    """What would be decided, and about how long it would take (from one layer's pass and a few generated tokens)."""
    device = jobs.device_of(recipe)
    teacher, _ = jobs.load_teacher(recipe, torch.device("cpu"))
    found = models.structure(teacher)
    plan = jobs.new_plan(recipe, teacher, found)
    packed = jobs.packed_size(recipe, teacher, found)(plan)
    length = jobs.sequence_length(recipe, teacher)
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    batch = min(recipe.calibrate.batch_size, recipe.calibrate.sequences)
    ids = torch.zeros((batch, length), dtype=torch.int64)
    job = Job(recipe, work, teacher, found, None, length, device, console)
    walk = walk_of(job, "walk", [(ids, torch.ones_like(ids, dtype=torch.bool))])
    adaptive = plan.adaptive_tokens == "causal"
    sequences = (1 + adaptive) * recipe.calibrate.sequences
    if measures(recipe.calibrate):
        settings = recipe.calibrate
        sizes = len(candidates_of(settings)), len(found.linears), settings.sensitivity_points
        walks = sensitivity.forward_passes(estimates_of(recipe), *sizes)
        sequences += walks * job.studied_sequences
    sequences += recipe.calibrate.sequences * initialization.PASSES[recipe.calibrate.init]
    seconds = walk.seconds(-(-sequences // batch))
    memory = walk.memory(whole_attention=adaptive)
    tokens = recipe.calibrate.sequences * length
    own = 0 if recipe.data.train else recipe.data.generated_tokens
    if own:
        writing = time_of_writing(recipe, device, length)
        seconds, memory = seconds + writing[0], max(memory, writing[1])
    return CalibrateDryRun(
        notation=plan.notation(),
        nominal_bits=round(plan.nominal_bits(), 4),
        real_bits=round(packed.real_bits, 4),
        bytes=packed.bytes,
        tokens=tokens,
        generated_tokens=own,
        memory_bytes=max(memory, initialization.memory_bytes(recipe, teacher, tokens)),
        mapped_bytes=size,
        disk_bytes=sum(m.columns * 4 for m in plan.matrices)
        + 2 * sum(m.rows for m in plan.matrices)
        + 10 * own
        + 2 * tokens * found.embedding.columns * walk.dtype.itemsize
        + initialization.file_bytes(recipe.calibrate.init, plan),
        seconds=float(f"{seconds:.3g}"),
    )


def time_of_writing(recipe: Recipe, device: torch.device, length: int) -> tuple[float, int]:
    """Seconds and bytes of memory that the teacher takes to write its own text, from a few tokens."""
    teacher, tokenizer = jobs.load_teacher(recipe, device, jobs.reading_dtype(device))
    writer = own_writer(recipe, teacher, tokenizer, length)
    size = writer.sampling.batch_size
    began = time.monotonic()
    writer.draw([[0]] * size, (0,), exactly=GENERATE_PROBE)
    seconds = (time.monotonic() - began) / (size * GENERATE_PROBE) * recipe.data.generated_tokens
    weights = sum(p.numel() * p.element_size() for p in teacher.parameters())
    return seconds, weights + size * teacher.config.get_text_config().vocab_size * 4


def show(result: CalibrateResult) -> list[RenderableType]:
    """The plan, for people."""
    rows = [[name, f"{count:,}"] for name, count in result.formats.items()]
    least = min(range(len(result.layer_similarity)), key=lambda i: result.layer_similarity[i])
    caption = f"{result.tokens:,} calibration tokens; layer {least + 1} changes its input most"
    if result.measured_kl is not None:
        predicted = "" if result.predicted_kl is None else f" ({result.predicted_kl:.3g} predicted)"
        caption += (
            f"; planned by {result.estimate}: KL {result.measured_kl:.3g}{predicted} before training, of the rounded "
            "linear layers; draw it with `edgerazor show plan`"
        )
    return [
        table(
            f"Plan {result.notation}: {result.nominal_bits:.3g} nominal bits, {result.real_bits:.3g} real ones in a "
            f"packed model of {megabytes(result.bytes)}",
            ["format of decoder linear layers", "weights"],
            rows,
            caption=caption,
        )
    ]

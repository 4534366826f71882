"""Write the packed model: encode once, pack, write, read again, and compare with what training computed.

The student's float32 master weights go through `encode`, the same function that every training step called, with
their trained or stored scales if they have them (codes that training kept fixed are taken as they are). The written
file must then decode to exactly the codes and scales whose digests the last evaluation of the training recorded.
Without a student, the teacher's own weights are rounded to nearest (`edgerazor pack MODEL --bits 4`), or as the start
that calibrate made of them says.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from rich.console import RenderableType
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgerazor import exporters, formats, importers, job, models, modules, packed, untrusted
from edgerazor.allocate import MatrixPlan, Plan, measures
from edgerazor.calibration import initialization
from edgerazor.console import Console, megabytes, table
from edgerazor.errors import UserError, usage_error
from edgerazor.exporters import ExportResult
from edgerazor.importers import ImportResult
from edgerazor.modules.attention import UNIMPORTANT_BITS
from edgerazor.packed import MatrixSource
from edgerazor.recipe import Calibrate, Recipe
from edgerazor.workdir import WorkDir, exports_of, make_folder, recover_folder, replace_folder, write_json

NAME = "pack"

#: Fields of the recipe that say what is made of the packed model.
EXPORTING = ("export", "allow_lossy")

#: Path of a module -> its weight (float, or int8 for codes) and its scales where they were trained or stored.
Reader = Callable[[str], tuple[Tensor, Tensor | None]]


class PackResult(BaseModel):
    """The packed model. `verified`: it decodes to what training computed, or, without training, to what was encoded."""

    folder: str
    source: str
    notation: str
    bytes: int
    parameters: int
    nominal_bits: float
    real_bits: float
    teacher_bytes: int
    verified: bool
    classes: list[packed.ClassSize]
    exports: list[ExportResult] = []


class ExportsResult(BaseModel):
    """Exports of a packed folder that was given directly."""

    folder: str
    exports: list[ExportResult]


class ForeignResult(ImportResult):
    """A packed model made of somebody else's, and its exports."""

    exports: list[ExportResult] = Field(default_factory=list)


class ExportDryRun(BaseModel):
    """What exports of a packed model would take."""

    bytes: dict[str, int]
    real_bits: dict[str, float]


class PackDryRun(BaseModel):
    """What pack would write, but for exports and compression.

    Time is estimated from some rows of each kind of matrix, written and verified. `memory_bytes` is what it needs at
    once besides the program itself; `mapped_bytes` the weights that are read in place. `disk_bytes` are free ones.
    """

    source: str
    notation: str
    bytes: int
    nominal_bits: float
    real_bits: float
    memory_bytes: int
    mapped_bytes: int
    disk_bytes: int
    seconds: float


def inputs(recipe: Recipe, work: WorkDir) -> dict[str, str]:
    """Everything the result depends on."""
    common = {
        "model": job.teacher_fingerprint(recipe),
        **job.settings(NAME, recipe.pack, ("source", *EXPORTING)),
    }
    if source_of(recipe, work) == "student":
        distilled = work.manifest("distill")
        return {"student": distilled.fingerprint() if distilled else "missing", **common}
    settings = job.settings("calibrate", recipe.calibrate, ("sequences", "batch_size"))
    measured = measures(recipe.calibrate) and job.is_planned(recipe, work)
    if measured or job.needs_calibration(recipe.calibrate):
        calibrated = work.manifest("calibrate")
        settings["calibrate"] = calibrated.fingerprint() if calibrated else "missing"
    return {"student": "the teacher, rounded to nearest", **settings, **common}


def source_of(recipe: Recipe, work: WorkDir) -> str:
    """`student` or `teacher`.

    Raises:
        UserError: there is no student.
    """
    half = work.checkpoint("current").exists()
    if recipe.pack.source == "teacher":
        if half or work.manifest("distill"):
            raise usage_error(
                f"{work.path} holds a student; rounding the teacher there would replace its packed model.",
                f"Round in a folder of its own: `edgerazor pack {recipe.model} --work {work.path}-rounded`.",
            )
        return "teacher"
    if work.manifest("distill") is None:
        raise UserError(
            f"{work.path} holds no finished student to pack" + (", only an interrupted training." if half else "."),
            f"Run `edgerazor distill {recipe.model or 'MODEL'}`"
            + (" again to finish it." if half else ", or round without training: `edgerazor pack MODEL --bits 4`."),
        )
    return "student"


def training_of(work: WorkDir, source: str) -> dict[str, str] | None:
    """What the student's training depended on; None without one."""
    manifest = work.manifest("distill") if source == "student" else None
    return manifest.inputs if manifest else None


def plan_of(recipe: Recipe, work: WorkDir, teacher: models.PreTrainedModel) -> Plan:
    """The student's plan, or for rounding the plan of the recipe's settings."""
    if source_of(recipe, work) == "student":
        return job.read_plan(work)
    for field, other in (("scales", "computed"), ("activation_scales", "static")):
        value = getattr(recipe.calibrate, field)
        if value in ("learned", "asymmetric"):
            raise usage_error(
                f"`calibrate.{field}: {value}` needs a training, but the teacher is rounded without one.",
                f"Use `{field}: {other}`, or run `edgerazor distill`.",
            )
    if measures(recipe.calibrate) and job.is_planned(recipe, work):
        return job.read_plan(work)
    return job.new_plan(recipe, teacher, models.structure(teacher), source="teacher")


def run(recipe: Recipe, work: WorkDir, console: Console) -> PackResult:
    """Write and verify the packed folder."""
    source = source_of(recipe, work)
    teacher_folder = models.resolve(recipe.model, recipe.revision)
    teacher, _ = models.load(recipe.model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    found = models.structure(teacher)
    plan = plan_of(recipe, work, teacher)
    job.check_attention(teacher, plan)
    scales = job.input_scales(plan, teacher, found, work) or {}
    start = initialization.stored(recipe, work, plan) if source == "teacher" else None
    if source == "teacher" and measures(recipe.calibrate) and plan.strategy != "sensitivity":
        console.say(
            "Nothing was measured of the model here, so its rows are mixed as EdgeRazor does. For one by sensitivity, "
            f"run `edgerazor calibrate` with the same options and --work {work.path} first."
        )
    make_folder(work.path)
    settings = job.packed_settings(plan, found, work)
    with (
        student_weights(source, recipe, work, teacher, start) as (read, trained, digests),
        replace_folder(work.folder(NAME)) as folder,
        console.track("pack", len(plan.matrices)) as tracker,
    ):
        header = packed.write(
            folder,
            [matrix_source(matrix, read) for matrix in plan.matrices],
            {name: torch.tensor(scale) for name, scale in scales.items()} | whole_zero_points(trained, plan),
            tied=job.tied_modules(found),
            settings=settings,
            provenance=job.provenance(recipe, source, plan, training_of(work, source)),
            shard_bytes=recipe.pack.shard_bytes,
            done=tracker.advance,
            compress=recipe.pack.compress,
        )
        packed.verify_digests(folder, digests or {name: entry.digest for name, entry in header.matrices.items()})
        accompany(folder, teacher_folder, teacher.config, {"version": header.version, **settings})
        sizes = packed.size_table(packed.PackedModel.open(folder))
    result = PackResult(
        folder=str(work.folder(NAME)),
        source=source,
        notation=plan.notation(),
        bytes=sizes.bytes,
        parameters=sizes.parameters,
        nominal_bits=round(sizes.nominal_bits, 4),
        real_bits=round(sizes.real_bits, 4),
        teacher_bytes=sum(file.stat().st_size for file in teacher_folder.glob("*.safetensors")),
        verified=True,
        classes=sizes.classes,
    )
    write_json(work.result_file(NAME), result.model_dump(mode="json"))
    return result


def export(result: PackResult, recipe: Recipe, work: WorkDir, console: Console) -> PackResult:
    """The packed model in the recipe's other formats, each written anew."""
    folder, asked = work.folder(NAME), recipe.pack
    written = exporters.write_all(folder, asked.export, work.exports, asked.allow_lossy, console)
    return result.model_copy(update={"exports": written})


def export_folder(folder: Path, names: list[str], allow_lossy: bool, console: Console) -> ExportsResult:
    """A packed folder in other formats.

    Raises:
        UserError: it is no packed folder, or an export is refused.
    """
    written = exporters.write_all(folder, names, exports_of(folder), allow_lossy, console)
    return ExportsResult(folder=str(folder), exports=written)


def read_foreign(path: Path, recipe: Recipe, work: WorkDir, console: Console, force: bool) -> ForeignResult:
    """A packed folder of somebody else's quantized model, and its exports.

    Args:
        path: what they wrote.
        recipe: how the packed model computes, and what is exported.
        work: its packed folder is written, but it does not become a job: there is no teacher.
        console: where to say what is done.
        force: replace a packed folder that is not an import.

    Raises:
        UserError: it is refused, or there is something else in the way.
    """
    target = work.folder(NAME)
    asked = recipe.calibrate
    with work.lock():
        recover_folder(target)
        if work.recipe_file.exists() or (target.exists() and not (force or _is_import(target))):
            raise usage_error(
                f"{work.path} holds another job or packed model, which this one would replace.",
                f"Give it a folder of its own: `edgerazor pack {path} --work NAME`.",
            )
        found = importers.import_model(
            path,
            target,
            console,
            activation_bits=_asked(asked, "activation_bits"),
            kv_bits=_asked(asked, "kv_bits"),
            lossy=recipe.pack.allow_lossy,
        )
        written = exporters.write_all(target, recipe.pack.export, work.exports, recipe.pack.allow_lossy, console)
    return ForeignResult(**dict(found), exports=written)


def _asked(wanted: Calibrate, field: str) -> int | None:
    """Bits that the user asked for; None where it is only the default for models that are trained here."""
    return getattr(wanted, field) if field in wanted.model_fields_set else None


def _is_import(folder: Path) -> bool:
    """Whether a packed folder was made of somebody else's model."""
    try:
        return packed.PackedModel.open(folder).header.provenance.get("source") == "import"
    except UserError:
        return False


def show_foreign(result: ForeignResult) -> list[RenderableType]:
    """The size table, for people."""
    said = [f"{name} {weights:,}" for name, weights in result.formats.items()]
    kept = f"scales of {len(result.lossy)} matrices rounded" if result.lossy else "every weight as it was"
    caption = f"{result.folder}, made of {result.source}: {', '.join(said)} weights; {kept}"
    shown = [size_table("Packed", result.sizes.classes, result.sizes, caption), *result.notes]
    return [*shown, *show_exports(result.exports)]


def export_dry_run(folder: Path, names: list[str], allow_lossy: bool, console: Console) -> ExportDryRun:
    """The size of a packed folder in other formats."""
    plans = exporters.plan_all(folder, names, allow_lossy, console)
    return ExportDryRun(
        bytes={plan.export: plan.bytes for plan in plans},
        real_bits={plan.export: round(plan.real_bits, 4) for plan in plans},
    )


class student_weights:  # noqa: N801 - used as a context manager, like those of contextlib
    """The weights to pack: a reader by module path, the tensors that stay as they are, and recorded digests.

    For a student the digests are those of training. For the teacher, which is rounded from the start that calibrate
    made if there is one, there are none.
    """

    def __init__(
        self,
        source: str,
        recipe: Recipe,
        work: WorkDir,
        teacher: models.PreTrainedModel,
        start: Callable[[str], modules.InitialWeight] | None,
    ) -> None:
        self.source, self.recipe, self.work, self.teacher, self.start = source, recipe, work, teacher, start

    def __enter__(self) -> tuple[Reader, dict[str, Tensor], dict[str, str]]:
        found = models.structure(self.teacher)
        if self.source == "teacher":
            state = self.teacher.state_dict()
            others = {name: tensor.contiguous() for name, tensor in job.other_tensors(self.teacher, found).items()}
            return lambda name: self._begin(name, state[f"{name}.weight"]), others, {}
        folder = self.work.student(self.recipe.pack.student)
        try:
            self.file = safe_open(folder / "model.safetensors", framework="pt").__enter__()
            digests = untrusted.load_json(folder / "digests.json")
            if not all(isinstance(digest, str) for digest in digests.values()):
                raise ValueError("digests.json holds something else than digests")
            names = set(self.file.keys())
            others = {name: self.file.get_tensor(name) for name in sorted(names - job.matrix_tensors(found))}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"The student {folder} cannot be read: {str(error).rstrip('.')}.", "Run `edgerazor distill --force`."
            ) from None

        def read(name: str) -> tuple[Tensor, Tensor | None]:
            scales = f"{name}.scales"
            return self.file.get_tensor(f"{name}.weight"), self.file.get_tensor(scales) if scales in names else None

        return read, others, digests

    def _begin(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where a matrix of the teacher begins."""
        if self.start is None:
            return weight, None
        begun = self.start(name)
        return weight if begun.weight is None else begun.weight, begun.scales

    def __exit__(self, *exception: object) -> None:
        if self.source == "student":
            self.file.__exit__(None, None, None)


def matrix_source(matrix: MatrixPlan, read: Reader) -> MatrixSource:
    """A matrix of the plan, encoded when it is its turn."""
    spec = matrix.spec()
    return MatrixSource(
        matrix.name, matrix.kind, spec, matrix.shape, lambda: modules.encode_trained(*read(matrix.name), spec)
    )


def whole_zero_points(tensors: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors of a student, with trained zero points of inputs as the whole numbers that it computes with."""
    bits = {formats.INPUT_ZERO_POINT: plan.activation_bits, formats.LOW_INPUT_ZERO_POINT: UNIMPORTANT_BITS}
    kinds = {name: name.rpartition(".")[2] for name in tensors}
    return {
        name: formats.whole_zero_point(tensor, bits[kinds[name]]) if kinds[name] in bits else tensor
        for name, tensor in tensors.items()
    }


def accompany(folder: Path, teacher_folder: Path, config: object, settings: dict[str, Any]) -> None:
    """Configuration, generation settings, tokenizer and chat template."""
    models.copy_companions(teacher_folder, folder)
    values = untrusted.without_code(json.loads(config.to_json_string(use_diff=True)))  # type: ignore[attr-defined]
    values["dtype"] = "float32"  # of the activations between quantized layers
    values["quantization_config"] = {"quant_method": "edgerazor", **settings}
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def dry_run(recipe: Recipe, work: WorkDir, console: Console) -> PackDryRun:
    """What would be written, and about how long it would take."""
    source = source_of(recipe, work)
    teacher, _ = models.load(recipe.model, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    plan = plan_of(recipe, work, teacher)
    calibrated = work if work.statistics_file.exists() else None
    found, training = models.structure(teacher), training_of(work, source)
    size = job.packed_size(recipe, teacher, found, source, calibrated, training)(plan)
    mapped = sum(p.numel() * p.element_size() for p in teacher.parameters())
    if source == "student":
        mapped += (work.student(recipe.pack.student) / "model.safetensors").stat().st_size
    return PackDryRun(
        source=source,
        notation=plan.notation(),
        bytes=size.bytes,
        nominal_bits=round(plan.nominal_bits(), 4),
        real_bits=round(size.real_bits, 4),
        memory_bytes=packed.working_memory((matrix.spec(), matrix.shape) for matrix in plan.matrices),
        mapped_bytes=mapped,
        disk_bytes=size.bytes,  # beside the old one, which stays until the new one is complete
        seconds=float(f"{estimated_seconds(plan, teacher):.3g}"),
    )


#: Weights of each kind that a dry run packs.
SAMPLE = 1 << 22


def estimated_seconds(plan: Plan, teacher: models.PreTrainedModel) -> float:
    """How long all cores take to write and verify the matrices of a plan, from some rows of each kind."""
    total, longest = 0.0, 0.0
    for kind in sorted({matrix.kind for matrix in plan.matrices}):
        weights = {matrix.name: matrix.rows * matrix.columns for matrix in plan.matrices if matrix.kind == kind}
        largest = max((matrix for matrix in plan.matrices if matrix.kind == kind), key=lambda each: weights[each.name])
        once = seconds_per_weight(largest, teacher.get_submodule(largest.name).weight)
        total += once * sum(weights.values())
        longest = max(longest, once * weights[largest.name])
    return max(longest, total / min(packed.cores(), len(plan.matrices)))  # a matrix is one core's


def seconds_per_weight(matrix: MatrixPlan, weight: Tensor) -> float:
    """Of one core that packs and verifies the first rows of a matrix."""
    rows = min(matrix.rows, max(1, SAMPLE // matrix.columns))
    spec = matrix.spec().take(torch.arange(rows))
    sample = MatrixSource(
        "rows", "linear", spec, (rows, matrix.columns), lambda: formats.encode_matrix(weight[:rows], spec)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            packed.write(Path(folder), [sample], {}, tied={}, settings={}, provenance={})
            packed.PackedModel.open(Path(folder)).verify()
            return (time.monotonic() - began) / (rows * matrix.columns)
    finally:
        torch.set_num_threads(threads)


def show(result: PackResult) -> list[RenderableType]:
    """The size table, for people."""
    smaller = result.teacher_bytes / result.bytes
    caption = (
        f"{result.folder}: {smaller:.1f} times smaller than the {megabytes(result.teacher_bytes)} teacher, "
        "verified bit for bit"
    )
    shown = [size_table(f"Packed {result.notation}", result.classes, result, caption)]
    return [*shown, *show_exports(result.exports)]


def show_exports(results: list[ExportResult]) -> list[RenderableType]:
    """A line for each export, and its notes."""
    lines: list[RenderableType] = []
    for each in results:
        kept = f"changes weights of {len(each.lossy)} tensors" if each.lossy else "every weight bit for bit"
        lines.append(f"{each.export}: {each.file}, {megabytes(each.bytes)}, {each.real_bits:.2f} real bits, {kept}")
        lines += [f"  {note}" for note in each.notes]
    return lines


def size_table(
    title: str, classes: list[packed.ClassSize], whole: PackResult | packed.SizeTable, caption: str = ""
) -> RenderableType:
    """Weights, bits and bytes by class of tensors and altogether."""
    names = {"linear": "decoder linear layers", "embedding": "embeddings", "head": "head", "other": "norms and others"}
    rows = [
        [names[c.kind], f"{c.weights:,}", f"{c.nominal_bits:.2f}", f"{c.real_bits:.2f}", megabytes(c.bytes)]
        for c in classes
    ]
    rows.append(["whole file", f"{whole.parameters:,}", "", f"{whole.real_bits:.2f}", megabytes(whole.bytes)])
    return table(title, ["tensors", "weights", "nominal bits", "real bits", "size"], rows, caption)

"""Write the packed model: encode once, pack, write, read again, and compare with what training computed.

The student's float32 master weights go through `encode`, the same function that every training step called, with
their trained or stored scales if they have them (codes that training kept fixed are taken as they are). The written
file must then decode to exactly the codes and scales whose digests the last evaluation of the training recorded.
Without a student, the teacher's own weights are rounded to nearest (`edgerazor pack MODEL --bits 4`), or begin with the
scales and weights that calibrate found for them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import RenderableType

from edgerazor import exporters, packed, student_plan
from edgerazor import recipe as recipes
from edgerazor.allocate import Plan, measures
from edgerazor.console import Console
from edgerazor.errors import UserError, usage_error
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.job import JobContext, LoadedModel, training_in
from edgerazor.packaging.companions import write_companions
from edgerazor.packaging.foreign import read_foreign
from edgerazor.packaging.model_card import Making, write_card
from edgerazor.packaging.pack_result import ExportDryRun, ExportsResult, PackDryRun, PackResult
from edgerazor.packaging.pack_time import estimated_seconds
from edgerazor.packaging.pack_weights import (
    Weights,
    matrix_source,
    student_weights,
    teacher_weights,
    tower_sources,
    whole_zero_points,
)
from edgerazor.packaging.recompression import recompress
from edgerazor.packaging.teacher_card import read_teacher_card
from edgerazor.recipe import Recipe
from edgerazor.report import card_results
from edgerazor.report.tables import compress_lines, export_lines, foreign_tables, pack_tables
from edgerazor.stage import Stage
from edgerazor.workdir import WorkDir, exports_of, make_folder, replace_folder, write_json

__all__ = [
    "STAGE",
    "compress_lines",
    "export_dry_run",
    "export_folder",
    "export_lines",
    "foreign_tables",
    "read_foreign",
    "recompress",
    "stands_alone",
]

#: Fields of the recipe that say what is made of the packed model.
EXPORTING = ("export", "allow_lossy")


class PackStage(Stage):
    """`edgerazor pack`."""

    name = "pack"
    result_model = PackResult
    manages_folder = True  # the packed folder is replaced as a whole, once it is verified

    def describe(self, context: JobContext) -> str:
        return "writing the packed model"

    def inputs(self, context: JobContext) -> dict[str, str]:
        recipe, work = context.recipe, context.work
        common = {
            "model": context.teacher_fingerprint,
            **context.section_inputs(self.name, ("source", *EXPORTING)),
        }
        if source_of(context) == "student":
            distilled = work.manifest("distill")
            return {"student": distilled.fingerprint() if distilled else "missing", **common}
        settings = context.section_inputs("calibrate", ("sequences", "batch_size"))
        measured = measures(recipe.calibrate) and context.is_planned()
        if measured or student_plan.needs_calibration(recipe.calibrate):
            calibrated = work.manifest("calibrate")
            settings["calibrate"] = calibrated.fingerprint() if calibrated else "missing"
        return {"student": "the teacher, rounded to nearest", **settings, **common}

    def check_settings(self, context: JobContext) -> None:
        if context.recipe.pack.export:
            exporters.check(context.recipe.pack.export, context.teacher_folder)
            if context.recipe.calibrate.rotation:
                for name in context.recipe.pack.export:
                    exporters.refuse_rotated(exporters.find(name), "A model of `calibrate.rotation: hadamard`")

    def check(self, context: JobContext) -> None:
        source_of(context)

    def stands_alone(self, context: JobContext) -> bool:
        return stands_alone(context.work)

    def run(self, context: JobContext) -> PackResult:
        """Write and verify the packed folder."""
        recipe, work = context.recipe, context.work
        source = source_of(context)
        teacher = context.load_teacher(torch.device("cpu"))
        structure = teacher.structure
        plan = plan_of(context, teacher)
        student_plan.check_attention(teacher.model, plan)
        scales, towers = context.input_scales(plan, teacher) or {}, context.tower_matrices(teacher)
        weights_to_pack = weights_of(context, source, teacher, plan)
        if source == "teacher" and measures(recipe.calibrate) and plan.strategy != "sensitivity":
            context.console.say(
                "Nothing was measured of the model here, so its rows are mixed as EdgeRazor does. For one by "
                f"sensitivity, run `edgerazor calibrate` with the same options and --work {work.path} first."
            )
        make_folder(work.path)
        settings = student_plan.header_settings(context.student_settings(plan, structure))
        with (
            weights_to_pack as weights,
            replace_folder(work.folder(self.name)) as folder,
            context.console.track("pack", len(plan.matrices) + len(towers)) as tracker,
        ):
            others = {
                name: value for name, value in weights.others.items() if name.removesuffix(".weight") not in towers
            }
            header = packed.write(
                folder,
                [*(matrix_source(matrix, weights) for matrix in plan.matrices), *tower_sources(towers, weights)],
                {name: torch.tensor(scale) for name, scale in scales.items()} | whole_zero_points(others, plan),
                tied=student_plan.tied_modules(structure),
                settings=settings,
                provenance=context.provenance(source, plan, training_inputs(work, source)),
                shard_bytes=recipe.pack.shard_bytes,
                done=tracker.advance,
                compress=recipe.pack.compress,
            )
            digests = {name: entry.digest for name, entry in header.matrices.items()}
            if weights.digests:  # of what was trained; towers were not
                digests = {**weights.digests, **{path: digests[path] for path in towers}}
            packed.verify_digests(folder, digests)
            write_companions(folder, context.teacher_folder, teacher.model, {"version": header.version, **settings})
            card = read_teacher_card(recipe.model, context.teacher_folder)
            write_card(folder, card, making_of(context, source, weight_bytes(context.teacher_folder)))
            sizes = packed.size_table(packed.PackedModel.open(folder))
        result = PackResult(
            folder=str(work.folder(self.name)),
            source=source,
            notation=plan.notation(),
            bytes=sizes.bytes,
            parameters=sizes.parameters,
            nominal_bits=round(sizes.nominal_bits, 4),
            real_bits=round(sizes.real_bits, 4),
            teacher_bytes=weight_bytes(context.teacher_folder),
            verified=True,
            classes=sizes.classes,
        )
        write_json(work.result_file(self.name), result.model_dump(mode="json"))
        return result

    def deliver(self, context: JobContext, result: PackResult) -> PackResult:
        """The packed model in the recipe's other formats, each written anew, and its card with what `eval` measured."""
        if (measured := measured_results(context.work)) is not None:
            card_results.refresh(context.work, measured)
        settings, work = context.recipe.pack, context.work
        if not settings.export:
            return result
        folder = work.folder(self.name)
        written = exporters.write_all(folder, settings.export, work.exports, settings.allow_lossy, context.console)
        return result.model_copy(update={"exports": written})

    def dry_run(self, context: JobContext) -> PackDryRun:
        """What would be written, and about how long it would take."""
        work, source = context.work, source_of(context)
        teacher = context.load_teacher(torch.device("cpu"))
        plan = plan_of(context, teacher)
        training = training_inputs(work, source)
        size = context.packed_size(teacher, source, work.statistics_file.exists(), training)(plan)
        mapped = teacher.weight_bytes
        if source == "student":
            mapped += (work.student(context.recipe.pack.student) / "model.safetensors").stat().st_size
        return PackDryRun(
            source=source,
            notation=plan.notation(),
            bytes=size.bytes,
            nominal_bits=round(plan.nominal_bits(), 4),
            real_bits=round(size.real_bits, 4),
            memory_bytes=packed.working_memory((matrix.spec(), matrix.shape) for matrix in plan.matrices),
            mapped_bytes=mapped,
            disk_bytes=size.bytes,  # beside the old one, which stays until the new one is complete
            seconds=float(f"{estimated_seconds(plan, teacher.model):.3g}"),
        )

    def show(self, result: PackResult) -> list[RenderableType]:
        return pack_tables(result)


STAGE = PackStage()


def source_of(context: JobContext) -> str:
    """`student` or `teacher`.

    Raises:
        UserError: there is no student.
    """
    recipe, work = context.recipe, context.work
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


def training_inputs(work: WorkDir, source: str) -> dict[str, str] | None:
    """What the student's training depended on; None without one."""
    manifest = work.manifest("distill") if source == "student" else None
    return manifest.inputs if manifest else None


def stands_alone(work: WorkDir) -> bool:
    """Whether there is a packed model that was rounded without training, so that it needs nothing before it."""
    manifest = work.manifest("pack")
    return manifest is not None and not training_in(work) and work.up_to_date("pack", manifest.inputs)


def plan_of(context: JobContext, teacher: LoadedModel) -> Plan:
    """The student's plan, or for rounding the plan of the recipe's settings.

    Raises:
        UserError: the settings need a training, or do not fit the model.
    """
    settings = context.recipe.calibrate
    if source_of(context) == "student":
        return context.plan()
    for field, other in (("scales", "computed"), ("activation_scales", "static")):
        value = getattr(settings, field)
        if value in ("learned", "asymmetric"):
            raise usage_error(
                f"`calibrate.{field}: {value}` needs a training, but the teacher is rounded without one.",
                f"Use `{field}: {other}`, or run `edgerazor distill`.",
            )
    if measures(settings) and context.is_planned():
        return context.plan()
    return context.new_plan(teacher, source="teacher")


def weights_of(context: JobContext, source: str, teacher: LoadedModel, plan: Plan) -> AbstractContextManager[Weights]:
    """The weights to pack, once they are entered.

    Raises:
        UserError: calibrate has not made the initialization that the recipe asks for.
    """
    if source == "student":
        return student_weights(context.work.student(context.recipe.pack.student), teacher.structure)
    return teacher_weights(teacher, plan, context.initial_weights(plan))


# --- the card ----------------------------------------------------------------------------------

#: Fields of a recipe that decide what is packed, and those in its sections that do not.
DECISIVE = ("model", "revision", "trust_remote_code", "seed", "data", "calibrate", "distill", "pack")
INDECISIVE = (
    "calibrate.batch_size",
    "distill.checkpoint_every",
    "distill.track",
    "distill.gradient_checkpointing",
    "distill.memory",
    "distill.cache_rounding",
    *(f"pack.{field}" for field in EXPORTING),
)


def weight_bytes(folder: Path) -> int:
    """Bytes of a teacher's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def making_of(context: JobContext, source: str, teacher_bytes: int) -> Making:
    """How a packed model was made: commands, and the recipe of what decided it."""
    skip = INDECISIVE if source == "student" else (*INDECISIVE, "distill")
    text = recipes.dump_without_places(decisive_recipe(context, source), DECISIVE, skip)
    commands: tuple[str, ...] = ("edgerazor distill --recipe recipe.yaml", "edgerazor pack")
    if source == "teacher":
        commands = ("edgerazor pack --recipe recipe.yaml",)
    return Making(source, commands, text, teacher_bytes)


def decisive_recipe(context: JobContext, source: str) -> Recipe:
    """The recipe that a packed model was made of: of a student the one that is kept with it, and what its budget chose.

    Raises:
        UserError: the kept recipe is damaged.
    """
    recipe, file = context.recipe, context.work.recipe_file
    if source == "teacher" or not file.exists():
        return recipe
    stored = recipes.build(recipes.load(file), f"The recipe {file}")
    decided = {name: getattr(stored, name) for name in ("data", "calibrate", "distill")}
    chosen = {
        **context.chosen,
        "calibrate": {**context.chosen.get("calibrate", {}), "rotation": recipe.calibrate.rotation},
    }
    return recipes.with_values(recipe.model_copy(update=decided), chosen, "What was chosen for the budget")


def measured_results(work: WorkDir) -> EvalResult | None:
    """What `eval` measured of the very packed model that is there; None where it has not."""
    packed_manifest, measured = work.manifest("pack"), work.manifest("eval")
    if packed_manifest is None or measured is None or measured.inputs.get("pack") != packed_manifest.fingerprint():
        return None
    try:
        return EvalResult.model_validate(measured.result)
    except ValidationError:  # written by another version of this program
        return None


# --- packed folders that are given directly ----------------------------------------------------


def export_folder(folder: Path, names: list[str], allow_lossy: bool, console: Console) -> ExportsResult:
    """A packed folder in other formats.

    Raises:
        UserError: it is no packed folder, or an export is refused.
    """
    written = exporters.write_all(folder, names, exports_of(folder), allow_lossy, console)
    return ExportsResult(folder=str(folder), exports=written)


def export_dry_run(folder: Path, names: list[str], allow_lossy: bool, console: Console) -> ExportDryRun:
    """The size of a packed folder in other formats."""
    plans = exporters.plan_all(folder, names, allow_lossy, console)
    return ExportDryRun(
        bytes={plan.export: plan.bytes for plan in plans},
        real_bits={plan.export: round(plan.real_bits, 4) for plan in plans},
    )

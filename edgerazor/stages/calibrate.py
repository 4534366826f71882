"""Look at the teacher, then decide what the student will be.

Calibration text passes through the teacher, one decoder layer at a time (`calibration/measurement.py`), and what is
measured serves every budget (`calibration/statistics.py`). From that comes the plan: a format for every row, tensor or
block of every matrix (`allocate/`), with a summary of what was measured in `sensitivity.json`. Where training is to
start from scales or codes that take text to find, they are found then (`calibration/initialization.py`).

Several processes of a launcher measure with a part of the text each; the main process does the rest alone.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor

from edgerazor import allocate, devices, models, student_plan
from edgerazor.allocate import Plan, measures, passes_of, shortfall
from edgerazor.calibration import experts, initialization, own_text, planning, statistics, towers
from edgerazor.calibration import measurement as measuring
from edgerazor.calibration.calibrate_result import CalibrateDryRun, CalibrateResult, TowersResult
from edgerazor.calibration.measurement import Measurement
from edgerazor.console import is_main_process
from edgerazor.errors import INTERRUPTED, UserError
from edgerazor.job import JobContext
from edgerazor.packaging.native_teacher import native_teacher
from edgerazor.recipe import Recipe
from edgerazor.report.tables import calibrate_tables
from edgerazor.stage import Stage
from edgerazor.training import cost_of, forward_seconds, init_seconds, measure_machine
from edgerazor.workdir import make_folder, write_json, write_text


class CalibrateStage(Stage):
    """`edgerazor calibrate`."""

    name = "calibrate"
    result_model = CalibrateResult
    decides_student = True
    on_all_processes = True
    #: Statistics and text may serve another plan.
    carried = ("stats.safetensors", "generated.jsonl")

    def takes_part(self, recipe: Recipe) -> bool:
        return recipe.pack.source != "teacher" or student_plan.needs_calibration(recipe.calibrate)

    def describe(self, context: JobContext) -> str:
        return f"{context.recipe.model} {context.budget_in_words}"

    def inputs(self, context: JobContext) -> dict[str, str]:
        recipe = context.recipe
        return {
            "model": context.teacher_fingerprint,
            "data": context.data_fingerprint,
            "data.sequence_length": str(recipe.data.sequence_length),
            "data.packing": recipe.data.packing,
            **context.row_inputs,
            "seed": str(recipe.seed),
            **context.section_inputs("calibrate", skip=("batch_size",)),
        }

    def check_settings(self, context: JobContext) -> None:
        allocate.check(context.recipe.calibrate)

    def run(self, context: JobContext) -> CalibrateResult:
        """Write statistics and plan into the stage's folder.

        Raises:
            UserError: interrupted; the same command goes on from there.
        """
        work, console = context.work, context.console
        teacher = context.load_teacher(torch.device("cpu"))
        structure = teacher.structure
        student_plan.check_attention(teacher.model, context.recipe.calibrate)
        length = context.sequence_length(teacher.model)
        make_folder(work.folder(self.name))
        tensors = devices.of_main_process(statistics.stored(context) if is_main_process() else None)
        text = "the recipe's data"
        if not context.recipe.data.train:
            text = "written by the teacher, since no --data was given"
            if is_main_process() and (tensors is None or not work.generated_text.exists()):
                own_text.provide(context, length, native_teacher)
            devices.wait_for_everyone()
        rows, _ = context.open_text(teacher.tokenizer, length)
        shape = models.logit_shape(teacher.model, structure.head_path)
        measurement = Measurement(context, teacher, length, rows, shape)
        try:
            if tensors is None:
                tensors = measuring.measure(measurement)
                if is_main_process():
                    statistics.write(context, tensors)
            else:
                console.say("What was measured of the teacher for another plan serves this one too.")
            if unreached := experts.unreached(tensors):
                console.say(unreached)
            plan, sensitivity = planning.decide(measurement, tensors)
        except KeyboardInterrupt:
            raise UserError(
                "Interrupted; the layers that were finished are saved.",
                "The same command goes on from there.",
                code=INTERRUPTED,
            ) from None
        wrote = None
        if is_main_process():
            of_towers = towers.measure(context, teacher)
            wrote = self.write(measurement, plan, sensitivity, tensors, text, of_towers)
        result = devices.of_main_process(wrote)
        assert result is not None
        return result

    def write(
        self,
        measurement: Measurement,
        plan: Plan,
        sensitivity: dict[str, Any],
        tensors: dict[str, Tensor],
        text: str,
        of_towers: TowersResult | None,
    ) -> CalibrateResult:
        """Write the plan, where the student begins, and the result, into the stage's folder."""
        context = measurement.context
        settings, work, console = context.recipe.calibrate, context.work, context.console
        if below := shortfall(plan, settings):
            console.say(below)
        write_text(work.plan_file, plan.model_dump_json(indent=1) + "\n")
        if sensitivity:
            write_json(work.sensitivity_file, sensitivity)
        else:  # of an earlier plan
            work.sensitivity_file.unlink(missing_ok=True)
        if settings.init in student_plan.CALIBRATED_INITS:
            assert measurement.rows is not None
            initialization.write(context, plan, measurement.rows)
        result = result_of(measurement, plan, sensitivity, tensors, text)
        result.towers = of_towers
        write_json(work.result_file(self.name), result.model_dump(mode="json"))
        return result

    def dry_run(self, context: JobContext) -> CalibrateDryRun:
        """What would be decided, and about how long it would take: from shapes and the speed of the machine."""
        recipe, settings, device = context.recipe, context.recipe.calibrate, context.device
        outline = context.teacher_outline
        teacher = context.planning_teacher()
        plan = context.new_plan(teacher)
        packed = context.packed_size(teacher)(plan)
        length = context.sequence_length(outline.model)
        mapped = outline.weight_bytes
        measurement = Measurement(context, outline, length)
        batch = min(settings.batch_size, settings.sequences)
        ids = torch.zeros((batch, length), dtype=torch.int64)
        layerwise = measurement.layerwise_pass("walk", [(ids, torch.ones_like(ids, dtype=torch.bool))])
        machine = measure_machine(device, layerwise.dtype)
        passed = sequences_passed(measurement) * length
        cost, tokens = cost_of(outline.structure, length), settings.sequences * length
        init_tokens = settings.init_sequences(length) * length
        seconds = forward_seconds(cost, machine, passed) + init_seconds(settings.init, cost, machine, init_tokens)
        memory = layerwise.memory(whole_attention=settings.adaptive_tokens == "causal")
        own_tokens = 0 if recipe.data.train else recipe.data.generated_tokens
        if own_tokens:
            dtype = devices.inference_dtype(device)
            writing_seconds, writing_memory = own_text.estimate(outline, own_tokens, machine, dtype)
            seconds, memory = seconds + writing_seconds, max(memory, writing_memory)
        return CalibrateDryRun(
            notation=plan.notation(),
            nominal_bits=round(plan.nominal_bits(), 4),
            real_bits=round(packed.real_bits, 4),
            bytes=packed.bytes,
            tokens=tokens,
            generated_tokens=own_tokens,
            memory_bytes=max(memory, initialization.memory_bytes(settings.init, outline.model, init_tokens)),
            mapped_bytes=mapped,
            disk_bytes=sum(matrix.columns * 4 for matrix in plan.matrices)
            + 2 * sum(matrix.rows for matrix in plan.matrices)
            + 10 * own_tokens
            + 2 * tokens * outline.structure.embedding.columns * layerwise.dtype.itemsize
            + initialization.file_bytes(settings.init, plan),
            seconds=float(f"{seconds:.3g}"),
        )

    def show(self, result: CalibrateResult) -> list[RenderableType]:
        return calibrate_tables(result)


STAGE = CalibrateStage()


def result_of(
    measurement: Measurement, plan: Plan, sensitivity: dict[str, Any], tensors: dict[str, Tensor], text: str
) -> CalibrateResult:
    """What was decided, from the plan, what `sensitivity.json` says, and the statistics."""
    context = measurement.context
    size = context.packed_size(measurement.teacher, measured=True)(plan)
    return CalibrateResult(
        model=context.recipe.model,
        notation=plan.notation(),
        nominal_bits=round(plan.nominal_bits(), 4),
        real_bits=round(size.real_bits, 4),
        bytes=size.bytes,
        formats=planning.weights_by_format(plan),
        tokens=sum(int(counts.sum()) for _, counts in measurement.batches()),
        layer_similarity=[round(float(value), 5) for value in tensors["layer_cosine"]],
        text=text,
        estimate=plan.estimate,
        predicted_kl=plan.predicted_kl,
        measured_kl=sensitivity["measured_kl"].get(plan.estimate) if sensitivity else None,
    )


def sequences_passed(measurement: Measurement) -> int:
    """About how many sequences pass through the whole teacher to be measured, all passes together."""
    settings = measurement.settings
    sequences = (1 + (settings.adaptive_tokens == "causal")) * settings.sequences
    if measures(settings):
        passes = passes_of(settings, len(measurement.teacher.structure.linears))
        sequences += passes * measurement.sensitivity_sequences
    return sequences

"""What razoring cost: the packed model against its 16-bit teacher.

The packed model is loaded from its folder, as a user would load it, and asked the same as the teacher
(`evaluation/evaluated_model.py`). Several processes of a launcher load the models each, and share text and items.

* *tasks*: the score of each, and how much of the teacher's score is left (`evaluation/scores.py`);
* *text*: on held-out text, perplexity, KL divergence and agreement (`evaluation/text_metrics.py`);
* *a sample*: greedy text, which fails the run where it has collapsed (`evaluation/sample.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import RenderableType

from edgerazor import data, kernels, models, tasks, transformers_plugin
from edgerazor.console import Console, is_main_process
from edgerazor.errors import UserError, usage_error
from edgerazor.evaluation import picture_tasks
from edgerazor.evaluation.eval_result import DryRun, DryTask, EvalResult, Measured
from edgerazor.evaluation.evaluated_model import EvaluatedModel, load_16_bit, load_packed, load_rounding_inputs
from edgerazor.evaluation.measuring import Evaluation, held_out_rows, load_tasks, request_of
from edgerazor.evaluation.sample import add_sample
from edgerazor.evaluation.scores import retention_failure
from edgerazor.job import JobContext, RecipeContext
from edgerazor.packed import PackedModel
from edgerazor.pictures import PictureReader
from edgerazor.recipe import Recipe
from edgerazor.report import card_results
from edgerazor.report.tables import eval_tables
from edgerazor.stage import Stage
from edgerazor.workdir import hash_file, hash_folder, write_json

#: Settings of `evaluate_model` alone.
ALONE = ("against", "activation_bits", "kv_bits")
#: Tokens of the forward pass that a dry run measures.
PROBE_TOKENS = 128


class EvalStage(Stage):
    """`edgerazor eval`."""

    name = "eval"
    result_model = EvalResult
    needs = ("pack",)
    on_all_processes = True

    def describe(self, context: JobContext) -> str:
        settings = context.recipe.eval
        named = [*settings.tasks, *(Path(place).stem for place in settings.pictures)]
        return ", ".join(named) or "held-out text"

    def inputs(self, context: JobContext) -> dict[str, str]:
        """Fingerprints of everything the result depends on.

        Raises:
            UserError: a compared folder, a text or a file of items is missing.
        """
        recipe, packed = context.recipe, context.work.manifest("pack")
        inputs = {
            "pack": packed.fingerprint() if packed else "missing",
            "model": context.teacher_fingerprint,
            "seed": str(recipe.seed),
            "device": recipe.device,
            "kernel": kernels.name(),
            **context.section_inputs(self.name, skip=("batch_size", "task_data", "pictures", *ALONE)),
        }
        for place in recipe.eval.pictures:
            for file in picture_tasks.files_of(place):
                inputs[f"pictures {file.stem}"] = hash_file(file)
        inputs |= {f"compare {name}": hash_folder(folder) for name, folder in compared_folders(recipe).items()}
        request = request_of(recipe.eval, recipe.seed)
        inputs |= {f"task {name}": digest for name, digest in tasks.fingerprint(request).items()}
        if sources := context.held_out_sources:
            settings = recipe.data
            inputs["text"] = data.fingerprint(sources)
            inputs["text.held_out_fraction"] = "all" if settings.held_out else f"{settings.held_out_fraction}, spread"
            if settings.held_out_seed is not None and not settings.held_out:
                inputs["text.held_out_seed"] = str(settings.held_out_seed)
            inputs["text.sequence_length"] = str(settings.sequence_length)
            inputs["text.packing"] = settings.packing
            inputs |= context.text_inputs
            if any(source.streaming for source in sources):
                inputs["text.held_out_rows"] = str(settings.held_out_rows)
        return inputs

    def run(self, context: JobContext) -> EvalResult:
        """Measure the packed model, and the folders of `recipe.compare`, against the teacher.

        Returns:
            the result, also written to the stage's folder. `failures` that are not empty mean exit code 3.

        Raises:
            UserError: nothing to measure, unknown tasks, items that are missing, a model that cannot be loaded.
        """
        recipe, sources = context.recipe, context.held_out_sources
        request = request_of(recipe.eval, recipe.seed)
        folders = {"packed": context.work.folder("pack"), **compared_folders(recipe)}
        if not transformers_plugin.is_packed(folders["packed"]):
            raise UserError(f"{folders['packed']} is not a packed model.", "Make one with `edgerazor pack`.")
        about_pictures = picture_tasks.load(recipe.eval.pictures, recipe.eval.limit)
        loaded = load_tasks(request, sources, about_pictures)
        teacher = load_16_bit("teacher", recipe.model, context)
        own_towers = {name: read_with_own_tower(context, folder) for name, folder in folders.items()}
        text = held_out_rows(context, sources, teacher)
        length = recipe.data.sequence_length
        evaluation = Evaluation(
            *(recipe.eval, request, loaded, text, length, context.console, teacher),
            about_pictures=about_pictures,
            reader=context.pictures,
        )
        result = EvalResult(notes=evaluation.notes_on_data())
        if text is not None and not (recipe.data.held_out or recipe.data.train):
            result.notes.append("The held-out text was written by the teacher.")
        result.notes += evaluation.score_teacher()
        for name, folder in folders.items():
            evaluated, notes = load_packed(name, folder, context.device, recipe.threads, loaded)
            if own_towers[name]:
                evaluated.look_with(own_towers[name])
            result.notes += [f"{name}: {note}" for note in notes] if name != "packed" else notes
            measured = result if name == "packed" else Measured()
            result.notes += evaluation.measure(evaluated, measured)
            if name == "packed":
                note_kernels(result, evaluated)
                if is_main_process():
                    add_sample(result, evaluated, teacher, text)
            else:
                result.compared[name] = measured
            del evaluated  # its memory, before the next one is loaded
        check_retention(result, recipe.eval.min_retention)
        if is_main_process():
            write_json(context.work.result_file(self.name), result.model_dump(mode="json"))
        return result

    def deliver(self, context: JobContext, result: EvalResult) -> EvalResult:
        """The results in the card of the packed model, too."""
        if is_main_process() and not card_results.refresh(context.work, result):
            context.console.say(
                f"{context.work.folder('pack')} has no README.md with a place for results, so none are written there."
            )
        return result

    def dry_run(self, context: JobContext) -> DryRun:
        """What `run` would do, and about how long it would take; fetches no items.

        The time is estimated from one forward pass of the teacher.

        Raises:
            UserError: unknown tasks or files that are missing.
        """
        recipe = context.recipe
        counts = tasks.estimate(request_of(recipe.eval, recipe.seed)) if recipe.eval.tasks else {}
        model_count = 2 + len(compared_folders(recipe))
        sequences = recipe.eval.text_sequences if context.held_out_sources else 0
        known = [tokens for _, tokens in counts.values() if tokens is not None]
        total = None
        if len(known) == len(counts):
            # On text the teacher runs beside each other model.
            total = sum(known) * model_count + sequences * recipe.data.sequence_length * 2 * (model_count - 1)
        return DryRun(
            tasks={name: DryTask(items=items, tokens=tokens) for name, (items, tokens) in counts.items()},
            models=model_count,
            text_sequences=sequences,
            forward_tokens=total,
            packed_bytes=weight_bytes(context.work.folder("pack")),
            teacher_bytes=weight_bytes(context.teacher_folder),
            seconds=None if total is None else float(f"{total * seconds_per_token(context):.3g}"),
        )

    def show(self, result: EvalResult) -> list[RenderableType]:
        return eval_tables(result)


STAGE = EvalStage()


def evaluate_model(
    model: str, recipe: Recipe, console: Console, teacher_scores: Mapping[str, tasks.TaskScore] | None = None
) -> EvalResult:
    """Measure one model outside any working directory, against a teacher if `eval.against` names one.

    Args:
        model: a packed folder, a 16-bit model folder, or a hub id. Inputs of linear layers, keys and values of a 16-bit
            model are rounded as `eval.activation_bits` and `eval.kv_bits` say, in groups of `calibrate.group_size`.
        recipe: its `eval`, `data` and general sections.
        console: shows the progress.
        teacher_scores: task -> the teacher's score on the same items, where it is known; it is not asked again then.

    Raises:
        UserError: as `EvalStage.run`; a least retention was asked for without a teacher; or other bits for a packed
            model.
    """
    context, settings = RecipeContext(recipe, console), recipe.eval
    if settings.min_retention is not None and settings.against is None:
        raise usage_error("--min-retention compares with a teacher.", "Name it: `eval MODEL --against TEACHER`.")
    request, sources = request_of(settings, recipe.seed), context.held_out_sources
    about_pictures = picture_tasks.load(settings.pictures, settings.limit)
    loaded = load_tasks(request, sources, about_pictures)
    device = context.device
    is_packed = transformers_plugin.is_packed(Path(model))
    if is_packed and (settings.activation_bits, settings.kv_bits) != (16, 16):
        raise usage_error(
            f"{model} is packed, so the bits of its activations and cache are decided.", "Leave them out."
        )
    notes: list[str] = []
    if is_packed:
        evaluated, notes = load_packed("packed", Path(model), device, recipe.threads, loaded)
    else:
        evaluated = load_rounding_inputs(model, context)
    teacher = load_16_bit("teacher", settings.against, context) if settings.against else None
    if models.sees((teacher or evaluated).model.config):
        folder = models.resolve(settings.against or model, recipe.revision)
        context.read_pictures_of(folder, (teacher or evaluated).model)
        if teacher is not None and is_packed and (own_tower := read_with_own_tower(context, Path(model))):
            evaluated.look_with(own_tower)
    text = held_out_rows(context, sources, teacher or evaluated)
    evaluation = Evaluation(
        *(settings, request, loaded, text, recipe.data.sequence_length, console, teacher),
        about_pictures=about_pictures,
        reader=context.pictures,
    )
    result = EvalResult(notes=notes + evaluation.notes_on_data())
    if teacher_scores is None:
        result.notes += evaluation.score_teacher()
    else:
        evaluation.teacher_scores = dict(teacher_scores)
    result.notes += evaluation.measure(evaluated, result)
    if is_packed:
        note_kernels(result, evaluated)
    add_sample(result, evaluated, teacher, text, gate=is_packed)
    check_retention(result, settings.min_retention)
    return result


def read_with_own_tower(context: RecipeContext, folder: Path) -> str:
    """Let pictures be read for a packed model whose tower is quantized, too.

    Returns:
        the name of its features among those of other towers; empty where its tower is the teacher's.
    """
    if context.pictures is None or not transformers_plugin.towers_of(PackedModel.open(folder)):
        return ""
    context.pictures.others[str(folder)] = PictureReader(
        folder, lambda: transformers_plugin.load(folder)[0], str(folder), None, context.console
    )
    return str(folder)


def show(result: EvalResult) -> list[RenderableType]:
    """The result of `evaluate_model`, for people."""
    return eval_tables(result)


def compared_folders(recipe: Recipe) -> dict[str, Path]:
    """The packed models that are measured beside the job's, by their names.

    Raises:
        UserError: one is no packed model, or has the name of the job's own.
    """
    folders = {name: Path(folder) for name, folder in recipe.compare.items()}
    for name, folder in folders.items():
        if name == "packed" or not transformers_plugin.is_packed(folder):
            reason = "needs another name" if name == "packed" else f"is not a packed model: {folder}"
            raise usage_error(f"`compare.{name}` {reason}.", "Give name: folder, as made by `edgerazor pack`.")
    return folders


def note_kernels(result: EvalResult, evaluated: EvaluatedModel) -> None:
    """Say what computed the packed model."""
    result.engine, result.kernel = "native" if evaluated.is_native else "transformers", evaluated.kernel
    if (note := kernels.note(evaluated.kernel)) and note not in result.notes:
        result.notes.append(note)


def check_retention(result: EvalResult, least: float | None) -> None:
    """The gate of `--min-retention`."""
    if failure := retention_failure(result.average, least):
        result.failures.append(failure)


def seconds_per_token(context: JobContext) -> float:
    """Of one measured forward pass of the teacher over a batch."""
    teacher = load_16_bit("teacher", context.recipe.model, context)
    shape = (context.recipe.eval.batch_size, min(teacher.context_length, PROBE_TOKENS))
    ids = torch.zeros(shape, dtype=torch.int64, device=context.device)
    with torch.inference_mode():
        teacher.model(ids[:1], logits_to_keep=1, use_cache=False)
        began = time.monotonic()
        teacher.model(ids, logits_to_keep=1, use_cache=False)
    return (time.monotonic() - began) / ids.numel()


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

"""What a command needs to know of its job, each thing resolved once: stages ask here and receive answers.

A `RecipeContext` answers what the recipe alone decides: the device, the teacher, fingerprints. A `JobContext` knows the
working directory too: the text, the plan, how the student computes and how large it will be.

What the recipe decides is resolved at the first question and kept for the command. What stages write into the working
directory (plan, statistics, manifests) is read anew at each question, because an earlier stage of the same command may
have made it meanwhile. Models are never kept: each stage loads its own, and lets go of it.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from edgerazor import __version__, calibrated, data, devices, models, modules, packed, student_plan
from edgerazor.allocate import Plan, SensitivityTable, make_plan, unmeasured
from edgerazor.console import Console, megabytes
from edgerazor.errors import UserError
from edgerazor.models import PreTrainedModel, PreTrainedTokenizerBase
from edgerazor.packed import FolderSize
from edgerazor.pictures import PictureReader
from edgerazor.recipe import Recipe, Source
from edgerazor.workdir import WorkDir, digest_json


@dataclass
class ModelOutline:
    """A model as its configuration describes it; its weights may be missing (on the meta device)."""

    model: PreTrainedModel

    @cached_property
    def structure(self) -> models.Structure:
        """Where its matrices are.

        Raises:
            UserError: it is not built as a decoder that can be quantized.
        """
        return models.structure(self.model)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all its weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())


@dataclass
class LoadedModel(ModelOutline):
    """A 16-bit model in memory, in evaluation mode, its weights without gradients."""

    tokenizer: PreTrainedTokenizerBase


class RecipeContext:
    """Answers that a recipe alone decides.

    Args:
        recipe: of the whole job.
        console: where to talk.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console

    # --- where it computes, and the teacher ---

    @cached_property
    def device(self) -> torch.device:
        """The device to compute on; the first question also sets the number of CPU threads.

        Raises:
            UserError: there is no such device here.
        """
        return devices.choose(self.recipe.device, self.recipe.threads)

    @cached_property
    def teacher_folder(self) -> Path:
        """The local folder of the teacher; a hub model is downloaded, and a GGUF file dequantized, on its first use.

        Raises:
            UserError: there is no such model.
        """
        return self._resolve(self.recipe.model, self.recipe.revision, "teacher")

    def _resolve(self, source: str, revision: str | None, role: str) -> Path:
        """The local folder of a model; where a GGUF file was dequantized for it, that is said."""
        folder = models.resolve(source, revision, self.console)
        if origin := models.gguf_origin(folder):
            self.console.say_once(f"{role}: {origin}, in {folder}")
        return folder

    def load(self, source: str, device: torch.device, dtype: torch.dtype | None = None) -> LoadedModel:
        """A 16-bit model by its folder or hub id, at the recipe's revision.

        Args:
            source: local folder or hub id.
            device: where the weights go.
            dtype: of the weights; None for the checkpoint's own.
        """
        is_teacher = source == self.recipe.model
        folder = self.teacher_folder if is_teacher else self._resolve(source, self.recipe.revision, "model")
        model, tokenizer = models.load(folder, self.recipe.revision, str(device), dtype, self.recipe.trust_remote_code)
        return LoadedModel(model.requires_grad_(False), tokenizer)

    def load_teacher(self, device: torch.device, dtype: torch.dtype | None = None) -> LoadedModel:
        """The recipe's teacher; arguments as `load`."""
        return self.load(self.recipe.model, device, dtype)

    @cached_property
    def teacher_outline(self) -> ModelOutline:
        """The recipe's teacher without its weights: shapes and names, for estimates and plans that measure nothing."""
        recipe = self.recipe
        return ModelOutline(models.outline(recipe.model, recipe.revision, recipe.trust_remote_code))

    @cached_property
    def pictures(self) -> PictureReader | None:
        """What reads pictures for the teacher; None where it sees none.

        The teacher's own tower makes their features, in float32. A teacher that computes elsewhere or has another tower
        cannot be given them.
        """
        settings = self.recipe.distill
        elsewhere = settings.recording or settings.teacher or settings.teachers or settings.teacher_source != "resident"
        if not self.recipe.model or elsewhere:
            return None
        folder = self.teacher_folder
        if not models.sees(models.auto_config(folder, self.recipe.trust_remote_code)):
            return None

        def tower() -> PreTrainedModel:
            teacher = self.load_teacher(torch.device("cpu"))  # the decoder stays mapped
            for path in teacher.structure.towers:
                teacher.model.get_submodule(path).float()
            return teacher.model

        def rounded_tower() -> PreTrainedModel:
            model = tower()
            student_plan.round_towers(model, self.tower_matrices(ModelOutline(model)))
            return model

        reader = PictureReader(folder, tower, self.teacher_fingerprint, self.picture_store, self.console)
        if towers := self.recipe.calibrate.towers:
            identity = f"{self.teacher_fingerprint}, towers {towers}"
            reader.others[towers] = PictureReader(folder, rounded_tower, identity, self.picture_store, self.console)
        return reader

    def tower_matrices(self, teacher: ModelOutline) -> student_plan.TowerMatrices:
        """The matrices of a teacher's towers that are rounded, as the recipe says."""
        return student_plan.tower_matrices(teacher.model, teacher.structure, self.recipe.calibrate.towers)

    def read_pictures_of(self, folder: Path, model: Any) -> None:
        """Read pictures for a model that is measured alone.

        Args:
            folder: of the model.
            model: of transformers or of the runtime.
        """
        tower = model.pictures.model if hasattr(model, "pictures") else model
        self.pictures = PictureReader(folder, lambda: tower, str(folder), None, self.console)

    @property
    def picture_store(self) -> Path | None:
        """The folder for features of pictures; None outside a working directory."""
        return None

    @property
    def default_rotation(self) -> str | None:
        """The rotation of a student where nobody says it; none of a model that is not understood as a teacher."""
        try:
            width = self.teacher_outline.structure.embedding.columns
        except UserError:  # a packed model of others, say, which needs no plan; else it is refused where it does
            return None
        return student_plan.default_rotation(self.recipe.calibrate, width)

    def sequence_length(self, model: PreTrainedModel) -> int:
        """Tokens per sequence: the recipe's, but no more than the model has positions for."""
        return min(self.recipe.data.sequence_length, context_length(model))

    @property
    def budget_in_words(self) -> str:
        """How large the packed model may be."""
        name, value = self.recipe.calibrate.budget()
        return f"in {megabytes(value)}" if name == "target_size" else f"at {value:g} {name.replace('_', ' ')}"

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        """The held-out sources, else the training mixture, a share of which is held out, else nothing."""
        return self.recipe.data.held_out or self.recipe.data.train

    def open_held_out(
        self, sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase, length: int
    ) -> data.TokenRows:
        """Rows of held-out text; of a training mixture only the share that is kept for it.

        Args:
            sources: at least one of them.
            tokenizer: of the teacher.
            length: most tokens in a row.
        """
        settings = self.recipe.data
        share = 0.0 if settings.held_out else settings.held_out_fraction
        rows, held_out = data.open_rows(sources, tokenizer, self._row_settings(length, share))
        return rows if held_out is None else held_out

    def _row_settings(
        self, length: int, held_out_fraction: float = 0.0, held_out_length: int | None = None
    ) -> data.RowSettings:
        """How text becomes rows of so many tokens, a share of which is held out."""
        settings = self.recipe.data
        return data.RowSettings(
            length,
            self.recipe.seed,
            held_out_fraction,
            settings.packing,
            settings.held_out_rows,
            settings.template_kwargs,
            held_out_length,
            settings.bos,
            settings.held_out_seed,
            self.pictures,
        )

    # --- fingerprints: what a result depends on ---

    @cached_property
    def teacher_fingerprint(self) -> str:
        """Identity of the teacher's files; gigabytes are hashed once per process."""
        return _fingerprint_of(self.teacher_folder)

    @cached_property
    def further_teachers_fingerprint(self) -> str:
        """Identity of the further teachers' files, in their order."""
        folders = [self._resolve(source, None, "further teacher") for source in self.recipe.distill.teachers]
        return " + ".join(map(_fingerprint_of, folders)) or "none"

    @cached_property
    def other_teacher_fingerprint(self) -> str:
        """Identity of the files of the model that teaches in the place of the recipe's own; "none" without one."""
        source = self.recipe.distill.teacher
        return "none" if source is None else _fingerprint_of(self._resolve(source, None, "teacher"))

    @cached_property
    def data_fingerprint(self) -> str:
        """Identity of the text that training and calibration read; generated text is decided by teacher and seed."""
        settings = self.recipe.data
        if not settings.train:
            return f"{settings.generated_tokens} tokens written by the teacher, seed {self.recipe.seed}"
        return data.fingerprint(settings.train)

    @cached_property
    def held_out_fingerprint(self) -> str:
        """Identity of the held-out text, or of the share of the training text that is held out."""
        settings = self.recipe.data
        if settings.held_out:
            return data.fingerprint(settings.held_out)
        streamed = f", or {settings.held_out_rows} rows," if any(source.streaming for source in settings.train) else ""
        seed = "" if settings.held_out_seed is None else f" by seed {settings.held_out_seed}"
        return f"{settings.held_out_fraction:g}{streamed} of {self.data_fingerprint}, spread over it{seed}"

    @property
    def text_inputs(self) -> dict[str, str]:
        """Inputs of a stage: what decides how text becomes tokens; nothing where all is as usual."""
        options, bos = self.recipe.data.template_kwargs, self.recipe.data.bos
        inputs = {"data.template_kwargs": json.dumps(options, sort_keys=True, default=str)} if options else {}
        return inputs if bos == "auto" else {**inputs, "data.bos": bos}

    @property
    def row_inputs(self) -> dict[str, str]:
        """Inputs of a stage: what, beside sources, packing and length, decides which rows are trained on."""
        settings = self.recipe.data
        seed = "" if settings.held_out_seed is None else f" by seed {settings.held_out_seed}"
        share = {} if settings.held_out else {"data.held_out_fraction": f"{settings.held_out_fraction:g}, spread{seed}"}
        return share | self.text_inputs

    def section_inputs(self, section: str, skip: tuple[str, ...] = ()) -> dict[str, str]:
        """Inputs of a stage: the fields of a section of the recipe, but for some.

        A field that is not set is left out, so that one that a later version adds changes nothing.
        """
        values: dict[str, Any] = getattr(self.recipe, section).model_dump(
            mode="json", exclude=set(skip), exclude_none=True
        )
        return {
            f"{section}.{name}": json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else str(value)
            for name, value in values.items()
        }


class JobContext(RecipeContext):
    """Answers about a job in its working directory.

    Args:
        recipe: of the whole job.
        work: the job's folder.
        console: where to talk.
        fresh: throw away what an interrupted run of the stage would have gone on from.
    """

    def __init__(self, recipe: Recipe, work: WorkDir, console: Console, fresh: bool = False) -> None:
        super().__init__(recipe, console)
        self.work, self.fresh = work, fresh
        #: Section -> field -> value of the settings that the budget chose.
        self.chosen: dict[str, dict[str, Any]] = {}
        #: The machines that a dry run plans for; None: those that are here.
        self.machines: devices.Machines | None = None

    def resolved(self, recipe: Recipe, chosen: dict[str, dict[str, Any]]) -> JobContext:
        """This job with the settings that its budget chose in the recipe; what was resolved is shared."""
        same = copy.copy(self)
        same.recipe, same.chosen = recipe, chosen
        return same

    def with_rotation(self, rotation: str | None) -> JobContext:
        """This job with a rotation of weights and inputs in its recipe."""
        calibrate = self.recipe.calibrate.model_copy(update={"rotation": rotation})
        return self.resolved(self.recipe.model_copy(update={"calibrate": calibrate}), self.chosen)

    def at(self, work: WorkDir, fresh: bool) -> JobContext:
        """This job with another place for what is made; what was resolved is shared."""
        moved = copy.copy(self)
        moved.work, moved.fresh = work, fresh
        return moved

    # --- what is there ---

    @property
    def picture_store(self) -> Path | None:
        return self.work.pictures

    @property
    def training(self) -> str:
        """What of a training the working directory holds, in words; empty where there is none."""
        return training_in(self.work)

    def plan(self) -> Plan:
        """What calibrate decided.

        Raises:
            UserError: the file is missing or damaged.
        """
        return calibrated.read_plan(self.work)

    def plan_if_any(self) -> Plan | None:
        """What calibrate decided; None where the file is missing or damaged."""
        try:
            return self.plan()
        except UserError:
            return None

    def is_planned(self) -> bool:
        """Whether calibrate has made a plan for this model that is just what the recipe asks for."""
        manifest = self.work.manifest("calibrate")
        settings = {"model": self.teacher_fingerprint} | self.section_inputs("calibrate", ("batch_size",))
        stored = manifest.inputs.items() if manifest else ()
        return settings == {name: value for name, value in stored if name == "model" or name.startswith("calibrate.")}

    # --- the text ---

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        """As of a recipe alone, else the text that the teacher wrote in calibrate."""
        named = super().held_out_sources
        if named or not self.work.generated_text.exists():
            return named
        return (Source(file=str(self.work.generated_text)),)

    @property
    def training_sources(self) -> tuple[Source, ...]:
        """The training mixture: the recipe's, else the text that the teacher wrote in calibrate."""
        return self.recipe.data.train or (Source(file=str(self.work.generated_text)),)

    def open_text(
        self, tokenizer: PreTrainedTokenizerBase, length: int, held_out_length: int | None = None
    ) -> tuple[data.TokenRows, data.TokenRows]:
        """Rows to train on and rows to measure on.

        Args:
            tokenizer: of the teacher.
            length: most tokens in a row.
            held_out_length: the length that decides what is held out, as `eval` will have it; else that of the rows.

        Returns:
            training rows; held-out rows, disjoint from them: the recipe's held-out text, else a share of each source.
        """
        settings = self.recipe.data
        share = 0.0 if settings.held_out else settings.held_out_fraction
        rows, held_out = data.open_rows(
            self.training_sources, tokenizer, self._row_settings(length, share, held_out_length)
        )
        if held_out is None:
            held_out, _ = data.open_rows(settings.held_out, tokenizer, self._row_settings(length))
        return rows, held_out

    # --- plans and the student that they make ---

    def new_plan(
        self, teacher: ModelOutline, sensitivity: SensitivityTable | None = None, source: str = "student"
    ) -> Plan:
        """What the recipe's settings make of this teacher.

        Args:
            teacher: the model; its outline where the plan looks at no weights.
            sensitivity: what calibrate measured; None plans without, by the nearest strategy that measures nothing.
            source: of what is packed, as `packed_size` has it.

        Raises:
            UserError: the settings do not fit the model.
        """
        settings = self.recipe.calibrate if sensitivity else unmeasured(self.recipe.calibrate)
        size_of = self.packed_size(teacher, source)

        def weight_of(path: str) -> torch.Tensor:
            return teacher.model.get_submodule(path).weight

        return make_plan(teacher.structure.targets, settings, weight_of, sensitivity, size_of)

    def planning_teacher(self) -> ModelOutline:
        """What `new_plan` needs of the teacher for a plan that nothing was measured for: weights only where it looks
        at them."""
        if unmeasured(self.recipe.calibrate).plan == "variance":
            return self.load_teacher(torch.device("cpu"))
        return self.teacher_outline

    def nominal_bits(self, plan: Plan | None) -> float:
        """The nominal bits that losses may depend on: what the recipe asks for, or what its plan made of a size."""
        if plan is None or self.recipe.calibrate.budget()[0] == "bits":
            return self.recipe.calibrate.bits
        return plan.nominal_bits()

    def student_settings(self, plan: Plan, structure: models.Structure, imagined: bool = False) -> modules.Settings:
        """How a student of this plan computes.

        Args:
            plan: what calibrate or the recipe decided.
            structure: of the teacher.
            imagined: make up the importance of tokens that calibrate has not measured yet.

        Raises:
            UserError: what calibrate measured is needed and not there.
        """
        if plan.adaptive_tokens != "causal":
            return student_plan.settings_of(plan)
        if imagined:
            return student_plan.settings_of(plan, (0.5,) * structure.layer_count)
        return student_plan.settings_of(plan, calibrated.read_vector(self.work, "importance_threshold"))

    def input_scales(self, plan: Plan, teacher: ModelOutline) -> dict[str, float] | None:
        """Calibrate's scales for the inputs of linear layers and the head; None where each token has its own.

        Args:
            plan: says whether there are any.
            teacher: where the linear layers are.

        Raises:
            UserError: the file is missing or damaged, or calibrate did not look for them.
        """
        if plan.activation_scales == "dynamic":
            return None
        names = student_plan.input_scale_names(plan, teacher.model, teacher.structure)
        return calibrated.read_input_scales(self.work, names, plan.activation_bits, plan.rotation)

    def initial_weights(self, plan: Plan) -> Callable[[str], modules.InitialWeight] | None:
        """Where each matrix begins, by its module path; None where all begin at the scales that the plan says.

        Raises:
            UserError: calibrate has not made the recipe's initialization for this plan, or its file is damaged.
        """
        work, settings = self.work, self.recipe.calibrate
        if settings.init not in student_plan.CALIBRATED_INITS:
            return None
        made = work.manifest("calibrate") is not None and work.start_file.exists() and self.plan() == plan
        initial = calibrated.read_initialization(work, settings.init, plan) if made else None
        if initial is None:
            raise UserError(
                f"{work.path} holds no {settings.init} start for these settings.",
                f"Make one: `edgerazor calibrate {self.recipe.model} --bits {settings.bits:g} --init {settings.init}`.",
            )
        return initial

    def provenance(self, source: str, plan: Plan, training: Mapping[str, str] | None) -> dict[str, Any]:
        """Where a packed model comes from; equal for equal runs.

        Args:
            source: `student` or `teacher`.
            plan: its formats.
            training: inputs of the student's training; None where there was none.
        """
        return {
            "teacher": models.describe_source(self.recipe.model, self.teacher_folder),
            "teacher_sha256": self.teacher_fingerprint,
            "source": source,
            "plan_sha256": digest_json(plan.model_dump(mode="json")),
            "recipe_sha256": None if training is None else digest_json(dict(training)),
            "data_sha256": None if training is None else training["data"],
            "seed": self.recipe.seed,
            "edgerazor": __version__,
        }

    def packed_size(
        self,
        teacher: ModelOutline,
        source: str = "student",
        measured: bool = False,
        training: Mapping[str, str] | None = None,
    ) -> Callable[[Plan], FolderSize]:
        """Tells of any plan what `pack` would write, to the byte: the one meaning of real bits, planned or shown.

        Only for adaptive tokens whose thresholds are not measured yet may less be written, by a few bytes per layer:
        the header holds them as numbers, which are counted at their longest.

        Args:
            teacher: the model that is quantized; only names, shapes and dtypes of its tensors count.
            source: `student`, whose other tensors are float32, or `teacher`, rounded without training.
            measured: calibrate has written the importance of tokens.
            training: inputs of the student's training; None before it.
        """
        model, structure = teacher.model, teacher.structure
        towers = self.tower_matrices(teacher)
        others = student_plan.other_specs(model, structure, source == "student", towers)
        if source == "student" and not training:
            # The fingerprint of text has always the same length; large files need not be read for it.
            training = {"data": packed.ANY_SHA256 if self.recipe.data.train else self.data_fingerprint}

        def size(plan: Plan) -> FolderSize:
            settings = student_plan.header_settings(self.student_settings(plan, structure, imagined=not measured))
            if not measured:
                settings["thresholds"] = [student_plan.LONGEST_NUMBER] * len(settings["thresholds"])
            provenance = self.provenance(source, plan, training)
            return student_plan.packed_size(
                plan, model, structure, others, settings, provenance, self.recipe.pack.shard_bytes, towers
            )

        return size


def context_length(model: PreTrainedModel) -> int:
    """Tokens that a model has positions for; a very large number where it does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def training_in(work: WorkDir) -> str:
    """What of a training a working directory holds: `a student`, `an interrupted training`, or an empty string."""
    if work.manifest("distill"):
        return "a student"
    return "an interrupted training" if work.checkpoint("current").exists() else ""


def _fingerprint_of(folder: Path) -> str:
    folder = folder.resolve()
    return _fingerprint(folder, _state_of(folder))


@functools.cache
def _fingerprint(folder: Path, _state: tuple[tuple[str, int, int], ...]) -> str:
    return models.fingerprint(folder)


def _state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file of the folder does: names, sizes, times."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)

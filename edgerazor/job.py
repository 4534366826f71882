"""What several stages need: the device, the teacher, the text."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from edgerazor import __version__, data, formats, models, modules, packed, untrusted
from edgerazor.allocate import Plan, SensitivityTable, make_plan, unmeasured
from edgerazor.console import launched
from edgerazor.errors import UserError, usage_error
from edgerazor.losses import METRICS
from edgerazor.models import PreTrainedModel, PreTrainedTokenizerBase
from edgerazor.modules import attention
from edgerazor.packed import FolderSize
from edgerazor.recipe import Calibrate, Recipe, Source
from edgerazor.workdir import WorkDir, digest_json

#: Values of `calibrate.init` for which calibrate makes something of the text, beside the plan.
MADE_INITS = ("clip", "gptq")
#: A number below 1 that JSON needs most characters for.
LONGEST_NUMBER = 1.2345678901234567e-05


def device_of(recipe: Recipe) -> torch.device:
    """The device to compute on; also sets the number of CPU threads.

    Raises:
        UserError: there is no such device here.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    elif "LOCAL_WORLD_SIZE" in os.environ:  # several processes share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, launched("LOCAL_WORLD_SIZE", 1))))
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise usage_error(f"There is no device called {name!r}.", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("No CUDA device was found by torch.", "Use --device cpu, or install torch with CUDA.")
    if device.type not in ("cpu", "cuda"):
        raise usage_error(f"The device {name!r} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    return device


def processes() -> int:
    """How many processes a launcher (torchrun, accelerate launch) started for this run."""
    return launched("WORLD_SIZE", 1)


def join_processes(device: torch.device) -> None:
    """Meet the other processes of a launcher, if there are any; they may wait for each other for hours."""
    if processes() > 1:
        PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))


def wait_for_everyone() -> None:
    """Wait until every process of the launcher is here."""
    if processes() > 1:
        PartialState().wait_for_everyone()


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def reading_dtype(device: torch.device) -> torch.dtype | None:
    """In which a teacher that is only read computes: the checkpoint's own (None) where that is fast, else float32."""
    return None if fast_bfloat16(device) else torch.float32


def walking_dtype(teacher: PreTrainedModel, device: torch.device) -> torch.dtype:
    """In which a walk through a teacher computes; float32 for float16, whose range gradients leave."""
    own = teacher.dtype
    return own if fast_bfloat16(device) and own == torch.bfloat16 else torch.float32


def load_teacher(
    recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's teacher in evaluation mode, its weights without gradients."""
    model, tokenizer = models.load(recipe.model, recipe.revision, str(device), dtype, recipe.trust_remote_code)
    return model.requires_grad_(False), tokenizer


def teacher_fingerprint(recipe: Recipe) -> str:
    """Identity of the teacher's files; several stages ask, and gigabytes are hashed once per process."""
    folder = models.resolve(recipe.model, recipe.revision).resolve()
    return _fingerprint(folder, _state_of(folder))


@functools.cache
def _fingerprint(folder: Path, _state: tuple[tuple[str, int, int], ...]) -> str:
    return models.fingerprint(folder)


def _state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file of the folder does: names, sizes, times."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def sources(recipe: Recipe, work: WorkDir) -> tuple[Source, ...]:
    """The training mixture: the recipe's, else the text that the teacher wrote in calibrate."""
    return recipe.data.train or (Source(file=str(work.generated_text)),)


def teachers_fingerprint(recipe: Recipe) -> str:
    """Identity of the further teachers' files, in their order."""
    folders = [models.resolve(source).resolve() for source in recipe.distill.teachers]
    return " + ".join(_fingerprint(folder, _state_of(folder)) for folder in folders) or "none"


def data_fingerprint(recipe: Recipe) -> str:
    """Identity of the text that training and calibration read; generated text is decided by the teacher and seed."""
    if not recipe.data.train:
        return f"{recipe.data.generated_tokens} tokens written by the teacher, seed {recipe.seed}"
    return data.fingerprint(recipe.data.train)


def held_out_fingerprint(recipe: Recipe) -> str:
    if recipe.data.held_out:
        return data.fingerprint(recipe.data.held_out)
    streamed = f", or {recipe.data.held_out_rows} rows," if any(each.streaming for each in recipe.data.train) else ""
    return f"{recipe.data.held_out_fraction:g}{streamed} of {data_fingerprint(recipe)}, spread over it"


def text_settings(recipe: Recipe) -> dict[str, str]:
    """What decides how text becomes tokens, as the readable part of a fingerprint; nothing where all is as usual."""
    given, bos = recipe.data.template_kwargs, recipe.data.bos
    found = {"data.template_kwargs": json.dumps(given, sort_keys=True, default=str)} if given else {}
    return found if bos == "auto" else {**found, "data.bos": bos}


def row_settings(recipe: Recipe) -> dict[str, str]:
    """What, beside sources, packing and length, decides which rows are trained on, as part of a fingerprint."""
    kept = {} if recipe.data.held_out else {"data.held_out_fraction": f"{recipe.data.held_out_fraction:g}, spread"}
    return kept | text_settings(recipe)


def context(model: PreTrainedModel) -> int:
    """Tokens that the model has positions for; a very large number where it does not say."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def sequence_length(recipe: Recipe, model: PreTrainedModel) -> int:
    """Tokens per sequence: the recipe's, but no more than the model has positions for."""
    return min(recipe.data.sequence_length, context(model))


def open_text(
    recipe: Recipe, work: WorkDir, tokenizer: PreTrainedTokenizerBase, length: int, held_out_length: int | None = None
) -> tuple[data.TokenRows, data.TokenRows]:
    """Rows to train on and rows to measure on.

    Args:
        recipe: names the mixture and the held-out text.
        work: where text of the teacher lies, if the recipe names no mixture.
        tokenizer: of the teacher.
        length: most tokens in a row.
        held_out_length: the length that decides what is held out, as `eval` will have it; else that of the rows.

    Returns:
        training rows; held-out rows, disjoint from them: the recipe's held-out text, else a share of each source.
    """
    fraction = 0.0 if recipe.data.held_out else recipe.data.held_out_fraction
    asked, options = recipe.data, recipe.data.template_kwargs
    rows, held_out = data.open_rows(
        sources(recipe, work),
        tokenizer,
        data.RowSettings(
            length, recipe.seed, fraction, asked.packing, asked.held_out_rows, options, held_out_length, asked.bos
        ),
    )
    if held_out is None:
        held_out, _ = data.open_rows(
            asked.held_out,
            tokenizer,
            data.RowSettings(length, recipe.seed, packing=asked.packing, template_kwargs=options, bos=asked.bos),
        )
    return rows, held_out


def new_plan(
    recipe: Recipe,
    teacher: PreTrainedModel,
    found: models.Structure,
    damages: SensitivityTable | None = None,
    source: str = "student",
) -> Plan:
    """What the recipe's settings make of this teacher.

    Args:
        recipe: of the whole job.
        teacher: the model, and where its matrices are.
        found: the same.
        damages: what calibrate has found; None plans without, by the nearest strategy that measures nothing.
        source: of what is packed, as `packed_size` has it.

    Raises:
        UserError: the settings do not fit the model.
    """
    settings = recipe.calibrate if damages else unmeasured(recipe.calibrate)
    size = packed_size(recipe, teacher, found, source)
    return make_plan(found.targets, settings, lambda name: teacher.get_submodule(name).weight, damages, size)


def is_planned(recipe: Recipe, work: WorkDir) -> bool:
    """Whether calibrate has made a plan for this model that is just what the recipe asks for."""
    manifest = work.manifest("calibrate")
    asked = {"model": teacher_fingerprint(recipe)} | settings("calibrate", recipe.calibrate, ("batch_size",))
    return manifest is not None and asked.items() <= manifest.inputs.items()


def read_plan(work: WorkDir) -> Plan:
    """What calibrate decided.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return untrusted.load_model(work.plan_file, Plan)
    except (OSError, ValueError):
        raise damaged(work.plan_file) from None


def read_layer_metrics(work: WorkDir) -> dict[str, list[float]]:
    """What calibrate measured of each layer (see `METRICS`), by metric.

    Raises:
        UserError: the file is missing or damaged.
    """
    return {metric: _statistics(work, f"layer_{metric}") for metric in METRICS}


def stored_input_scales(
    wanted: Plan | Calibrate, model: PreTrainedModel, found: models.Structure
) -> dict[str, tuple[str, int]]:
    """The scales of inputs that are not found anew each time: `P.input_scale` -> its linear layer P, and the bits.

    Args:
        wanted: says whether there are any; tokens with fewer bits have one of their own, `P.low_input_scale`.
        model: where the linear layers are.
        found: the same.

    Raises:
        UserError: the model's tokens cannot have bits of their own.
    """
    if wanted.activation_scales == "dynamic":
        return {}
    names = (*(site.name for site in found.linears), found.head_path)
    scales = {f"{name}.{formats.INPUT_SCALE}": (name, wanted.activation_bits) for name in names}
    if wanted.adaptive_tokens != "off":
        for name in attention.deciding_layers(model):
            scales[f"{name}.{formats.LOW_INPUT_SCALE}"] = (name, attention.UNIMPORTANT_BITS)
    return scales


def _stored_of_inputs(plan: Plan, model: PreTrainedModel, found: models.Structure) -> list[str]:
    """Names of all that is stored of inputs: scales, and their zero points where there are any."""
    scales = list(stored_input_scales(plan, model, found))
    if plan.activation_scales != "asymmetric":
        return scales
    zero_points = {formats.INPUT_SCALE: formats.INPUT_ZERO_POINT, formats.LOW_INPUT_SCALE: formats.LOW_INPUT_ZERO_POINT}
    return [
        *scales,
        *(f"{module}.{zero_points[kind]}" for module, _, kind in (name.rpartition(".") for name in scales)),
    ]


def input_scales(
    plan: Plan, model: PreTrainedModel, found: models.Structure, work: WorkDir | None
) -> dict[str, float] | None:
    """Calibrate's scales for the inputs of linear layers and the head; None where they are found anew each time.

    Args:
        plan: says whether there are any.
        model: where the linear layers are.
        found: the same.
        work: where calibrate wrote them; None to make some up.

    Raises:
        UserError: the file is missing or damaged, or calibrate did not look for them.
    """
    if plan.activation_scales == "dynamic":
        return None
    names = stored_input_scales(plan, model, found)
    if work is None:
        return dict.fromkeys(names, 1.0)
    if read_plan(work).activation_bits != plan.activation_bits:
        raise UserError(
            f"The scales in {work.statistics_file} are not for {plan.activation_bits}-bit activations.",
            "Run `edgerazor calibrate` first.",
        )
    try:
        stored = load_file(work.statistics_file)
        return {name: float(stored[name]) for name in names}
    except (OSError, SafetensorError, KeyError):
        raise damaged(work.statistics_file) from None


def bits_of(recipe: Recipe, plan: Plan | None) -> float:
    """The nominal bits that losses may depend on: what the recipe asks for, or what its plan made of a size."""
    if plan is None or recipe.calibrate.budget()[0] == "bits":
        return recipe.calibrate.bits
    return plan.nominal_bits()


def needs_calibration(wanted: Calibrate) -> bool:
    """Whether a model of these settings cannot be made without what calibrate measures, even without training."""
    return wanted.activation_scales != "dynamic" or wanted.adaptive_tokens == "causal" or wanted.init in MADE_INITS


def check_attention(model: PreTrainedModel, wanted: Plan | Calibrate) -> None:
    """Make sure that what enters attention can be rounded as wanted, and tokens be told apart.

    Raises:
        UserError: the model's attention is not built for it.
    """
    attention.check_attention_bits(model, min(wanted.kv_bits, wanted.query_bits, wanted.probability_bits))
    if wanted.adaptive_tokens != "off":
        attention.deciding_layers(model)


def settings_of(plan: Plan, found: models.Structure, work: WorkDir | None) -> modules.Settings:
    """How a student of this plan computes.

    Args:
        plan: what calibrate or the recipe decided.
        found: how many layers there are.
        work: where calibrate wrote the importance of tokens; None to make some up.

    Raises:
        UserError: it is needed and not there.
    """
    thresholds: tuple[float, ...] = ()
    if plan.adaptive_tokens == "causal":
        thresholds = (0.5,) * found.layer_count if work is None else tuple(_statistics(work, "importance_threshold"))
    return modules.Settings(
        activation_bits=plan.activation_bits,
        kv_bits=plan.kv_bits,
        group_size=plan.group_size,
        learned_scales=plan.scales == "learned",
        learned_inputs=plan.activation_scales in ("learned", "asymmetric"),
        learned_zero_points=plan.activation_scales == "asymmetric",
        query_bits=plan.query_bits,
        probability_bits=plan.probability_bits,
        adaptive_tokens=plan.adaptive_tokens,
        thresholds=thresholds,
    )


def packed_settings(plan: Plan, found: models.Structure, work: WorkDir | None) -> dict[str, Any]:
    """The settings in the header of a packed model (see `settings_of`), as JSON values."""
    computing = settings_of(plan, found, work)
    return {name: getattr(computing, name) for name in packed.SETTINGS} | {"thresholds": list(computing.thresholds)}


def tied_modules(found: models.Structure) -> dict[str, str]:
    """Path of each module that uses another one's matrix -> path of that one."""
    return {} if found.head else {found.head_path: found.embedding.name}


def other_tensors(model: PreTrainedModel, found: models.Structure) -> dict[str, torch.Tensor]:
    """The tensors of a model that are not quantized, by name."""
    quantized = matrix_tensors(found)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in quantized}


def matrix_tensors(found: models.Structure) -> set[str]:
    """Names of all tensors that hold quantized matrices, or their trained scales."""
    modules = [*(site.name for site in found.targets), found.head_path]
    return {f"{module}.{part}" for module in modules for part in ("weight", "scales")}


def provenance(recipe: Recipe, source: str, plan: Plan, distilled: Mapping[str, str] | None) -> dict[str, Any]:
    """Where a packed model comes from; equal for equal runs.

    Args:
        recipe: of the whole job.
        source: `student` or `teacher`.
        plan: its formats.
        distilled: what the training depended on; None where there was none.
    """
    folder = models.resolve(recipe.model, recipe.revision)
    return {
        "teacher": models.describe_source(recipe.model, folder),
        "teacher_sha256": teacher_fingerprint(recipe),
        "source": source,
        "plan_sha256": digest_json(plan.model_dump(mode="json")),
        "recipe_sha256": None if distilled is None else digest_json(dict(distilled)),
        "data_sha256": None if distilled is None else distilled["data"],
        "seed": recipe.seed,
        "edgerazor": __version__,
    }


def packed_size(
    recipe: Recipe,
    teacher: PreTrainedModel,
    found: models.Structure,
    source: str = "student",
    work: WorkDir | None = None,
    distilled: Mapping[str, str] | None = None,
) -> Callable[[Plan], FolderSize]:
    """Tells of any plan what `pack` would write, to the byte: the one meaning of real bits, planned or shown.

    Only for adaptive tokens whose thresholds are not known yet (`work` is None) may less be written, by a few bytes per
    layer: the header holds them as numbers, which are counted at their longest.

    Args:
        recipe: names model, data, seed, and the size of shards.
        teacher: the model that is quantized; only names, shapes and dtypes of its tensors count.
        found: its matrices.
        source: `student`, whose other tensors are float32, or `teacher`, rounded without training.
        work: where calibrate wrote the importance of tokens.
        distilled: what the student's training depended on; None before it.
    """
    others = {name: packed.tensor_spec(name, tensor) for name, tensor in other_tensors(teacher, found).items()}
    if source == "student":
        floats = {name: size for name, (dtype, size) in others.items() if packed.DTYPES[dtype].is_floating_point}
        others |= {name: ("F32", size) for name, size in floats.items()}
        # The fingerprint of text has always the same length; large files need not be read for it.
        text = packed.ANY_SHA256 if recipe.data.train else data_fingerprint(recipe)
        distilled = distilled or {"data": text}

    def size(plan: Plan) -> FolderSize:
        settings = packed_settings(plan, found, work)
        if work is None:
            settings["thresholds"] = [LONGEST_NUMBER] * len(settings["thresholds"])
        return packed.predict(
            ((matrix.name, matrix.kind, matrix.spec(), matrix.shape) for matrix in plan.matrices),
            others | dict.fromkeys(_stored_of_inputs(plan, teacher, found), ("F32", ())),
            tied=tied_modules(found),
            settings=settings,
            provenance=provenance(recipe, source, plan, distilled),
            shard_bytes=recipe.pack.shard_bytes,
        )

    return size


def _statistics(work: WorkDir, name: str) -> list[float]:
    """A vector that calibrate wrote."""
    try:
        return [float(value) for value in load_file(work.statistics_file)[name]]
    except (OSError, SafetensorError, KeyError):
        raise damaged(work.statistics_file) from None


def damaged(path: Path) -> UserError:
    """What to say of a file of calibrate that cannot be used."""
    return UserError(f"{path} is missing or damaged.", "Make it again with `edgerazor calibrate --force`.")


def settings(section: str, values: BaseModel, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """The fields of a recipe section as the readable part of a fingerprint.

    A field that is not set is left out, so that one that a later version adds changes nothing.
    """
    found: dict[str, Any] = values.model_dump(mode="json", exclude=set(skip), exclude_none=True)
    result = {}
    for name, value in found.items():
        text = str(value) if not isinstance(value, list | dict) else json.dumps(value, sort_keys=True)
        result[f"{section}.{name}"] = text
    return result

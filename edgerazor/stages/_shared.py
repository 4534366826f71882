"""What several stages need: the device, the teacher, the text."""

from __future__ import annotations

import os
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgerazor import data, models
from edgerazor.errors import UserError, usage_error
from edgerazor.recipe import Recipe, Source
from edgerazor.workdir import WorkDir, digest_json


def device_of(recipe: Recipe) -> torch.device:
    """The device to compute on; also sets the number of CPU threads.

    Raises:
        UserError: there is no such device here.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    elif "LOCAL_WORLD_SIZE" in os.environ:  # several processes share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
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


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def load_teacher(
    recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The recipe's teacher in evaluation mode, its weights without gradients."""
    model, tokenizer = models.load(recipe.model, recipe.revision, str(device), dtype, recipe.trust_remote_code)
    return model.requires_grad_(False), tokenizer


def teacher_fingerprint(recipe: Recipe) -> str:
    return models.fingerprint(models.resolve(recipe.model, recipe.revision))


def sources(recipe: Recipe, work: WorkDir) -> tuple[Source, ...]:
    """The training mixture: the recipe's, else the text that the teacher wrote in calibrate."""
    return recipe.data.train or (Source(file=str(work.generated_text)),)


def data_fingerprint(recipe: Recipe) -> str:
    """Identity of the text that training and calibration read; generated text is decided by the teacher and seed."""
    if not recipe.data.train:
        return f"written by the teacher, seed {recipe.seed}"
    return data.fingerprint(recipe.data.train)


def held_out_fingerprint(recipe: Recipe) -> str:
    if recipe.data.held_out:
        return data.fingerprint(recipe.data.held_out)
    return f"the last {recipe.data.held_out_fraction:g} of {data_fingerprint(recipe)}"


def sequence_length(recipe: Recipe, model: PreTrainedModel) -> int:
    """Tokens per sequence: the recipe's, but no more than the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(recipe.data.sequence_length, limit or recipe.data.sequence_length)


def open_text(
    recipe: Recipe, work: WorkDir, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[data.TokenRows, data.TokenRows]:
    """Rows to train on and rows to measure on.

    Args:
        recipe: names the mixture and the held-out text.
        work: where text of the teacher lies, if the recipe names no mixture.
        tokenizer: of the teacher.
        length: tokens per row.

    Returns:
        training rows; held-out rows, disjoint from them: the recipe's held-out text, else the end of each source.
    """
    fraction = 0.0 if recipe.data.held_out else recipe.data.held_out_fraction
    rows, held_out = data.open_rows(sources(recipe, work), tokenizer, length, recipe.seed, fraction)
    if held_out is None:
        held_out, _ = data.open_rows(recipe.data.held_out, tokenizer, length, recipe.seed)
    return rows, held_out


def settings(section: str, values: BaseModel, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """The fields of a recipe section as the readable part of a fingerprint."""
    found: dict[str, Any] = values.model_dump(mode="json", exclude=set(skip))
    result = {}
    for name, value in found.items():
        text = str(value) if not isinstance(value, list | dict) else digest_json(value)[:12]
        result[f"{section}.{name}"] = text
    return result

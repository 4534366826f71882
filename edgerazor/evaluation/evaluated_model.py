"""The models under evaluation, as a user would load them: packed ones by the runtime where it can, else transformers.

On a CPU the runtime computes a packed model, natively where it can; 16-bit models, and packed ones on other devices,
transformers does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgerazor import job, models, modules, runtime, tasks, transformers_plugin
from edgerazor.job import RecipeContext

#: What changes the greedy text that transformers writes, and the values that do not.
PLAIN_GREEDY = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "watermarking_config", "stop_strings")),
}


@dataclass
class EvaluatedModel:
    """A model in memory: of transformers, or of the runtime."""

    title: str
    model: Any
    tokenizer: Any

    @property
    def is_native(self) -> bool:
        """Whether the runtime computes it."""
        return isinstance(self.model, runtime.Model)

    @property
    def kernel(self) -> str:
        """Names of the kernels that multiply, of a packed model."""
        return str(self.model.kernel if self.is_native else modules.kernels_of(self.model))

    @contextlib.contextmanager
    def seeing(self, tower: str) -> Iterator[None]:
        """Let it read a tower's features of pictures (`models.PictureTable.view`) inside."""
        own = self.model.tower if isinstance(self.model, runtime.NativeModel) else models.tower_of(self.model)
        self.look_with(tower)
        try:
            yield
        finally:
            self.look_with(own)

    def look_with(self, tower: str) -> None:
        """Let it read a tower's features of pictures from now on."""
        if isinstance(self.model, runtime.NativeModel):
            self.model.tower = tower
        else:
            models.let_see(self.model, tower=tower)

    @property
    def context_length(self) -> int:
        """Tokens that it has positions for."""
        return job.context_length(self.model)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def load_16_bit(title: str, source: str, context: RecipeContext) -> EvaluatedModel:
    """A 16-bit model by its folder or hub id; float32 on a CPU, where 16-bit arithmetic is slow or rounds more."""
    dtype = torch.float32 if context.device.type == "cpu" else None
    loaded = context.load(source, context.device, dtype)
    return EvaluatedModel(title, loaded.model, loaded.tokenizer)


def load_rounding_inputs(source: str, context: RecipeContext) -> EvaluatedModel:
    """A 16-bit model, its activations and cache rounded as the recipe's `eval` section says."""
    evaluated, settings = load_16_bit("model", source, context), context.recipe.eval
    if (settings.activation_bits, settings.kv_bits) != (16, 16):
        group_size = context.recipe.calibrate.group_size
        computing = modules.Settings(settings.activation_bits, settings.kv_bits, group_size)
        modules.quantize_inputs(evaluated.model, models.structure(evaluated.model), computing)
    return evaluated


def load_packed(
    title: str, folder: Path, device: torch.device, threads: int | None, loaded: Sequence[tasks.LoadedTask]
) -> tuple[EvaluatedModel, list[str]]:
    """A packed model, natively if that is possible here; else with the reason.

    Args:
        title: for people.
        folder: packed.
        device: to compute on.
        threads: of the runtime; None for all cores.
        loaded: the tasks that it will answer.
    """
    if device.type != "cpu":
        return EvaluatedModel(
            title, *transformers_plugin.load(folder, str(device), torch.bfloat16, cache_decoded=True)
        ), []
    model = runtime.load(folder, threads=threads)
    note = model.note
    if model.engine == "native":
        note = beyond_greedy(model, loaded)
        if note is None:
            return EvaluatedModel(title, model, model.tokenizer), []
    del model
    notes = [note] if note else []
    return EvaluatedModel(title, *transformers_plugin.load(folder, dtype=torch.float32, cache_decoded=True)), notes


def beyond_greedy(model: runtime.Model, loaded: Sequence[tasks.LoadedTask]) -> str | None:
    """Why the tasks need transformers' `generate`, if they do."""
    if names := tasks.non_greedy(loaded):
        return f"transformers computes the packed model: the answers of {', '.join(names)} are not greedy text."
    own = model.generation_config
    changed = [name for name, plain in PLAIN_GREEDY.items() if getattr(own, name, None) not in (None, plain)]
    if changed and any(map(tasks.is_generative, loaded)):
        return f"transformers computes the packed model: its generation_config.json sets {changed[0]}."
    return None

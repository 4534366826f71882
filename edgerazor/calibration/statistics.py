"""The file of statistics, `stats.safetensors`: what is measured of a teacher serves every budget.

It holds

* `input_second_moment/<module>`, float32 [in]: mean of x squared over tokens, for the input of every linear layer
  (the diagonal of the Hessian of its squared output error; GPTQ's and imatrix's quantity); of rotated inputs where
  the recipe rotates them, as all that is said of inputs here; of an expert, x is 0 for the tokens that do not go there,
  and multiplied with its weight for those that do;
* `expert_tokens/<list of experts>`, int64 [experts]: how many tokens went to each expert of a layer;
* `layer_cosine`, float32 [layers]: mean cosine similarity of each decoder layer's output and input;
* `layer_l2` and `layer_variance`, float32 [layers]: mean norm of its output, and its variance over positions;
* `<module>.input_scale`, float32 [], where activations have stored scales: the one with the least squared error for
  the input of a linear layer or the head, and `<module>.low_input_scale` at the bits of unimportant tokens;
* `importance_threshold`, float32 [layers], where tokens have bits of their own: see `modules/attention.py`;
* `damage/<estimate>/<module>`, float32 [formats, rows], nats of KL per token: see `sensitivity/analysis.py`; its
  metadata names the formats;
* `alone/<module>`, float32 [formats], the same of the whole module when nothing else is rounded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgerazor import untrusted
from edgerazor.allocate import candidates_of, measures
from edgerazor.job import JobContext
from edgerazor.sensitivity import PER_MATRIX
from edgerazor.workdir import digest_json, share, versions, write_atomically


def stored(context: JobContext) -> dict[str, Tensor] | None:
    """What an earlier calibration measured, or this one before it was interrupted, if it is what this one needs.

    Statistics that only an interrupted run wrote are given their place in the stage's folder.
    """
    work, identity = context.work, identity_of(context)
    tensors = read(work.statistics_file, identity)
    if tensors is None and (tensors := read(_progress_file(context), identity)) is not None:
        share(_progress_file(context), work.statistics_file)
    return tensors


def read(path: Path, identity: dict[str, Any]) -> dict[str, Tensor] | None:
    """What a file of statistics holds of the formats of an identity; None where it was measured otherwise."""
    try:
        with safe_open(path, framework="pt") as file:
            measured = untrusted.parse_json((file.metadata() or {})["measured"], dict)
            if measured["identity"] != identity["identity"]:
                return None
            needed = [measured["formats"].index(name) for name in identity["formats"]]
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
    of_formats = ("damage/", PER_MATRIX)
    return {name: value[needed] if name.startswith(of_formats) else value for name, value in tensors.items()}


def write(context: JobContext, tensors: dict[str, Tensor]) -> None:
    """Keep what was measured, also for a run that goes on after an interruption."""
    metadata = {"measured": json.dumps(identity_of(context))}  # one key: safetensors keeps no order of several
    write_atomically(_progress_file(context), lambda path: save_file(tensors, path, metadata))
    share(_progress_file(context), context.work.statistics_file)


def _progress_file(context: JobContext) -> Path:
    return context.work.progress("calibrate", context.work.statistics_file.name)


def identity_of(context: JobContext) -> dict[str, Any]:
    """What decides the statistics, for the metadata of their file: budgets and plans do not.

    Returns:
        `identity`, a digest of everything but the candidate formats, and `formats`, their names.
    """
    recipe, settings = context.recipe, context.recipe.calibrate
    measured = measures(settings)
    names = ["group_size", "activation_bits", "activation_scales", "adaptive_tokens", "sequences", "batch_size"]
    names += ["rotation"] if settings.rotation else []
    names += ["sensitivity", "sensitivity_tokens", "sensitivity_points"] if measured else []
    decisive = {
        "model": context.teacher_fingerprint,
        "data": [context.data_fingerprint, recipe.data.sequence_length, recipe.data.packing],
        **context.row_inputs,
        "seed": recipe.seed,
        "settings": {name: getattr(settings, name) for name in names},
        "published": measured and settings.init == "rtn",
        "holds": ["damage", "alone"] if measured else [],
        "versions": versions(),
    }
    return {"identity": digest_json(decisive), "formats": candidates_of(settings) if measured else ()}

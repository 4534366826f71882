"""The teacher in the native engine, its weights rounded to eight bits: a CPU writes text many times as fast with it.

Rotated and rounded to int8 in groups of 64, with int8 activations and cache, it is a few thousandths of a nat from the
teacher (`recipes/results/writing.md`). It is packed into a folder that is deleted as soon as it is loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from edgerazor import families, packed, student_plan, transformers_plugin
from edgerazor.allocate import make_plan
from edgerazor.errors import UserError
from edgerazor.job import LoadedModel, RecipeContext
from edgerazor.packaging.companions import write_companions
from edgerazor.packaging.pack_weights import matrix_source, teacher_weights
from edgerazor.recipe import Calibrate
from edgerazor.runtime.native_model import NativeModel
from edgerazor.runtime.network import NotNativeError

#: How the teacher is rounded.
EIGHT_BITS = Calibrate(
    bits=8,
    formats=("int8",),
    plan="interleave",
    embedding_format="int8",
    group_size=64,
    init="rtn",
    rotation="hadamard",
)


@contextmanager
def native_teacher(teacher: LoadedModel, context: RecipeContext) -> Iterator[NativeModel | None]:
    """The teacher in the native engine; None, and a sentence that says why, where transformers has to compute it.

    Args:
        teacher: on the CPU.
        context: of the job; a device other than a CPU computes with transformers, about which nothing is said.
    """
    if context.device.type != "cpu":
        yield None
        return
    try:
        model = _round(teacher, context)
    except NotNativeError as error:
        context.console.say(f"transformers writes, slower than the native engine, because {error.reason}. {error.hint}")
        model = None
    yield model


def _round(teacher: LoadedModel, context: RecipeContext) -> NativeModel:
    """The teacher rounded and loaded.

    Raises:
        NotNativeError: the native engine does not compute it.
    """
    family = families.find(teacher.model.config.model_type)
    if family is None or family.native is None:
        raise NotNativeError(f"there is no native code for models of type {teacher.model.config.model_type}")
    structure = teacher.structure
    plan = make_plan(structure.targets, EIGHT_BITS)
    settings = student_plan.header_settings(student_plan.settings_of(plan))
    try:
        with tempfile.TemporaryDirectory() as name, teacher_weights(teacher, plan, None) as weights:
            folder = Path(name)
            header = packed.write(
                folder,
                [matrix_source(matrix, weights) for matrix in plan.matrices],
                weights.others,
                tied=student_plan.tied_modules(structure),
                settings=settings,
                provenance={"source": "teacher", "teacher_sha256": context.teacher_fingerprint},
            )
            write_companions(folder, context.teacher_folder, teacher.model, {"version": header.version, **settings})
            threads = context.recipe.threads or torch.get_num_threads()
            model = NativeModel(*transformers_plugin.open_folder(folder), threads, mapped=False)
    except UserError as error:
        raise NotNativeError(error.message.rstrip(".")) from None
    if model.has_states:
        raise NotNativeError("its layers keep states beside the cache, which texts side by side cannot share")
    return model

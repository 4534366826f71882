"""How far the features of pictures move when the matrices of a tower are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from edgerazor import data, models, student_plan
from edgerazor.calibration.calibrate_result import TowersResult
from edgerazor.data import Conversation
from edgerazor.job import JobContext, LoadedModel
from edgerazor.models import PreTrainedModel

#: Conversations whose pictures are looked at.
CONVERSATIONS = 8


@torch.no_grad()
def measure(context: JobContext, teacher: LoadedModel) -> TowersResult | None:
    """What rounding does to the features of some pictures of the training data; None where towers stay in 16 bits.

    Each matrix is rounded alone, and then all of them: the squared distance of the features, relative to their square.

    Raises:
        UserError: a picture cannot be read.
    """
    matrices, reader = context.tower_matrices(teacher), context.pictures
    if not matrices or reader is None:
        return None
    model = reader.model
    conversations = list(_conversations(context))
    inputs = [
        {name: value for name, value in made.inputs.items() if isinstance(value, Tensor)}
        for made in (data.encode_with_pictures(one, reader.processor) for one in conversations)
    ]
    before = [models.features_of(model, one).rows for one in inputs]
    weights = {path: model.get_submodule(path).weight for path in matrices}
    originals = {path: weight.clone() for path, weight in weights.items()}
    moved = {}
    for path, matrix in matrices.items():
        student_plan.round_towers(model, {path: matrix})
        moved[path] = _distance(model, inputs, before)
        weights[path].copy_(originals[path])
    student_plan.round_towers(model, matrices)
    together = _distance(model, inputs, before)
    for path, weight in weights.items():
        weight.copy_(originals[path])
    return TowersResult(
        format=str(context.recipe.calibrate.towers),
        groups={path: spec.group_size for path, (spec, _) in matrices.items()},
        moved=moved,
        together=together,
        pictures=sum(len(one.pictures) for one in conversations),
    )


def _conversations(context: JobContext) -> Iterator[Conversation]:
    """The first conversations with pictures of the training data."""
    documents = (document for source in context.recipe.data.train for document in data.documents(source))
    shown = (one for one in documents if isinstance(one, Conversation) and one.pictures)
    return islice(shown, CONVERSATIONS)


def _distance(model: PreTrainedModel, inputs: list[dict[str, Any]], before: list[Tensor]) -> float:
    """Squared distance of features from what they were, relative to their square."""
    after = [models.features_of(model, one).rows for one in inputs]
    apart = sum(float((new - old).square().sum()) for new, old in zip(after, before, strict=True))
    return apart / max(sum(float(old.square().sum()) for old in before), 1e-30)

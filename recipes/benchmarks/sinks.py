"""Whether a few tokens make most of what losses of hidden states see.

    python -m recipes.benchmarks.sinks --real-data DIR      the table, for the embedded teacher and those of DIR

Large models have attention sinks: the first token of a sequence, or BOS wherever it stands, has hidden states a hundred
times as long as others, and a squared error could be theirs alone. Here a student is the teacher rounded to 1.88 bits
(interleave, A8-KV8), as every training begins, and reads rows as trainings do. Told is the share that position 0, BOS
tokens, and the hundredth of the tokens with the largest error have

- in *features*: LAFD's squared error of the three layers that change their input most;
- in *reconstruction*: what `distill.reconstruct` lowers, squared error over squared length of what leaves a layer, mean
  of all layers;
- in *length*: the squared length of the teacher's states, mean of all layers but for the last, behind the final norm.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgerazor import allocate, data, models, modules
from edgerazor import recipe as recipes
from edgerazor.losses import layer_metric
from edgerazor.losses.lafd import least_similar
from recipes.benchmarks.methods import Teacher, real_teachers, world
from recipes.benchmarks.results import markdown

ROWS, TOP = 32, 0.01


@torch.no_grad()
def states(model: Any, structure: models.Structure, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Hidden states [B, T, H] as transformers returns them, the embedding's first; what leaves the last layer."""
    leaving: list[Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        leaving.append(output[0] if isinstance(output, tuple) else output)

    last = model.get_submodule(structure.layers_path)[structure.layer_count - 1]
    with last.register_forward_hook(note):
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return list(hidden), leaving[0]


def errors(teacher: Teacher) -> tuple[dict[str, Tensor], Tensor, int | None]:
    """What is told -> what each token has of it, [B, T]; ids; which of them is BOS."""
    changes = {"calibrate": {"bits": 1.88, "plan": "interleave"}, "model": str(teacher.model)}
    recipe = recipes.build(recipes.merge(teacher.recipe, changes))
    model, tokenizer = models.load(teacher.model, dtype=torch.float32)
    student, _ = models.load(teacher.model, dtype=torch.float32)
    structure = models.structure(model)
    plan = allocate.make_plan(structure.targets, recipe.calibrate)
    how = modules.Settings(plan.activation_bits, plan.kv_bits, plan.group_size)
    modules.prepare_for_training(student, structure, plan.specs(), how)
    settings = data.RowSettings(recipe.data.sequence_length, bos=recipe.data.bos)
    rows, _ = data.open_rows(recipe.data.train, tokenizer, settings)
    ids = torch.stack([rows.row(index)["input_ids"] for index in range(ROWS)])
    (theirs, theirs_last), (ours, ours_last) = (states(side.eval(), structure, ids) for side in (model, student))
    similar = layer_metric("cosine", dict(enumerate(theirs)), torch.ones_like(ids))
    chosen = least_similar(similar.tolist(), 3)
    features = sum((ours[layer] - theirs[layer]).square().sum(-1) for layer in chosen)
    leaving = [*zip(ours[1:-1], theirs[1:-1], strict=True), (ours_last, theirs_last)]
    relative = [(a - b).square().sum(-1) / b.square().sum() for a, b in leaving]
    lengths = [b.square().sum(-1) / b.square().sum() for b in theirs[1:-1]]
    told = {"features": features, "reconstruction": sum(relative), "length": sum(lengths)}
    return told, ids, tokenizer.bos_token_id  # type: ignore[return-value]


def shares(teacher: Teacher) -> list[list[str]]:
    """The teacher's lines of the table."""
    by_measure, ids, bos = errors(teacher)
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = True
    begins = ids == bos if bos is not None else torch.zeros_like(first)
    lines = [
        [teacher.name, "tokens", *(f"{100 * error.float().mean():.2f}" for error in (first, begins)), f"{100 * TOP:g}"]
    ]
    for name, error in by_measure.items():
        top = error.flatten().topk(max(1, round(TOP * error.numel()))).values.sum()
        parts = [error[first].sum(), error[begins].sum(), top]
        lines.append(["", name, *(f"{100 * float(part / error.sum()):.2f}" for part in parts)])
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    options = parser.parse_args(arguments)
    teachers = [world(), *(real_teachers(options.real_data) if options.real_data else ())]
    head = ["teacher", "share of, %", "position 0", "BOS", "largest hundredth"]
    print(markdown(head, [line for teacher in teachers for line in shares(teacher)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a signed block Hadamard rotation is worth before any training: held-out KL of rounded weights, with and without.

    make real-models && python -m recipes.benchmarks.rotated_rounding
    python -m recipes.benchmarks.rotated_rounding --models realtext-4m --formats int4,ternary --group-sizes 256 --dry
    python -m recipes.benchmarks.rotated_rounding --only embedding --dry

All matrices, embedding and head included, or those of one kind alone, are rounded to one format with scales of least
squared error; activations and cache are not. KL, in nats a token, and perplexity are of held-out web text and
Wikipedia. The table goes into recipes/results/rotation.md. A cell of the real models takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgerazor import data, formats, models
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.evaluation.eval_result import TextResult
from edgerazor.evaluation.evaluated_model import EvaluatedModel
from edgerazor.evaluation.text_metrics import text_metrics
from edgerazor.formats import MatrixSpec
from edgerazor.models import PreTrainedModel
from edgerazor.workdir import machine
from recipes.benchmarks import real, real_models
from recipes.benchmarks.folders import BUILD, CHECKOUT, RESULTS
from recipes.benchmarks.methods import Teacher
from recipes.benchmarks.results import commit, markdown, number, packages, publish

PAGE = RESULTS / "rotation.md"
#: Tokens of a held-out sequence.
LENGTH = 256
HEAD = ("model", "weights", "group", "KL", "rotated", "perplexity", "rotated", "top-1", "rotated")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(arguments)
    console = Console()
    rows: list[list[str]] = []
    try:
        for teacher in real.find_teachers(options):
            for row in rows_of(teacher, options):
                rows.append(row)
                print(*row, flush=True)
    except UserError as error:
        console.error(error)
        return error.code
    facts = f"{machine()}; {packages()}; commit {commit()}; {options.sequences} sequences of {LENGTH} tokens."
    if not options.dry:
        publish("rotation", f"{markdown(HEAD, rows)}\n\n{facts}", PAGE)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    shared = CHECKOUT.parent / "shared" / "data"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", help="comma-separated; default: those of `make real-models`")
    made.add_argument("--formats", default="int4,int3,int2,ternary")
    made.add_argument("--group-sizes", default="256,64")
    made.add_argument("--only", choices=("linear", "embedding", "head"), help="kind of the matrices; default: all")
    made.add_argument("--sequences", type=int, default=8, help=f"of {LENGTH} held-out tokens")
    made.add_argument("--real-data", type=Path, default=shared if shared.is_dir() else None)
    made.add_argument("--folder", type=Path, default=real_models.FOLDER, help="of the models")
    made.add_argument("--build", type=Path, default=BUILD / "real", help=argparse.SUPPRESS)
    made.add_argument("--dry", action="store_true", help="print only")
    return made


def rows_of(teacher: Teacher, options: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each format and group size of a model: without and with the rotation."""
    model, tokenizer = models.load(teacher.model, dtype=torch.float32)
    reference, _ = models.load(teacher.model, dtype=torch.float32)
    batches = held_out(teacher, tokenizer, options.sequences)
    original = EvaluatedModel("teacher", reference, tokenizer)
    for name, size in itertools.product(options.formats.split(","), map(int, options.group_sizes.split(","))):
        plain, rotated = (
            measure(
                EvaluatedModel("rounded", model, tokenizer), original, (name, size, rotation), batches, options.only
            )
            for rotation in (None, "hadamard")
        )
        pairs = [(plain.kl, rotated.kl, 3), (plain.perplexity, rotated.perplexity, 4)]
        numbers = [number(value, digits) for *values, digits in pairs for value in values]
        agreements = [number(text.top1_agreement, 3) for text in (plain, rotated)]
        yield [teacher.name, name, str(size), *numbers, *agreements]


def held_out(teacher: Teacher, tokenizer: models.PreTrainedTokenizerBase, sequences: int) -> list[data.Batch]:
    """The first sequences of a teacher's held-out text."""
    sources = recipes.build(teacher.recipe).data.held_out
    rows, _ = data.open_rows(sources, tokenizer, data.RowSettings(LENGTH))
    return list(data.sample_batches(rows, sequences, 1))


def measure(
    rounded: EvaluatedModel,
    original: EvaluatedModel,
    what: tuple[str, int, str | None],
    batches: Sequence[data.Batch],
    only: str | None = None,
) -> TextResult:
    """Held-out text of a model whose matrices are rounded in place.

    Args:
        rounded: takes the rounded weights of `original`.
        original: the teacher.
        what: format, group size and rotation.
        batches: held-out text.
        only: kind of the matrices that are rounded; None: all.
    """
    weights = dict(matrices(original.model, only))
    with torch.no_grad():
        for name, weight in matrices(rounded.model, only):
            weight.copy_(rounded_weight(weights[name], *what))
    return text_metrics(rounded, original, batches, Console(quiet=True))


def matrices(model: PreTrainedModel, only: str | None) -> Iterator[tuple[str, Tensor]]:
    """The matrices that are quantized, or those of one kind: path -> weight [rows, columns]."""
    for target in models.structure(model).targets:
        if only in (None, target.kind):
            yield target.name, model.get_submodule(target.name).weight


def rounded_weight(weight: Tensor, name: str, group_size: int, rotation: str | None) -> Tensor:
    """What a weight [rows, columns] is worth in a format."""
    spec = MatrixSpec((name,), group_size, rotation=formats.find_rotation(rotation, weight.shape[1]))
    return formats.rounded_weight(weight, spec)


if __name__ == "__main__":
    sys.exit(main())

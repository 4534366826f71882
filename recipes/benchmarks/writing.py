"""How fast a teacher writes text on this CPU, and what the native engine's eight bits change of what it writes.

    make real-models && python -m recipes.benchmarks.writing
    python -m recipes.benchmarks.writing --models smollm2-135m --tokens 40 --side-by-side 8 --dry

Both engines write as `distill` without `--data` lets them: from the beginning of a text, at temperature 1, a batch of
texts side by side, each so many tokens, one engine after the other in one run. KL and top-1 agreement are those of the
rounded teacher to the 16-bit one, in float32, on held-out text of two kinds. The table goes into
recipes/results/writing.md. Alone on the machine; a minute or two for each model.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from edgerazor import recipe as recipes
from edgerazor.calibration import own_text
from edgerazor.calibration.generated_text import Writer, written_with
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.evaluation.evaluated_model import EvaluatedModel
from edgerazor.evaluation.text_metrics import text_metrics
from edgerazor.job import RecipeContext
from edgerazor.packaging.native_teacher import native_teacher
from edgerazor.recipe import Sampling
from edgerazor.workdir import machine
from recipes.benchmarks import real, real_models
from recipes.benchmarks.folders import BUILD, CHECKOUT, RESULTS
from recipes.benchmarks.methods import Teacher
from recipes.benchmarks.results import commit, markdown, number, packages, publish
from recipes.benchmarks.rotated_rounding import held_out

PAGE = RESULTS / "writing.md"
HEAD = ("model", "side by side", "transformers, tokens/s", "native, tokens/s", "times", "KL", "top-1")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[list[str]] = []
    console = Console()
    try:
        for teacher in real.find_teachers(options):
            rows.append(row_of(teacher, options, console))
            print(*rows[-1], flush=True)
    except UserError as error:
        console.error(error)
        return error.code
    facts = (
        f"{machine()}, {options.threads} threads; {packages()}; commit {commit()}; {options.tokens} tokens of each "
        f"text, KL of {options.sequences} sequences of 256 tokens."
    )
    if not options.dry:
        publish("writing", f"{markdown(HEAD, rows)}\n\n{facts}", PAGE)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    shared = CHECKOUT.parent / "shared" / "data"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", help="comma-separated; default: those of `make real-models`")
    made.add_argument("--tokens", type=int, default=64, help="of each text")
    made.add_argument("--side-by-side", type=int, default=Sampling().batch_size)
    made.add_argument("--sequences", type=int, default=6, help="held-out ones that KL is measured on; 0: none")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")
    made.add_argument("--real-data", type=Path, default=shared if shared.is_dir() else None)
    made.add_argument("--folder", type=Path, default=real_models.FOLDER, help="of the models")
    made.add_argument("--build", type=Path, default=BUILD / "real", help=argparse.SUPPRESS)
    made.add_argument("--dry", action="store_true", help="print only")
    return made


def row_of(teacher: Teacher, options: argparse.Namespace, console: Console) -> list[str]:
    """Both engines with one model.

    Raises:
        UserError: the native engine does not compute it.
    """
    context = RecipeContext(recipes.build({"model": str(teacher.model), "threads": options.threads}), console)
    loaded = context.load_teacher(torch.device("cpu"))
    writer = own_text.writer_of(loaded, 0, options.tokens + 1)
    slow = speed_of(writer, options)
    with native_teacher(loaded, context) as native, written_with(writer, native) as fastest:
        if native is None:
            raise UserError(f"The native engine does not compute {teacher.name}.")
        fast = speed_of(fastest, options)
        kl, agreement = "", ""
        if options.sequences:
            reference = context.load_teacher(torch.device("cpu"), torch.float32)
            original = EvaluatedModel("teacher", reference.model, loaded.tokenizer)
            rounded = EvaluatedModel("8 bits", native, loaded.tokenizer)
            text = text_metrics(
                rounded, original, held_out(teacher, loaded.tokenizer, options.sequences), Console(quiet=True)
            )
            kl, agreement = number(text.kl, 3), number(text.top1_agreement, 3)
    speeds = [number(slow, 3), number(fast, 3), number(fast / slow, 3)]
    return [teacher.name, str(options.side_by_side), *speeds, kl, agreement]


def speed_of(writer: Writer, options: argparse.Namespace) -> float:
    """Tokens a second of a batch of texts, none of which ends early, after a short one that warms up."""
    start = [[writer.tokenizer.bos_token_id or 0]] * options.side_by_side
    writer.draw(start, (0,), exactly=2)
    began = time.perf_counter()
    answers = writer.draw(start, (1,), exactly=options.tokens)
    return sum(len(answer.ids) for answer in answers) / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())

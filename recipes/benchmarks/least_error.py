"""What the scales of least squared error are worth in rounding, beside the published rules, and what they cost.

    make results-least-error REAL_DATA=DIR                        the tables in recipes/results/scales.md
    python -m recipes.benchmarks.least_error --work speed --dry              one, printed only

*rounding*: teachers rounded without training in the setting of the rows of rounding under Methods (int4 embedding,
8-bit activations, keys and values), at `--init rtn` and `--init least_error`: KL to the teacher and perplexity on
held-out text.

*gain*: ternary weights alone, everything else as it is. The decoded weights of least error lie closer to the weights,
but they are smaller: of all `w w'`, for codes at their best scale, just the share of the squares is left that is no
error. So they are tried with larger scales, too: with the length of the weights, and with the gain 1.

*speed*: of one thread, from 16-bit weights to the written file, as `make results-packing` measures it; the two take
turns. Alone on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from edgerazor import data, formats, kernels, models, pipeline
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.evaluation.eval_result import EvalResult, TextResult
from edgerazor.formats import MatrixSpec
from edgerazor.workdir import WorkDir, machine
from recipes.benchmarks.folders import RESULTS
from recipes.benchmarks.methods import Teacher, Values, real_teachers
from recipes.benchmarks.packing import MB, random_weights, seconds_with
from recipes.benchmarks.results import commit, markdown, number, packages, publish

WORK = ("rounding", "gain", "speed")
INITS = ("rtn", "least_error")
#: A row's name -> what it asks for.
ROWS: dict[str, Values] = {
    "ternary": {"bits": 1.58, "formats": ["ternary"]},
    "2 bits, int2": {"bits": 2, "formats": ["int2"]},
    "2 bits, ternary and int4": {"bits": 2, "formats": ["ternary", "int4"]},
    "3 bits, int3": {"bits": 3, "formats": ["int3"]},
    "3 bits, ternary and int4": {"bits": 3, "formats": ["ternary", "int4"]},
    "4 bits, int4": {"bits": 4, "formats": ["int4"]},
    "2 bits by sensitivity": {"bits": 2, "plan": "sensitivity"},
}
#: Sequences of held-out text that gains are measured on.
SEQUENCES = 24


# Rounding ---------------------------------------------------------------------------------------------------------


def rounding(teachers: list[Teacher]) -> str:
    """Markdown."""
    head = ["model", "weights", "KL, rule", "KL, least error", "perplexity, rule", "perplexity, least error"]
    rows = []
    for teacher in teachers:
        for name, settings in ROWS.items():
            texts = [rounded(teacher, {**settings, "init": init}) for init in INITS]
            numbers = [*(number(text.kl) for text in texts), *(number(text.perplexity, 4) for text in texts)]
            rows.append([teacher.name, name, *numbers])
            print(*rows[-1], flush=True)
    return markdown(head, rows)


def rounded(teacher: Teacher, calibrate: Values) -> TextResult:
    """What held-out text says of a teacher that is rounded so."""
    settings = {"plan": "interleave", "sequences": 64, "embedding_format": "int4", **calibrate}
    values: Values = {"model": str(teacher.model), "calibrate": settings, "pack": {"source": "teacher"}}
    recipe, console = recipes.build(recipes.merge(teacher.recipe, values)), Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        work = WorkDir(Path(folder) / "work")
        for stage in ("calibrate", "pack") if settings["plan"] == "sensitivity" else ("pack",):
            pipeline.run(stage, recipe, work, console)
        measured = pipeline.run("eval", recipe, work, console)
    assert isinstance(measured, EvalResult)
    assert measured.text is not None
    return measured.text


# Gain -------------------------------------------------------------------------------------------------------------


def ternary(w: Tensor, group_size: int, published: bool) -> Tensor:
    return formats.quantize_dequantize(w, MatrixSpec(("ternary",), group_size, published=published))


def longer(w: Tensor, group_size: int) -> Tensor:
    """Of least error, times what makes them as long as the weights."""
    nearest = ternary(w, group_size, published=False)
    return nearest * (w.square().sum() / nearest.square().sum()).sqrt()


def unbiased(w: Tensor, group_size: int) -> Tensor:
    """Of least error, times what gives them the gain 1: the sum of w w' is that of w w."""
    nearest = ternary(w, group_size, published=False)
    return nearest * (w.square().sum() / (w * nearest).sum())


VARIANTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "published rule": partial(ternary, published=True),
    "least error": partial(ternary, published=False),
    "least error, as long as the weights": longer,
    "least error, gain 1": unbiased,
}


@torch.inference_mode()
def gains(teachers: list[Teacher]) -> str:
    """Markdown."""
    rows = []
    for teacher in teachers:
        recipe = recipes.build(recipes.merge(teacher.recipe, {"model": str(teacher.model)}))
        model, tokenizer = models.load(teacher.model)
        model = model.float().eval()
        length, fraction = recipe.data.sequence_length, recipe.data.held_out_fraction
        _, held_out = data.open_rows(recipe.data.train, tokenizer, data.RowSettings(length, recipe.seed, fraction))
        assert held_out is not None
        ids = torch.stack([held_out.row(index)["input_ids"] for index in range(SEQUENCES)])
        truth = model(ids).logits.log_softmax(-1)
        linears = [target.name for target in models.structure(model).targets if target.kind == "linear"]
        weights = {name: model.get_submodule(name).weight for name in linears}
        originals = {name: weight.clone() for name, weight in weights.items()}
        for variant, change in VARIANTS.items():
            for name, weight in weights.items():
                weight.copy_(change(originals[name], recipe.calibrate.group_size))
            pairs = [(originals[name].double(), weight.double()) for name, weight in weights.items()]
            squares = sum(float(w.square().sum()) for w, _ in pairs)
            gain = sum(float((w * made).sum()) for w, made in pairs) / squares
            error = sum(float((w - made).square().sum()) for w, made in pairs) / squares
            kl = float((truth.exp() * (truth - model(ids).logits.log_softmax(-1))).sum(-1).mean())
            rows.append([teacher.name, variant, f"{error:.3f}", f"{gain:.3f}", number(kl)])
            print(*rows[-1], flush=True)
    return markdown(["model", "ternary weights", "squared error", "gain", "KL"], rows)


# Speed ------------------------------------------------------------------------------------------------------------


def speed(matrices: int, rounds: int) -> str:
    """Markdown."""
    weights = [random_weights(torch.Size((3072, 2048))) for _ in range(matrices)]
    size = 2 * sum(w.numel() for w in weights) / MB
    rows = []
    for name in formats.names():
        best = dict.fromkeys(INITS, float("inf"))
        with tempfile.TemporaryDirectory() as place:
            for _ in range(rounds):
                for init in INITS:
                    spec = MatrixSpec((name,), 256, published=init == "rtn")
                    best[init] = min(best[init], seconds_with(weights, Path(place) / "packed", spec)[0])
        rows.append([name, *(f"{size / best[init]:,.0f} MB/s" for init in INITS)])
        print(*rows[-1], flush=True)
    return markdown(["format", "published rule", "least error"], rows)


# The command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--real-data", type=Path, help="a folder with `models` and `text`; for rounding and gain")
    parser.add_argument("--matrices", type=int, default=16, help="of 6 million weights, for speed")
    parser.add_argument("--rounds", type=int, default=5, help="the best of them, for speed")
    parser.add_argument("--dry", action="store_true", help="leave the results as they are")
    parser.add_argument("--results", type=Path, default=RESULTS / "scales.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.work:
        if name == "speed":
            text = speed(options.matrices, options.rounds)
        elif options.real_data is None:
            parser.error(f"--work {name} needs --real-data")
        else:
            text = {"rounding": rounding, "gain": gains}[name](real_teachers(options.real_data))
        facts = f"{machine()}; {packages()}; kernels {kernels.name()}; commit {commit()}."
        if not options.dry:
            publish(f"least-error-{name}", f"{text}\n\n{facts}", options.results)


if __name__ == "__main__":
    main()

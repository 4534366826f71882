"""The table of plans: what it is worth to give bits to the rows that need them, at equal real bytes.

    make results-plans                         all rows that are not there yet, then the table
    python -m recipes.benchmarks.plans --teachers world --kinds interleave,rows --bits 1.88
    python -m recipes.benchmarks.plans --table            only the table, from the stored rows

For each teacher and number of bits, EdgeRazor's interleave of ternary and int4 rows decides how many bytes the packed
model may have, everything counted; the other plans may have no more: `rows` and `tensors` are plans by sensitivity at
the two granularities (`--sensitivity auto`), `uniform` is the widest single format that fits. Embedding int4, A8-KV8
and group size are the same for all.

*before* is rounding to nearest at the plan; *after* is distillation at it, by forward KL, of the same tokens for
all, with three seeds (of text order, of the text that sensitivity is estimated from, and of its labels): mean, and the
largest minus the smallest behind the sign ±. A finished row is a JSON file, kept as in `methods.py`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from edgerazor import data, formats, models, pipeline
from edgerazor import recipe as recipes
from edgerazor.errors import UserError
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.job import JobContext
from edgerazor.recipe import Recipe
from edgerazor.workdir import WorkDir, digest_json, machine, versions, write_json
from recipes.benchmarks import numerics
from recipes.benchmarks.folders import BUILD, RESULTS
from recipes.benchmarks.methods import (
    Row,
    Setting,
    Teacher,
    real_teachers,
    scores,
    stored,
    world,
)
from recipes.benchmarks.results import commit, markdown, number, percent, publish

BEFORE, AFTER = (1.7, 1.88, 2.0, 2.5, 3.0), (1.88, 2.5)
SEEDS = (0, 1, 2)
STEPS = {"world": 100, "realtext-4m": 60, "stories260K": 100}
KINDS = ("interleave", "rows", "tensors", "uniform")
UNIFORM = ("int4", "int3", "int2", "ternary")


@dataclass(frozen=True)
class Case:
    """A row: a teacher, a plan, bits, before or after training, and a seed."""

    teacher: Teacher
    kind: str
    bits: float
    trained: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.bits:g}-{'after' if self.trained else 'before'}-{self.seed}"


def base(case: Case, setting: Setting) -> dict[str, object]:
    """The recipe's values that all kinds have."""
    steps = setting.steps or STEPS[case.teacher.name]
    changes = {
        "model": str(case.teacher.model),
        "seed": case.seed,
        "calibrate": {
            "sequences": 64,
            "overrides": [{"match": "*embed_tokens", "format": "int4"}, {"match": "lm_head", "format": "int4"}],
        },
        "distill": {"steps": steps, "evaluate_every": steps, "losses": [{"name": "forward_kl"}]},
        "pack": {} if case.trained else {"source": "teacher"},
        "eval": {"tasks": list(case.teacher.tasks), "limit": setting.limit},
    }
    values = recipes.merge(case.teacher.recipe, changes)
    teacher, _ = models.load(case.teacher.model)
    if models.structure(teacher).head is None:
        values["calibrate"]["overrides"] = values["calibrate"]["overrides"][:1]
    return values


def recipe_of(case: Case, setting: Setting) -> Recipe:
    """The whole recipe of a row."""
    values = base(case, setting)
    interleave = recipes.build(recipes.merge(values, {"calibrate": {"plan": "interleave", "bits": case.bits}}))
    if case.kind == "interleave":
        return interleave
    context = JobContext(interleave, WorkDir(setting.build), setting.console)
    teacher = context.load_teacher(torch.device("cpu"))
    size = context.packed_size(teacher, "student" if case.trained else "teacher")
    limit = size(context.new_plan(teacher)).bytes
    if case.kind == "uniform":
        for name in UNIFORM:
            wide = {
                "plan": "interleave",
                "formats": [name],
                "bits": 1.58 if name == "ternary" else float(name[3:]),
            }
            chosen = recipes.build(recipes.merge(values, {"calibrate": wide}))
            if size(JobContext(chosen, context.work, setting.console).new_plan(teacher)).bytes <= limit:
                return chosen
        raise UserError("No single format is small enough.")
    granularity = {"rows": "row", "tensors": "tensor"}[case.kind]
    names = ["ternary", "int2", "int3", "int4"]
    chosen = {"plan": "sensitivity", "granularity": granularity, "target_size": limit, "formats": names}
    chosen |= {"sensitivity_tokens": 8192, "sensitivity_points": 3}
    return recipes.build(recipes.merge(values, {"calibrate": chosen}))


def fingerprint(case: Case, recipe: Recipe) -> str:
    """Identity of everything that decides a row, places and times left out."""
    settings = recipe.model_dump(mode="json", exclude={"model", "data", "bench", "compare"}, exclude_defaults=True)
    measured = {"plans": numerics.of_plans()} if recipe.calibrate.plan == "sensitivity" else {}
    return digest_json(
        {
            "recipe": settings,
            "teacher": models.fingerprint(case.teacher.model),
            "text": [data.fingerprint(recipe.data.train), recipe.data.sequence_length],
            "versions": versions(),
            "code": {"formats": numerics.of_formats(), "loss": numerics.of_loss("forward_kl"), **measured},
        }
    )


def make_row(case: Case, recipe: Recipe, setting: Setting) -> Row:
    """Calibrate and distill where that is needed, pack, measure."""
    work = WorkDir(setting.build / "plans" / case.teacher.name / case.name)
    measured_plan = recipe.calibrate.plan == "sensitivity"
    reuse_statistics(case, recipe, work, setting)
    stages = ("calibrate",) * (measured_plan or case.trained) + ("distill",) * case.trained + ("pack",)
    for stage in stages:
        pipeline.run(stage, recipe, work, setting.console)
    keep_statistics(case, work, setting, measured_plan)
    measured = pipeline.run("eval", recipe, work, setting.console)
    packed, calibrated = work.manifest("pack"), work.manifest("calibrate")
    assert isinstance(measured, EvalResult)
    assert packed is not None
    sizes = {key: packed.result[key] for key in ("bytes", "nominal_bits", "real_bits")}
    calibration = calibrated.result if calibrated else {}
    estimates = {key: calibration.get(key) for key in ("estimate", "predicted_kl", "measured_kl")}
    row = {**sizes, **estimates, **scores(measured)}
    shutil.rmtree(work.path, ignore_errors=True)
    return row


def statistics_of(case: Case, setting: Setting) -> Path:
    """What was measured of a teacher with a seed; it serves all budgets."""
    return setting.build / "plans" / case.teacher.name / f"statistics-{case.seed}.safetensors"


def reuse_statistics(case: Case, recipe: Recipe, work: WorkDir, setting: Setting) -> None:
    shared = statistics_of(case, setting)
    if shared.exists() and not work.statistics_file.exists():
        work.write_recipe(recipes.dump(recipe))
        work.statistics_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shared, work.statistics_file)


def keep_statistics(case: Case, work: WorkDir, setting: Setting, measured: bool) -> None:
    if measured:
        shutil.copyfile(work.statistics_file, statistics_of(case, setting))


def cases(teachers: Iterable[Teacher], kinds: Iterable[str], bits: Iterable[float] | None) -> list[Case]:
    """All rows, in the order in which they are made."""
    rows = []
    chosen = None if bits is None else set(bits)
    for teacher in teachers:
        for trained, budgets in ((False, BEFORE), (True, AFTER)):
            for budget in budgets:
                for seed in SEEDS if trained else SEEDS[:1]:
                    rows += [
                        Case(teacher, kind, budget, trained, seed)
                        for kind in kinds
                        if chosen is None or budget in chosen
                    ]
    return rows


def make_rows(wanted: list[Case], setting: Setting) -> None:
    """All rows that are missing or stale, one after the other, each stored when it is finished."""
    for case in wanted:
        recipe = recipe_of(case, setting)
        identity, path = fingerprint(case, recipe), setting.rows / case.teacher.name / f"{case.name}.json"
        if (existing := stored(path)) and existing["fingerprint"] == identity:
            setting.console.say(f"{case.teacher.name}, {case.name}: kept")
            continue
        setting.console.say(f"{case.teacher.name}, {case.name}")
        identification = {"teacher": case.teacher.name, "kind": case.kind, "bits": case.bits, "trained": case.trained}
        identification |= {"seed": case.seed, "steps": recipe.distill.steps if case.trained else 0}
        row = make_row(case, recipe, setting)
        where = {"machine": machine(), "versions": versions(), "commit": commit()}
        write_json(path, {**identification, **row, **where, "fingerprint": identity})


# --- the table ---------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """Markdown of all stored rows, a table for each teacher."""
    parts = []
    for teacher in sorted(path for path in folder.glob("*") if path.is_dir()):
        rows = [row for file in sorted(teacher.glob("*.json")) if (row := stored(file))]
        if rows:
            parts.append(teacher_table(teacher.name, rows))
    return "\n\n".join(parts)


def teacher_table(name: str, rows: list[Row]) -> str:
    groups: dict[tuple[bool, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["trained"], row["bits"], row["kind"]), []).append(row)
    has_tasks = any(row["tasks"] for row in rows)
    head = ["", "bits", "plan", "bytes", "KL", "against interleave", "perplexity"]
    head += ["above chance"] * has_tasks + ["estimate", "predicted"]
    lines = []
    for key in sorted(groups, key=lambda key: (key[0], key[1], KINDS.index(key[2]))):
        lines.append(cells(key, groups[key], groups.get((key[0], key[1], "interleave")), has_tasks))
    text = markdown(head, lines)
    facts = [f"perplexity of the teacher {number(rows[0]['teacher_perplexity'], 4)}"]
    facts += [f"{max(row['steps'] for row in rows)} steps where trained", *sorted({row["machine"] for row in rows})]
    facts += [f"commit {', '.join(sorted({row['commit'] for row in rows if row['commit']}))}"]
    return f"## {name}\n\n{'; '.join(facts)}.\n\n{text}"


def cells(key: tuple[bool, float, str], rows: list[Row], others: list[Row] | None, has_tasks: bool) -> list[str]:
    trained, bits, kind = key
    mean = statistics.mean(row["kl"] for row in rows)
    against = ""
    if others and kind != "interleave":
        against = f"{100 * (mean / statistics.mean(row['kl'] for row in others) - 1):+.0f} %"
    single = {formats.get(name).nominal_bits: name for name in UNIFORM}
    title = kind if kind != "uniform" else f"uniform {single[rows[0]['nominal_bits']]}"
    estimates = sorted({row["estimate"] for row in rows if row["estimate"]})
    predicted = [row["predicted_kl"] for row in rows if row["predicted_kl"] is not None]
    line = ["after" if trained else "before", f"{bits:g}", title, f"{max(row['bytes'] for row in rows):,}"]
    line += [spread([row["kl"] for row in rows]), against, spread([row["perplexity"] for row in rows], 4)]
    if has_tasks:
        line.append(percent(statistics.mean(row["above_chance"] for row in rows)))
    return [*line, ", ".join(estimates), number(statistics.mean(predicted)) if predicted else ""]


def spread(values: list[float], digits: int = 3) -> str:
    mean = number(statistics.mean(values), digits)
    return mean if len(values) == 1 else f"{mean} ± {number(max(values) - min(values), 2)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", help="comma-separated; default: all that are there")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"comma-separated, of {', '.join(KINDS)}")
    parser.add_argument("--bits", help="comma-separated; default: all")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--limit", type=int, default=100, help="items per task")
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows-of-plans", help="folder of the finished rows")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of unfinished ones")
    parser.add_argument("--results", type=Path, default=RESULTS / "plans.md", help="where the table goes")
    parser.add_argument("--table", action="store_true", help="only the table")
    options = parser.parse_args()
    teachers = [world(), *(real_teachers(options.real_data) if options.real_data else [])]
    if options.teachers:
        teachers = [teacher for teacher in teachers if teacher.name in options.teachers.split(",")]
    setting = Setting(options.rows, options.build, options.steps, options.limit, Path())
    if not options.table:
        bits = None if options.bits is None else [float(width) for width in options.bits.split(",")]
        make_rows(cases(teachers, options.kinds.split(","), bits), setting)
    publish("plans", table(options.rows), options.results)


if __name__ == "__main__":
    main()

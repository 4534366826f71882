"""The table of methods: what each one keeps of a teacher at each number of bits.

    make results-methods                       all rows that are not there yet, then the table
    python -m recipes.benchmarks.methods --methods rtn,eakld --bits 1.88,4 --steps 200
    python -m recipes.benchmarks.methods --table          only the table, from the stored rows

A row is a teacher, a method and a number of bits. A finished row is a JSON file with a fingerprint of what decides it:
the recipe, the teacher's files, the text, the tasks, the versions of packages, and what formats and the losses it uses
compute on fixed inputs (`numerics.py`). It is made again only when that changes, or when its file is deleted (each row
knows the commit it was made at); a killed training goes on from its last checkpoint. All trained rows of a
teacher see the same tokens, but for those that say "4 x" or "10 x tokens"; "layer by layer" are 48 more steps of each
layer.
All rows have an int4 embedding, int8 activations and int8 keys and values, and our group size, but for those called
"own defaults": a peer's package as it comes, with its group size and everything but the weights of linear layers left
as it is.

Columns: *above chance* is the average retention above chance; *KL* and *perplexity* are on held-out text, KL against
the teacher; *real bits* are 8 x bytes / all weights; *bytes* are those of everything stored, for peers what their own
packages store of the linear layers, plus our int4 (or the unquantized) embedding and the norms; *minutes* are those of
making the model, not of measuring it. *At equal bytes* is the post-training row (round-to-nearest or a peer, not with
its own defaults) with the lowest KL among those of at most 1.02 times this row's bytes: what the same bytes hold
without training.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgerazor import data, models, pipeline, tasks
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.errors import INTERRUPTED, UserError, usage_error
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.evaluation.measuring import request_of
from edgerazor.recipe import Recipe
from edgerazor.stages import eval as evaluation
from edgerazor.workdir import WorkDir, digest_json, machine, versions, write_json, write_text
from recipes.benchmarks import numerics, results
from recipes.benchmarks.cpu_time import counted
from recipes.benchmarks.folders import BENCHMARKS, BUILD, RESULTS, WORLD
from recipes.benchmarks.results import commit, markdown, number, percent

BITS = (1.58, 1.88, 2.0, 2.79, 3.0, 4.0)
EQUAL_BYTES = 1.02
CALIBRATION_ROWS = 128
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"

Values = dict[str, Any]
Row = dict[str, Any]


def terms(forward: Values | None = None, **weights: float) -> Values:
    """Changes to a recipe: these losses, and what else is said of `forward_kl`."""
    said = {"forward_kl": forward or {}}
    losses = [{"name": name, "weight": weight, **said.get(name, {})} for name, weight in weights.items()]
    return {"distill": {"losses": losses}}


@dataclass(frozen=True)
class Method:
    """A row's method.

    Attributes:
        title: in the table.
        changes: to the teacher's recipe, section by section; None for methods that do not train.
        peer: of `peers.py`.
        own: the peer's own defaults.
        bits: at which it is asked; all by default.
        times: how many times the steps of the other rows.
    """

    title: str
    changes: Values | None = None
    peer: str | None = None
    own: bool = False
    bits: tuple[float, ...] = BITS
    times: int = 1

    @property
    def trains(self) -> bool:
        return self.changes is not None

    @property
    def stages(self) -> tuple[str, ...]:
        """What makes the model."""
        return ("calibrate", "distill", "pack") if self.trains else ("pack",)

    def asked_at(self, bits: float) -> bool:
        """Whether there is such a row; what is not limited by a peer or by time can be at any bits."""
        return bits in self.bits or self.bits == BITS

    def values(self, teacher: Teacher, bits: float, setting: Setting) -> Values:
        """What a row's recipe says beside its teacher's, and before the changes."""
        steps = self.steps_of(teacher, setting)
        return {
            "calibrate": {
                "bits": bits,
                "plan": "interleave",
                "sequences": 64,
                "embedding_format": "int4",
                "activation_bits": 8,
                "kv_bits": 8,
            },
            "distill": {"steps": steps, "evaluate_every": max(1, steps // 2)},
        }

    def steps_of(self, teacher: Teacher, setting: Setting) -> int:
        """Steps of a row's training."""
        return (setting.steps or teacher.steps) * self.times

    def identity(self, setting: Setting) -> list[Any]:
        """Whose program makes a row, and its version.

        Raises:
            UserError: as `peer_version`.
        """
        return [self.peer, self.own, peer_version(self, setting)]

    def make(self, teacher: Teacher, bits: float, setting: Setting, folder: Path) -> Row:
        """Make the model in a folder that is kept until the row is finished, and measure it."""
        return (peer_row if self.peer else our_row)(teacher, self, bits, setting, folder)

    def measure(self, folder: Path, recipe: Recipe, setting: Setting) -> EvalResult:
        """Measure a model outside of a working directory."""
        return evaluation.evaluate_model(str(folder), recipe, setting.console)


WHOLE = (2.0, 3.0, 4.0)
EDGERAZOR = terms(ce=0.1, eakld=2.0, lafd=0.1)
#: EdgeQAT (arXiv 2402.10787) at these bits: learned steps of weights, learned steps and zero points of activations,
#: rounded queries and probabilities, its losses, whose KL is a sum over the tokens of a sequence.
EDGEQAT: Values = {
    "calibrate": {
        "scales": "learned",
        "activation_scales": "asymmetric",
        "init": "rtn",
        "query_bits": 8,
        "probability_bits": 8,
    },
    **terms(
        {"temperature": 2.0, "options": {"reduction": "sum"}},
        ce=0.5,
        forward_kl=0.5,
        qk_entropy=1.0,
        attention_cosine=1.0,
    ),
}
LEARNED: Values = {"calibrate": {"scales": "learned"}, **terms(forward_kl=1.0)}
BLOCKS: Values = recipes.merge(EDGERAZOR, {"distill": {"reconstruct": {"steps": 48, "sequences": 128}}})
CLIPPED: Values = recipes.merge(LEARNED, {"calibrate": {"init": "clip"}})
COMPENSATED: Values = recipes.merge(LEARNED, {"calibrate": {"init": "gptq"}})
PHASES: Values = {"phases": [{"train": "scales", "share": 0.15}, {"train": "all", "share": 0.85}]}
PHASED: Values = recipes.merge(COMPENSATED, {"distill": {"reconstruct": {"steps": 48, "sequences": 128}, **PHASES}})
SCALES: Values = recipes.merge({"distill": {"train": "scales"}}, terms(forward_kl=1.0))
#: To add a method, add a line.
METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest"),
    "gptq": Method("GPTQ (GPTQModel)", peer="gptq", bits=WHOLE),
    "gptq-own": Method("GPTQ, own defaults", peer="gptq", own=True, bits=WHOLE),
    "auto-round": Method("AutoRound", peer="auto-round", bits=WHOLE),
    "auto-round-own": Method("AutoRound, own defaults", peer="auto-round", own=True, bits=WHOLE),
    "hqq": Method("HQQ", peer="hqq", bits=WHOLE),
    "hqq-own": Method("HQQ, own defaults", peer="hqq", own=True, bits=WHOLE),
    "ce": Method("cross-entropy QAT", terms(ce=1.0)),
    "forward-kl": Method("forward KL", terms(forward_kl=1.0)),
    "eakld": Method("CE + EAKLD", terms(ce=0.1, eakld=2.0)),
    "eakld-lafd": Method("CE + EAKLD + LAFD", EDGERAZOR),
    "edgeqat": Method("EdgeQAT recipe", EDGEQAT),
    "learned": Method("learned steps, forward KL", LEARNED),
    "clipped": Method("learned steps from clipped ones, forward KL", CLIPPED, bits=(1.58, 1.88)),
    "compensated": Method("learned steps from GPTQ's codes, forward KL", COMPENSATED, bits=(1.58, 1.88)),
    "phases": Method("phases: GPTQ's codes, layer by layer, scales, all", PHASED, bits=(1.58, 1.88)),
    "scales": Method("scales only, forward KL", SCALES),
    "blocks": Method("layer by layer, then CE + EAKLD + LAFD", BLOCKS, bits=(1.88,)),
    "eakld-lafd-long": Method("CE + EAKLD + LAFD, 4 x tokens", EDGERAZOR, bits=(1.88,), times=4),
    "learned-long": Method("learned steps, forward KL, 4 x tokens", LEARNED, bits=(1.88,), times=4),
    "learned-longer": Method("learned steps, forward KL, 10 x tokens", LEARNED, bits=(1.88,), times=10),
}


@dataclass(frozen=True)
class Teacher:
    """A model with its text, its tasks, and how, and for how many steps of 2,048 tokens, students of it are trained.

    `gguf` is the file that the folder was made from, if any.
    """

    name: str
    model: Path
    recipe: Values
    tasks: tuple[str, ...] = ()
    steps: int = 150
    gguf: Path | None = None


@dataclass
class Setting:
    """Where rows lie and how they are made; `steps` takes the place of each teacher's, `methods` are a table's."""

    rows: Path
    build: Path
    steps: int | None
    limit: int | None
    peers_python: Path
    console: Console = field(default_factory=Console)
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    task_data: Path | None = None
    threads: int | None = None
    llamacpp: Path = BUILD / "llamacpp"


TRAINING: Values = {"batch_size": 8, "learning_rate": 1e-3, "schedule": "cosine", "checkpoint_every": 50}


def world() -> Teacher:
    """The embedded teacher."""
    text = {
        "train": [{"file": str(WORLD / "distill.txt")}],
        "held_out": [{"file": str(WORLD / "heldout.txt")}],
        "sequence_length": 256,
    }
    return Teacher("world", WORLD / "teacher", {"data": text, "distill": TRAINING}, ("world",))


def real_teachers(folder: Path) -> list[Teacher]:
    """The models of a folder of real data: `models/realtext-4m` and `models/stories260K` with their texts.

    Raises:
        UserError: a file is missing.
    """
    four = [folder / "text" / f"{name}.txt" for name in ("tinystories_slice", "wiki", "c4", "tinyshakespeare")]
    made = []
    for name, files, group_size, held_out, steps in (
        ("realtext-4m", four, 256, 0.03, 100),
        ("stories260K", four[:1], 64, 0.05, 150),
    ):
        for path in (folder / "models" / name / "config.json", *files):
            if not path.exists():
                raise usage_error(f"There is no {path}.", "Give the folder with `models` and `text`: --real-data DIR.")
        text = {
            "train": [{"file": str(file)} for file in files],
            "held_out_fraction": held_out,
            "sequence_length": 256,
        }
        values = {"data": text, "calibrate": {"group_size": group_size}, "distill": TRAINING}
        made.append(Teacher(name, folder / "models" / name, values, steps=steps))
    return made


# --- what a row depends on ---------------------------------------------------------------------


def recipe_of(teacher: Teacher, method: Method, bits: float, setting: Setting) -> Recipe:
    """The whole recipe of a row."""
    values: Values = {
        "model": str(teacher.model),
        "pack": {} if method.trains else {"source": "teacher"},
        "eval": {"tasks": list(teacher.tasks), "limit": setting.limit},
        **method.values(teacher, bits, setting),
    }
    if setting.threads:
        values["threads"] = setting.threads
    if setting.task_data:
        values["eval"]["task_data"] = str(setting.task_data)
    if method.peer:
        rounding = {} if method.own else {"activation_bits": 8, "kv_bits": 8}
        values["eval"] |= {"against": str(teacher.model), **rounding}
    return recipes.build(recipes.merge(teacher.recipe, values, method.changes or {}))


def fingerprint(teacher: Teacher, method: Method, bits: float, setting: Setting) -> str:
    """Identity of everything that decides a row, places and times left out."""
    recipe = recipe_of(teacher, method, bits, setting)
    # a field that is as it always is, as one that a later version adds, decides nothing
    left_out = {"model", "data", "bench", "compare", "threads"}
    settings = recipe.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    for section, *places_or_times in (("eval", "against", "task_data"), ("distill", "max_time", "clock")):
        for name in places_or_times:
            settings.get(section, {}).pop(name, None)
    settings["distill"] = settings.get("distill") if method.trains else None
    request = request_of(recipe.eval, recipe.seed)
    measured = data.fingerprint(recipe.data.held_out) if recipe.data.held_out else str(recipe.data.held_out_fraction)
    return digest_json(
        {
            "recipe": settings,
            "peer": method.identity(setting),
            "teacher": models.fingerprint(teacher.model),
            "text": [data.fingerprint(recipe.data.train), measured, recipe.data.sequence_length],
            "tasks": tasks.fingerprint(request) if teacher.tasks else {},
            "versions": versions(),
            "code": code_digest(method, recipe),
        }
    )


def code_digest(method: Method, recipe: Recipe) -> str:
    """Of what the numerics that a row is about compute; of the script that calls a peer, its text."""
    facts: dict[str, str] = {"formats": numerics.of_formats()}
    if method.trains:
        facts |= {term.name: numerics.of_loss(term.name) for term in recipe.distill.losses}
    if method.peer:
        facts["peers"] = (BENCHMARKS / "peers.py").read_text(encoding="utf-8")
    return digest_json(facts)


def peer_version(method: Method, setting: Setting) -> str | None:
    """The installed version of a peer's package.

    Raises:
        UserError: there is no environment with it.
    """
    if method.peer is None:
        return None
    package = {"gptq": "gptqmodel"}.get(method.peer, method.peer)
    code = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        done = subprocess.run([setting.peers_python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        done = None
    if done is None or done.returncode:
        raise UserError(f"{setting.peers_python} has no {package}.", "Make the peers' environment with `make peers`.")
    return done.stdout.strip()


# --- making rows -------------------------------------------------------------------------------


def row_file(teacher: Teacher, name: str, bits: float, setting: Setting) -> Path:
    return setting.rows / teacher.name / f"{name}-{bits:g}.json"


def stored(path: Path) -> Row | None:
    """A row, or None where there is none that can be read."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and "fingerprint" in row else None


def make_rows(teachers: Sequence[Teacher], chosen: Iterable[tuple[str, float]], setting: Setting) -> None:
    """All rows that are missing or stale, one after the other, each stored when it is finished.

    Raises:
        UserError: a peer's package is missing (said before the first row), or a row cannot be made.
    """
    chosen = list(chosen)
    for name in {name for name, _ in chosen}:
        setting.methods[name].identity(setting)
    for teacher in teachers:
        for name, bits in chosen:
            method, path = setting.methods[name], row_file(teacher, name, bits, setting)
            identity = fingerprint(teacher, method, bits, setting)
            if (existing := stored(path)) and existing["fingerprint"] == identity:
                setting.console.say(f"{teacher.name}, {method.title}, {bits:g} bits: kept")
                continue
            setting.console.say(f"{teacher.name}, {method.title}, {bits:g} bits")
            folder = setting.build / teacher.name / f"{name}-{bits:g}-{identity[:8]}"
            row = method.make(teacher, bits, setting, folder)
            identification = {
                "teacher": teacher.name,
                "method": name,
                "bits": bits,
                "steps": method.steps_of(teacher, setting) if method.trains else 0,
            }
            where = {"machine": machine(), "versions": versions(), "commit": commit()}
            write_json(path, {**identification, **row, **where, "fingerprint": identity})
            shutil.rmtree(folder, ignore_errors=True)


def our_row(teacher: Teacher, method: Method, bits: float, setting: Setting, folder: Path) -> Row:
    """Calibrate and distill where the method trains, pack, measure."""
    recipe, work = recipe_of(teacher, method, bits, setting), WorkDir(folder)
    facts = made_by_us(recipe, method.stages, work, setting.console)
    measured = pipeline.run("eval", recipe, work, setting.console)
    assert isinstance(measured, EvalResult)
    return {**facts, **scores(measured)}


def made_by_us(recipe: Recipe, stages: Sequence[str], work: WorkDir, console: Console) -> Row:
    """Run stages, the last of them pack: sizes of the packed model, and seconds of all; those of CPU are recorded."""
    seconds = 0.0
    for stage in stages:
        with counted(work.path, stage):
            result = pipeline.run(stage, recipe, work, console)
        manifest = work.manifest(stage)
        assert manifest is not None
        seconds += getattr(result, "seconds", None) or manifest.seconds  # distill counts across resumes
    packed = work.manifest("pack")
    assert packed is not None
    return {**{key: packed.result[key] for key in ("bytes", "nominal_bits", "real_bits")}, "seconds": seconds}


def peer_row(teacher: Teacher, method: Method, bits: float, setting: Setting, folder: Path) -> Row:
    """Let the package round, and measure what it decodes to; where it cannot, the row says why."""
    recipe = recipe_of(teacher, method, bits, setting)
    rows, decoded = folder / "rows.json", folder / "decoded"
    decoded.mkdir(parents=True, exist_ok=True)
    model, tokenizer = models.load(teacher.model)
    write_json(rows, calibration_rows(recipe, tokenizer))
    command: list[Any] = [
        setting.peers_python,
        BENCHMARKS / "peers.py",
        method.peer,
        teacher.model,
        "--bits",
        int(bits),
    ]
    command += ["--calibration", rows, "--out", decoded]
    command += [] if method.own else ["--group-size", recipe.calibrate.group_size]
    # in a folder of its own, because packages write logs where they are started
    words = [str(Path(word).absolute()) if isinstance(word, Path) else str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        return {"failed": reason(done.stderr) or f"exit code {done.returncode}"}
    report = json.loads((decoded / "peer.json").read_text(encoding="utf-8"))
    sizes = peer_sizes(method, recipe, model, decoded, report)
    measured = method.measure(decoded, recipe, setting)
    package_facts = {"package": report["package"], "group_size": report["group_size"]}
    return {**sizes, **package_facts, "nominal_bits": bits, "seconds": report["seconds"], **scores(measured)}


def reason(printed: str) -> str:
    """The last error that a package printed, or the last thing it said."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (errors or lines or [""])[-1][:300]


def calibration_rows(recipe: Recipe, tokenizer: Any) -> list[list[int]]:
    """The first training rows, the same for every package; short ones left out, because packages drop them."""
    fraction = 0.0 if recipe.data.held_out else recipe.data.held_out_fraction
    length = recipe.data.sequence_length
    rows, _ = data.open_rows(recipe.data.train, tokenizer, data.RowSettings(length, recipe.seed, fraction))
    chosen = [rows.row(index) for index in range(CALIBRATION_ROWS)]
    return [row["input_ids"].tolist() for row in chosen if bool((row["labels"] != data.MASKED).all())]


def peer_sizes(method: Method, recipe: Recipe, model: Any, decoded: Path, report: Row) -> Row:
    """Bytes of a peer's model; rounds its embedding to our int4 in place, unless it is the package as it comes."""
    from edgerazor import allocate

    structure = models.structure(model)
    parameters = sum(p.numel() for p in model.parameters())
    plan = allocate.make_plan(structure.targets, recipe.calibrate)
    tables = [] if method.own else [plan[target.name] for target in structure.targets if target.kind != "linear"]
    round_tables(decoded, tables)
    untouched = parameters - report["linear_weights"] - sum(matrix.rows * matrix.columns for matrix in tables)
    width = next(model.parameters()).element_size()
    total = report["linear_bytes"] + sum(matrix.bytes() for matrix in tables) + width * untouched
    return {"bytes": total, "real_bits": round(8 * total / parameters, 4)}


def round_tables(folder: Path, tables: Sequence[Any]) -> None:
    """Embedding and head of a plain folder as they are after rounding to the plan's formats."""
    from edgerazor import formats

    model, _ = models.load(folder)
    for matrix in tables:
        module = model.get_submodule(matrix.name)
        spec = matrix.spec()
        module.weight.data.copy_(formats.rounded_weight(module.weight.data, spec))
    with models.quiet_transformers():
        model.save_pretrained(folder)


def scores(measured: EvalResult) -> Row:
    """What the table shows of a measurement."""
    mean, text = measured.average, measured.text
    return {
        "above_chance": mean.retention_above_chance if mean else None,
        "above_chance_stderr": mean.retention_stderr if mean else None,
        "tasks": {name: task.score for name, task in measured.tasks.items()},
        "perplexity": text.perplexity if text else None,
        "teacher_perplexity": text.teacher_perplexity if text else None,
        "kl": text.kl if text else None,
        "top1_agreement": text.top1_agreement if text else None,
        "collapsed": any("collapsed" in line for line in (*measured.failures, *measured.notes)),
    }


# --- the table ---------------------------------------------------------------------------------


def table(setting: Setting) -> str:
    """Markdown of all stored rows, a table for each teacher."""
    parts = []
    for folder in sorted(path for path in setting.rows.glob("*") if path.is_dir()):
        rows = [row for file in sorted(folder.glob("*.json")) if (row := stored(file)) and row["method"] in METHODS]
        if rows:
            parts.append(teacher_table(folder.name, rows))
    return "\n\n".join(parts)


def teacher_table(name: str, rows: list[Row]) -> str:
    """One teacher's rows, by bits and then in the order of `METHODS`."""
    order = list(METHODS)
    rows = sorted(rows, key=lambda row: (row["bits"], order.index(row["method"])))
    tasks_of = list(next((row["tasks"] for row in rows if row.get("tasks")), {}))
    head = [
        "bits",
        "method",
        *(["above chance"] if tasks_of else []),
        "KL",
        "perplexity",
        "real bits",
        "at equal bytes",
    ]
    text = markdown(head, [quality_cells(row, rows, bool(tasks_of)) for row in rows])
    made = [row for row in rows if "failed" not in row]
    cost = markdown(
        ["bits", "method", *map(shortened, tasks_of), "bytes", "minutes"], [cost_cells(row, tasks_of) for row in made]
    )
    facts = [f"perplexity of the teacher {teacher_perplexities(rows)}", f"{step_counts(rows)} steps where trained"]
    facts += sorted({row["machine"] for row in rows})
    facts += [f"commit {', '.join(sorted({row['commit'] for row in rows if row['commit']}))}"]
    facts += sorted({row["package"] for row in rows if "package" in row})
    what = "Scores, size and time" if tasks_of else "Size and time"
    return f"## {name}\n\n{'; '.join(facts)}.\n\n{text}\n\n{what}:\n\n{cost}"


def teacher_perplexities(rows: list[Row]) -> str:
    """The teacher's; where rows were measured on other held-out text than most, theirs and the methods' names, too."""
    titles: dict[str, dict[str, None]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        if row.get("teacher_perplexity"):
            perplexity = number(row["teacher_perplexity"], 4)
            titles.setdefault(perplexity, {})[METHODS[row["method"]].title] = None
            counts[perplexity] += 1
    (usual, _), *others = counts.most_common() or [("unknown", 0)]
    said = [f"{value} on the other held-out text of new rows ({', '.join(titles[value])})" for value, _ in others]
    return ", ".join([usual, *said])


def step_counts(rows: list[Row]) -> str:
    """The steps of the trained rows, the fewest first."""
    return " or ".join(str(count) for count in sorted({row["steps"] for row in rows if row["steps"]})) or "no"


def quality_cells(row: Row, rows: list[Row], has_tasks: bool) -> list[str]:
    """What a row keeps of the teacher, or why it could not be made."""
    cells = [f"{row['bits']:g}", METHODS[row["method"]].title]
    if "failed" in row:
        return [*cells, *[""] * (3 + has_tasks), f"does not run: {row['failed'].replace('|', '/')}"]
    if has_tasks:
        cells.append(percent(row["above_chance"]))
    return [*cells, number(row["kl"]), number(row["perplexity"], 4), f"{row['real_bits']:.2f}", equal_bytes(row, rows)]


def cost_cells(row: Row, task_names: list[str]) -> list[str]:
    """Its score in each task, its bytes, and the minutes that making it took."""
    cells = [f"{row['bits']:g}", METHODS[row["method"]].title]
    cells += [percent(row["tasks"].get(task)) for task in task_names]
    return [*cells, f"{row['bytes']:,}", f"{row['seconds'] / 60:.1f}"]


def equal_bytes(row: Row, rows: list[Row]) -> str:
    """The best post-training row that is no larger, in words (see the first comment); empty for those rows."""
    if not METHODS[row["method"]].trains:
        return ""
    without = [other for other in rows if post_training(other) and other["bytes"] <= EQUAL_BYTES * row["bytes"]]
    if not without:
        return "none so small"
    best = min(without, key=lambda other: other["kl"])
    retention = f"{percent(best['above_chance'])}, " if best["above_chance"] is not None else ""
    return f"{METHODS[best['method']].title} {best['bits']:g}: {retention}KL {number(best['kl'])}"


def post_training(row: Row) -> bool:
    method = METHODS[row["method"]]
    return not method.trains and not method.own and row.get("kl") is not None


def shortened(task: str) -> str:
    return task.removeprefix("world_")


def publish(text: str, path: Path) -> None:
    """Put the table between its two marks in a Markdown file, at its end where they are missing."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Methods\n"
    if BEGIN not in old:
        write_text(path, f"{old.rstrip()}\n\n## Methods (`make results-methods`)\n\n{BEGIN}\n{END}\n")
    results.publish("methods", text, path)


# --- the command line --------------------------------------------------------------------------


def choose(methods: str | None, bits: str | None) -> list[tuple[str, float]]:
    """Pairs of method and bits, by bits and then by method.

    Raises:
        UserError: there is no such method, or it is not asked at these bits.
    """
    from edgerazor.registry import unknown

    names = methods.split(",") if methods else list(METHODS)
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    try:
        wanted = tuple(float(width) for width in bits.split(",")) if bits else BITS
    except ValueError:
        raise usage_error(f"--bits wants comma-separated numbers, and got {bits!r}.") from None
    pairs = [(name, width) for width in wanted for name in names if METHODS[name].asked_at(width)]
    if not pairs:
        raise usage_error(f"None of {', '.join(names)} is asked at {bits} bits.")
    return pairs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", help="comma-separated; default: all that are there")
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join(METHODS)}")
    parser.add_argument("--bits", help="comma-separated; default: 1.58, 1.88, 2, 2.79, 3, 4")
    parser.add_argument("--steps", type=int, help="of each training, instead of the teacher's own 100 or 150")
    parser.add_argument("--limit", type=int, default=250, help="items per task")
    parser.add_argument("--real-data", type=Path, help="folder with `models` and `text` of real teachers")
    parser.add_argument("--rows", type=Path, default=RESULTS / "rows", help="folder of the finished rows")
    parser.add_argument("--build", type=Path, default=BUILD / "methods", help="folder of unfinished ones")
    parser.add_argument("--peers-python", type=Path, default=BUILD / "peers" / "bin" / "python")
    parser.add_argument("--results", type=Path, default=RESULTS / "methods.md", help="where the table goes")
    parser.add_argument("--table", action="store_true", help="only the table")
    options = parser.parse_args(arguments)
    setting = Setting(options.rows, options.build, options.steps, options.limit, options.peers_python)
    try:
        if not options.table:
            make_rows(find_teachers(options), choose(options.methods, options.bits), setting)
        text = table(setting)
        publish(text, options.results)
        print(text)
    except UserError as error:
        setting.console.error(error)
        return error.code
    except KeyboardInterrupt:
        setting.console.say("Interrupted; finished rows and the last checkpoint are kept.")
        return INTERRUPTED
    return 0


def find_teachers(options: argparse.Namespace) -> list[Teacher]:
    """The teachers that were asked for.

    Raises:
        UserError: there is no such teacher here.
    """
    from edgerazor.registry import unknown

    known = {
        teacher.name: teacher for teacher in (world(), *(real_teachers(options.real_data) if options.real_data else ()))
    }
    names = options.teachers.split(",") if options.teachers else list(known)
    for name in names:
        if name not in known:
            raise unknown("teacher", name, known)
    return [known[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())

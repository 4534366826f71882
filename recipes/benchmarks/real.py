"""The table of real models: what every method keeps of them at each number of real bits.

    make results-real                          all rows that are not there yet, then tables, plot and page
    python -m recipes.benchmarks.real --models smollm2-135m --methods rtn,distill --bits 2.4 --minutes 10
    python -m recipes.benchmarks.real --table  only tables and plot, from the stored rows

A row is a model, a method and a number of bits. Like those of `methods.py` it is a JSON file with a fingerprint of what
decides it, made one at a time, and kept; a killed training goes on from its last checkpoint. What cannot be made is a
row that says why. The models are those of `make real-models`.

* *Ours* are asked for real bits (8 x bytes of the packed weight files / all weights) and, where they train, for minutes
  of CPU: `distill.max_time` is that time divided by the number of threads. Everything else is the default.
* *Peers* (`make peers`) round the linear layers at their 2, 3 and 4 bits: in the largest groups that divide the rows of
  the model, with our int4 embedding, 8-bit activations and cache; and as their packages come.
* *llama.cpp's types* (`make llamacpp`) are made by `llama-quantize` from the model's GGUF file, widened to bfloat16,
  with an importance matrix of the same text that the peers are calibrated on, and read back. Where rows are no multiple
  of 256 the tool takes other types for them; the table says which.

*Above chance* is the sum over five tasks of score minus chance, relative to the teacher's; its standard error is that
of the model's own scores, of one row. *KL* (in nats), *perplexity* and *top-1* agreement with the teacher are on
held-out text of two kinds. *Real bits* count everything that is stored but the tokenizer. *Minutes* are of CPU, those
of making the model, whatever else the machine does (`distill.clock: cpu`): steps that an interruption lost count, what
was measured once for several rows counts in each.

All rows are measured in the native engine: packed models as they are, all others in a copy of 8 bits.
"""

from __future__ import annotations

import argparse
import filecmp
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgerazor import models, pipeline, transformers_plugin
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.errors import INTERRUPTED, UserError, usage_error
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.locks import HeldError
from edgerazor.models.gguf_teacher import folder_of_gguf
from edgerazor.packaging.native_teacher import EIGHT_BITS
from edgerazor.recipe import Recipe
from edgerazor.registry import unknown
from edgerazor.stages import eval as evaluation
from edgerazor.tasks import TaskScore
from edgerazor.workdir import WorkDir, share, write_json, write_text
from recipes.benchmarks import cpu_time, methods, real_models, real_tables
from recipes.benchmarks.folders import BENCHMARKS, BUILD, CHECKOUT, RESULTS
from recipes.benchmarks.methods import Method, Row, Setting, Teacher, Values
from recipes.benchmarks.sizes import File, theirs

BITS = (2.1, 2.4, 3.1, 4.1)
MINUTES = (10.0, 30.0, 100.0)
SEEDS = (0, 1)
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "openbookqa")
TEXTS = ("tinystories_slice", "wiki", "c4", "tinyshakespeare")
#: Of these, the end is held out.
HELD_OUT = ("wiki", "c4")
HELD_OUT_SHARE = 0.06
#: llama.cpp's types, with bits a weight of their own blocks.
TYPES = {
    "TQ1_0": 1.6875,
    "TQ2_0": 2.0625,
    "IQ2_XXS": 2.0625,
    "IQ2_XS": 2.3125,
    "IQ2_M": 2.5,
    "Q2_K": 2.625,
    "IQ3_XXS": 3.0625,
    "Q3_K_M": 3.4375,
    "IQ4_XS": 4.25,
    "Q4_K_M": 4.5,
}
LAYERS: Values = {"distill": {"steps": 1, "reconstruct": {}}}
#: Scales by the published rule, and no rotation; GPTQ in a plan that measures nothing.
PUBLISHED: Values = {"calibrate": {"init": "rtn"}}
GPTQ_ALIKE: Values = {"calibrate": {"init": "gptq", "plan": "interleave"}}
#: Of all rows: one cheap analysis serves all plans, and so many held-out sequences of 256 tokens are read.
MEASURING: Values = {
    "calibrate": {"sensitivity": "fisher", "sensitivity_tokens": 5098},
    "eval": {"text_sequences": 16},
}
#: Of each task.
ITEMS = 200
#: Tokens that llama-imatrix reads at once.
IMATRIX_CONTEXT = 256


@dataclass(frozen=True)
class RealMethod(Method):
    """A method of this table.

    Attributes:
        family: by which it is asked for, too, and drawn.
        calibrated: whether its plan is by sensitivity where it does not train.
        minutes: of CPU that it trains; None for other methods.
        seed: of ours.
        quantize: llama.cpp's type.
        nominal: its bits are nominal ones.
    """

    family: str = ""
    calibrated: bool = False
    minutes: float | None = None
    seed: int = 0
    quantize: str | None = None
    nominal: bool = False

    @property
    def trains(self) -> bool:
        return self.minutes is not None or self.family == "layers"

    @property
    def stages(self) -> tuple[str, ...]:
        return ("calibrate", "pack") if self.calibrated else super().stages

    @property
    def is_ours(self) -> bool:
        return self.peer is None and self.quantize is None and self.family != "teacher"

    def values(self, teacher: Teacher, bits: float, setting: Setting) -> Values:
        """Bits, time and seed of ours; groups of peers."""
        if self.peer is not None:
            group_size = fitting_group_size(teacher.model)
            return {"calibrate": {"bits": bits, "plan": "interleave", "group_size": group_size}}
        if not self.is_ours:
            return {}
        values: Values = {"seed": self.seed, "calibrate": {"real_bits": bits}}
        if not self.trains and not self.calibrated:
            values["calibrate"]["plan"] = "interleave"
        if self.minutes is not None:
            values["distill"] = {"max_time": 60 * self.minutes / (setting.threads or 1), "clock": "cpu"}
        if self.nominal:
            values["calibrate"] = {"bits": bits}
        return values

    def steps_of(self, teacher: Teacher, setting: Setting) -> int:
        """None are asked for: time is."""
        return 0

    def identity(self, setting: Setting) -> list[Any]:
        """Whose program makes a row, and its version; of ours, how long it trains.

        Raises:
            UserError: the program is not there.
        """
        if self.quantize is not None:
            return [self.quantize, llamacpp_version(setting)]
        return [*super().identity(setting), self.minutes]

    def make(self, teacher: Teacher, bits: float, setting: Setting, folder: Path) -> Row:
        """As all methods, but what cannot be made is a row that says why; what another process makes is none."""
        named = {"title": self.title, "family": self.family, "seed": self.seed}
        began = cpu_time.of_programs()
        try:
            if self.quantize is not None:
                row = type_row(teacher, self, setting, folder)
            elif self.peer is not None:
                row = methods.peer_row(teacher, self, bits, setting, folder)
            elif self.is_ours:
                row = our_row(teacher, self, bits, setting, folder)
            else:
                row = teacher_row(teacher, self, setting)
        except UserError as error:
            if error.code == INTERRUPTED or isinstance(error, HeldError):
                raise
            return {**named, "failed": error.message}
        if "cpu_seconds" not in row:
            row["cpu_seconds"] = cpu_time.of_programs() - began
        return {**named, **row}

    def measure(self, folder: Path, recipe: Recipe, setting: Setting) -> EvalResult:
        """Measure a model; the teacher's own scores are known from its row."""
        return measured(folder, recipe, setting, known_scores(setting, Path(recipe.model)))


def all_methods(minutes: Sequence[float] = MINUTES) -> dict[str, RealMethod]:
    """Every method by its name, in the order of the table."""
    made = {
        "teacher": RealMethod("teacher", bits=(16.0,), family="teacher"),
        "rtn": RealMethod("round to nearest, mixed alike", PUBLISHED, bits=BITS, family="rtn"),
        "rounded": RealMethod("least error, rotated, mixed alike", bits=BITS, family="rounded"),
        "planned": RealMethod("least error, rotated, by sensitivity", bits=BITS, family="planned", calibrated=True),
        "gptq": RealMethod("--init gptq", {"calibrate": {"init": "gptq"}}, bits=BITS, family="gptq", calibrated=True),
        "gptq-alike": RealMethod("--init gptq, mixed alike", GPTQ_ALIKE, bits=BITS, family="gptq", calibrated=True),
        "two-bits": RealMethod("distilled, --bits 2", {}, bits=(2.0,), family="two-bits", minutes=84, nominal=True),
    }
    for seed in SEEDS:
        made[f"layers-seed{seed}"] = RealMethod("layer by layer", LAYERS, bits=BITS, family="layers", seed=seed)
    for budget in minutes:
        for seed in SEEDS:
            made[f"distill-{budget:g}m-seed{seed}"] = RealMethod(
                f"distilled, {budget:g} CPU minutes", {}, bits=BITS, family="distill", minutes=budget, seed=seed
            )
    for peer, title in (("gptq", "GPTQ (GPTQModel)"), ("auto-round", "AutoRound"), ("hqq", "HQQ")):
        for own in (False, True):
            name = f"peer-{peer}{'-own' if own else ''}"
            said = f"{title}, own defaults" if own else title
            made[name] = RealMethod(said, peer=peer, own=own, bits=methods.WHOLE, family=f"peer-{peer}")
    for kind, bits in TYPES.items():
        made[f"llamacpp-{kind}"] = RealMethod(f"llama.cpp {kind}", bits=(bits,), family="llamacpp", quantize=kind)
    return made


def measured(
    folder: Path, recipe: Recipe, setting: Setting, teacher_scores: Mapping[str, TaskScore] | None
) -> EvalResult:
    """Measure a model beside the teacher, in the engine that computes packed ones.

    Args:
        folder: the model, packed or not.
        recipe: of the row; its model is the teacher.
        setting: of the table.
        teacher_scores: task -> the teacher's; nothing is compared of tasks that are not there.
    """
    against = {"against": recipe.model, "activation_bits": 16, "kv_bits": 16}  # packed ones say themselves
    beside_teacher = recipe.model_copy(update={"eval": recipe.eval.model_copy(update=against)})
    with packed_folder(folder, setting) as packed:
        return evaluation.evaluate_model(str(packed), beside_teacher, setting.console, teacher_scores)


@contextmanager
def packed_folder(folder: Path, setting: Setting) -> Iterator[Path]:
    """A packed model as it is; any other rounded to 8 bits, with which the native engine is as fast, and deleted after.

    All rows are measured by one engine then, with 8-bit activations and cache. The rounding leaves a KL of some
    thousandths (`recipes/results/writing.md`); the teacher's own row says how much.
    """
    if transformers_plugin.is_packed(folder):
        yield folder
        return
    setting.build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setting.build) as place:
        values = {"model": str(folder), "calibrate": EIGHT_BITS.model_dump(mode="json", exclude_unset=True)}
        values |= {"pack": {"source": "teacher"}, "threads": setting.threads}
        work = WorkDir(Path(place) / "eight-bits")
        pipeline.run("pack", recipes.build(values), work, setting.console)
        yield work.folder("pack")


# --- what a row is made from ---------------------------------------------------------------------


@functools.cache
def fitting_group_size(model: Path) -> int:
    """The largest power of two, from 8 to our group size, that divides the rows of all linear layers; else 8."""
    structure = models.structure(models.load(model)[0])
    common = math.gcd(*(target.columns for target in structure.targets if target.kind == "linear"))
    return max(8, min(common & -common, recipes.build({"model": str(model)}).calibrate.group_size))


def weights_of(model: Path) -> int:
    """How many weights a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in models.load(model)[0].parameters())


def llamacpp_version(setting: Setting) -> str:
    """The version of llama.cpp's tools.

    Raises:
        UserError: they are not there.
    """
    for name in ("llama-quantize", "llama-imatrix"):
        if not (setting.llamacpp / "tools" / name).exists():
            raise UserError(f"{setting.llamacpp / 'tools'} has no {name}.", "Build llama.cpp with `make llamacpp`.")
    pinned = (BENCHMARKS / "llamacpp.txt").read_text(encoding="utf-8")
    version = re.search(r"^llama-cpp-python==(\S+)", pinned, re.MULTILINE)
    assert version is not None
    return f"llama.cpp of llama-cpp-python {version[1]}"


def teacher_file(setting: Setting, name: str) -> Path:
    return setting.rows / name / "teacher-16.json"


def known_scores(setting: Setting, model: Path) -> Mapping[str, TaskScore] | None:
    """The teacher's scores from its row; None where there is no row of this model."""
    for file in setting.rows.glob("*/teacher-16.json"):
        row = methods.stored(file)
        if row and row.get("model") == model_name(model) and "scores" in row:
            return {name: TaskScore(**score) for name, score in row["scores"].items()}
    return None


def model_name(model: Path) -> str:
    """Identity of a model's folder."""
    return f"{model.name} {models.fingerprint(model)}"


def split_texts(folder: Path, target: Path) -> Values:
    """The `data` section: the texts to learn from, and the ends of two of them to measure on.

    Args:
        folder: of the texts.
        target: where the parts are written, if they are not there yet.

    Raises:
        UserError: a text is missing.
    """
    target.mkdir(parents=True, exist_ok=True)
    train, held_out = [], []
    for name in TEXTS:
        path = folder / f"{name}.txt"
        if not path.exists():
            raise usage_error(f"There is no {path}.", "Give the folder with `text` and `eval`: --real-data DIR.")
        if name not in HELD_OUT:
            train.append({"file": str(path.absolute())})
            continue
        text = path.read_text(encoding="utf-8")
        cut = text.index("\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1
        for part, content, sources in (("train", text[:cut], train), ("held_out", text[cut:], held_out)):
            file = target / f"{name}-{part}.txt"
            if not (file.exists() and file.read_text(encoding="utf-8") == content):
                write_text(file, content)
            sources.append({"file": str(file.absolute())})
    return {"train": train, "held_out": held_out, "sequence_length": 256}


# --- making rows -----------------------------------------------------------------------------------


def teacher_row(teacher: Teacher, method: RealMethod, setting: Setting) -> Row:
    """The teacher's own scores, which all others are compared with: of its 8-bit copy, whose KL to it is the row's."""
    recipe = methods.recipe_of(teacher, method, 16.0, setting)
    result = measured(teacher.model, recipe, setting, {})
    known = {name: asdict(TaskScore(task.score, task.stderr, task.metric, True)) for name, task in result.tasks.items()}
    size = sum(file.stat().st_size for file in teacher.model.glob("*.safetensors"))
    facts = {"bytes": size, "origin": models.gguf_origin(teacher.model), "model": model_name(teacher.model)}
    chances = {name: task.chance for name, task in result.tasks.items()}
    bits = round(8 * size / weights_of(teacher.model), 4)
    row = {**facts, "real_bits": bits, "cpu_seconds": 0.0, "scores": known, "chances": chances}
    row["items"] = {name: task.items for name, task in result.tasks.items()}
    of_eight_bits = methods.scores(result)
    return {**row, **of_eight_bits, "perplexity": of_eight_bits["teacher_perplexity"]}


def our_row(teacher: Teacher, method: RealMethod, bits: float, setting: Setting, folder: Path) -> Row:
    """Run the method's stages and measure what is packed; what calibrate measured serves all rows of a model."""
    recipe, work = methods.recipe_of(teacher, method, bits, setting), WorkDir(folder)
    measurements = setting.build / teacher.name / f"measured-{recipe.seed}"
    lend(measurements, recipe, work)
    facts = methods.made_by_us(recipe, method.stages, work, setting.console)
    seconds = cpu_time.stored(work.path)
    used = sum(seconds.values()) + seconds_of_lent(measurements, work, seconds.get("calibrate", 0.0))
    measured = method.measure(work.folder("pack"), recipe, setting)
    return {**facts, "cpu_seconds": round(used, 3), **curve(work), **methods.scores(measured)}


def curve(work: WorkDir) -> Row:
    """Held-out KL over tokens while a row was trained; nothing where it was not."""
    if not work.metrics_file.exists():
        return {}
    lines = [json.loads(line) for line in work.metrics_file.read_text(encoding="utf-8").splitlines()]
    return {"curve": [[line["tokens"], round(line["kl"], 4)] for line in lines if "kl" in line]}


def lend(measurements: Path, recipe: Recipe, work: WorkDir) -> None:
    """Begin calibrate with what it measured for an earlier row, as after an interruption."""
    statistics = work.progress("calibrate", work.statistics_file.name)
    if (measurements / statistics.name).exists() and not work.statistics_file.exists() and not statistics.exists():
        statistics.parent.mkdir(parents=True, exist_ok=True)
        work.write_recipe(recipes.dump(recipe))
        share(measurements / statistics.name, statistics)


def seconds_of_lent(measurements: Path, work: WorkDir, seconds: float) -> float:
    """CPU seconds of an earlier row's calibrate for what this one used; keeps what was measured now, in `seconds`."""
    statistics = work.statistics_file
    if not statistics.exists():
        return 0.0
    stored, record = measurements / statistics.name, measurements / "seconds.json"
    if stored.exists() and filecmp.cmp(stored, statistics, shallow=False):
        first = json.loads(record.read_text(encoding="utf-8"))
        return 0.0 if first["row"] == work.path.name else float(first["seconds"])
    measurements.mkdir(parents=True, exist_ok=True)
    stored.unlink(missing_ok=True)
    share(statistics, stored)
    write_json(record, {"seconds": seconds, "row": work.path.name})
    return 0.0


def type_row(teacher: Teacher, method: RealMethod, setting: Setting, folder: Path) -> Row:
    """Let llama.cpp quantize the model's GGUF file, read that back, and measure it."""
    if teacher.gguf is None:
        return {"failed": "llama.cpp's types are made from a GGUF file, and this model came without one"}
    assert method.quantize is not None
    recipe = methods.recipe_of(teacher, method, TYPES[method.quantize], setting)
    wide, matrix = importance_matrix(teacher, recipe, setting)
    made = folder / f"{method.quantize}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(setting.threads or os.cpu_count() or 1)
    tool(setting, "llama-quantize", "--imatrix", matrix, wide, made, method.quantize, threads)
    facts: File = theirs(method.title, made)
    decoded = folder_of_gguf(made, setting.console)
    try:
        measured = method.measure(decoded, recipe, setting)
    finally:
        shutil.rmtree(decoded, ignore_errors=True)
    sizes = {"bytes": facts.tensors, "real_bits": round(8 * facts.tensors / weights_of(teacher.model), 4)}
    types = {"types": f"{facts.linear}; embedding {facts.embedding}", "package": llamacpp_version(setting)}
    return {**sizes, **types, **methods.scores(measured)}


def importance_matrix(teacher: Teacher, recipe: Recipe, setting: Setting) -> tuple[Path, Path]:
    """The model's GGUF file, in bfloat16 as the teacher's folder is, and its importance matrix; made once."""
    folder = setting.build / teacher.name / "llamacpp"
    folder.mkdir(parents=True, exist_ok=True)
    wide, matrix, text = folder / "bf16.gguf", folder / "imatrix.gguf", folder / "text.txt"
    threads = str(setting.threads or os.cpu_count() or 1)
    if not wide.exists():
        half = folder / "unfinished.gguf"
        tool(setting, "llama-quantize", "--allow-requantize", teacher.gguf, half, "BF16", threads)
        os.replace(half, wide)
    if not matrix.exists():
        tokenizer = models.load_tokenizer(teacher.model)
        rows = methods.calibration_rows(recipe, tokenizer)
        write_text(text, "\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows))
        half = folder / "unfinished-imatrix.gguf"
        words = ["-m", wide, "-f", text, "-o", half, "-c", str(IMATRIX_CONTEXT), "-t", threads, "--no-ppl"]
        tool(setting, "llama-imatrix", *words)
        os.replace(half, matrix)
    return wide, matrix


def tool(setting: Setting, name: str, *words: Any) -> None:
    """Run one of llama.cpp's tools.

    Raises:
        UserError: it fails, with the last thing that it said.
    """
    program = (setting.llamacpp / "tools" / name).absolute()
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} fails: {methods.reason(done.stderr) or f'exit code {done.returncode}'}")


def make_rows(teachers: Sequence[Teacher], chosen: Iterable[tuple[str, float]], setting: Setting) -> None:
    """All rows that are missing or stale; the teacher's first, those whose programs are missing left out.

    Raises:
        UserError: a teacher cannot be measured.
    """
    there = []
    missing: dict[str, None] = {}
    for name, bits in chosen:
        try:
            setting.methods[name].identity(setting)
        except UserError as error:
            missing[f"{error.message} {error.hint or ''}".strip()] = None
        else:
            there.append((name, bits))
    for sentence in missing:
        setting.console.warn(f"Rows are left out: {sentence}")
    for teacher in teachers:
        methods.make_rows([teacher], [("teacher", 16.0)], setting)
        row = methods.stored(teacher_file(setting, teacher.name))
        if row is None or "failed" in row:
            raise UserError(f"{teacher.name} cannot be measured: {(row or {}).get('failed', 'there is no row')}.")
        methods.make_rows([teacher], there, setting)


# --- the command line --------------------------------------------------------------------------------


def find_teachers(options: argparse.Namespace) -> list[Teacher]:
    """The models that were asked for.

    Raises:
        UserError: there is no such model here, or a text is missing.
    """
    folders = {name: (folder, {}) for name, folder in real_models.made_folders(folder=options.folder).items()}
    names = options.models.split(",") if options.models else list(folders)
    if not names:
        raise usage_error(f"There are no models in {options.folder}.", "Make them with `make real-models`.")
    if options.real_data is None:
        raise usage_error("There is no text.", "Give the folder with `text` and `eval`: --real-data DIR.")
    made = options.real_data / "models"
    for folder in sorted(path for path in made.glob("*") if (path / "config.json").exists()):
        folders.setdefault(folder.name, (folder, {"calibrate": {"group_size": 64}}))
    texts = split_texts(options.real_data / "text", options.build / "text")
    teachers = []
    for name in names:
        if name not in folders:
            raise unknown("model", name, folders)
        folder, values = folders[name]
        file = options.folder / f"{name}.gguf"
        gguf = file if file.exists() else None
        teachers.append(
            Teacher(name, folder.absolute(), recipes.merge(MEASURING, {"data": texts}, values), TASKS, gguf=gguf)
        )
    return teachers


def choose(known: Mapping[str, RealMethod], wanted: str | None, bits: str | None) -> list[tuple[str, float]]:
    """Pairs of method and bits, in the order of the methods.

    Args:
        known: the methods.
        wanted: comma-separated names or families; all when absent.
        bits: comma-separated, of ours; of the others, those whose own bits are between the same whole numbers.

    Raises:
        UserError: there is no such method, or no such row.
    """
    families = {method.family for method in known.values()}
    words = wanted.split(",") if wanted else list(known)
    for word in words:
        if word not in known and word not in families:
            raise unknown("method", word, [*known, *families])
    try:
        targets = tuple(float(width) for width in bits.split(",")) if bits else BITS
    except ValueError:
        raise usage_error(f"--bits wants comma-separated numbers, and got {bits!r}.") from None
    near = {max(2, int(target)) for target in targets}
    pairs = []
    for name, method in known.items():
        if name == "teacher" or not (name in words or method.family in words):
            continue
        if method.is_ours and not method.nominal:
            pairs += [(name, target) for target in targets]
        else:
            pairs += [(name, own) for own in method.bits if max(2, int(own)) in near]
    if not pairs and words != ["teacher"]:
        raise usage_error(f"None of {', '.join(words)} is asked at {bits} bits.")
    return pairs


def parser() -> argparse.ArgumentParser:
    """The options."""
    shared = CHECKOUT.parent / "shared" / "data"
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", help="comma-separated; default: those of `make real-models`")
    made.add_argument("--methods", help=f"comma-separated names or families, of {', '.join(all_methods())}")
    made.add_argument("--bits", help="comma-separated real bits of ours; default: 2.1, 2.4, 3.1, 4.1")
    made.add_argument("--minutes", help="comma-separated CPU minutes of distilled rows; default: 10, 30, 100")
    made.add_argument("--limit", type=int, default=ITEMS, help="items per task; 0 for all; default: 200")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    made.add_argument("--real-data", type=Path, default=shared if shared.is_dir() else None)
    made.add_argument("--folder", type=Path, default=real_models.FOLDER, help="of the models")
    made.add_argument("--rows", type=Path, default=RESULTS / "rows-of-real", help="folder of the finished rows")
    made.add_argument("--build", type=Path, default=BUILD / "real", help="folder of unfinished ones")
    made.add_argument("--peers-python", type=Path, default=BUILD / "peers" / "bin" / "python")
    made.add_argument("--llamacpp", type=Path, default=BUILD / "llamacpp", help="what `make llamacpp` made")
    made.add_argument("--results", type=Path, default=RESULTS / "real.md", help="the page; its picture lies beside it")
    made.add_argument("--table", action="store_true", help="only tables and plot")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(arguments)
    console = Console()
    try:
        budgets = numbers(options.minutes) or MINUTES
        known = all_methods(budgets)
        setting = Setting(options.rows, options.build, None, options.limit or None, options.peers_python, console)
        setting = replace(setting, methods=known, threads=options.threads, llamacpp=options.llamacpp)
        if not options.table:
            # what is read back of llama.cpp's files is deleted after it was measured, and is not for the user's cache
            os.environ["EDGERAZOR_CACHE"] = str((options.build / "cache").absolute())
            os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
            chosen = choose(known, options.methods, options.bits)
            teachers = find_teachers(options)
            setting.task_data = (options.real_data / "eval").absolute()
            make_rows(teachers, chosen, setting)
        print(real_tables.publish(options.rows, list(known), options.results))
    except UserError as error:
        console.error(error)
        return error.code
    except KeyboardInterrupt:
        console.say("Interrupted; finished rows and the last checkpoint are kept.")
        return INTERRUPTED
    return 0


def numbers(text: str | None) -> tuple[float, ...]:
    """Comma-separated numbers above zero.

    Raises:
        UserError: they are none.
    """
    try:
        values = tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        values = (0.0,)
    if any(not 0 < value < math.inf for value in values):
        raise usage_error(f"--minutes wants comma-separated numbers above zero, and got {text!r}.")
    return values


if __name__ == "__main__":
    sys.exit(main())

"""A report as a page: one HTML file that needs nothing else, or Markdown.

Everything that is shown passes Jinja's autoescape, or in Markdown the filter `md`; names and texts of strangers are
bounded and without control characters before that. There is no script, and a policy in the page forbids any request.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from edgerazor.console import duration, megabytes, percent
from edgerazor.errors import harmless, plain
from edgerazor.evaluation.eval_result import EvalResult, Measured
from edgerazor.packaging import markdown
from edgerazor.report import charts
from edgerazor.report.card_results import retention_stderr
from edgerazor.report.charts import Chart, Dot, Part, Point, Speed, Table
from edgerazor.report.heatmap import colour, is_light
from edgerazor.report.job_report import JobReport, Report, StageReport
from edgerazor.report.plan_summary import PlanSummary
from edgerazor.report.side_by_side import SideBySide
from edgerazor.report.summary import ModelRow
from edgerazor.report.tables import CLASSES

#: Characters of a text of a model that are shown.
LONGEST_TEXT = 1200
#: Points of the Pareto plot, models of another one, engines and tasks that are drawn.
MOST_POINTS, MOST_SERIES, MOST_ENGINES, MOST_TASKS = 40, 12, 16, 40


@dataclass
class Figure:
    """A number to see first: what it is, and the command that made it, or makes it."""

    name: str
    value: str
    detail: str
    command: str
    known: bool = True


@dataclass
class Heat:
    """Bits of a matrix as a cell: its number and its colours."""

    text: str
    back: str = ""
    front: str = ""


@dataclass
class Continuation:
    """A prompt and both continuations: what they share, and what follows in each."""

    prompt: str
    shared: str
    teacher: str
    student: str
    verdict: str


@dataclass
class JobView:
    """A job as the templates show it."""

    report: JobReport
    figures: list[Figure]
    charts: dict[str, Chart | None]
    tables: dict[str, Table | None]
    heat_columns: list[str] = field(default_factory=list)
    heat_rows: list[tuple[str, list[Heat]]] = field(default_factory=list)
    heat_ends: list[tuple[str, Heat, str]] = field(default_factory=list)
    heat_sentence: str = ""
    texts: list[Continuation] = field(default_factory=list)
    texts_sentence: str = ""

    def stage(self, name: str) -> StageReport | None:
        return next((stage for stage in self.report.stages if stage.name == name), None)


def render_html(report: Report) -> str:
    """The page."""
    return environment().get_template("page.html.jinja").render(view(report))


def render_markdown(report: Report) -> str:
    """The same as Markdown, its charts as tables."""
    return environment().get_template("page.md.jinja").render(view(report))


def environment() -> jinja2.Environment:
    """Of the templates beside this file: HTML is escaped by itself, Markdown by the filters `md` and `code`."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("edgerazor.report"),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        undefined=jinja2.StrictUndefined,
        finalize=without_commands,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"md": lambda text: markdown.escaped(text, 1000), "code": markdown.code, "block": markdown.block}
    made.filters |= {"duration": duration}
    return made


def without_commands(value: Any) -> Any:
    """Whatever is shown, HTML of ours aside, without characters that command a terminal or turn text around."""
    return value if not isinstance(value, str) or hasattr(value, "__html__") else harmless(value)


def view(report: Report) -> dict[str, Any]:
    """What the templates are given."""
    jobs = [job_view(job) for job in report.jobs]
    return {
        "title": title(report.jobs),
        "jobs": jobs,
        "pareto": pareto(report.jobs),
        "retention": retention(report.jobs),
        "comparison": comparison(report.jobs) if len(jobs) > 1 else None,
    }


def title(jobs: Sequence[JobReport]) -> str:
    if len(jobs) > 1:
        return f"{len(jobs)} jobs side by side"
    name = jobs[0].teacher or jobs[0].name
    return f"{name}, {jobs[0].notation}" if jobs[0].notation else name


# --- all jobs together -------------------------------------------------------------------------


def pareto(jobs: Sequence[JobReport]) -> Chart | None:
    """All models of all jobs: retention over real bits, or KL where there is no retention; None where neither is."""
    for attribute, name, better, share in (
        ("retention_above_chance", "retention above chance", "up", True),
        ("kl", "KL to the teacher, nats per token", "down", False),
    ):
        points = [
            Point(
                model_name(job, row, len(jobs)),
                row.real_bits,
                value,
                error_of(job.eval, row.name) if share else None,
                row.name == "packed",
            )
            for job in jobs
            for row in sorted(job.models, key=lambda row: row.name != "packed")
            if row.name != "teacher"
            and row.real_bits is not None
            and (value := getattr(row, attribute)) is not None
            and (share or value > 0)
        ]
        if points:
            return charts.pareto(points[:MOST_POINTS], name, better, share)
    return None


def model_name(job: JobReport, row: ModelRow, count: int) -> str:
    """A model's name: that of its job, or the one that it has in the recipe."""
    if row.name == "packed":
        return job.name
    return plain(f"{row.name} ({job.name})" if count > 1 else row.name, 80)


def error_of(result: EvalResult | None, name: str) -> float | None:
    """The standard error of a model's retention."""
    if result is None:
        return None
    measured = result if name == "packed" else result.compared.get(name)
    return measured.average.retention_stderr if measured is not None and measured.average is not None else None


def retention(jobs: Sequence[JobReport]) -> Chart | None:
    """Retention above chance of each task and their average: a mark for each job, or for each model of a single one."""
    measured: list[tuple[str, Measured]] = [(job.name, job.eval) for job in jobs if job.eval is not None]
    if len(jobs) == 1 and jobs[0].eval is not None:
        measured += [(plain(name, 60), other) for name, other in jobs[0].eval.compared.items()]
    dots = []
    for index, (label, model) in enumerate(measured[:MOST_SERIES]):
        for name, task in list(model.tasks.items())[:MOST_TASKS]:
            if task.retention_above_chance is not None:
                dots.append(Dot(plain(name, 60), task.retention_above_chance, retention_stderr(task), index, label))
        mean = model.average
        if mean is not None and mean.retention_above_chance is not None and len(model.tasks) > 1:
            dots.append(Dot("average", mean.retention_above_chance, mean.retention_stderr, index, label))
    return charts.dots("Retention above chance, ± one standard error", dots) if dots else None


def comparison(jobs: Sequence[JobReport]) -> Table:
    """The first numbers of all jobs, a row each."""
    columns = ["job", "formats", "retention", "KL", "perplexity", "real bits", "size", "decode/s"]
    return Table(columns, [comparison_row(job) for job in jobs])


def comparison_row(job: JobReport) -> list[str]:
    row = packed_row(job)
    return [
        job.name,
        job.notation or "",
        with_error(row.retention_above_chance, error_of(job.eval, "packed")),
        plain_number(row.kl, ".4g"),
        plain_number(row.perplexity, ".4g"),
        plain_number(row.real_bits, ".2f"),
        "" if row.bytes is None else megabytes(row.bytes),
        plain_number(row.decode_tokens_per_second, ",.1f"),
    ]


def packed_row(job: JobReport) -> ModelRow:
    return next((row for row in job.models if row.name == "packed"), ModelRow(name="packed", scores={}))


def plain_number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def with_error(share: float | None, error: float | None) -> str:
    """97.4 % ± 1.2."""
    return percent(share) + (f" ± {100 * error:.1f}" if share is not None and error is not None else "")


# --- one job -----------------------------------------------------------------------------------


def job_view(job: JobReport) -> JobView:
    """Everything that the templates show of a job."""
    shown = JobView(
        report=job,
        figures=list(figures(job)),
        charts={"curve": curve(job), "size": size(job), "speed": speed(job)},
        tables={"tasks": tasks(job), "text": text(job), "size": sizes(job), "speed": speeds(job)},
    )
    if job.plan is not None:
        heat_map(shown, job.plan)
    if job.samples is not None:
        shown.texts = [continuation(pair) for pair in job.samples.texts]
        shown.texts_sentence = texts_sentence(job.samples.texts)
    return shown


def figures(job: JobReport) -> list[Figure]:
    """The numbers to see first; those that are not known yet, with the command that makes them."""
    row = packed_row(job)
    mean = job.eval.average if job.eval else None
    commands = {stage.name: stage.command for stage in job.stages}
    size = job.pack
    decode = row.decode_tokens_per_second
    share = decode_share(job)
    return [
        Figure(
            "retention above chance",
            percent(row.retention_above_chance),
            f"± {100 * mean.retention_stderr:.1f}, one standard error"
            if mean and mean.retention_stderr is not None
            else "",
            commands.get("eval", ""),
        ),
        Figure("KL to the teacher", plain_number(row.kl, ".3g"), "nats per token", commands.get("eval", "")),
        Figure(
            "real bits a weight",
            plain_number(row.real_bits, ".2f"),
            f"{size.nominal_bits:.2f} nominal" if size else "",
            commands.get("pack", ""),
        ),
        Figure(
            "size",
            megabytes(row.bytes) if row.bytes is not None else "",
            f"{row.bytes:,} bytes" if row.bytes is not None else "",
            commands.get("pack", ""),
        ),
        Figure(
            "decode, tokens/s",
            plain_number(decode, ",.0f"),
            "" if share is None else f"{100 * share:.0f} % of the memory's bandwidth",
            commands.get("bench", ""),
        ),
    ]


def decode_share(job: JobReport) -> float | None:
    """The share of the bandwidth that the packed model's decoding reads, of the most threads and shortest context."""
    if job.bench is None:
        return None
    runs = [run for run in job.bench.runs if (run.engine, run.phase) == ("packed", "decode")]
    runs = [run for run in runs if run.threads == max(job.bench.threads)]
    return runs[0].bandwidth_share if runs else None


def tasks(job: JobReport) -> Table | None:
    """Every score of every model."""
    if job.eval is None or not job.eval.tasks:
        return None
    columns = ["task", "metric, items", "teacher", "score", "chance", "above chance"]
    rows = []
    for name, measured in {"": job.eval, **job.eval.compared}.items():
        label = f" ({plain(name, 60)})" if name else ""
        for task_name, task in list(measured.tasks.items())[:MOST_TASKS]:
            part = ", part" if task.full_set is False else ""
            rows.append(
                [
                    plain(task_name, 60) + label,
                    f"{plain(task.metric, 30)}, {task.items:,}{part}",
                    percent(task.teacher_score),
                    with_error(task.score, task.stderr),
                    percent(task.chance),
                    with_error(task.retention_above_chance, retention_stderr(task)),
                ]
            )
        if measured.average is not None:
            mean = measured.average
            above = with_error(mean.retention_above_chance, mean.retention_stderr)
            score = with_error(mean.score, mean.stderr)
            rows.append([f"average{label}", "", percent(mean.teacher_score), score, "", above])
    return Table(columns, rows)


def text(job: JobReport) -> Table | None:
    """Metrics on held-out text, of every model."""
    if job.eval is None:
        return None
    rows = []
    for name, measured in {job.name: job.eval, **job.eval.compared}.items():
        if measured.text is not None:
            values = (measured.text.perplexity, measured.text.teacher_perplexity, measured.text.kl)
            numbers = [plain_number(value, ".4g") for value in values]
            rows.append([plain(name, 60), *numbers, percent(measured.text.top1_agreement), f"{measured.text.tokens:,}"])
    columns = ["held-out text", "perplexity", "teacher's", "KL, nats per token", "top-1 agreement", "tokens"]
    return Table(columns, rows) if rows else None


def curve(job: JobReport) -> Chart | None:
    """Losses during training, over tokens."""
    names = {"loss": "training loss", "kl": "held-out KL", "cross_entropy": "held-out cross-entropy"}
    x = "tokens" if all("tokens" in row for row in job.curve) else "step"
    series = [(label, [(row[x], row[name]) for row in job.curve if name in row]) for name, label in names.items()]
    return charts.curves("Training curve", "training tokens" if x == "tokens" else "steps", "nats, logarithmic", series)


#: Order and colours of the classes of tensors.
ORDER = {"linear": 0, "embedding": 1, "head": 2, "tower": 3, "other": 4}


def size(job: JobReport) -> Chart | None:
    """Bytes by class of tensors."""
    if job.pack is None:
        return None
    parts = [Part(CLASSES[size.kind], float(size.bytes), ORDER[size.kind]) for size in job.pack.classes]
    rest = job.pack.bytes - sum(size.bytes for size in job.pack.classes)
    parts += [Part("file headers", float(rest), 5)] if rest > 0 else []
    return charts.stacked("Bytes by class of tensors", [(job.name, parts)], "bytes")


def sizes(job: JobReport) -> Table | None:
    """The size table."""
    if job.pack is None:
        return None
    rows = [
        [CLASSES[s.kind], f"{s.weights:,}", f"{s.nominal_bits:.2f}", f"{s.real_bits:.2f}", f"{s.bytes:,}"]
        for s in job.pack.classes
    ]
    rows.append(["whole files", f"{job.pack.parameters:,}", "", f"{job.pack.real_bits:.2f}", f"{job.pack.bytes:,}"])
    return Table(["tensors", "weights", "nominal bits", "real bits", "bytes"], rows)


def speed(job: JobReport) -> Chart | None:
    """Decoding with the most threads and the shortest context, and each engine's roofline."""
    if job.bench is None:
        return None
    bandwidth = {measured.threads: measured.bytes_per_second for measured in job.bench.bandwidths}
    most = max(job.bench.threads)
    bars: dict[str, Speed] = {}
    for run in job.bench.runs:
        if (run.phase, run.threads) == ("decode", most) and run.engine not in bars:
            limit = bandwidth[most] / run.bytes_per_token if run.bytes_per_token and most in bandwidth else None
            bars[run.engine] = Speed(plain(run.engine, 40), run.tokens_per_second, limit)
    return charts.roofline("Decoding speed and its roofline", list(bars.values())[:MOST_ENGINES]) if bars else None


def speeds(job: JobReport) -> Table | None:
    """All speeds."""
    if job.bench is None:
        return None
    columns = ["engine", "threads", "phase", "context", "tokens/s", "bytes a token", "share of bandwidth"]
    rows = [
        [
            plain(run.engine, 60),
            str(run.threads),
            run.phase,
            f"{run.context:,}",
            f"{run.tokens_per_second:,.1f}",
            "" if run.bytes_per_token is None else f"{run.bytes_per_token:,}",
            percent(run.bandwidth_share),
        ]
        for run in sorted(job.bench.runs, key=lambda run: run.threads)
    ]
    return Table(columns, rows)


def heat_map(shown: JobView, plan: PlanSummary) -> None:
    """Bits by layer and role, as coloured cells."""
    low, high = plan.range()

    def heat(bits: float | None) -> Heat:
        if bits is None:
            return Heat("")
        rgb = colour(bits, low, high)
        return Heat(f"{bits:.2f}", "#{:02x}{:02x}{:02x}".format(*rgb), "#000000" if is_light(rgb) else "#ffffff")

    grid = plan.grid()
    shown.heat_columns = [plain(role, 60) for role in plan.roles()]
    shown.heat_rows = [
        (str(layer), [heat(grid.get((layer, role))) for role in plan.roles()]) for layer in plan.layers()
    ]
    shown.heat_ends = [(plain(end.name, 80), heat(end.bits), in_words(end.formats)) for end in plan.ends()]
    by = f" Planned by {plan.strategy}, {plan.granularity} by {plan.granularity}." if plan.strategy else ""
    shown.heat_sentence = f"Nominal bits a weight. Decoder linear layers: {in_words(plan.formats)}.{by}"


def in_words(shares: dict[str, float]) -> str:
    return ", ".join(f"{plain(name, 30)} {share:.1%}" for name, share in shares.items())


# --- texts -------------------------------------------------------------------------------------


def continuation(pair: SideBySide) -> Continuation:
    """Both texts, cut where they part."""
    teacher, student = bounded(pair.teacher), bounded(pair.student)
    pairs = zip(teacher, student, strict=False)
    equal = sum(1 for _ in itertools.takewhile(lambda letters: letters[0] == letters[1], pairs))
    verdict = f"{pair.equal_tokens} of {pair.tokens} tokens equal, then they part"
    if pair.equal_tokens >= pair.tokens:
        verdict = f"all {pair.tokens} tokens equal"
    if pair.student_loops or pair.teacher_loops:
        both = pair.student_loops and pair.teacher_loops
        whose = "the student's ends" if pair.student_loops else "the teacher's ends"
        verdict += f"; {'both end' if both else whose} in a loop"
    return Continuation(
        bounded(pair.prompt).strip(), teacher[:equal].lstrip("\n"), teacher[equal:], student[equal:], verdict
    )


def bounded(words: str) -> str:
    """A text of a model: cut, and without characters that command anything."""
    return harmless(words if len(words) <= LONGEST_TEXT else f"{words[:LONGEST_TEXT]}…")


def texts_sentence(texts: Sequence[SideBySide]) -> str:
    """How often, and on average after how many tokens they part."""
    equal = sum(pair.equal_tokens >= pair.tokens for pair in texts)
    mean = sum(pair.equal_tokens for pair in texts) / max(len(texts), 1)
    return (
        f"{equal} of {len(texts)} continuations are equal to the last token; on average {mean:.1f} tokens are equal "
        "before the first that differs."
    )

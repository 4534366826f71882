"""The page of a report: valid, self-contained, harmless whatever strangers wrote, and its numbers those of the job."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from edgerazor.benchmark.bench_result import BenchResult, Engine, MeasuredBandwidth, Run
from edgerazor.evaluation.eval_result import Average, EvalResult, Measured, TaskResult, TextResult
from edgerazor.packaging.pack_result import PackResult
from edgerazor.packed import ClassSize
from edgerazor.report import charts, job_report, page, side_by_side
from edgerazor.report.charts import Dot, Point, Scale
from edgerazor.report.commands import option, stage_command
from edgerazor.report.job_report import JobReport, Report, StageReport
from edgerazor.report.plan_summary import PlannedMatrix, PlanSummary
from edgerazor.report.side_by_side import Samples, SideBySide
from edgerazor.report.summary import ModelRow
from edgerazor.training.results import DistillResult
from edgerazor.workdir import DEFAULT, Manifest
from helpers.html_checks import check

#: What somebody may call a model, a task or a folder, or a model may write.
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)> & \" ' \x1b[2J \u202e {{7*7}} `x` | [a](b)"


def a_task(**changes: Any) -> TaskResult:
    values: dict[str, Any] = {
        "score": 0.4321,
        "stderr": 0.0123,
        "chance": 0.25,
        "teacher_score": 0.5,
        "teacher_stderr": 0.01,
        "retention": 0.9,
        "retention_above_chance": 0.7284,
        "metric": "acc_norm",
        "items": 500,
        "data": "file",
        "full_set": False,
        "prompt_note": None,
    }
    return TaskResult(**{**values, **changes})


def a_pair(**changes: Any) -> SideBySide:
    values: dict[str, Any] = {"prompt": "p", "teacher": "one two", "student": "one <b>three", "equal_tokens": 1}
    return SideBySide(**{**values, "tokens": 2, "teacher_loops": False, "student_loops": True, **changes})


def a_job(name: str = "job", words: str = "tiny", **changes: Any) -> JobReport:
    """A job with everything in it; `words` are those of strangers."""
    stages = [
        StageReport(
            name=stage, state="done", command=f"edgerazor {stage}", seconds=1.5, machine="m", versions={"a": "1"}
        )
        for stage in ("calibrate", "distill", "pack", "eval", "bench")
    ]
    text = TextResult(perplexity=12.3, teacher_perplexity=11.2, kl=0.0456, top1_agreement=0.81, tokens=4096)
    mean = Average(score=0.43, teacher_score=0.5, retention_above_chance=0.7284, stderr=0.01, retention_stderr=0.04)
    compared = {words[:40]: Measured(tasks={words: a_task(retention_above_chance=-0.1)}, text=text)}
    tasks = {words: a_task(), "other": a_task(retention_above_chance=None)}
    evaluated = EvalResult(tasks=tasks, average=mean, text=text, compared=compared, notes=[words], failures=[words])
    engine = Engine(
        name="packed", threads=2, kernel="avx2", weight_bytes=10, bytes_per_token=10, cache_bytes_per_token=1
    )
    runs = [
        Run(engine=engine_name, threads=2, phase="decode", context=0, tokens_per_second=speed, bytes_per_token=size)
        for engine_name, speed, size in (("packed", 50.0, 10), (words, 5.0, None))
    ]
    bench = BenchResult(
        bytes=10,
        load_seconds=0.1,
        peak_memory_bytes=10,
        bandwidth_bytes_per_second=1000.0,
        threads=[2],
        bandwidths=[MeasuredBandwidth(threads=2, bytes_per_second=1000.0)],
        bandwidth_of=words,
        machine=words,
        engines=[engine],
        runs=runs,
        notes=[words],
    )
    classes = [
        ClassSize(kind="linear", weights=1000, nominal_bits=2.0, bytes=300, real_bits=2.4),
        ClassSize(kind="other", weights=10, nominal_bits=32.0, bytes=40, real_bits=32.0),
    ]
    packed = PackResult(
        folder="f",
        source="student",
        notation="W2",
        bytes=400,
        parameters=1010,
        nominal_bits=2.0,
        real_bits=3.17,
        teacher_bytes=2020,
        verified=True,
        classes=classes,
    )
    roles = ("q_proj", words)
    matrices = [
        PlannedMatrix(name=f"l.{layer}.{role}", kind="linear", layer=layer, role=role, rows=2, columns=2,
                      bits=1.58 + layer, formats={"ternary": 0.5, "int4": 0.5})
        for layer in range(2) for role in roles
    ]  # fmt: skip
    end = PlannedMatrix(
        name=words, kind="embedding", layer=None, role=None, rows=2, columns=2, bits=4.0, formats={"int4": 1.0}
    )
    plan = PlanSummary(
        notation="W2",
        strategy="sensitivity",
        granularity="row",
        nominal_bits=2.0,
        real_bits=3.17,
        bytes=400,
        predicted_kl=None,
        formats={"ternary": 1.0},
        matrices=[*matrices, end],
        estimate=None,
        tokens=None,
        most_sensitive=[],
        kv_damage=None,
    )
    pair = a_pair(prompt=words)
    row = ModelRow(name="packed", scores={}, retention_above_chance=0.7284, kl=0.0456, real_bits=3.17, bytes=400)
    other = ModelRow(name=words, scores={}, retention_above_chance=0.2, kl=1.0, real_bits=2.0, bytes=300)
    values: dict[str, Any] = {
        "name": name,
        "folder": name,
        "teacher": words,
        "notation": "W2",
        "sentence": words,
        "stages": stages,
        "cautions": [job_report.grave(words), job_report.note("a note")],
        "models": [row, other],
        "distill": DistillResult(notation="W2", steps=3, tokens=300, seconds=9.0, loss=1.0, best=0.5, best_step=3,
                                 measure=words, tokens_per_second=33.0),
        "pack": packed,
        "eval": evaluated,
        "bench": bench,
        "plan": plan,
        "curve": [{"step": step, "tokens": 100 * step, "loss": 2 / step, "kl": 0.5 / step} for step in (1.0, 3.0)],
        "samples": Samples(fingerprint="0", engine="native", texts=[pair]),
    }  # fmt: skip
    return JobReport(**{**values, **changes})


def a_report(*jobs: JobReport) -> Report:
    return Report(file="report.html", jobs=list(jobs))


def test_a_whole_page_is_valid_and_asks_for_nothing() -> None:
    checked = check(page.render_html(a_report(a_job())))
    assert checked.tags.count("svg") == 5  # retention, Pareto, training, size, speed
    assert "Content-Security-Policy" in page.render_html(a_report(a_job()))
    shown = " ".join("".join(checked.text).split())
    for number in ("72.8 % ± 4.0", "0.0456", "3.17", "400 bytes", "12.3", "81.0 %"):
        assert number in shown, number
    for stage in ("pack", "eval", "bench", "distill", "calibrate"):
        assert f"Made by edgerazor {stage}, 1.5 s on m" in shown


def test_every_chart_is_told_and_tabled() -> None:
    text = page.render_html(a_report(a_job()))
    assert text.count('role="img"') == text.count("<desc") == 5
    assert "job, tiny: 72.8 %" in text


def test_jobs_side_by_side() -> None:
    names = [f"job-{index}" for index in range(7)]
    checked = check(page.render_html(a_report(*(a_job(name) for name in names))))
    assert {f"job{index}" for index in range(1, 8)} <= set(checked.ids)
    assert "7 jobs side by side" in "".join(checked.text)


@pytest.mark.parametrize("count", [1, 2])
def test_words_of_strangers_do_nothing(count: int) -> None:
    jobs = [a_job(f"{HOSTILE}{index}", HOSTILE) for index in range(count)]
    text = page.render_html(a_report(*jobs))
    checked = check(text)
    assert "alert(1)" in "".join(checked.text)
    assert "{{7*7}}" in "".join(checked.text)
    for part in ("<script", "<img", "\x1b", "\u202e"):
        assert part not in text, part
    words = page.render_markdown(a_report(*jobs))
    assert "\x1b" not in words
    outside = re.sub(r"(`+)[^`].*?[^`]\1(?!`)", "", words, flags=re.DOTALL)  # without what is code
    assert not re.search(r"(?<!\\)(\]\(|<script|<img)", outside)


def test_long_texts_are_cut() -> None:
    pair = a_pair(teacher="a" * 10**6)
    samples = Samples(fingerprint="0", engine="native", texts=[pair] * 10)
    text = page.render_html(a_report(a_job(samples=samples)))
    check(text)
    assert len(text) < 200_000


EMPTY: dict[str, Any] = {"curve": [], "samples": None, "no_samples": "None.", "models": [], "cautions": []}
PARTS = ("distill", "pack", "eval", "bench", "plan")


@pytest.mark.parametrize("count", range(len(PARTS) + 1))
def test_any_part_may_be_missing(count: int) -> None:
    for missing in itertools.combinations(PARTS, count):
        job = a_job(**{**EMPTY, **dict.fromkeys(missing)})
        job.sentence = job_report.sentence(job)
        check(page.render_html(a_report(job)))
        check(page.render_html(a_report(job, a_job())))
        assert page.render_markdown(a_report(job)).startswith("# ")


def test_a_page_is_a_function_of_its_report() -> None:
    assert page.render_html(a_report(a_job())) == page.render_html(a_report(a_job()))


def test_markdown_has_the_same_numbers() -> None:
    text = page.render_markdown(a_report(a_job()))
    for number in ("72.8 % ± 4.0", "0.0456", "3.17", "400", "`edgerazor eval`", "Warning:"):
        assert number in text, number
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1, table


# --- charts ------------------------------------------------------------------------------------


def test_the_frontier_is_what_no_other_beats() -> None:
    points = [
        Point("a", 2.0, 0.5),
        Point("b", 3.0, 0.4),
        Point("c", 3.0, 0.9),
        Point("d", 4.0, 0.9),
        Point("e", 1.0, 0.1),
    ]
    assert [point.name for point in charts.frontier(points, "up")] == ["e", "a", "c"]
    assert [point.name for point in charts.frontier(points, "down")] == ["e"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.1, 2.4), (0.0, 1e6), (-0.1, 1.05), (3.0, 3.0), (0.0, 1e-9)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    scale = Scale(low, high, 0, 100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 11 or low == high
    assert all(scale.low - 1e-9 <= tick <= scale.high + 1e-9 for tick in ticks)
    assert [round(scale(tick), 6) for tick in ticks] == sorted(round(scale(tick), 6) for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.01, 1.0), (1e-9, 1e9), (0.5, 0.6)])
def test_logarithmic_axes(low: float, high: float) -> None:
    scale = Scale(low, high, 0, 100, logarithmic=True)
    assert scale(low) == pytest.approx(0)
    assert scale((low * high) ** 0.5) == pytest.approx(50)
    assert all(low <= tick * 1.001 for tick in scale.ticks())


def test_nothing_is_drawn_outside() -> None:
    for chart in (
        charts.pareto([Point("a", 0.0, 1.2, 0.5)], "y", "up", True),
        charts.pareto([Point("a", 16.0, 1e-9), Point("b", 16.0, 1e9)], "y", "down", False),
        charts.dots("t", [Dot("r", -3.0, 0.5, 0, "j"), Dot("r", 1.5, None, 1, "k")]),
    ):
        for shape in chart.shapes:
            assert -5 <= shape.x <= charts.WIDTH + 5, shape
            assert -20 <= shape.y <= chart.height + 20, shape


def test_curves_leave_out_what_has_no_logarithm() -> None:
    assert charts.curves("t", "x", "y", [("a", [(1.0, 0.0), (2.0, float("inf"))])]) is None
    chart = charts.curves("t", "x", "y", [("a", [(1.0, 1.0), (2.0, 0.0), (3.0, 0.5)])])
    assert chart is not None
    assert "from 1 to 0.5" in chart.description


# --- commands, loops, staleness ----------------------------------------------------------------


def a_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": "eval",
        "inputs": {},
        "section": {
            "tasks": ["arc", "world"],
            "limit": 5,
            "batch_size": 32,
            "apply_chat_template": True,
            "against": None,
        },
        "outputs": {},
        "result": {},
        "seconds": 1.0,
        "versions": {},
        "machine": "m",
    }
    return Manifest(**{**values, **changes})


def test_commands_name_what_was_set() -> None:
    flags = {
        "eval": {
            f"eval.{name}": f"--{name.replace('_', '-')}"
            for name in ("tasks", "limit", "batch_size", "apply_chat_template")
        }
    }
    command = stage_command("eval", Path("a b"), a_manifest(), flags)
    assert command == "edgerazor eval --tasks arc,world --limit 5 --apply-chat-template --work 'a b'"
    assert stage_command("eval", DEFAULT, a_manifest(section={}), flags) == "edgerazor eval"
    assert stage_command("pack", Path("x")) == "edgerazor pack --work x"
    assert option("--learning-rate", 1e-3) == ["--learning-rate", "0.001"]
    assert option("--losses", [{"name": "x"}]) == []


def test_a_loop_is_a_text_whose_end_repeats_itself() -> None:
    assert side_by_side.loops([*range(100), *[1, 2, 3] * 8])
    assert side_by_side.loops([7] * 24)
    assert not side_by_side.loops([*range(100)])
    assert not side_by_side.loops([1, 2, 3] * 7)
    assert not side_by_side.loops([*([1, 2, 3] * 8), 9])


def test_repeated_data_is_a_warning() -> None:
    distill = a_job().distill
    assert distill is not None
    for passes, grave in ((4.5, True), (2.0, False)):
        job = a_job(distill=distill.model_copy(update={"passes": passes}))
        found_cautions = [c for c in job_report.training_cautions(job) if "read its text" in c.text]
        assert [caution.grave for caution in found_cautions] == [grave]
    job = a_job(distill=distill.model_copy(update={"passes": 0.4}))
    assert not list(job_report.training_cautions(job))

"""`edgerazor report`: a page of whatever is there of a job, and `run` writes it at its end."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgerazor import pipeline
from edgerazor.benchmark.bench_result import BenchResult, Engine, MeasuredBandwidth
from edgerazor.benchmark.bench_result import Run as BenchRun
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.report import page
from edgerazor.workdir import WorkDir
from helpers.html_checks import check
from helpers.tiny_job import Run, call, snapshot, write_recipe

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def recipe(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipes") / "r.yaml", llama, text_file)


@pytest.fixture(scope="module")
def job(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole job, its speed made up: measuring one takes processes, and seconds."""
    folder = tmp_path_factory.mktemp("jobs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "stages_of", lambda _: ["distill", "pack", "eval"])
        done = call("run", recipe, "--work", folder, "--json")
    assert done.code == 0, done.err
    assert "tells all of it" in done.err
    work = WorkDir(folder)
    packed = work.manifest("pack")
    assert packed is not None
    work.folder("bench").mkdir()
    work.finish("bench", {"pack": packed.fingerprint()}, {"rounds": 2}, a_bench(), 1.0)
    assert call("report", folder).code == 0
    return folder


def a_bench() -> BenchResult:
    size = {"weight_bytes": 100, "bytes_per_token": 100, "cache_bytes_per_token": 1}
    return BenchResult(
        bytes=100,
        load_seconds=0.1,
        peak_memory_bytes=10,
        bandwidth_bytes_per_second=1000.0,
        threads=[1],
        bandwidths=[MeasuredBandwidth(threads=1, bytes_per_second=1000.0)],
        bandwidth_of="made up",
        machine="none",
        engines=[Engine(name="packed", threads=1, kernel="reference", **size)],
        runs=[
            BenchRun(engine="packed", threads=1, phase="decode", context=0, tokens_per_second=5.0, bytes_per_token=100)
        ],
        notes=[],
    )


@pytest.fixture
def copy(job: Path, tmp_path: Path) -> Path:
    """The job, to be changed."""
    folder = tmp_path / "job"
    shutil.copytree(job, folder)
    return folder


def states(outcome: Any) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in outcome.json()["jobs"][0]["stages"]}


def test_run_writes_a_valid_page_of_its_numbers(job: Path) -> None:
    text = (job / "report.html").read_text(encoding="utf-8")
    checked = check(text)
    result = EvalResult.model_validate_json((job / "eval" / "result.json").read_bytes())
    assert result.text is not None
    assert result.text.kl is not None
    words = "".join(checked.text)
    assert f"{result.text.kl:.4g}" in words
    packed = json.loads((job / "packed" / "result.json").read_bytes())
    assert f"{packed['bytes']:,} bytes" in words
    assert "10. " not in words
    assert words.count("tokens equal, then they part") + words.count("tokens equal;") >= 1


def test_texts_are_written_once(copy: Path, run: Run) -> None:
    samples = (copy / "samples.json").read_bytes()
    first = run("report", "--work", copy, "--json")
    assert first.code == 0, first.err
    # pack, teacher, data and seed are the same wherever the job lies
    assert (copy / "samples.json").read_bytes() == samples
    before = (copy / "report.html").read_bytes()
    assert run("report", copy).code == 0
    assert (copy / "report.html").read_bytes() == before
    (copy / "samples.json").write_text('{"fingerprint": "other", "engine": "native", "texts": []}')
    again = run("report", copy)
    assert again.code == 0
    assert (copy / "samples.json").read_bytes() == samples
    damaged = copy / "samples.json"
    damaged.write_text("{")
    assert run("report", copy, "--no-samples").code == 0
    assert damaged.read_text() == "{"
    assert "left out (--no-samples)" in (copy / "report.html").read_text()


def test_a_report_changes_nothing_else(copy: Path, run: Run) -> None:
    before = snapshot(copy)
    assert run("report", copy).code == 0
    assert {name: state for name, state in snapshot(copy).items() if name != "report.html"} == {
        name: state for name, state in before.items() if name != "report.html"
    }
    assert "up to date" in run("eval", "--work", copy).err


def test_a_model_that_is_not_at_hand_is_one_sentence(copy: Path, run: Run) -> None:
    (copy / "samples.json").unlink()
    text = (copy / "recipe.yaml").read_text()
    moved = "\n".join("model: /nowhere/at-all" if line.startswith("model:") else line for line in text.splitlines())
    (copy / "recipe.yaml").write_text(moved + "\n")
    done = run("report", copy)
    assert done.code == 0, done.err
    words = "".join(check((copy / "report.html").read_text()).text)
    assert "No texts side by side: There is no folder /nowhere/at-all." in words


@pytest.mark.parametrize("missing", ["bench", "eval", "pack", "distill", "calibrate"])
def test_what_is_missing_is_named_with_its_command(copy: Path, run: Run, missing: str) -> None:
    shutil.rmtree(WorkDir(copy).folder(missing))
    done = run("report", copy, "--json", "--no-samples")
    assert done.code == 0, done.err
    assert states(done)[missing] == "missing"
    words = " ".join("".join(check((copy / "report.html").read_text()).text).split())
    assert f"{missing} was not run: edgerazor {missing} --work {copy}." in words


def test_a_job_of_which_nothing_is_done(recipe: Path, run: Run, tmp_path: Path) -> None:
    work = tmp_path / "new"
    assert run("report", work).code == 2
    assert not work.exists()
    assert run("calibrate", "--recipe", recipe, "--work", work).code == 0
    shutil.rmtree(work / "calibrate")
    done = run("report", work, "--json")
    assert done.code == 0, done.err
    assert set(states(done).values()) == {"missing"}
    assert "nothing is finished yet" in done.json()["jobs"][0]["sentence"]
    check((work / "report.html").read_text())


def test_stale_and_damaged_stages_are_told(copy: Path, run: Run) -> None:
    manifest = copy / "packed" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["outputs"]["model.safetensors"] = "0" * 64
    manifest.write_text(json.dumps(values))
    (copy / "bench" / "manifest.json").write_text("{")
    done = run("report", copy, "--json", "--no-samples")
    assert states(done) == {"calibrate": "done", "distill": "done", "pack": "done", "eval": "stale", "bench": "damaged"}
    graves = [caution["text"] for caution in done.json()["jobs"][0]["cautions"] if caution["grave"]]
    assert any("eval is stale: pack was done again since" in text for text in graves)
    assert any("bench is damaged" in text for text in graves)


def test_a_rounded_model_has_no_training(llama: Path, run: Run, tmp_path: Path) -> None:
    assert run("pack", llama, "--bits", "4", "--plan", "interleave", "--work", tmp_path / "rounded").code == 0
    done = run("report", tmp_path / "rounded", "--json", "--no-samples")
    assert states(done) == {"pack": "done", "eval": "missing", "bench": "missing"}
    words = "".join(check((tmp_path / "rounded" / "report.html").read_text()).text)
    assert "Rounded without training." in words
    assert done.json()["jobs"][0]["plan"]["matrices"]  # of the packed file


def test_several_jobs_and_markdown(job: Path, copy: Path, run: Run, tmp_path: Path) -> None:
    done = run("report", job, copy, "--out", tmp_path / "both.html", "--no-samples")
    assert done.code == 0, done.err
    assert "2 jobs side by side" in "".join(check((tmp_path / "both.html").read_text()).text)
    assert run("report", job, "--md", "--out", tmp_path / "one.md").code == 0
    assert (tmp_path / "one.md").read_text().startswith("# llama, W1.8")
    assert run("report", copy, "--md", "--no-samples").code == 0
    assert (copy / "report.md").exists()


def test_wrong_commands(job: Path, run: Run, tmp_path: Path) -> None:
    for words, sentence in (
        ([job, "--work", job], "both name jobs"),
        ([job, job], "each named once"),
        ([tmp_path], "is not a working directory"),
        ([job, "--out", tmp_path], "wants the name of a file"),
    ):
        refused = run("report", *words)
        assert refused.code == 2, words
        assert sentence in refused.err


def test_a_page_that_cannot_be_written_costs_nothing(
    recipe: Path, copy: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `run` measured is told although its page is in the way."""
    monkeypatch.setattr(pipeline, "stages_of", lambda _: ["distill", "pack", "eval"])
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    done = run("run", recipe, "--work", copy, "--json")
    assert done.code == 0, done.err
    assert "There is no report: --out wants the name of a file" in done.err
    assert done.json()["models"]


def test_a_browser_finds_nothing_to_complain_about(job: Path) -> None:
    """No message, no request, no sideways scrolling, in both themes, on a phone and on paper."""
    pytest.importorskip("playwright", reason="the package playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("no browser is installed (/usr/bin/chromium)")
    sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for scheme, width in (("light", 360), ("dark", 1400)):
            opened = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
            messages: list[str] = []
            requests: list[str] = []
            opened.on("console", lambda message, into=messages: into.append(message.text))
            opened.on("pageerror", lambda error, into=messages: into.append(str(error)))
            opened.on("request", lambda request, into=requests: into.append(request.url))
            opened.goto((job / "report.html").as_uri())
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            assert messages == []
            assert [url.partition(":")[0] for url in requests] == ["file"]
            ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
        assert len(opened.pdf()) > 10_000
        browser.close()


def test_the_templates_are_part_of_the_package() -> None:
    assert {"page.html.jinja", "page.md.jinja", "charts.html.jinja"} <= set(page.environment().list_templates())

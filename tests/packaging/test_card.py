"""The card of a packed model: honest numbers, a licence carried over, nothing that differs between equal runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgerazor import exporters
from edgerazor import recipe as recipes
from edgerazor.evaluation.eval_result import Average, EvalResult, TaskResult, TextResult
from edgerazor.packaging import markdown, model_card
from edgerazor.packaging.teacher_card import read_teacher_card
from edgerazor.packed import PackedModel, size_table
from edgerazor.report import card_results
from edgerazor.workdir import CARD, WorkDir
from helpers.tiny_job import Outcome, Run, call, snapshot, write_recipe

FRONT = """---
license: other
license_name: tiny-1
license_link: LICENSE
language: [en, de]
tags: [old]
---
# Old
"""


def front_of(card: str) -> dict[str, Any]:
    """The metadata of a card."""
    values = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(values, dict)
    return values


def section_of(card: str, name: str) -> str:
    """What stands between the marks of a section."""
    return card.split(f"<!-- edgerazor: {name} -->")[1].split(f"<!-- edgerazor: end of {name} -->")[0]


@pytest.fixture(scope="module")
def teacher(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a card and a licence of its own."""
    folder = tmp_path_factory.mktemp("teachers") / "tiny-llama"
    shutil.copytree(llama, folder)
    (folder / CARD).write_text(FRONT)
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


@pytest.fixture(scope="module")
def job(teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that is packed and measured on text."""
    folder = tmp_path_factory.mktemp("jobs")
    recipe = write_recipe(folder / "r.yaml", teacher, text_file, distill={"steps": 2})
    for stage in ("distill", "pack", "eval"):
        outcome: Outcome = call(stage, "--recipe", recipe, "--work", folder / "job", "--quiet")
        assert outcome.code == 0, outcome.err
    return folder / "job"


def test_metadata_are_carried_over(job: Path) -> None:
    card = (job / "packed" / CARD).read_text()
    front = front_of(card)
    assert front["license"] == "other"
    assert (front["license_name"], front["license_link"]) == ("tiny-1", "LICENSE")
    assert front["language"] == ["en", "de"]
    assert (front["library_name"], front["pipeline_tag"]) == ("edgerazor", "text-generation")
    assert {"edgerazor", "quantized", "llama"} <= set(front["tags"])
    assert "old" not in front["tags"]
    assert "base_model" not in front  # a local folder is nothing that the hub knows
    assert "name no `base_model`" in card
    assert (job / "packed" / "LICENSE").read_text() == "Do what you like.\n"


def test_sizes_are_those_of_the_files(job: Path) -> None:
    sizes = size_table(PackedModel.open(job / "packed"))
    text = section_of((job / "packed" / CARD).read_text(), "size")
    assert f"**{sizes.nominal_bits:.4g} label bits, {sizes.real_bits:.4g} real bits**" in text
    assert f"{sizes.bytes:,} bytes for {sizes.parameters:,} weights" in text
    assert all(f"| {size.bytes:,} |" in text for size in sizes.classes)


def test_the_results_are_those_of_eval(job: Path) -> None:
    result = EvalResult.model_validate_json((job / "eval" / "result.json").read_bytes())
    assert result.text is not None
    text = section_of((job / "packed" / CARD).read_text(), "results")
    for value in (result.text.perplexity, result.text.teacher_perplexity, result.text.kl):
        assert f"| {value:.4g} |" in text
    assert "Measured was no task." in text


def a_result() -> EvalResult:
    """Two tasks: one of which a part was asked, one without a retention."""
    task: dict[str, Any] = {"teacher_stderr": 0.01, "retention": 0.9, "prompt_note": None, "data": "file"}
    arc = TaskResult(score=0.4321, stderr=0.0123, chance=0.25, teacher_score=0.5, retention_above_chance=0.7284,
                     metric="acc_norm", items=500, full_set=False, **task)  # fmt: skip
    odd = TaskResult(score=0.1, stderr=None, chance=None, teacher_score=None, retention_above_chance=None,
                     metric="exact|match", items=7, full_set=True, **task)  # fmt: skip
    mean = Average(
        score=0.4321, teacher_score=0.5, retention_above_chance=0.7284, stderr=0.0123, retention_stderr=0.0492
    )
    text = TextResult(perplexity=12.345, teacher_perplexity=11.2, kl=0.0456, top1_agreement=0.81, tokens=4096)
    return EvalResult(tasks={"arc_easy": arc, "<script>": odd}, average=mean, text=text, sample="``` <b>x</b>\x1b[2J")


def test_every_number_of_a_task_is_there() -> None:
    text = card_results.text(a_result())
    row = next(line for line in text.splitlines() if line.startswith("| arc"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == [
        "500 (a part)",
        "43.21 % ± 1.23",
        "50.00 %",
        "25.00 %",
        "72.84 % ± 4.92",
    ]
    assert "**72.84 % ± 4.92**" in text
    assert "only a part of the items was asked" in text


def test_words_of_strangers_are_words() -> None:
    text = card_results.text(a_result())
    assert "<script>" not in text
    assert r"\<script\>" in text
    assert "\x1b" not in text
    assert "````text\n" in text  # a fence that the sample cannot end
    assert markdown.escaped("[a](b) `c` <d>\n# e_f _g_") == r"\[a\](b) \`c\` \<d\>?# e_f \_g\_"
    note = card_results.without_places("500 items of /a/b c/d.jsonl, see https://x.y/z or a/b", ["/a/b c/d.jsonl"])
    assert note == "500 items of d.jsonl, see https://x.y/z or a/b"
    assert card_results.without_places("packed: of /a/b/d.jsonl.") == "packed: of d.jsonl."
    assert markdown.code("a`b") == "``a`b``"
    assert markdown.escaped("x" * 1000).startswith("x" * 400 + "...")


def test_equal_runs_have_equal_cards(teacher: Path, text_file: Path, job: Path, run: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "other.yaml", teacher, text_file, distill={"steps": 2})
    for stage in ("distill", "pack", "eval"):
        assert run(stage, "--recipe", recipe, "--work", tmp_path / "again").code == 0
    card = (job / "packed" / CARD).read_text()
    assert (tmp_path / "again" / "packed" / CARD).read_text() == card
    assert str(tmp_path.parent) not in card
    assert str(teacher) not in card
    assert "tiny-llama" in card


def test_the_recipe_in_the_card_is_the_jobs(job: Path, text_file: Path) -> None:
    card = (job / "packed" / CARD).read_text()
    text = card.split("```yaml\n")[1].split("```")[0]
    recipe = recipes.build(yaml.safe_load(text))
    assert (recipe.distill.steps, recipe.calibrate.bits, recipe.data.train[0].file) == (2, 1.88, text_file.name)
    assert recipe.eval == recipes.Recipe().eval


def test_a_card_makes_nothing_stale(job: Path, run: Run) -> None:
    """Results in the card are no other packed model; a second eval is skipped, and writes what a card lacks."""
    before = snapshot(job)
    again = run("eval", "--work", job)
    assert "eval is up to date" in again.err
    assert snapshot(job) == before
    card = job / "packed" / CARD
    measured = card.read_text()
    try:
        model_card.update_section(job / "packed", "results", model_card.NOT_MEASURED)
        assert run("pack", "--work", job).code == 0  # up to date: only what eval found is written
        assert card.read_text() == measured
        card.write_text("# Mine alone\n")
        said = run("eval", "--work", job)
        assert "has no README.md with a place for results" in said.err
        assert card.read_text() == "# Mine alone\n"
        card.write_text(f"My words.\n{measured}")
        assert run("pack", "--work", job, "--force").code == 0
        assert card.read_text() == measured
    finally:
        card.write_text(measured)


def test_compressing_writes_the_sizes_anew(job: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "shipped"
    shutil.copytree(job / "packed", folder)
    (folder / CARD).write_text("My words.\n" + (folder / CARD).read_text())
    assert run("pack", folder, "--compress").code == 0
    card = (folder / CARD).read_text()
    sizes = size_table(PackedModel.open(folder))
    assert card.startswith("My words.")
    assert f"{sizes.bytes:,} bytes for" in section_of(card, "size")
    assert "compressed (zstd)" in section_of(card, "size")
    assert section_of(card, "results") == section_of((job / "packed" / CARD).read_text(), "results")
    assert "of its teacher" in section_of(card, "size")


def test_rounding_without_a_training_says_so(llama: Path, run: Run, tmp_path: Path) -> None:
    assert run("pack", llama, "--bits", "4", "--plan", "interleave", "--work", tmp_path / "job").code == 0
    card = (tmp_path / "job" / "packed" / CARD).read_text()
    assert "rounded without training" in card
    assert "edgerazor pack --recipe recipe.yaml" in card
    assert "edgerazor distill" not in card.split("## How it was made")[1]
    assert "license" not in front_of(card)
    assert "name no licence" in card
    assert model_card.NOT_MEASURED in section_of(card, "results")


@pytest.mark.parametrize(
    ("front", "licence", "languages"),
    [
        ("license: apache-2.0\nlanguage: en", {"license": "apache-2.0"}, ("en",)),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}, ()),
        ("license: 'a b'\nlanguage: [en, 'x\"y', 3]", {}, ("en",)),
        ("license: mit\nlicense_link: 'javascript:alert(1)'", {"license": "mit"}, ()),
        ("license: mit\nlicense_link: https://e.org/l", {"license": "mit", "license_link": "https://e.org/l"}, ()),
        ("license: &a [*a]", {}, ()),
        ("license: !!python/object:os.system x", {}, ()),
    ],
)  # fmt: skip
def test_only_what_can_be_a_licence_is_carried_over(
    tmp_path: Path, front: str, licence: dict[str, Any], languages: tuple[str, ...]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / CARD).write_text(f"---\n{front}\n---\nlicense: gpl\n")
    card = read_teacher_card(str(folder), folder)
    assert (dict(card.licence), card.languages) == (licence, languages)


def test_a_model_of_the_hub_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    card = read_teacher_card("some/model", folder)
    assert (card.hub_id, card.revision, card.name) == ("some/model", "a" * 40, "some/model")
    local = read_teacher_card(str(folder), folder)
    assert (local.hub_id, local.name) == ("", "a" * 40)


def test_the_hub_id_is_the_base_model(job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--some--model" / "snapshots" / ("b" * 40)
    folder.mkdir(parents=True)
    teacher = read_teacher_card("some/model", folder)
    card = model_card.render(job / "packed", teacher, model_card.Making("student", ("edgerazor pack",)))
    front = front_of(card)
    assert (front["base_model"], front["base_model_relation"]) == ("some/model", "quantized")
    assert re.search(r"\[some/model\]\(https://huggingface\.co/some/model\)", card)


def test_a_licence_that_is_a_link_to_elsewhere_is_refused(llama: Path, run: Run, tmp_path: Path) -> None:
    teacher = tmp_path / "model"
    shutil.copytree(llama, teacher)
    (tmp_path / "secret").write_text("secret")
    (teacher / "LICENSE").symlink_to(tmp_path / "secret")
    refused = run("pack", teacher, "--bits", "4", "--plan", "interleave", "--work", tmp_path / "job")
    assert refused.code == 1
    assert "a link that leaves the model's folder" in refused.err
    assert not WorkDir(tmp_path / "job").folder("pack").exists()


def test_the_exports_in_a_card_are_those_that_there_are() -> None:
    known = exporters.available()
    assert set(model_card.export_names(rotated=False)) <= set(known)
    rotated = model_card.export_names(rotated=True)
    assert rotated
    assert all(known[name].rotated for name in rotated)


def test_the_manifest_says_what_pack_wrote(job: Path) -> None:
    """The card is no part of the fingerprint that later stages compare."""
    manifest = WorkDir(job).manifest("pack")
    assert manifest is not None
    assert CARD in manifest.outputs
    with_other_words = manifest.model_copy(update={"outputs": {**manifest.outputs, CARD: "0" * 64}})
    assert with_other_words.fingerprint() == manifest.fingerprint()
    assert json.loads((job / "eval" / "manifest.json").read_text())["inputs"]["pack"] == manifest.fingerprint()

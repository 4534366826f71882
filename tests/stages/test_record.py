"""Recordings through the command line: the same bytes however often they are interrupted, and trainings from them."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgerazor.errors import INTERRUPTED
from edgerazor.job import RecipeContext
from edgerazor.recording import shards
from edgerazor.stages import record
from helpers.killing import die_at
from helpers.tiny_job import Run, call, metrics, sha256, write_recipe

#: All tokens of the tiny vocabulary: nothing is left to chance, so that a training comes to what it does resident.
WHOLE = {"draws": 300, "held_out_sequences": 2, "held_out_draws": 300, "batch_size": 3, "shard_bytes": 200_000}
#: Losses that a recording can serve, none of which has layers to choose.
LOSSES = [{"name": "ce", "weight": 0.1}, {"name": "eakld"}, {"name": "lafd", "options": {"layers": [1, 2]}}]


@pytest.fixture(scope="module")
def short_text(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text("".join(text_file.read_text().splitlines(keepends=True)[:60]))
    return path


@pytest.fixture(scope="module")
def recipe(llama: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    layers = {**WHOLE, "hidden_layers": [1, 2]}
    return write_recipe(
        path, llama, short_text, record=layers, distill={"losses": LOSSES, "steps": 3}, data={"held_out_fraction": 0.2}
    )


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that was never interrupted; read only."""
    folder = tmp_path_factory.mktemp("recordings") / "whole"
    done = call("record", "--recipe", recipe, "--out", folder)
    assert done.code == 0, done.err
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir())}


def changed(recipe: Path, path: Path, **sections: dict[str, Any]) -> Path:
    """A recipe with other fields."""
    values = yaml.safe_load(recipe.read_text())
    for name, fields in sections.items():
        values[name] = {**values[name], **fields} if isinstance(fields, dict) else fields
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_training_without_its_teacher_comes_to_the_same(
    run: Run, recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all tokens recorded, for another seed of the order, batch and budget than anybody thought of then."""
    words: tuple[Any, ...] = ("--recipe", changed(recipe, tmp_path / "r.yaml", data={"held_out_seed": 0}))
    words = (*words, "--seed", 3, "--batch-size", 3, "--steps", 4)
    assert run("distill", *words, "--work", tmp_path / "resident").code == 0
    assert run("calibrate", *words[:4], "--work", tmp_path / "recorded").code == 0

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(RecipeContext, "load_teacher", refuse)
    done = run("distill", *words, "--recording", whole, "--work", tmp_path / "recorded")
    assert done.code == 0, done.err
    pairs = zip(metrics(tmp_path / "resident"), metrics(tmp_path / "recorded"), strict=True)
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert theirs == pytest.approx(ours, rel=1e-2)
    again = run("distill", *words, "--recording", whole, "--work", tmp_path / "recorded")
    assert "distill is up to date" in again.err
    dry = run(
        "distill", *words, "--recording", whole, "--work", tmp_path / "recorded", "--dry-run", "--json", "--force"
    )
    assert (
        dry.json()["memory_bytes"]
        < run("distill", *words, "--work", tmp_path / "n", "--dry-run", "--json").json()["memory_bytes"]
    )


@pytest.mark.parametrize(("latest", "least_kills"), [(70, 3), pytest.param(30, 20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_comes_to_the_same_bytes(
    run: Run, recipe: Path, whole: Path, tmp_path: Path, latest: int, least_kills: int
) -> None:
    """SIGKILL at random dealings with the file system, again and again in one folder, later and later."""
    draw, folder, kills = random.Random(4), tmp_path / "killed", 0
    while die_at(
        draw.randint(latest // 10, latest + kills),
        lambda: call("record", "--recipe", recipe, "--out", folder, "--quiet"),
    ):
        kills += 1
    done = run("record", "--recipe", recipe, "--out", folder, "--json")
    assert done.code == 0, done.err
    assert contents(folder) == contents(whole)
    assert kills >= least_kills
    assert done.json()["bytes_per_token"] > 100


def test_an_interrupted_or_damaged_recording_is_gone_on_with(
    run: Run, recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "recording", shards.write_atomically
    written: list[str] = []

    def interrupting(path: Path, content: Callable[[Path], object]) -> None:
        write(path, content)
        written.append(path.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(shards, "write_atomically", interrupting)
    ended = run("record", "--recipe", recipe, "--out", folder)
    assert ended.code == INTERRUPTED
    assert "The same command goes on from there." in ended.err
    refused = run("distill", "--recipe", recipe, "--recording", folder, "--work", tmp_path / "job")
    assert (refused.code, "is not finished" in refused.err) == (2, True)
    assert run("record", "--recipe", recipe, "--out", folder).code == 0
    assert contents(folder) == contents(whole)
    assert len(set(written)) == len(written)  # nothing was made twice
    victim = folder / written[-1]
    for damage in (victim.read_bytes()[:-9], victim.read_bytes()[:-9] + b"\0" * 9):
        victim.write_bytes(damage)
        refused = run("distill", "--recipe", recipe, "--recording", folder, "--work", tmp_path / "job")
        assert (refused.code, f"damaged at {victim.name}" in refused.err) == (1, True)
        assert "damaged" in run("show", folder, "--verify").err
        assert run("record", "--recipe", recipe, "--out", folder).code == 0
        assert contents(folder) == contents(whole)
    shown = run("show", folder, "--verify")
    assert (shown.code, "verified: every sequence" in shown.out) == (0, True)


def test_one_at_a_time_and_nothing_of_somebody_else(run: Run, recipe: Path, whole: Path, tmp_path: Path) -> None:
    with record.alone(tmp_path / "held"):
        refused = run("record", "--recipe", recipe, "--out", tmp_path / "held")
    assert (refused.code, "is writing" in refused.err) == (1, True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    refused = run("record", "--recipe", recipe, "--out", tmp_path / "other", "--force")
    assert (refused.code, "did not make it" in refused.err) == (2, True)
    copy = shutil.copytree(whole, tmp_path / "copy")
    refused = run("record", "--recipe", recipe, "--out", copy, "--draws", 5)
    assert (refused.code, "draws was 300, and is 5 now" in refused.err) == (1, True)
    assert contents(copy) == contents(whole)
    dry = run("record", "--recipe", recipe, "--out", tmp_path / "none", "--dry-run", "--json")
    done = run("record", "--recipe", recipe, "--out", copy, "--draws", 5, "--force", "--json").json()
    assert dry.json()["sequences"] == done["sequences"]
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_is_refused_by_name(
    run: Run, recipe: Path, whole: Path, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    def refusal(path: Path, *words: Any) -> str:
        done = run("distill", "--recipe", path, "--recording", whole, "--work", tmp_path / "job", *words)
        assert done.code in (1, 2), done.out
        assert not (tmp_path / "job").exists()
        return done.err

    other = shutil.copytree(llama, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert "the teacher was" in refusal(recipe, other)
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    assert "the tokenizer was" in refusal(recipe, other)
    assert "the text was" in refusal(recipe, "--data", text_file)
    assert "the held-out text was" in refusal(recipe, "--held-out", text_file)
    assert "the seed that decides what is held out was 0 when it was made, and is 5 here" in refusal(
        recipe, "--seed", 5
    )
    assert "the sequence length was 32 when it was made, and is 16 here" in refusal(recipe, "--sequence-length", 16)
    packing = changed(recipe, tmp_path / "p.yaml", data={"packing": "document"})
    assert "the packing of sequences was stream when it was made, and is document here" in refusal(packing)
    assert "edgerazor record" in refusal(packing)
    assert "Layers are reconstructed" in refusal(recipe, "--reconstruct", 2)
    for losses, words in (
        ([{"name": "relation"}], "The loss relation cannot be computed from a recording"),
        ([{"name": "js", "temperature": 2.0}], "is to have the temperature 2, and the recording"),
    ):
        assert words in refusal(changed(recipe, tmp_path / "l.yaml", distill={"losses": losses}))
    assert (
        "is not a recording"
        in run("distill", "--recipe", recipe, "--recording", tmp_path, "--work", tmp_path / "x").err
    )
    more = changed(recipe, tmp_path / "e.yaml", distill={"evaluate_sequences": 3})
    done = run("distill", "--recipe", more, "--recording", whole, "--work", tmp_path / "job")
    assert (done.code, "holds 2 held-out sequences" in done.err) == (2, True)


def test_a_part_of_the_text_serves_its_seed_as_far_as_it_goes(run: Run, recipe: Path, tmp_path: Path) -> None:
    """Recorded for few steps, it is refused for more, and then recorded on from there."""
    folder, job = tmp_path / "part", tmp_path / "job"
    path = changed(recipe, tmp_path / "r.yaml", record={"hidden_layers": [], "draws": 20, "shard_bytes": 20_000})
    path = changed(path, path, distill={"losses": [{"name": "forward_kl"}], "evaluate_every": 100})
    assert run("record", "--recipe", path, "--out", folder, "--tokens", 6 * 32).code == 0
    before = contents(folder)
    words = ("--recipe", path, "--recording", folder, "--work", job)
    refused = run("distill", *words, "--steps", 4)
    assert "holds 6 sequences (seed 0), and of the 8 that this training reads 2 are not among them" in refused.err
    by_clock = changed(path, tmp_path / "c.yaml", distill={"steps": None, "max_time": 5.0})
    assert "only the clock limits" in run("distill", "--recipe", by_clock, *words[2:4], "--work", tmp_path / "c").err
    assert run("distill", *words, "--steps", 3).code == 0
    grown = run("record", "--recipe", path, "--out", folder, "--tokens", 8 * 32, "--json").json()
    assert (grown["sequences"], grown["covers"]) == (8, "seed 0")
    after = contents(folder)
    assert after["held-out-00000.safetensors"] == before["held-out-00000.safetensors"]
    assert run("distill", *words, "--steps", 4, "--force").code == 0
    less = run("record", "--recipe", path, "--out", folder, "--tokens", 6 * 32, "--json").json()
    assert less["sequences"] == 8  # nothing that was recorded is thrown away
    assert contents(folder) == after
    lafd = changed(path, tmp_path / "l.yaml", distill={"losses": [{"name": "lafd", "options": {"count": 1}}]})
    refused = run("distill", "--recipe", lafd, *words[2:], "--steps", 4, "--force")
    assert "The loss lafd compares hidden states, and the recording" in refused.err
    assert "--hidden-layers " in refused.err


def test_what_cannot_be_recorded(run: Run, recipe: Path, llama: Path, tmp_path: Path) -> None:
    refused = run("record", "--recipe", recipe, "--out", tmp_path / "r", "--hidden-layers", "1,9")
    assert (refused.code, "There is no layer 9" in refused.err) == (2, True)
    refused = run("record", llama, "--out", tmp_path / "r", "--work", tmp_path / "nothing")
    assert (refused.code, "There is no text that could have been recorded" in refused.err) == (2, True)
    assert list(tmp_path.iterdir()) == []

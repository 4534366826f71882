"""Some of the damaged folders of `make fuzz` and `make test-sanitizers`, and that the fuzzers would notice."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzz_inputs
import fuzz_loader
import fuzz_packed
import pytest
from fuzz_packed import DAMAGES, KINDS, SUBJECT, make_folders

from edgerazor import kernels
from edgerazor.errors import UserError
from edgerazor.kernels import native
from edgerazor.packed import PackedModel
from helpers.fuzzing import MEMORY, Folder, fuzz, put

needs_native = pytest.mark.skipif(native.library() is None, reason="the native library is not built")


@pytest.mark.slow
def test_damaged_folders_are_refused_or_unharmed() -> None:
    outcome = fuzz(SUBJECT, 1500, seed=5)
    assert outcome.failures == []
    assert outcome.total == 1500
    assert outcome.peak < MEMORY
    outcomes = {name.rpartition(" ")[2] for name in outcome.counts}
    assert outcomes == {"refused", "unharmed", "other"}


@pytest.mark.slow
@needs_native
def test_damaged_models_are_refused_or_run() -> None:
    outcome = fuzz(fuzz_loader.SUBJECT, 60, seed=6)
    assert outcome.failures == []
    assert outcome.total == 60
    assert outcome.peak < MEMORY
    assert {name.rpartition(" ")[2] for name in outcome.counts} >= {"refused", "unharmed", "other"}


def test_every_damage_changes_every_kind(tmp_path: Path) -> None:
    folders = make_folders(tmp_path)
    assert [folder.kind for folder in folders] == list(KINDS)
    draw = random.Random(0)
    for damage in DAMAGES:
        for folder in folders:
            changed = 0
            for _ in range(10):
                copy = folder.copy()
                damage(draw, copy)
                changed += copy.files != folder.files or bool(copy.special)
            assert changed >= 5, (damage.__name__, folder.kind)


def test_a_number_is_always_the_same_folder(tmp_path: Path) -> None:
    folders = make_folders(tmp_path)
    for number in range(50):
        first, second = (SUBJECT.damaged(number, 1, folders) for _ in range(2))
        assert (first[0].files, first[1]) == (second[0].files, second[1])


def test_the_law_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lets damage pass, says too much, or asks for another exit code, is noticed."""
    (folder, *_) = make_folders(tmp_path)
    path = tmp_path / "damaged"
    path.mkdir()
    put(folder, None, path)
    assert fuzz_packed.check(path, folder) == "unharmed"
    other = make_folders_again(tmp_path / "again")
    with pytest.raises(AssertionError, match="nobody noticed"):
        fuzz_packed.check(path, other)
    for error in (
        UserError("Two\nlines."),
        UserError("x" * 5000 + "."),
        UserError("No end"),
        UserError("Usage.", code=2),
    ):

        def refuse(_: Path, error: UserError = error) -> PackedModel:
            raise error

        monkeypatch.setattr(PackedModel, "open", refuse)
        with pytest.raises(AssertionError):
            fuzz_packed.check(path, folder)


@needs_native
def test_models_that_compute_something_else_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, kernels.name())  # what the fuzzer sets goes with the test
    folders = {folder.kind: folder for folder in fuzz_loader.make_folders(tmp_path)}
    assert list(folders) == list(fuzz_loader.KINDS)
    assert fuzz_loader.check(tmp_path / "qwen3", folders["qwen3"]) == "unharmed"
    with pytest.raises(AssertionError, match="nobody noticed"):
        fuzz_loader.check(tmp_path / "olmo2", folders["qwen3"])
    changed = folders["qwen3"].copy()
    changed.lies = True
    assert fuzz_loader.check(tmp_path / "olmo2", changed) == "other"
    draw = random.Random(0)
    for damage in fuzz_loader.DAMAGES:
        changes = 0
        for folder in folders.values():
            copy = folder.copy()
            damage(draw, copy)
            changes += copy.files != folder.files or bool(copy.special)
        assert changes > len(folders) // 2, damage.__name__


def make_folders_again(place: Path) -> Folder:
    """A folder of another kind."""
    place.mkdir()
    return make_folders(place)[1]


def test_a_hanging_and_a_dying_worker_are_reported(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "for number in range(*map(int, sys.argv[2:5])):\n"
        "    print(json.dumps({'at': number}), flush=True)\n"
        "    if number in (3, 5): os.kill(os.getpid(), 11)\n"
        "print(json.dumps({'counts': {'x refused': 1}, 'peak': 7}))\n"
    )
    outcome = fuzz(SUBJECT._replace(script=str(script)), 8)
    assert outcome.failures == [f"number {n}: the process ended with code -11" for n in (3, 5)]
    assert (outcome.total, outcome.peak) == (1, 7)


# What is given to commands --------------------------------------------------------------------------------------------


@pytest.fixture
def runner() -> Iterator[fuzz_inputs.Runner]:
    found = fuzz_inputs.Runner()
    yield found
    found.end()


def run(runner: fuzz_inputs.Runner, place: Path, monkeypatch: pytest.MonkeyPatch) -> fuzz_inputs.Answer:
    """A command whose stderr is file 2, not what pytest puts in its place."""
    with open(2, "w", closefd=False) as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        return runner.run(place, ["show"])


def says(text: str, code: int) -> Callable[[], None]:
    def act() -> None:
        os.write(2, text.encode())
        sys.exit(code)

    return act


def fails() -> None:
    raise ZeroDivisionError


def fills_memory() -> None:
    b"x" * 50_000_000  # noqa: B018


def computes() -> None:
    while True:
        pass


BREACHES: dict[str, tuple[Callable[[], None], str]] = {
    "a bug": (fails, "exit code 70: .*ZeroDivision"),
    "a traceback that is printed": (says("Error: x\nTraceback (most recent call last)", 1), "Traceback"),
    "a control character": (says("Error: \x1b[31m.\n", 1), r"\{'\\x1b'\} in"),
    "too many words": (says("Error: " + "x" * 4000, 1), "4007 bytes on stderr"),
    "a code of its own": (says("Error: x.\n", 5), "exit code 5"),
    "no sentence": (says("", 1), "without a sentence"),
    "a signal": (lambda: os.kill(os.getpid(), signal.SIGTERM), "exit code -15"),
    "a large answer": (fills_memory, "MB of memory"),
    "no answer": (computes, "no answer within"),
    "a hang": (lambda: time.sleep(1000), "exit code -9"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_breaches_of_the_law_are_noticed(
    name: str, runner: fuzz_inputs.Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, reason = BREACHES[name]
    monkeypatch.setattr(fuzz_inputs.cli, "main", act)
    monkeypatch.setattr(fuzz_inputs, "MEMORY", 20_000_000)
    monkeypatch.setattr(fuzz_inputs, "SECONDS", 0 if name == "no answer" else 15)
    monkeypatch.setattr(fuzz_inputs, "PATIENCE", 0.1 if name == "a hang" else 120)
    answer = run(runner, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=reason):
        fuzz_inputs.check_answer(answer, "show")


@pytest.mark.parametrize("act", [says("", 0), says("Error: it is damaged.\nCopy it again.\n", 1)])
def test_what_is_lawful_passes(
    act: Callable[[], None], runner: fuzz_inputs.Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_inputs.cli, "main", act)
    fuzz_inputs.check_answer(run(runner, tmp_path, monkeypatch), "show")

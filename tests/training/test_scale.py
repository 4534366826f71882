"""A training on machines that are not here: what each process would hold, receive and take."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgerazor.training.scale import Parts, received_bytes
from helpers.tiny_job import Run, write_recipe


def test_what_a_process_receives() -> None:
    student, teacher = Parts(layers=80, largest=10, rest=20), Parts(layers=800, largest=100, rest=200)
    assert received_bytes(student, teacher, 1, 1, 2) == 0
    parts = 4 * (80 + 80 + 20) + 4 * (80 + 20) + 2 * (800 + 200)
    assert received_bytes(student, teacher, 4, 1, 2) == parts * 3 // 4
    assert received_bytes(student, teacher, 4, 5, 2) == 5 * parts * 3 // 4


def test_more_processes_hold_less_each(run: Run, llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    words = ("distill", "--recipe", recipe, "--work", tmp_path / "job", "--dry-run", "--json", "--world-size")
    few, many = (run(*words, count, "--gpu-memory", "80GB").json() for count in (2, 16))
    assert few["fits"]
    assert many["memory_bytes"] < few["memory_bytes"]
    assert many["tokens_per_step"] == 8 * few["tokens_per_step"]
    assert many["received_bytes"] > few["received_bytes"]
    assert not run(*words, 2, "--gpu-memory", "1MB").json()["fits"]
    here = run(*words, 2).json()
    assert here["gpu_memory_bytes"] is None
    assert here["fits"] is None
    assert "measured" in here["speed"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--world-size", 2), "plan a training on other machines"),
        (("--dry-run", "--gpu-memory", "80GB"), "plan a training on other machines"),
        (("--dry-run", "--world-size", 0), "was 0"),
        (("--dry-run", "--world-size", 2, "--gpu-memory", "much"), "--gpu-memory: "),
        (("--dry-run", "--world-size", 2, "--optimizer", "adafactor"), "add up their gradients"),
    ],
)
def test_what_cannot_be_planned(
    run: Run, llama: Path, text_file: Path, tmp_path: Path, words: tuple[object, ...], sentence: str
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    refused = run("distill", "--recipe", recipe, "--work", tmp_path / "job", *words)
    assert refused.code == 2
    assert sentence in refused.err

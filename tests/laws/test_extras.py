"""What runs a packed model needs none of the extras; what needs one says which, in a sentence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from edgerazor.cli.errors import EXTRAS
from helpers.places import ROOT

ALL = {extra for extras in EXTRAS.values() for extra in extras.split(",")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distribution(file: Path) -> str:
    """The name under which a file or folder of site-packages was installed, as it is imported."""
    return re.split(r"[-.]", file.name)[0].lower()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python where the packages of all extras are missing."""
    folder = tmp_path_factory.mktemp("site")
    for file in Path(sysconfig.get_path("purelib")).iterdir():
        if distribution(file) not in EXTRAS and file.suffix != ".pth" and "edgerazor" not in file.name:
            (folder / file.name).symlink_to(file)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

    def python(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return python


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory, bare: Callable[..., object]) -> Path:
    """A model that was rounded without the extras."""
    folder = tmp_path_factory.mktemp("bare") / "job"
    done = bare("-m", "edgerazor", "pack", llama, "--bits", "4", "--group-size", "32", "--work", folder)
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    return folder / "packed"


def test_a_packed_model_is_loaded_and_writes(
    bare: Callable[..., subprocess.CompletedProcess[str]], packed: Path
) -> None:
    loaded = bare("-c", f"import edgerazor; print(edgerazor.load({str(packed)!r}).engine)")
    assert loaded.returncode == 0, loaded.stderr
    written = bare("-m", "edgerazor", "generate", "Nora took", "--model", packed, "--max-tokens", "3", "--quiet")
    assert written.returncode == 0, written.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        pytest.param(
            ("distill", "LLAMA", "--bits", "2", "--data", "TEXT", "--steps", "1", "--work", "WORK"),
            "train",
            marks=pytest.mark.slow,
        ),
        pytest.param(("eval", "LLAMA", "--tasks", "world"), "eval", marks=pytest.mark.slow),
        (("pack", "PACKED", "--export", "gguf"), "gguf"),
        (("serve", "PACKED"), "serve"),
    ],
)
def test_what_is_missing_is_a_sentence(
    bare: Callable[..., subprocess.CompletedProcess[str]],
    packed: Path,
    llama: Path,
    text_file: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    extra: str,
) -> None:
    places = {"LLAMA": llama, "TEXT": text_file, "PACKED": packed, "WORK": tmp_path / "job"}
    refused = bare("-m", "edgerazor", *(places.get(word, word) for word in words))
    assert refused.returncode == 1, refused.stderr
    said = " ".join(refused.stderr.split())
    assert "which is not installed" in said
    assert re.search(rf"edgerazor-toolchain\[[a-z,]*{extra}\]", said)
    assert "Traceback" not in said


def test_every_extra_is_known() -> None:
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    names = {extra: {re.split("[<>=]", each)[0].replace("-", "_") for each in extras[extra]} for extra in ALL}
    assert set().union(*names.values()) == EXTRAS.keys()
    for package, bringing in EXTRAS.items():
        assert {extra for extra in ALL if package in names[extra]} == set(bringing.split(","))


def test_all_and_dev_hold_every_extra() -> None:
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(re.findall(r"\[(.*)\]", everything)[0].split(",")) == ALL
    assert f"{PROJECT['name']}[all]" in extras["dev"]

"""The documents: every relative link leads somewhere, the map names every room, and what is told to be done works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import edgerazor
from edgerazor import losses, registry
from helpers.tiny_job import Run, metrics, write_recipe

PACKAGE = Path(edgerazor.__file__).parent
ROOT = PACKAGE.parent
GUIDE = (PACKAGE / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def documents() -> list[Path]:
    """All Markdown files of the repository, what was built or downloaded left out."""
    skipped = {".git", ".venv", "build", "dist", "node_modules"}
    return sorted(path for path in ROOT.rglob("*.md") if not skipped & set(path.relative_to(ROOT).parts))


def prose(text: str) -> str:
    """A document without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The fragments that headings can be linked by, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken(document: Path) -> list[str]:
    """Relative links of a document that lead nowhere."""
    text = document.read_text(encoding="utf-8")
    wrong = []
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (
            fragment and target.suffix == ".md" and fragment not in anchors(target.read_text(encoding="utf-8"))
        ):
            wrong.append(link)
    return wrong


def test_links_lead_somewhere() -> None:
    wrong = {str(path.relative_to(ROOT)): links for path in documents() if (links := broken(path))}
    assert not wrong


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One head, `two`\n")
    (tmp_path / "a.md").write_text(
        "[a](other.md) [b](other.md#one-head-two) [c](none.md) [d](other.md#three) [e](https://x.y) `[f](none)`\n"
    )
    assert broken(tmp_path / "a.md") == ["none.md", "other.md#three"]


def test_the_front_page_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_map_names_every_room() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    rooms |= {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("_")}
    section = GUIDE.split("## The map")[1].split("\n## ")[0]
    named = {link.rstrip("/") for link in re.findall(r"^\| \[[^\]]+\]\(([^)]+)\)", section, re.MULTILINE)}
    assert named == rooms


def example(kind: str) -> str:
    """The example of the guide that is marked as that kind."""
    (code,) = re.findall(rf"^```python {kind}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    return str(code)


@pytest.fixture
def state_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The guide's loss in a file of its own, as if it lay in the folder of losses."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "state_error.py").write_text(example("loss"))
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path / "more")])
    yield "state_error"
    sys.modules.pop("edgerazor.losses.state_error", None)


def test_a_new_loss_is_one_file(state_error: str, tmp_path: Path, llama: Path, text_file: Path, run: Run) -> None:
    """The registry knows it, a recipe gives it an option, and a training moves the weights by it alone."""
    assert state_error in registry.names("losses")
    assert losses.make(state_error, factor=2.0).factor == 2.0
    terms = [{"name": state_error, "weight": 0.5, "options": {"factor": 2.0}}]
    distill: dict[str, Any] = {"losses": terms, "steps": 3, "evaluate_every": 1, "learning_rate": 1e-3}
    path = write_recipe(tmp_path / "recipe.yaml", llama, text_file, distill=distill)
    done = run("distill", "--recipe", path, "--work", tmp_path / "job")
    assert done.code == 0, done.err
    assert all(line["loss"] > 0 for line in metrics(tmp_path / "job") if "loss" in line)
    student = load_file(tmp_path / "job" / "distill" / "last" / "model.safetensors")
    teacher = load_file(llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(student[name], teacher[name])


def test_benchmarks_start_from_the_checkout() -> None:
    """Each with its own --help, by the name that the pages give."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "recipes").rglob("*.md"))
    modules = set(re.findall(r"recipes\.benchmarks\.(\w+)", pages + (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert {"methods", "plans"} <= modules
    assert all((ROOT / "recipes" / "benchmarks" / f"{name}.py").exists() for name in modules)
    words = [sys.executable, "-m", "recipes.benchmarks.compression", "--help"]
    assert "--results" in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout

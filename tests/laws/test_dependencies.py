"""What pyproject.toml declares is what the code imports, and what was tested is within what it declares."""

from __future__ import annotations

import ast
import itertools
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

from helpers.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
#: Only of environments that are made for them (`make peers`, `make llamacpp`).
PEERS = {"gptqmodel", "auto-round", "hqq", "optimum", "llama-cpp"}
#: Used through a command or a plugin, so nothing imports them.
COMMANDS = {"mypy", "pytest-xdist", "ruff", "types-pyyaml"}


def normal(name: str) -> str:
    """A distribution's name as package registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*lists: Iterable[str]) -> set[str]:
    """Names of other people's distributions in lists of requirements."""
    names = {normal(re.match(r"[A-Za-z0-9._-]+", each)[0]) for each in itertools.chain(*lists)}  # type: ignore[index]
    return names - {PROJECT["name"]}  # extras that are made of others


def imported(folders: Iterable[str], but: str = "") -> set[str]:
    """Distributions of other people that the files of folders import, at any depth."""
    owners = metadata.packages_distributions()
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    ours = {
        "edgerazor",
        "recipes",
        *(path.stem for path in files if "edgerazor" not in path.relative_to(ROOT).parts),
        "helpers",
    }
    names: set[str] = set()
    for path in files:
        if path.name == but:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).partition(".")[0])
    others = names - set(sys.stdlib_module_names) - ours
    return {normal(owners.get(name, [name])[0]) for name in others}


def test_the_package_imports_what_it_declares() -> None:
    used = (EXTRAS[name] for name in EXTRAS if name != "dev")
    assert imported(["edgerazor"], but="setuptools_commands.py") == declared(PROJECT["dependencies"], *used)


def test_tests_and_recipes_import_what_is_declared() -> None:
    everything = declared(PROJECT["dependencies"], *EXTRAS.values())
    assert imported(["tests", "recipes", ".ci"]) - everything <= PEERS
    used = imported(["edgerazor", "tests", "recipes"])
    assert everything - used <= COMMANDS


REQUIREMENTS = dict.fromkeys(itertools.chain(PROJECT["dependencies"], *EXTRAS.values()))


@pytest.mark.parametrize("requirement", [each for each in REQUIREMENTS if not each.startswith(PROJECT["name"])])
def test_what_was_tested_is_within_the_ranges(requirement: str) -> None:
    tested = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    found = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)(?:,<([0-9.]+))?", requirement)
    assert found, f"{requirement}: no range"
    version = numbers(tested[normal(found[1])])
    assert numbers(found[2]) <= version
    assert found[3] is None or version < numbers(found[3])


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(each) for each in version.split(".") if each.isdigit())


def test_a_source_distribution_holds_what_its_tests_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers and recipes as well as tests, and nothing that was built or downloaded."""
    egg_info = pytest.importorskip("setuptools.command.egg_info")
    monkeypatch.chdir(ROOT)
    chosen = egg_info.FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            chosen.process_template_line(line)
    files = {Path(file) for file in chosen.files}
    needed = {path.relative_to(ROOT) for path in (ROOT / "tests").iterdir() if path.is_file()}
    needed |= {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.py")}
    needed |= {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml")}
    needed |= {Path("Makefile"), Path(".ci/constraints.txt"), Path("recipes/world/teacher/model.safetensors")}
    assert needed <= files
    assert not {path for path in files if "__pycache__" in path.parts or path.suffix in (".so", ".pyc")}
    assert not {path for path in files if path.name == "distill.txt"}

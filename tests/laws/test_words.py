"""One vocabulary: the words that edgerazor/README.md calls retired are in no name, no file name and no help text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import edgerazor

PACKAGE = Path(edgerazor.__file__).parent
ROOT = PACKAGE.parent
#: What a row's column "where" may name beside rooms: kinds of names.
KINDS = {"local", "functions", "rooms"}
#: Where help texts are written.
HELP = ("cli", "recipe")


@dataclass(frozen=True)
class Retired:
    """A retired word: the whole name, or with `part` one of the words that a name is made of.

    Attributes:
        where: rooms in which it is retired; everywhere where empty.
        kind: "", "local" (variables and arguments alone), "functions" (definitions) or "rooms" (files).
    """

    word: str
    part: bool
    where: tuple[str, ...] = ()
    kind: str = ""

    def holds_in(self, path: Path) -> bool:
        """Whether it is retired in a file."""
        if not self.where:
            return True
        room = path.relative_to(PACKAGE).with_suffix("") if path.is_relative_to(PACKAGE) else None
        return room is not None and any(room.is_relative_to(each) for each in self.where)

    def is_in(self, name: str) -> bool:
        """Whether a name is it, or is made of it."""
        return self.word in words_of(name) if self.part else self.word == name


def words_of(name: str) -> list[str]:
    """The words that a name is made of: `fixed_codes` and `FixedCodes` are made of "fixed" and "codes"."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def table(text: str) -> list[Retired]:
    """The rows of the table of retired words in a Markdown text."""
    section = text.split("### Retired words")[1].split("\n## ")[0]
    words = []
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        retired, _, where = (cell.strip() for cell in line.strip("|").split("|"))
        places = [place.strip() for place in where.split(",") if place.strip()]
        kind = next((place for place in places if place in KINDS), "")
        rooms = tuple(place for place in places if place not in KINDS)
        for word in re.findall(r"`([^`]+)`", retired):
            words.append(Retired(word.strip("*"), word.startswith("*"), rooms, kind))
    return words


RETIRED = table((PACKAGE / "README.md").read_text(encoding="utf-8"))


def python_names(source: str) -> Iterator[tuple[str, str, int]]:
    """(name, kind, line) of all that a file defines or mentions as an attribute or a keyword."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    fields = {id(line.target) for node in classes for line in node.body if isinstance(line, ast.AnnAssign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, "functions", node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, "local", node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, "" if id(node) in fields else "local", node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, "", node.lineno
        elif isinstance(node, ast.alias):
            for part in node.name.split("."):
                yield part, "", node.lineno
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, "", node.value.lineno


def cpp_names(source: str) -> Iterator[tuple[str, str, int]]:
    """The names of a C++ file, comments and strings left out."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    code = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, source, flags=re.DOTALL)
    for number, line in enumerate(code.splitlines(), 1):
        for name in re.findall(r"[A-Za-z_]\w*", line):
            yield name, "", number


def code_files() -> list[Path]:
    """The package, the benchmarks and what tests share."""
    python = [*PACKAGE.rglob("*.py"), *(ROOT / "recipes" / "benchmarks").rglob("*.py")]
    python += [path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_")]
    return sorted([*python, *PACKAGE.glob("kernels/cpp/*")])


def problems(path: Path, source: str) -> list[str]:
    """Retired words in a file, with their lines."""
    retired = [word for word in RETIRED if word.kind != "rooms" and word.holds_in(path)]
    names = python_names(source) if path.suffix == ".py" else cpp_names(source)
    lines = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for name, kind, line in names
        for word in retired
        if word.is_in(name) and word.kind in ("", kind) and "__" not in name
    }
    return sorted(lines)


def test_names() -> None:
    found = [line for path in code_files() for line in problems(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join([f"{len(found)} retired names", *found])


def test_file_names() -> None:
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    found = [
        str(path.relative_to(ROOT))
        for path in [*code_files(), *folders]
        for word in RETIRED
        if word.kind in ("", "rooms") and word.holds_in(path) and word.is_in(path.stem)
    ]
    assert not found, "\n".join(found)


def test_help_texts() -> None:
    """Words that are retired everywhere are in no explanation of an option or a field.

    A single word is a key: that of a field that had another name is refused with the new one.
    """
    words = [word.word for word in RETIRED if word.part and not word.where]
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in HELP:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
                if " " in text and pattern.search(text):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text!r}")
    assert not found, "\n".join(found)


def test_the_table_is_read() -> None:
    assert len(RETIRED) > 80
    assert Retired("rung", part=True) in RETIRED
    assert Retired("TrainingLinear", part=False) in RETIRED
    assert Retired("cell", part=True, where=("runtime", "kernels")) in RETIRED
    assert Retired("found", part=False, kind="local") in RETIRED
    rooms = {room for word in RETIRED for room in word.where}
    assert all((PACKAGE / room).exists() or (PACKAGE / f"{room}.py").exists() for room in rooms)


@pytest.mark.parametrize(
    ("room", "source", "names"),
    [
        ("training", "def begin_rung(x):\n    return x\n", ["begin_rung"]),
        ("training", "class RungResult: pass\n", ["RungResult"]),
        ("training", "wrung = strung = 1\n", []),
        ("models", "x.fix_codes()\n", ["fix_codes"]),
        ("models", "from edgerazor.models import walking\n", ["walking"]),
        ("console", "for path in os.walk(folder): pass\n", []),
        ("runtime", "def prefix(cells): pass\n", ["cells"]),
        ("report", "def table(cells): pass\n", []),
        ("training", "def keep(): write(begin=1)\n", ["keep"]),
        ("report", "class Difference:\n    about: str = ''\n", []),  # a field of a result
        ("formats", "found = 1\nself.found = 2\n", ["found"]),
        ("formats", "x = 'surgery'  # surgery\n", []),
    ],
)
def test_what_is_refused(room: str, source: str, names: list[str]) -> None:
    lines = problems(PACKAGE / room / "made_up.py", source)
    assert [line.rpartition(" ")[2] for line in lines] == names


def test_comments_of_cpp_are_free() -> None:
    path = PACKAGE / "kernels" / "cpp" / "made_up.hpp"
    assert problems(path, "// threads meet here\nbarrier(); /* a\nDesk */ int x;\n") == []
    assert [line.rpartition(" ")[2] for line in problems(path, "struct Desk {};\nvoid meet();\n")] == ["Desk", "meet"]

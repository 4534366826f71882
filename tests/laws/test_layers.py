"""The import rule of the house: imports point down, never up and never sideways between rooms."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import edgerazor
from helpers.places import ROOT as REPOSITORY

ROOT = Path(edgerazor.__file__).parent

#: From the top down; rooms of one layer do not know each other.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"pipeline"},
    {"stages"},
    {"stage", "report"},
    {"evaluation", "benchmark", "calibration", "packaging", "server"},
    {"training", "sensitivity"},
    {"job"},
    {"student_plan", "calibrated"},
    {"importers", "runtime"},  # importers read with the names that exporters write
    {"exporters", "tasks", "transformers_plugin"},
    {"allocate"},
    {"modules", "pictures"},
    {"packed", "models", "data", "recording"},
    {"kernels", "families"},
    {"formats", "losses", "devices"},
    {"recipe", "workdir", "console"},
    {"untrusted"},
    {"registry", "locks", "terminal", "transformers_registration"},
    {"errors"},
)
HEIGHT = {room: len(LAYERS) - index for index, rooms in enumerate(LAYERS) for room in rooms}
#: `formats` and `losses` see tensors only.
TENSORS_ONLY = {"formats", "losses"}
#: Folders of many of one kind: their files do not know each other (but `show` prints the schemas of all stages).
PLUGINS = {"stages", "importers", "exporters", "families", "formats", "losses"}
#: `families` are facts about configurations: neither torch nor transformers, and nothing of ours but these.
FACTS_ONLY, FACTS_MAY_IMPORT = {"families"}, {"registry", "errors"}
KNOW_TRANSFORMERS = {"models", "data", "modules", "transformers_plugin", "runtime", "untrusted"}


@functools.cache
def imports(path: Path) -> list[str]:
    """Dotted names of all modules that a file imports, wherever in the file (`from a import b` gives `a.b`)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def files() -> list[tuple[str, Path]]:
    """(room, file) for every file but the package's own `__init__`, which is above all rooms."""
    paths = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
    return [(path.relative_to(ROOT).parts[0].removesuffix(".py"), path) for path in paths]


def problem(room: str, path: Path, name: str) -> str:
    """What is wrong with an import of ours (`edgerazor.<room>.<file>...`), or an empty string."""
    parts = name.split(".")
    if parts[0] != "edgerazor" or parts[1:] in ([], ["__version__"]):
        return ""
    target = parts[1]
    if target == room:
        inside = len(parts) > 2 and (ROOT / room / f"{parts[2]}.py").exists()
        whole = path.name == "__init__.py" or path == ROOT / "stages" / "show.py" or room not in PLUGINS
        shared = whole or not inside
        return "" if shared else "is a plugin beside it"
    if target not in HEIGHT:
        return "is in no layer"
    if room in TENSORS_ONLY and target not in {"registry", "errors"}:
        return "is not for a room that sees tensors only"
    if room in FACTS_ONLY and target not in FACTS_MAY_IMPORT:
        return "is not for a room of facts"
    return "" if HEIGHT[target] < HEIGHT[room] else "does not lie below it"


def test_imports_point_down() -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}, which {reason}"
        for room, path in files()
        for name in imports(path)
        if (reason := problem(room, path, name))
    }
    assert wrong == set()


def hands_over_a_recipe(call: ast.Call) -> bool:
    """Whether a call is given the whole recipe: `recipe` or `anything.recipe`."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(
        (isinstance(value, ast.Name) and value.id == "recipe")
        or (isinstance(value, ast.Attribute) and value.attr == "recipe")
        for value in values
    )


def test_the_recipe_is_resolved_once() -> None:
    """Stages receive answers: few places hand the whole recipe to `job.py`, and no file is given it to ask again."""
    handing = []
    for _, path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        from_job = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "edgerazor.job"
            for alias in node.names
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and hands_over_a_recipe(node)):
            function = call.func
            by_name = isinstance(function, ast.Name) and function.id in from_job
            of_module = isinstance(function, ast.Attribute) and ast.unparse(function.value) in ("job", "jobs")
            if by_name or of_module:
                handing.append(f"{path.relative_to(ROOT)}: {ast.unparse(call)}")
    assert 0 < len(handing) <= 6, handing


def test_the_pipeline_knows_no_stage_by_name() -> None:
    tree = ast.parse((ROOT / "pipeline.py").read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert texts & {"calibrate", "distill", "pack", "eval", "bench"} == set()


def test_every_room_has_a_layer() -> None:
    assert {room for room, _ in files()} <= HEIGHT.keys()


def test_few_rooms_know_transformers() -> None:
    knowing = {room for room, path in files() for name in imports(path) if name.split(".")[0] == "transformers"}
    assert knowing <= KNOW_TRANSFORMERS


def test_families_are_facts_alone() -> None:
    outside = {name.split(".")[0] for room, path in files() if room in FACTS_ONLY for name in imports(path)}
    assert not outside & {"torch", "transformers", "gguf", "numpy"}


def test_the_rule_is_broken_by_what_it_forbids() -> None:
    stage = ROOT / "stages" / "pack.py"
    assert problem("formats", ROOT / "formats" / "int4.py", "edgerazor.recipe.Recipe") != ""
    assert problem("packed", ROOT / "packed.py", "edgerazor.modules.replacement") != ""  # up
    assert problem("families", ROOT / "families" / "llama.py", "edgerazor.families.qwen3") != ""
    assert problem("families", ROOT / "families" / "core" / "base.py", "edgerazor.kernels.decoder") != ""
    assert problem("data", ROOT / "data" / "rows.py", "edgerazor.models.Structure") != ""  # sideways
    assert problem("stages", stage, "edgerazor.stages.distill") != ""
    assert problem("stages", stage, "edgerazor.job") == ""
    assert problem("stages", stage, "edgerazor.formats") == ""


def test_the_tests_mirror_the_rooms() -> None:
    """A folder of tests is a room of the package or of the repository, and no test file imports another."""
    tests = REPOSITORY / "tests"
    outside = {"fuzz", "helpers", "laws", "recipes"}
    rooms = {room for room, _ in files()}
    folders = {path.parent.name for path in tests.rglob("*.py") if path.parent != tests}
    assert folders <= rooms | outside
    names = {path.stem for path in tests.rglob("test_*.py")}
    assert len(names) == len(list(tests.rglob("test_*.py")))  # pytest finds them by their bare names
    assert {path.name for path in tests.rglob("*.py") for name in imports(path) if name.split(".")[0] in names} == set()

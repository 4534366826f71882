"""The drawn plan: the numbers of the map are those of the plan, on any terminal and in the picture."""

from __future__ import annotations

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from edgerazor import pipeline
from edgerazor import recipe as recipes
from edgerazor.calibrated import read_plan
from edgerazor.report import heatmap
from edgerazor.report import plan_summary as plan_
from edgerazor.report.plan_summary import PlannedMatrix, PlanSummary, SensitiveMatrix
from edgerazor.workdir import WorkDir
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import ModelMaker

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def sensitivity(damage: dict[str, dict[str, float]], **changes: Any) -> str:
    described = [
        {"name": name, "kind": "linear", "rows": 1, "columns": 1, "damage": each} for name, each in damage.items()
    ]
    values = {"version": 1, "estimate": "fisher", "tokens": 8192, "model": "tiny", "tensors": described, "kv": None}
    return json.dumps({**values, **changes})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, llama: Path, text_file: Path) -> Path:
    """A calibrated job."""
    folder = tmp_path_factory.mktemp("plan")
    recipe = recipes.build(recipes.load(write_recipe(folder / "r.yaml", llama, text_file)))
    pipeline.run("calibrate", recipe, WorkDir(folder / "job"), pipeline.Console(quiet=True))
    return folder / "job"


def imagined(layers: int, roles: list[str], sensitive: bool = False) -> PlanSummary:
    """A plan in which every cell has another number of bits."""
    draw = torch.Generator().manual_seed(0)
    places = [(layer, role) for layer in range(layers) for role in roles]
    bits = (1.58 + 2.42 * torch.rand(len(places), generator=draw)).tolist()
    mixed = {"rows": 2, "columns": 2, "formats": {"ternary": 0.5, "int4": 0.5}}
    linears = [
        PlannedMatrix(name=f"layers.{layer}.{role}", kind="linear", layer=layer, role=role, bits=each, **mixed)
        for (layer, role), each in zip(places, bits, strict=True)
    ]
    ends = [
        PlannedMatrix(
            name=f"model.{kind}", kind=kind, layer=None, role=None, bits=4.0, rows=2, columns=2, formats={"int4": 1}
        )
        for kind in ("embedding", "head")
    ]
    worst = [SensitiveMatrix(name=each.name, bits=each.bits, damage={"int4": 0.25}) for each in linears[:10]]
    return PlanSummary(
        notation="W2-A8-KV8",
        strategy="sensitivity",
        granularity="row",
        nominal_bits=2.0,
        real_bits=2.4,
        bytes=200_000_000,
        predicted_kl=0.0123,
        formats={"ternary": 0.5, "int4": 0.5},
        matrices=[ends[0], *linears, ends[1]],
        estimate="fisher" if sensitive else None,
        tokens=8192 if sensitive else None,
        most_sensitive=worst if sensitive else [],
        kv_damage={"int8": 0.001} if sensitive else None,
    )


def printed(plan: PlanSummary, width: int, colours: bool = False) -> str:
    system: Any = "truecolor" if colours else None
    console = Console(width=width, record=True, file=io.StringIO(), color_system=system, highlight=False)
    for item in heatmap.show(plan):
        console.print(item, markup=False, soft_wrap=isinstance(item, str))
    return console.export_text(styles=colours)


# --- what is gathered --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 4.0},
        {"granularity": "block", "plan": "variance", "bits": 2.3},
        {"granularity": "column", "plan": "first"},
        {"bits": 6.0, "head_format": "int8", "overrides": [{"match": "*.1.mlp.*", "format": "int3"}]},
    ],
)
@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_the_numbers_are_those_of_the_plan(
    run: Run, tmp_path: Path, make_model: ModelMaker, text_file: Path, family: str, settings: dict[str, Any]
) -> None:
    make_model(tmp_path / "model", family)
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "model", text_file, calibrate=settings)
    assert run("calibrate", "--recipe", recipe, "--work", tmp_path / "job", "--quiet").code == 0
    found = run("show", "plan", "--work", tmp_path / "job", "--json").json()
    plan = read_plan(WorkDir(tmp_path / "job"))
    weights = sum(m.rows * m.columns for m in plan.matrices if m.kind == "linear")
    assert [each["name"] for each in found["matrices"]] == [each.name for each in plan.matrices]
    average = sum(m["bits"] * m["rows"] * m["columns"] for m in found["matrices"] if m["kind"] == "linear") / weights
    assert average == pytest.approx(plan.nominal_bits(), abs=1e-4)
    assert found["nominal_bits"] == pytest.approx(plan.nominal_bits(), abs=1e-4)
    assert sum(found["formats"].values()) == pytest.approx(1, abs=1e-5)
    calibrated = json.loads((tmp_path / "job" / "calibrate" / "result.json").read_text())
    assert (found["real_bits"], found["bytes"]) == (calibrated["real_bits"], calibrated["bytes"])
    assert (found["predicted_kl"], found["estimate"], found["most_sensitive"]) == (None, None, [])
    for each in found["matrices"]:
        if each["kind"] == "linear":
            assert each["name"].split(".")[2] == str(each["layer"])
            assert each["name"].endswith(f".{each['role']}")
        else:
            assert each["layer"] is each["role"] is None


def test_places_are_layers_and_roles() -> None:
    names = [f"model.layers.{i}.{end}" for i in (0, 1, 10) for end in ("self_attn.q_proj", "mlp.experts.3.up_proj")]
    assert plan_.places(names)["model.layers.10.mlp.experts.3.up_proj"] == (10, "up_proj")
    alike = ["h.0.attn.dense", "h.0.mlp.dense", "h.1.attn.dense", "h.1.mlp.dense", "h.1.mlp.fc"]
    assert list(plan_.places(alike).values()) == [
        (0, "attn.dense"),
        (0, "mlp.dense"),
        (1, "attn.dense"),
        (1, "mlp.dense"),
        (1, "fc"),
    ]
    assert plan_.places(["a.q", "b.0.q"]) == {"a.q": (0, "a.q"), "b.0.q": (0, "b.0.q")}


def test_the_most_sensitive_come_first(run: Run, work: Path) -> None:
    job = WorkDir(work)
    damage = {
        f"model.layers.{i % 2}.mlp.{LLAMA[4 + i % 3]}": {"ternary": (i * 5 % 6) / 10, "int4": 0.01} for i in range(6)
    }
    damage |= {f"other.{i}": {"int8": 2.0 - i} for i in range(6)}
    job.sensitivity_file.write_text(sensitivity(damage, kv={"int8": 0.5}))
    try:
        found = run("show", "plan", "--work", work, "--json").json()
        text = run("show", "plan", "--work", work).out
    finally:
        job.sensitivity_file.unlink()
    worst = [max(each["damage"].values()) for each in found["most_sensitive"]]
    assert worst == sorted(worst, reverse=True) == sorted((max(d.values()) for d in damage.values()), reverse=True)[:10]
    assert (found["estimate"], found["tokens"], found["kv_damage"]) == ("fisher", 8192, {"int8": 0.5})
    assert found["most_sensitive"][0] == {"name": "other.0", "bits": None, "damage": {"int8": 2.0}}
    assert "(fisher, 8,192 tokens)" in text
    assert "Keys and values: int8 0.5" in text


# --- in a terminal -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [24, 40, 80, 200])
@pytest.mark.parametrize(
    ("layers", "roles"),
    [(2, LLAMA), (28, LLAMA), (80, LLAMA), (3, ["attention.query_key_value", "dense_h_to_4h", "dense_4h_to_h"])],
)
def test_every_number_is_legible_on_any_terminal(width: int, layers: int, roles: list[str]) -> None:
    plan = imagined(layers, roles, sensitive=True)
    text = printed(plan, width)
    assert max(map(len, text.splitlines())) <= max(width, 40)
    words = text.split()
    for matrix in plan.matrices:
        assert f"{matrix.bits:.2f}" in words
    assert words.count("0.25") == len(plan.most_sensitive)
    for fact in ("2.4", "200", "0.0123", "sensitivity", "model.head"):
        assert fact in words
    coloured = printed(plan, width, colours=True)
    assert coloured.count("48;2;") >= layers * len(roles) + 2


def test_columns_stand_below_their_names() -> None:
    lines = printed(imagined(3, LLAMA), 200).splitlines()
    top = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    header, cells = lines[top], imagined(3, LLAMA).grid()
    for row in range(3):
        line = lines[top + 1 + row]
        for role in LLAMA:
            middle = header.index(role) + len(role) // 2
            number = f"{cells[row, role]:.2f}"
            assert number in line[middle - 4 : middle + 4]


def test_a_layer_without_a_role_has_no_cell() -> None:
    plan = imagined(2, LLAMA[:2])
    hole = plan.model_copy(update={"matrices": [m for m in plan.matrices if m.name != "layers.1.q_proj"]})
    line = next(line for line in printed(hole, 80).splitlines() if line.split()[:1] == ["1"])
    assert line.split() == ["1", f"{plan.grid()[1, 'k_proj']:.2f}"]


def test_colours_follow_the_bits_and_letters_stand_out() -> None:
    assert heatmap.luminance((255, 255, 255)) == pytest.approx(1)
    assert heatmap.luminance((0, 0, 0)) == 0
    ends = (heatmap.colour(1.58, 1.58, 4), heatmap.colour(4, 1.58, 4))
    assert ends == (heatmap.COLOURS[0], heatmap.COLOURS[-1])
    assert heatmap.colour(4, 4, 4) == heatmap.COLOURS[4]
    shades = [sum(heatmap.colour(bits / 100, 1.58, 8)) for bits in range(158, 801)]
    assert all(later <= earlier + 2 for earlier, later in pairwise(shades))  # but for rounding

    for bits in range(158, 801):
        rgb = heatmap.colour(bits / 100, 1.58, 8)
        letters = 0.0 if heatmap.is_light(rgb) else 1.0
        low, high = sorted((heatmap.luminance(rgb), letters))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # what WCAG 2 asks of text


# --- the picture -------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "sensitive"), [(1, False), (3, True), (40, True)])
def test_the_picture_holds_the_same_map(tmp_path: Path, layers: int, sensitive: bool) -> None:
    plan = imagined(layers, LLAMA, sensitive)
    drawn = heatmap.figure(plan)
    maps = [axes.images[0] for axes in drawn.axes if axes.images]
    expected = [[plan.grid()[layer, role] for role in LLAMA] for layer in range(layers)]
    assert maps[0].get_array().tolist() == expected
    assert maps[1].get_array().tolist() == [[4.0], [4.0]]
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    assert texts[: layers * 7] == [f"{bits:.2f}" for row in expected for bits in row]
    lengths = [bar.get_width() for axes in drawn.axes for bar in axes.patches if axes.get_title() == "most sensitive"]
    assert lengths == [0.25] * 10 * sensitive
    for row, bits in enumerate(expected[0]):
        assert [round(255 * part) for part in maps[0].to_rgba(bits)[:3]] == pytest.approx(
            heatmap.colour(bits, 1.58, 4), abs=3
        ), row
    heatmap.write_png(plan, tmp_path / "new" / "plan.png")
    assert (tmp_path / "new" / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command_draws_too(run: Run, work: Path, tmp_path: Path) -> None:
    done = run("show", "plan", "--work", work, "--png", tmp_path / "a.png")
    assert done.code == 0, done.err
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert "interleave by row" in done.out
    assert all(role in done.out for role in LLAMA)
    assert "\x1b" not in done.out


# --- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["plan", "--work", "nowhere"], 2, "nowhere is not a working directory of edgerazor yet."),
        (["plan"], 2, "edgerazor-work is not a working directory of edgerazor yet."),
        (["plan", "--work", "empty"], 1, "empty holds no plan yet."),
        (["plan", "--work", "JOB", "--png", "."], 2, "--png wants the name of a file, but . is a folder."),
        (["--work", "JOB", "--png", "a.png"], 2, "--png draws a plan."),
        (["recipe", "--png", "a.png"], 2, "--png draws a plan."),
        (["here", "--work", "there"], 2, "show takes a folder or --work, and got here and there."),
    ],
)
def test_asked_wrongly(
    run: Run, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text("seed: 1")
    outcome = run("show", *[str(work) if word == "JOB" else word for word in words])
    assert (outcome.code, outcome.out) == (code, "")
    assert sentence in " ".join(outcome.err.split())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00", '{"matrices": 3}', "null"])
@pytest.mark.parametrize("file", ["plan.json", "sensitivity.json"])
def test_a_damaged_file_is_one_sentence(run: Run, work: Path, tmp_path: Path, file: str, text: str) -> None:
    job = Path(shutil.copytree(work, tmp_path / "job"))
    (job / "calibrate" / file).write_text(text)
    outcome = run("show", "plan", "--work", job)
    assert (outcome.code, outcome.out) == (1, "")
    assert f"{file} is" in outcome.err.replace("\n", " ")
    assert "damaged" in outcome.err
    assert "edgerazor calibrate --force" in outcome.err
    assert "Traceback" not in outcome.err
    if file == "plan.json":
        assert run("show", job).code == 1


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"version": 2}, "version"),
        ({"tokens": -1}, "tokens"),
        ({"kv": {"int8": "much"}}, "kv.int8"),
        ({"surprise": 1}, "surprise"),
        ({"tensors": [{"name": "a"}]}, "tensors.0.kind"),
    ],
)
def test_a_wrong_field_is_named(run: Run, work: Path, tmp_path: Path, changes: dict[str, Any], place: str) -> None:
    job = WorkDir(work)
    job.sensitivity_file.write_text(sensitivity({"a": {"int4": 0.1}}, **changes))
    try:
        outcome = run("show", "plan", "--work", work)
    finally:
        job.sensitivity_file.unlink()
    assert outcome.code == 1
    assert f"is damaged: it is wrong at {place} (" in " ".join(outcome.err.split())

"""The table of methods: rows are kept by fingerprint, killed runs go on, and the columns are what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgerazor import data, formats, models, registry
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.formats import ROWS
from edgerazor.losses.core import divergences
from helpers.tiny_models import GROUP_SIZE, ModelMaker, sentences
from recipes.benchmarks import methods, numerics, sinks

PAIRS = [("rtn", 2.0), ("eakld", 2.0), ("rtn", 4.0), ("eakld", 4.0)]


@pytest.fixture(scope="module")
def teacher(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("methods")
    make_model(folder / "model", "llama")
    (folder / "text.txt").write_text(sentences(300), encoding="utf-8")
    values = {
        "threads": 1,
        "data": {"train": [{"file": str(folder / "text.txt")}], "sequence_length": 32},
        "calibrate": {"group_size": GROUP_SIZE, "sequences": 4, "sensitivity_tokens": 64},
        "distill": {"batch_size": 2, "evaluate_sequences": 2, "precision": "float32", "learning_rate": 1e-3},
        "eval": {"text_sequences": 2},
    }
    return methods.Teacher("tiny", folder / "model", values)


@pytest.fixture
def setting(tmp_path: Path) -> Any:
    return methods.Setting(tmp_path / "rows", tmp_path / "build", 2, None, Path(sys.executable), Console(quiet=True))


def made(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[tuple[str, float]]:
    """Notes which rows are made; the run is killed before the `fail_at`-th of them."""
    seen: list[tuple[str, float]] = []
    original = methods.our_row

    def note(teacher: Any, method: Any, bits: float, *rest: Any) -> Any:
        if len(seen) == fail_at:
            raise KeyboardInterrupt
        seen.append((method.title, bits))
        return original(teacher, method, bits, *rest)

    monkeypatch.setattr(methods, "our_row", note)
    return seen


@pytest.mark.slow
def test_killed_between_rows_it_goes_on_and_then_keeps_all(
    teacher: Any, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        assert made(patch, fail_at=2) == []
        with pytest.raises(KeyboardInterrupt):
            methods.make_rows([teacher], PAIRS, setting)
    first = {file.name: file.read_bytes() for file in (setting.rows / "tiny").iterdir()}
    assert sorted(first) == ["eakld-2.json", "rtn-2.json"]
    with monkeypatch.context() as patch:
        seen = made(patch)
        methods.make_rows([teacher], PAIRS, setting)
        assert seen == [("round to nearest", 4.0), ("CE + EAKLD", 4.0)]
        methods.make_rows([teacher], PAIRS, setting)
        assert len(seen) == 2
    assert all((setting.rows / "tiny" / name).read_bytes() == content for name, content in first.items())
    assert not any((setting.build / "tiny").iterdir())  # what finished rows left is swept away

    (setting.rows / "tiny" / "rtn-2.json").write_text("{")  # a damaged row is no row
    more = replace(setting, steps=3)  # and other steps are another training, but the same rounding
    with monkeypatch.context() as patch:
        seen = made(patch)
        methods.make_rows([teacher], PAIRS, more)
        assert seen == [("round to nearest", 2.0), ("CE + EAKLD", 2.0), ("CE + EAKLD", 4.0)]
    rows = [methods.stored(file) for file in sorted((setting.rows / "tiny").iterdir())]
    assert [row["steps"] for row in rows] == [3, 3, 0, 0]
    assert all(row["kl"] > 0 and row["bytes"] > 0 for row in rows)
    assert rows[0]["bytes"] == pytest.approx(rows[2]["bytes"], abs=500)  # the same formats, but for the files' headers
    table = methods.table(setting)
    assert table.count("\n| 2 |") == table.count("\n| 4 |") == 2 * 2  # two rows in each of two tables
    assert f"round to nearest 2: KL {methods.number(rows[2]['kl'])} |" in table


def test_a_killed_row_goes_on_from_its_checkpoint(
    teacher: Any, setting: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pair = [("ce", 2.0)]
    methods.make_rows([teacher], pair, setting)
    with monkeypatch.context() as patch:
        patch.setattr(methods.evaluation.STAGE, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        again = replace(setting, rows=tmp_path / "again")
        with pytest.raises(KeyboardInterrupt):
            methods.make_rows([teacher], pair, again)
    trained = sorted((again.build / "tiny").glob("*/distill/manifest.json"))
    assert len(trained) == 1
    monkeypatch.setattr(methods.pipeline.distill, "run", lambda *_, **__: pytest.fail("trained again"))
    methods.make_rows([teacher], pair, again)
    one, other = (methods.stored(each.rows / "tiny" / "ce-2.json") for each in (setting, again))
    assert {key: one[key] for key in ("kl", "perplexity", "bytes")} == {
        key: other[key] for key in ("kl", "perplexity", "bytes")
    }


def test_the_fingerprint_knows_what_decides_a_row(teacher: Any, setting: Any, tmp_path: Path) -> None:
    rtn, eakld = methods.METHODS["rtn"], methods.METHODS["eakld"]

    def now(teacher: Any = teacher, method: Any = eakld, bits: float = 2.0, setting: Any = setting) -> str:
        return str(methods.fingerprint(teacher, method, bits, setting))

    text = tmp_path / "other.txt"
    text.write_text(sentences(300, seed=5), encoding="utf-8")
    other_text = {**teacher.recipe, "data": {**teacher.recipe["data"], "train": [{"file": str(text)}]}}
    others = [
        now(method=rtn),
        now(method=methods.METHODS["eakld-lafd"]),
        now(bits=4.0),
        now(setting=replace(setting, steps=5)),
        now(setting=replace(setting, limit=5)),
        now(teacher=replace(teacher, tasks=("world_recall",))),
        now(teacher=replace(teacher, recipe=other_text)),
    ]
    assert len({now(), *others}) == 1 + len(others)
    assert now() == now(setting=replace(setting, rows=tmp_path / "r", build=tmp_path / "b"))
    assert now(method=rtn) == now(method=rtn, setting=replace(setting, steps=5))  # rounding has no steps


def test_every_line_of_the_table_is_a_recipe_that_can_be(teacher: Any, setting: Any) -> None:
    own = replace(setting, steps=None)
    assert methods.recipe_of(teacher, methods.METHODS["ce"], 2.0, own).distill.steps == teacher.steps == 150
    for name, method in methods.METHODS.items():
        recipe = methods.recipe_of(teacher, method, 2.0, setting)
        assert recipe.distill.steps == setting.steps * method.times
        assert ("-long" in name) == (method.times > 1) == ("x tokens" in method.title)
        assert not method.asked_at(2.5) or not method.peer


def fresh() -> dict[str, str]:
    """What the numerics compute now, nothing kept from before."""
    for digest in (numerics.of_formats, numerics.of_loss):
        digest.cache_clear()
    return {"formats": numerics.of_formats(), **{name: numerics.of_loss(name) for name in ("ce", "forward_kl", "lafd")}}


def changed(before: dict[str, str]) -> set[str]:
    """What computes something else now."""
    return {name for name, digest in fresh().items() if digest != before[name]}


def test_the_fingerprint_knows_what_the_code_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not how it is written: other rounding is other code, a repetition or other kernels are not."""
    before = fresh()
    assert changed(before) == set()
    with monkeypatch.context() as patch:
        patch.setenv("EDGERAZOR_ISA", "reference")
        assert changed(before) == set()
    with monkeypatch.context() as patch:
        rule = type(formats.get("int3")).scale_rule
        patch.setattr(type(formats.get("int3")), "scale_rule", lambda self, groups: 1.01 * rule(self, groups))
        assert changed(before) == {"formats"}
    with monkeypatch.context() as patch:
        forward_kl = registry.find("losses", "forward_kl", "LOSS")
        patch.setattr(forward_kl, "value_and_grad", lambda self, logits, _: divergences.mixed_kl(logits, 0.1))
        assert changed(before) == {"forward_kl"}
    assert changed(before) == set()


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("Traceback\n  here\nIndexError: too far\n    there\n", "IndexError: too far"),
        ("working\nno luck\n\n", "no luck"),
        ("", ""),
    ],
)
def test_why_a_package_failed(printed: str, found: str) -> None:
    assert methods.reason(printed) == found


def row(method: str, bits: float, size: int, kl: float, above: float | None = None) -> dict[str, Any]:
    return {"method": method, "bits": bits, "bytes": size, "kl": kl, "above_chance": above}


def test_at_equal_bytes_is_the_best_post_training_row_that_is_no_larger() -> None:
    rows = [row("rtn", 2, 100, 0.9), row("gptq", 2, 101, 0.5, 0.25), row("gptq", 3, 110, 0.1), row("hqq-own", 2, 90, 0)]
    assert methods.equal_bytes(row("eakld", 2, 100, 0.2), rows) == "GPTQ (GPTQModel) 2: 25.0, KL 0.5"
    assert methods.equal_bytes(row("eakld", 2, 98, 0.2), rows) == "none so small"
    assert methods.equal_bytes(row("eakld", 4, 200, 0.2), rows) == "GPTQ (GPTQModel) 3: KL 0.1"
    assert methods.equal_bytes(rows[0], rows) == ""


def test_rows_on_other_held_out_text_are_named() -> None:
    """The perplexity of the teacher tells: that of most rows comes first."""
    rows = [{"method": "rtn", "teacher_perplexity": 6.0}, {"method": "rtn", "teacher_perplexity": 6.0}]
    assert methods.teacher_perplexities(rows) == "6"
    rows = [{"method": "edgeqat", "teacher_perplexity": 5.5}, *rows, {"method": "gptq", "failed": "no"}]
    assert methods.teacher_perplexities(rows) == "6, 5.5 on the other held-out text of new rows (EdgeQAT recipe)"


def test_the_share_of_few_tokens(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of errors that are known; and every token has some of every error that is measured."""
    ids = torch.full((2, 50), 7)
    ids[1, 3] = 0
    error = torch.ones(2, 50)
    error[0, 0], error[1, 3] = 50.0, 51.0  # of 199 together
    monkeypatch.setattr(sinks, "errors", lambda _: ({"features": error}, ids, 0))
    first, second = sinks.shares(teacher)
    assert first[2:] == ["2.00", "1.00", "1"]
    assert [float(each) for each in second[2:]] == pytest.approx(
        [100 * 51 / 199, 100 * 51 / 199, 100 * 51 / 199], abs=0.01
    )
    monkeypatch.undo()
    monkeypatch.setattr(sinks, "ROWS", 3)
    found, ids, _ = sinks.errors(teacher)
    assert list(found) == ["features", "reconstruction", "length"]
    assert ids.shape == (3, 32)
    assert all(each.shape == ids.shape and (each > 0).all() for each in found.values())


def test_the_table_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "R.md"
    path.write_text("# Results\n\nBefore.\n")
    methods.publish("one", path)
    methods.publish("two", path)
    path.write_text(path.read_text() + "\nAfter.\n")
    methods.publish("three", path)
    text = path.read_text()
    assert text.startswith("# Results\n\nBefore.\n\n## Methods")
    assert text.endswith("three\n<!-- methods: end -->\n\nAfter.\n")
    assert "one" not in text
    assert "two" not in text


def test_wrong_questions_are_one_sentence(setting: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no method called 'eakl'"):
        methods.choose("eakl", None)
    with pytest.raises(UserError, match="comma-separated numbers"):
        methods.choose(None, "two")
    with pytest.raises(UserError, match=r"None of gptq is asked at 1\.58 bits"):
        methods.choose("gptq", "1.58")
    with pytest.raises(UserError, match="has no gptqmodel"):  # before the first row, not after hours
        methods.make_rows([], [("rtn", 2.0), ("gptq", 2.0)], setting)
    with pytest.raises(UserError, match="There is no"):
        methods.real_teachers(tmp_path)


# --- peers -------------------------------------------------------------------------------------

#: A package that rounds every linear layer to multiples of 1/64; what the real ones do is theirs to test.
FAKE = """
import argparse, json, shutil
from pathlib import Path
from safetensors.torch import load_file, save_file
parser = argparse.ArgumentParser()
for name in ("peer", "model"):
    parser.add_argument(name)
for name in ("--bits", "--group-size", "--calibration", "--out"):
    parser.add_argument(name)
asked = parser.parse_args()
if asked.bits == "3":
    raise SystemExit("3 bits are not for us")
shutil.copytree(asked.model, asked.out, dirs_exist_ok=True)
file = Path(asked.out) / "model.safetensors"
tensors = load_file(file)
linears = [name for name in tensors if "_proj" in name]
save_file({n: (t * 64).round() / 64 if n in linears else t for n, t in tensors.items()}, file, {"format": "pt"})
weights = sum(tensors[name].numel() for name in linears)
rows = json.loads(Path(asked.calibration).read_text())
assert len({len(row) for row in rows}) == 1
report = {"linear_bytes": weights, "linear_weights": weights, "group_size": asked.group_size, "seconds": 1.0}
(Path(asked.out) / "peer.json").write_text(json.dumps({**report, "package": "fake 1"}))
"""


@pytest.mark.slow
def test_a_peers_row_is_measured_like_ours(
    teacher: Any, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peers.py").write_text(FAKE)
    monkeypatch.setattr(methods, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(methods, "peer_version", lambda method, _: "1" if method.peer else None)
    methods.make_rows([teacher], [("hqq", 4.0), ("hqq-own", 4.0), ("hqq", 3.0)], setting)
    ours, own, failed = (
        methods.stored(setting.rows / "tiny" / f"{name}.json") for name in ("hqq-4", "hqq-own-4", "hqq-3")
    )
    model, _ = models.load(teacher.model)
    found = models.structure(model)
    linears = sum(site.weights for site in found.linears)
    parameters = sum(p.numel() for p in model.parameters())
    assert own["bytes"] == linears + 4 * (parameters - linears)  # a float32 teacher, its embedding untouched
    tables = [site for site in found.targets if site.kind != "linear"]
    groups = -(-tables[0].columns // GROUP_SIZE)
    int4 = sum(-(-site.rows // ROWS) * ROWS * (site.columns // 2 + 2 * groups) for site in tables)
    int4 += sum(-(-site.rows // ROWS) * groups % 2 * 32 for site in tables)  # up to whole vectors
    others = parameters - linears - sum(site.weights for site in tables)
    assert ours["bytes"] == linears + int4 + 4 * others
    assert (ours["group_size"], own["group_size"]) == (str(GROUP_SIZE), None)
    assert 0 < own["kl"] < ours["kl"]  # the own defaults leave embedding, activations and cache alone
    assert failed["failed"] == "3 bits are not for us"
    assert "does not run: 3 bits are not for us" in methods.table(setting)
    assert json.loads((setting.rows / "tiny" / "hqq-4.json").read_text())["package"] == "fake 1"


def test_peers_are_calibrated_on_whole_training_rows(teacher: Any, setting: Any) -> None:
    recipe = methods.recipe_of(teacher, methods.METHODS["gptq"], 2.0, setting)
    _, tokenizer = models.load(teacher.model)
    rows = methods.calibration_rows(recipe, tokenizer)
    assert {len(row) for row in rows} == {32}
    training, held_out = data.open_rows(
        recipe.data.train, tokenizer, data.RowSettings(32, 0, recipe.data.held_out_fraction)
    )
    assert rows[0] == training.row(0)["input_ids"].tolist()
    assert held_out is not None
    unseen = {tuple(row["input_ids"].tolist()) for row in held_out.in_order()}
    assert not unseen & {tuple(row) for row in rows}
    assert torch.tensor(rows).max() < 300

"""The table of real models: rows are kept by fingerprint, what fails says why, and page and plot hold what rows say."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from edgerazor import models
from edgerazor.console import Console
from edgerazor.errors import INTERRUPTED, UserError
from edgerazor.locks import HeldError
from helpers.tiny_models import GROUP_SIZE, ModelMaker, sentences
from recipes.benchmarks import cpu_time, methods, real, real_tables

TASK = {"query": "Question: Who took it?", "choices": ["Nora", "Ben"], "gold": 0}


@pytest.fixture(scope="module")
def teacher(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model with texts and items."""
    folder = tmp_path_factory.mktemp("real")
    make_model(folder / "model", "llama")
    (folder / "text").mkdir()
    for seed, name in enumerate(real.TEXTS):
        (folder / "text" / f"{name}.txt").write_text(sentences(300, seed), encoding="utf-8")
    (folder / "eval").mkdir()
    lines = "".join(json.dumps({**TASK, "gold": number % 2}) + "\n" for number in range(6))
    (folder / "eval" / "arc_easy.jsonl").write_text(lines, encoding="utf-8")
    texts = real.split_texts(folder / "text", folder / "parts")
    values = {
        "data": {**texts, "sequence_length": 32},
        "calibrate": {"group_size": GROUP_SIZE, "sequences": 4, "sensitivity_tokens": 64},
        "distill": {"batch_size": 2, "evaluate_sequences": 2, "precision": "float32"},
        "eval": {"text_sequences": 2},
    }
    return methods.Teacher("tiny", folder / "model", values, ("arc_easy",))


@pytest.fixture
def setting(teacher: Any, tmp_path: Path) -> Any:
    known = real.all_methods((0.001,))
    made = methods.Setting(tmp_path / "rows", tmp_path / "build", None, 4, Path(sys.executable), Console(quiet=True))
    items = teacher.model.parent / "eval"
    return replace(made, methods=known, task_data=items, threads=1, llamacpp=tmp_path / "none")


def rows_of(setting: Any) -> dict[str, Any]:
    return {file.stem: methods.stored(file) for file in sorted((setting.rows / "tiny").iterdir())}


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the rows that are made."""
    seen: list[str] = []
    original = real.RealMethod.make

    def make(self: Any, *rest: Any) -> Any:
        seen.append(self.title)
        return original(self, *rest)

    monkeypatch.setattr(real.RealMethod, "make", make)
    return seen


def test_rows_are_kept_until_what_decides_them_changes(
    teacher: Any, setting: Any, make_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noted(monkeypatch)
    real.make_rows([teacher], [("rtn", 12.0)], setting)
    real.make_rows([teacher], [("rtn", 12.0), ("rtn", 1.0)], setting)
    assert seen == ["teacher", *["round to nearest, mixed alike"] * 2]
    rows = rows_of(setting)
    assert sorted(rows) == ["rtn-1", "rtn-12", "teacher-16"]
    made = rows["rtn-12"]
    assert made["real_bits"] <= 12
    assert made["kl"] > 0
    assert 0 < made["top1_agreement"] <= 1
    assert made["tasks"].keys() == {"arc_easy"}
    assert made["teacher_perplexity"] == pytest.approx(rows["teacher-16"]["perplexity"])
    assert made["cpu_seconds"] > 0
    assert 0 < rows["teacher-16"]["kl"] < 0.02  # of the copy in 8 bits that answers the tasks
    assert rows["teacher-16"]["items"] == {"arc_easy": 4}
    assert "cannot be smaller than" in rows["rtn-1"]["failed"]
    assert "does not run: The packed model cannot be smaller" in real_tables.model_table(
        "tiny", list(rows.values()), []
    )
    make_model(tmp_path / "other", "llama", seed=3)
    real.make_rows([replace(teacher, model=tmp_path / "other")], [("rtn", 12.0)], setting)
    assert len(seen) == 5  # teacher and row once more
    assert rows_of(setting)["rtn-12"]["fingerprint"] != made["fingerprint"]
    assert not [path for path in (setting.build / "tiny").iterdir() if path.name.startswith("rtn")]


def test_the_fingerprint_knows_what_decides_a_row(teacher: Any, setting: Any) -> None:
    known = setting.methods

    def now(name: str = "distill-0.001m-seed0", setting: Any = setting, bits: float = 2.4) -> str:
        return str(methods.fingerprint(teacher, known[name], bits, setting))

    longer = real.all_methods((0.002,))["distill-0.002m-seed0"]
    others = [
        now("rtn"),
        now("planned"),
        now("gptq"),
        now("layers-seed0"),
        now("distill-0.001m-seed1"),
        now(bits=3.1),
        now(setting=replace(setting, limit=3)),
        str(methods.fingerprint(teacher, longer, 2.4, setting)),
    ]
    assert len({now(), *others}) == 1 + len(others)
    assert now() == now(setting=replace(setting, threads=2, rows=Path("r"), build=Path("b")))


@pytest.mark.slow
def test_what_calibrate_measured_serves_other_rows(teacher: Any, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real.make_rows([teacher], [("planned", 12.0)], setting)
    kept = setting.build / "tiny" / "measured-0"
    first = json.loads((kept / "seconds.json").read_text())
    assert first["seconds"] > 0
    monkeypatch.setattr("edgerazor.calibration.measurement.measure", lambda *_: pytest.fail("measured again"))
    real.make_rows([teacher], [("gptq", 12.0), ("distill-0.001m-seed0", 12.0)], setting)
    rows = rows_of(setting)
    assert all("failed" not in row for row in rows.values()), rows
    assert rows["gptq-12"]["cpu_seconds"] > first["seconds"]
    assert all(tokens > 0 and kl > 0 for tokens, kl in rows["distill-0.001m-seed0-12"]["curve"])
    assert rows["gptq-12"]["kl"] != rows["planned-12"]["kl"]


def test_seconds_of_cpu_are_added_up_over_interruptions(tmp_path: Path) -> None:
    def work_until_interrupted() -> None:
        with cpu_time.counted(tmp_path, "distill"):
            began = time.process_time()
            while time.process_time() < began + 0.05:
                pass
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work_until_interrupted()
    with cpu_time.counted(tmp_path, "pack"):
        time.sleep(0.2)  # which takes no CPU
    seconds = cpu_time.stored(tmp_path)
    assert seconds["distill"] >= 0.1
    assert seconds["pack"] < 0.1


def test_a_row_that_fails_says_why_and_interruptions_do_not(
    teacher: Any, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("The package gave up.")

    monkeypatch.setattr(methods, "peer_row", refuse)
    monkeypatch.setattr(methods, "peer_version", lambda method, _: "1" if method.peer else None)
    real.make_rows([teacher], [("peer-gptq", 2.0), ("llamacpp-Q2_K", 2.625)], setting)  # no llama.cpp: left out
    assert sorted(rows_of(setting)) == ["peer-gptq-2", "teacher-16"]
    assert rows_of(setting)["peer-gptq-2"]["failed"] == "The package gave up."

    for error in (UserError("Interrupted.", code=INTERRUPTED), HeldError("Another process is making it.")):
        monkeypatch.setattr(real, "our_row", Mock(side_effect=error))
        with pytest.raises(UserError, match=error.message):
            real.make_rows([teacher], [("rtn", 12.0)], setting)
        assert "rtn-12" not in rows_of(setting)


#: Stands in for llama.cpp's tools: writes the words it was called with where the result is expected.
TOOL = """#!{python}
import sys
words = sys.argv[1:]
out = words[words.index("-o") + 1] if "-o" in words else words[-3]
if "IQ2_M" in words:
    sys.exit("the type is not for us")
open(out, "w").write(" ".join(words))
"""


def test_llamacpp_is_called_as_its_tools_want(
    teacher: Any, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "llamacpp" / "tools"
    tools.mkdir(parents=True)
    for name in ("llama-quantize", "llama-imatrix"):
        (tools / name).write_text(TOOL.format(python=sys.executable))
        (tools / name).chmod(0o755)
    setting = replace(setting, llamacpp=tmp_path / "llamacpp")
    pair = [("llamacpp-Q2_K", 2.625), ("llamacpp-IQ2_M", 2.5)]
    real.make_rows([teacher], pair, setting)
    assert {row.get("failed") for row in rows_of(setting).values()} == {
        None,
        "llama.cpp's types are made from a GGUF file, and this model came without one",
    }
    for file in (setting.rows / "tiny").glob("llamacpp-*"):
        file.unlink()
    (tmp_path / "model.gguf").write_text("GGUF")
    seen: list[str] = []

    def read_back(path: Path, _: Console) -> Path:
        seen.append(path.read_text())
        copy = tmp_path / "decoded"
        model, tokenizer = models.load(teacher.model)
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
        return copy

    monkeypatch.setattr(real, "folder_of_gguf", read_back)
    monkeypatch.setattr(real, "theirs", lambda *_: real.File("", "Q2_K", "Q6_K", 5000, 4000))
    real.make_rows([replace(teacher, gguf=tmp_path / "model.gguf")], pair, setting)
    folder = setting.build / "tiny" / "llamacpp"
    assert (folder / "bf16.gguf").read_text().startswith(f"--allow-requantize {tmp_path / 'model.gguf'} ")
    assert f"-m {folder / 'bf16.gguf'} -f {folder / 'text.txt'}" in (folder / "imatrix.gguf").read_text()
    assert "took the" in (folder / "text.txt").read_text()
    (words,) = seen
    assert words.startswith(f"--imatrix {folder / 'imatrix.gguf'} {folder / 'bf16.gguf'} ")
    assert words.endswith("Q2_K 1")
    rows = rows_of(setting)
    assert rows["llamacpp-Q2_K-2.625"]["bytes"] == 4000
    assert rows["llamacpp-Q2_K-2.625"]["kl"] == pytest.approx(rows["teacher-16"]["kl"])  # the stand-in changes nothing
    assert rows["teacher-16"]["kl"] < 0.02  # of a copy in 8 bits
    assert "Q2_K; embedding Q6_K" in real_tables.model_table("tiny", list(rows.values()), [])
    assert rows["llamacpp-IQ2_M-2.5"]["failed"] == "llama-quantize fails: the type is not for us"
    assert not (tmp_path / "decoded").exists()


# --- page and plot -------------------------------------------------------------------------------


def row(title: str, family: str, bits: float, above: float | None, seed: int = 0) -> dict[str, Any]:
    facts = {"method": f"{family}-seed{seed}", "title": title, "family": family, "seed": seed, "bits": bits}
    measured = {"above_chance": above, "above_chance_stderr": 0.02, "kl": 0.5, "perplexity": 20.0}
    made = {"top1_agreement": 0.7, "real_bits": bits, "cpu_seconds": 90.0, "bytes": 1000, "tasks": {"arc_easy": 0.4}}
    return {**facts, **measured, **made, "commit": "abc", "machine": "m", "fingerprint": "f"}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for number, each in enumerate(rows):
        (folder / f"{number}.json").write_text(json.dumps(each))


def test_page_and_plot_are_made_of_the_rows_that_are_there(tmp_path: Path) -> None:
    page = tmp_path / "results" / "real.md"
    assert real_tables.publish(tmp_path / "rows", [], page) == "There are no rows yet."
    assert not page.with_suffix(".png").exists()
    page.write_text(page.read_text().replace("# Real language models\n", "# Real language models\n\nWhat won.\n"))
    rows = [
        {**row("distilled, 10 CPU minutes", "distill", 2.4, 0.60, seed=0), "curve": [[256, 2.5], [20480, 0.8276]]},
        row("distilled, 10 CPU minutes", "distill", 2.4, 0.70, seed=1),
        row("HQQ", "peer-hqq", 2.3, 0.1),
        {**row("AutoRound", "peer-auto-round", 2.0, None), "failed": "no | such layer"},
        {**row("teacher", "teacher", 16.0, None), "origin": "dequantized from Q4_1"},
    ]
    write_rows(tmp_path / "rows" / "tiny", rows)
    text = real_tables.publish(tmp_path / "rows", ["distill-seed0", "distill-seed1"], page)
    assert (
        "| 2.40 | distilled, 10 CPU minutes (2 seeds) | 2.4 | 65.0 ± 2.0 (60.0, 70.0) | 0.5 | 20 | 70.0 | 1.5 |" in text
    )
    assert (
        text.index("| 2.30 | HQQ") < text.index("| 2.40 | distilled") < text.index("|  | AutoRound | 2 | does not run")
    )
    assert "| distilled, 10 CPU minutes (2 seeds) | 2.4 | 256: 2.5, 20,480: 0.828 |" in text
    assert "no / such layer" in text
    assert "The teacher is dequantized from Q4_1" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "![How much of the score above chance is left, and KL to the teacher, over real bits](real.png)" in text
    said = page.read_text()
    assert said.startswith("# Real language models\n\nWhat won.\n")
    assert text in said


def test_only_rows_of_few_bits_that_keep_something_known_are_drawn() -> None:
    rows = [
        row("a", "rtn", 2.4, None),
        row("b", "rtn", 2.4, 0.5),
        row("c", "rtn", 16.0, 1.0),
        row("d", "llamacpp", 2.4, 1),
    ]
    assert list(real_tables.points(real_tables.lines_of(rows, []))) == ["b", "llama.cpp"]


def test_what_is_asked() -> None:
    known = real.all_methods()
    assert real.choose(known, "rtn,distill-10m-seed1", "2.4") == [("rtn", 2.4), ("distill-10m-seed1", 2.4)]
    assert len(real.choose(known, "distill", None)) == 3 * 2 * 4
    assert real.choose(known, "two-bits", "2.4") == [("two-bits", 2.0)]
    assert real.choose(known, "two-bits,rounded", "3.1") == [("rounded", 3.1)]
    assert real.choose(known, "peer-hqq", "2.1,2.4") == [("peer-hqq", 2.0), ("peer-hqq-own", 2.0)]
    assert real.choose(known, "llamacpp", "4.1") == [("llamacpp-IQ4_XS", 4.25), ("llamacpp-Q4_K_M", 4.5)]
    assert real.choose(known, "llamacpp-TQ1_0", "2.1") == [("llamacpp-TQ1_0", 1.6875)]
    assert real.numbers("10,2.5") == (10.0, 2.5)
    for wrong in ("0", "-1", "x", "nan", "inf"):
        with pytest.raises(UserError, match="--minutes wants"):
            real.numbers(wrong)
    with pytest.raises(UserError, match="no method called 'distil'"):
        real.choose(known, "distil", None)
    with pytest.raises(UserError, match="--bits wants"):
        real.choose(known, None, "low")
    with pytest.raises(UserError, match="None of llamacpp-TQ1_0 is asked at 4"):
        real.choose(known, "llamacpp-TQ1_0", "4")


def test_wrong_questions_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--folder", str(tmp_path), "--rows", str(tmp_path / "rows"), "--results", str(tmp_path / "real.md")]
    words += ["--build", str(tmp_path / "build"), "--real-data", str(tmp_path)]
    assert real.main(words) == 2
    assert "Make them with `make real-models`" in capsys.readouterr().err
    (tmp_path / "tiny").mkdir()
    assert real.main([*words, "--models", "tiny"]) == 2
    assert "There is no" in capsys.readouterr().err
    assert real.main([*words, "--table"]) == 0
    assert "There are no rows yet." in capsys.readouterr().out

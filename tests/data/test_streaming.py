"""Streamed data sets: the rows of the same data read whole, in bounded memory, resumed without reading all again."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from edgerazor import recipe as recipes
from edgerazor.data import Batch, RowSettings, TokenRows, fingerprint, open_rows, sources, streaming
from edgerazor.data.streaming import StreamedRows
from edgerazor.errors import UserError
from edgerazor.recipe import Source
from edgerazor.training import Trainer
from helpers.tiny_job import Run, metrics, sha256, write_recipe
from helpers.tiny_models import mostly_slow

FILES, LINES = 3, 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 8)
    monkeypatch.setattr(streaming, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of several files, with documents from one word to several rows, and blank ones."""
    path = tmp_path_factory.mktemp("set")
    draw = random.Random(0)
    for number in range(FILES):
        with open(path / f"train-{number}.jsonl", "w") as file:
            for line in range(LINES):
                text = " ".join(draw.choices(["Nora", "ball", "mill", "3", "found"], k=draw.randint(0, 25)))
                file.write(json.dumps({"id": line, "text": f"{number} {line} {text}" if text else ""}) + "\n")
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each row of the data set was read."""
    seen: Counter[int] = Counter()
    of_row = sources.of_row

    def counting(source: Source, number: int, record: Any) -> Iterator[Any]:
        seen[number] += 1
        return of_row(source, number, record)

    monkeypatch.setattr(streaming, "of_row", counting)
    return seen


def tokens_of(rows: Any) -> list[tuple[int, ...]]:
    return [tuple(row["labels"].tolist()) for row in rows]


def stream(folder: Path, tokenizer: Any, packing: Any = "stream", held_out_rows: int = 0) -> StreamedRows:
    return StreamedRows(Source(dataset=str(folder), streaming=True), tokenizer, 16, packing, (0, 0), held_out_rows)


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_streamed_rows_are_those_of_the_data_read_whole(folder: Path, tokenizer: Any, packing: Any) -> None:
    whole, _ = open_rows([Source(dataset=str(folder))], tokenizer, RowSettings(16, packing=packing))
    streamed, _ = open_rows([Source(dataset=str(folder), streaming=True)], tokenizer, RowSettings(16, packing=packing))
    expected = tokens_of(whole.in_order())
    assert tokens_of(streamed.in_order()) == expected
    assert tokens_of(streamed.in_order(5)) == expected[:5]
    assert len(expected) > 60


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_streamed_rows_begin_with_bos(folder: Path, tokenizer: PreTrainedTokenizerFast, packing: Any) -> None:
    """Where the tokenizer adds one: the rows of the data read whole, held out, trained on and resumed."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    source = Source(dataset=str(folder), streaming=True)
    whole, _ = open_rows([Source(dataset=str(folder))], adding, RowSettings(16, packing=packing))
    expected = tokens_of(whole.in_order())
    rows, held_out = open_rows([source], adding, RowSettings(16, 0, 0.1, packing, 7))
    assert held_out is not None
    assert tokens_of(held_out.in_order()) == expected[:7]
    assert tokens_of(rows.in_order()) == expected[7:]
    assert {int(row["input_ids"][0]) for row in [*held_out.in_order(), *rows.in_order()]} == {0}
    first, second = (StreamedRows(source, adding, 16, packing, (0, 0), 7) for _ in range(2))
    trained = tokens_of(first.row(turn) for turn in range(30))
    second.restore(json.loads(json.dumps(first.state(20))))
    assert tokens_of(second.row(turn) for turn in range(20, 30)) == trained[20:]


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_every_row_once_in_every_pass(folder: Path, tokenizer: Any, packing: Any) -> None:
    rows = stream(folder, tokenizer, packing)
    expected = tokens_of(rows.in_order())
    found = tokens_of(rows.row(turn) for turn in range(4 * len(expected)))
    for block in range(len(found) // 8):  # in the order of the stream, shuffled within blocks
        turns = [expected[turn % len(expected)] for turn in range(8 * block, 8 * block + 8)]
        assert Counter(found[8 * block : 8 * block + 8]) == Counter(turns)
    assert found[: len(expected)] != expected
    again = stream(folder, tokenizer, packing)
    assert tokens_of(again.row(turn) for turn in range(len(found))) == found
    assert tokens_of(again.row(turn) for turn in (50, 3, 51)) == [found[50], found[3], found[51]]


@pytest.mark.parametrize("bookmarks", [True, False])
@pytest.mark.parametrize("packing", ["stream", "document"])
def test_resuming_reads_little_again(
    folder: Path, tokenizer: Any, packing: Any, bookmarks: bool, opened: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bookmarks:  # as of a data set that cannot say where it is
        monkeypatch.setattr(streaming, "_state_of", lambda _: None)
    first = stream(folder, tokenizer, packing)
    count = len(list(first.in_order()))
    for turn in (0, 5, 8, 29, count - 1, count + 3, 2 * count + 17):
        before = tokens_of(first.row(each) for each in range(turn + 1))[turn:]
        state = json.loads(json.dumps(first.state(turn)))
        expected = before + tokens_of(first.row(each) for each in range(turn + 1, turn + 20))
        second = stream(folder, tokenizer, packing)
        second.restore(state)
        opened.clear()
        assert tokens_of(second.row(each) for each in range(turn, turn + 20)) == expected
        # the turns, the rest of their first and last block, and what is tokenized ahead; nothing before that
        assert sum(opened.values()) < 36 * FILES * LINES // count + 12


def test_opening_reads_only_the_beginning(folder: Path, tokenizer: Any, opened: Counter[int]) -> None:
    rows = stream(folder, tokenizer, held_out_rows=3)
    assert max(opened) < 20
    rows.row(0)
    assert max(opened) < 40
    for turn in range(300):
        rows.row(turn)
        assert len(rows._blocks) <= 2


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_held_out_rows_are_the_first_and_no_others(folder: Path, tokenizer: Any, packing: Any) -> None:
    source = Source(dataset=str(folder), streaming=True)
    every = tokens_of(open_rows([source], tokenizer, RowSettings(16, packing=packing))[0].in_order())
    rows, held_out = open_rows([source], tokenizer, RowSettings(16, 0, 0.1, packing, 7))
    assert held_out is not None
    assert tokens_of(held_out.in_order()) == every[:7]
    assert tokens_of(rows.in_order()) == every[7:]
    seen = set(tokens_of(rows.row(index) for index in range(3 * len(every))))
    assert seen == set(every[7:])


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_streamed_and_other_sources_mix_and_resume(
    folder: Path, tokenizer: Any, packing: Any, text_file: Path, opened: Counter[int]
) -> None:
    both = [Source(dataset=str(folder), streaming=True, weight=2.0), Source(file=str(text_file))]

    def make() -> TokenRows:
        return open_rows(both, tokenizer, RowSettings(16, packing=packing))[0]

    def batches(rows: TokenRows, steps: range, world: int = 1) -> list[list[tuple[int, ...]]]:
        def real(batch: Batch) -> list[tuple[int, ...]]:
            return [tuple(each for each in row if each != -100) for row in batch["labels"].tolist()]

        return [
            sorted(row for rank in range(world) for row in real(rows.batch(step, 0, rank, world, 4 // world)))
            for step in steps
        ]

    whole = make()
    expected = batches(whole, range(60))
    for step in (7, 33, 55):
        other = make()
        batches(other, range(step))
        resumed = make()
        resumed.restore(json.loads(json.dumps(other.state(step, 4))))
        opened.clear()
        assert batches(resumed, range(step, step + 4)) == expected[step : step + 4]
        assert sum(opened.values()) < 2 * FILES * LINES
    assert batches(make(), range(60), world=2) == expected


def test_conversations_are_streamed(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    roles = ("user", "assistant")
    lines = [[{"role": role, "content": f"{role[0]} {n}"} for role in roles] for n in range(30)]
    talks = tmp_path / "set"
    talks.mkdir()
    (talks / "train.jsonl").write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    for packing in ("stream", "document"):
        found = [
            tokens_of(open_rows([source], tokenizer, RowSettings(32, packing=packing))[0].in_order())  # type: ignore[arg-type]
            for source in (Source(dataset=str(talks)), Source(dataset=str(talks), streaming=True))
        ]
        assert found[0] == found[1]
        assert any(-100 in row[1:-1] for row in found[0])


# --- errors ------------------------------------------------------------------------------------


def test_what_is_wrong_is_one_sentence(tmp_path: Path, folder: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="only a `dataset` can be streamed"):
        recipes.build({"data": {"train": [{"file": "a.txt", "streaming": True}]}}, "The recipe")
    with pytest.raises(UserError, match="to keep its first 5000 rows for measuring"):
        stream(folder, tokenizer, held_out_rows=5000)
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "train.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="There is no text to learn from in the data set"):
        stream(blank, tokenizer)
    (blank / "train.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(UserError, match="split 'train', cannot be loaded"):
        list(stream(blank, tokenizer).in_order())
    with pytest.raises(UserError, match="no column 'body'"):
        open_rows([Source(dataset=str(folder), streaming=True, column="body")], tokenizer, RowSettings(16))
    assert fingerprint([Source(dataset=str(folder), streaming=True)]) != fingerprint([Source(dataset=str(folder))])


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", mostly_slow(["stream", "document"], "document"))
def test_a_training_from_a_stream_resumes(
    run: Run, tmp_path: Path, llama: Path, folder: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"train": [{"dataset": str(folder), "streaming": True}], "packing": packing, "held_out_rows": 8}
    settings = {"steps": 9, "checkpoint_every": 4}
    recipe = write_recipe(tmp_path / "r.yaml", llama, None, data=fields, distill=settings)
    whole = run("distill", "--recipe", recipe, "--work", tmp_path / "whole", "--json")
    assert whole.code == 0, whole.err
    step = Trainer.step

    def interrupting(trainer: Trainer, batches: Any) -> float:
        if trainer.progress.step + 1 == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupting)
        assert run("distill", "--recipe", recipe, "--work", tmp_path / "job").code == 130
    state = json.loads((tmp_path / "job" / "distill" / "checkpoints" / "current" / "state.json").read_text())
    assert state["progress"]["streams"]["0"]["block"] == (1 if packing == "stream" else 0)
    resumed = run("distill", "--work", tmp_path / "job", "--json")
    assert resumed.code == 0, resumed.err
    for name in ("best", "last"):
        one, other = (sha256(tmp_path / job / "distill" / name / "model.safetensors") for job in ("whole", "job"))
        assert one == other
    assert metrics(tmp_path / "job") == metrics(tmp_path / "whole")
    assert run("eval", "--work", tmp_path / "job", "--json").json()["text"]["tokens"] > 0

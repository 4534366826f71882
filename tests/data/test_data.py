"""Rows of tokens: nothing lost, nothing twice, one order however the work is shared, and every error a sentence."""

from __future__ import annotations

import gzip
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from edgerazor import data
from edgerazor.data import (
    Mixture,
    RowSettings,
    TokenRows,
    Tokens,
    documents,
    fingerprint,
    open_rows,
    sample_batches,
    split_held_out,
)
from edgerazor.errors import UserError
from edgerazor.recipe import Source

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "nine", "red", "kites", "over", "hills", "while", "rain"]


def text(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(seed) for seed in range(20)], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end-of-text token and a context shorter than some of the texts."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), eos_token="<|endoftext|>", model_max_length=16)


@pytest.fixture
def stories(tmp_path: Path) -> Source:
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(text(seed, 10 + seed) for seed in range(30)))
    return Source(file=str(path))


def write(path: Path, content: str | bytes) -> Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source(file=str(path))


def real_tokens(rows: list[data.Batch]) -> list[int]:
    """The tokens of rows in order, without padding."""
    return [int(token) for row in rows for token in row["labels"] if token != data.MASKED]


def stream(size: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + size, dtype=np.int32)


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("a.txt", "one\n\ntwo\n", {}, ["one\n\ntwo\n"]),
        ("a.txt", "one\n<|endoftext|>\n two\n<|endoftext|>\n\n<|endoftext|>", {}, ["one", " two"]),
        ("a.txt", "one\n\ntwo\n\n\n", {"separator": "\n\n"}, ["one", "two"]),
        ("a.TXT", "one<|endoftext|>two", {"separator": "##"}, ["one<|endoftext|>two"]),
        ("a.txt", "\ufeffone", {}, ["one"]),
        (
            "a.jsonl",
            '{"text": "one\\ntwo"}\n\n{"text": ""}\n{"text": "gr\\u00fcn", "id": 3}\n',
            {},
            ["one\ntwo", "grün"],
        ),
        ("a.json", '{"story": "one", "text": 5}', {"column": "story"}, ["one"]),
        ("a.jsonl", '{"text": "line\u2028separator"}', {}, ["line\u2028separator"]),
    ],
)
def test_documents_of_a_file(
    tmp_path: Path, name: str, content: str, options: dict[str, Any], expected: list[str], compressed: bool
) -> None:
    raw = content.encode()
    path = tmp_path / (name + ".gz" if compressed else name)
    path.write_bytes(gzip.compress(raw, mtime=0) if compressed else raw)
    assert list(documents(Source(file=str(path), **options))) == expected


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"", {}, "no text to learn from in .*a.txt: 0 tokens"),
        ("a.txt", b" \n \n", {}, "0 tokens; expected at least 2"),
        ("a.txt", b"caf\xe9", {}, "not UTF-8 text \\(byte 0xe9\\)"),
        ("a.txt", b"one", {"separator": ""}, "separator of .* is empty"),
        ("a.csv", b"text\none", {}, "expected .txt, .jsonl or .json"),
        ("a.txt.gz", b"plain", {}, "cannot be read: Not a gzipped file"),
        (
            "a.txt.gz",
            gzip.compress(bytes(range(97, 122)) * 99, mtime=0)[:-9],
            {},
            "cannot be read: Compressed file ended",
        ),
        ("a.jsonl", b"", {}, "0 tokens"),
        ("a.jsonl", b'{"text": "one"}\n{"text": ', {}, "Line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n["two"]', {}, "Line 2 of .* is a JSON list; expected an object"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "x", "id": 1}', {}, "Line 2 of .* no column 'text'; .* 'body', 'id'"),
        ("a.jsonl", b"{}", {}, "its columns are none"),
        ("a.jsonl", b'{"text": 3}', {}, "Line 1 of .* has int in column 'text'; expected text"),
        ("a.jsonl", b'{"text": "\\ud800"}', {}, "surrogate"),
        ("a.jsonl", b"[" * 100_000, {}, "Line 1 of .* is not JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_rows([Source(file=str(path), **options)], tokenizer, RowSettings(8))
    assert "\n" not in caught.value.message


def test_missing_files_and_folders(tmp_path: Path, tokenizer: Any) -> None:
    for use in (lambda source: open_rows([source], tokenizer, RowSettings(8)), lambda source: fingerprint([source])):
        with pytest.raises(UserError, match="There is no file"):
            use(Source(file=str(tmp_path / "none.txt")))
        with pytest.raises(UserError, match="is a folder"):
            use(Source(file=str(tmp_path)))
    with pytest.raises(UserError, match="list of sources is empty"):
        open_rows([], tokenizer, RowSettings(8))


def test_too_short_to_hold_out(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="too little text"):
        open_rows([write(tmp_path / "a.txt", "a cat")], tokenizer, RowSettings(8, held_out_fraction=0.1))


# --- data sets of the hub --------------------------------------------------------------------------------------------


def test_data_set_is_loaded_by_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs))
        return Dataset.from_dict({"story": ["one", "", "two"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    source = Source(dataset="who/what", config="small", split="validation", column="story")
    assert list(documents(source)) == ["one", "two"]
    assert asked == [(("who/what", "small"), {"split": "validation"})]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"story": ["one"], "id": [1]}, "data set 'who/what' has no column 'text'; its columns are 'story', 'id'"),
        ({"text": ["one", None]}, "Row 1 of the data set 'who/what' has nothing in column 'text'"),
    ],
)
def test_data_set_without_its_column(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, list[Any]], message: str
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Dataset.from_dict(columns))
    with pytest.raises(UserError, match=message):
        list(documents(Source(dataset="who/what")))


TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nora."}]
#: Rows of two kinds in one file: what a row does not have is null, or empty.
BOTH_KINDS = [
    {"messages": TALK, "text": None},
    {"messages": None, "text": "one"},
    {"messages": [], "text": "two"},
    {"messages": TALK, "text": ""},
    {"messages": None, "text": " "},  # a blank text, left out as ever
]


def kinds(found: Iterable[Any]) -> list[Any]:
    return [each if isinstance(each, str) else [dict(message) for message in each.messages] for each in found]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_null_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    rows = [{column: row["messages"], "text": row["text"], "id": 1} for row in BOTH_KINDS]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert kinds(documents(Source(file=str(tmp_path / "both.jsonl")))) == [TALK, "one", "two", TALK]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Dataset.from_list(rows))
    assert kinds(documents(Source(dataset="who/what"))) == [TALK, "one", "two", TALK]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": None}, "Line 1 of .* has nothing in column 'text'"),
        ({"text": None, "messages": None}, "Line 1 of .* has nothing in column 'text'"),
        ({"messages": None, "id": 1}, "Line 1 of .* has nothing in column 'messages'"),
    ],
)
def test_a_row_with_nothing_is_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        list(documents(Source(file=str(tmp_path / "a.jsonl"))))


@pytest.mark.parametrize("failure", [ConnectionError("no\nroute."), ValueError("Unknown split"), FileNotFoundError()])
def test_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr("datasets.load_dataset_builder", fail)
    source = Source(dataset="who/what", config="c")
    for use in (lambda: list(documents(source)), lambda: fingerprint([source])):
        with pytest.raises(UserError, match="'who/what' with configuration 'c', split 'train', cannot be loaded"):
            use()


def test_data_set_library_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder is a data set too, so the library is tested without a network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = Source(dataset=str(folder))
    assert list(documents(source)) == ["one", "two"]
    assert fingerprint([source]) == fingerprint([source])
    with pytest.raises(UserError, match="split 'nowhere', cannot be loaded"):
        list(documents(Source(dataset=str(folder), split="nowhere")))
    with pytest.raises(UserError, match="no column 'body'"):
        list(documents(Source(dataset=str(folder), column="body")))


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_every_token_of_every_document_once_per_epoch(stories: Source, tokenizer: Any) -> None:
    expected: list[int] = []
    for document in documents(stories):
        expected += [*tokenizer.encode(document), tokenizer.eos_token_id]
    rows, held_out = open_rows([stories], tokenizer, RowSettings(16, seed=3))
    assert held_out is None
    assert real_tokens(list(rows.in_order())) == expected
    assert rows.tokens == len(expected)
    in_order = Counter(tuple(row["labels"].tolist()) for row in rows.in_order())
    for epoch in range(3):
        shuffled = [rows.row(epoch * len(rows) + index) for index in range(len(rows))]
        assert Counter(tuple(row["labels"].tolist()) for row in shuffled) == in_order
        assert real_tokens(shuffled) != expected


def test_special_tokens_are_the_tokenizers_own() -> None:
    """A BOS where the tokenizer adds one, an EOS where it has one, never two."""
    plain, both = byte_level_bpe(), byte_level_bpe()
    both.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
    )
    body = plain.encode("a cat").ids
    for backend, options, expected in (
        (plain, {}, body),
        (plain, {"eos_token": "<|endoftext|>"}, [*body, 0]),
        (both, {"eos_token": "<|endoftext|>", "bos_token": "<s>"}, [1, *body, 0]),
    ):
        tokens = data.tokenize(["a cat"] * 300, PreTrainedTokenizerFast(tokenizer_object=backend, **options))
        assert tokens.ids.tolist() == expected * 300
        assert tokens.learn.all()
        assert tokens.starts.tolist() == [len(expected) * index for index in range(300)]


def test_long_texts_are_no_reason_to_warn(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "a.txt", text(1, 500))
    with caplog.at_level(logging.WARNING):
        rows, _ = open_rows([source], tokenizer, RowSettings(8))
    assert rows.tokens > tokenizer.model_max_length
    assert not caplog.records


@pytest.mark.parametrize(
    ("size", "rows", "last"), [(8, 1, 8), (9, 1, 8), (10, 2, 2), (16, 2, 8), (17, 2, 8), (2, 1, 2)]
)
def test_last_row_is_padded_never_dropped(size: int, rows: int, last: int) -> None:
    token_rows = TokenRows([stream(size, 100)], [1.0], length=8, padding=7)
    assert len(token_rows) == rows
    final = list(token_rows.in_order())[-1]
    assert final["labels"].tolist()[last:] == [data.MASKED] * (8 - last)
    assert final["input_ids"].tolist()[last:] == [7] * (8 - last)
    assert final["input_ids"].tolist()[:last] == final["labels"].tolist()[:last]
    kept = size if size % 8 != 1 else size - 1  # a lone token predicts nothing
    assert real_tokens(list(token_rows.in_order())) == list(range(100, 100 + kept))
    assert token_rows.tokens == kept


# --- order -----------------------------------------------------------------------------------------------------------


def three_sources(seed: int = 0) -> TokenRows:
    return TokenRows([stream(83), stream(37, 1000), stream(9, 2000)], [3.0, 1.0, 0.5], length=8, seed=seed)


def test_a_row_is_a_pure_function_of_its_index() -> None:
    uninterrupted = [three_sources().row(index)["input_ids"].tolist() for index in range(60)]
    resumed = three_sources()
    assert [resumed.row(index)["input_ids"].tolist() for index in range(41, 60)] == uninterrupted[41:]
    backwards = three_sources()
    assert [backwards.row(index)["input_ids"].tolist() for index in reversed(range(60))] == uninterrupted[::-1]
    assert [three_sources(seed=1).row(index)["input_ids"].tolist() for index in range(60)] != uninterrupted


def test_the_order_is_the_same_in_every_version() -> None:
    rows = TokenRows([stream(20)], [1.0], length=2, seed=5)
    order = [int(rows.row(index)["input_ids"][0]) // 2 for index in range(20)]
    assert order == [7, 8, 4, 3, 5, 6, 2, 0, 1, 9, 7, 1, 3, 6, 8, 9, 2, 0, 5, 4]


def test_epochs_are_permuted_differently() -> None:
    rows = TokenRows([stream(200)], [1.0], length=2)
    orders = [[int(rows.row(100 * epoch + index)["input_ids"][0]) for index in range(100)] for epoch in range(3)]
    assert all(sorted(order) == list(range(0, 200, 2)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("seed", range(12))
def test_every_prefix_of_a_mixture_has_the_right_shares(seed: int) -> None:
    generator = random.Random(seed)
    weights = [generator.choice([0.01, 0.3, 1.0, 7.0]) * generator.uniform(0.5, 1) for _ in range(1 + seed)]
    mixture, counts = Mixture(weights), [0] * len(weights)
    for row in range(2000):
        source, turn = mixture(row)
        assert turn == counts[source]
        counts[source] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - (row + 1) * weight / sum(weights)) < 1


def test_equal_weights_take_turns() -> None:
    mixture = Mixture([1.0, 1.0, 1.0, 1.0])
    assert all(sorted(mixture(4 * turn + place)[0] for place in range(4)) == [0, 1, 2, 3] for turn in range(50))


def test_processes_and_accumulation_only_share_out_a_steps_rows() -> None:
    def step_rows(step: int, world: int, accumulation: int, batch_size: int) -> list[list[int]]:
        rows = three_sources()
        batches = [
            rows.batch(step, micro, rank, world, batch_size, accumulation)
            for rank in range(world)
            for micro in range(accumulation)
        ]
        return sorted(torch.cat([batch["input_ids"] for batch in batches]).tolist())

    for step in range(4):
        expected = sorted(three_sources().row(index)["input_ids"].tolist() for index in range(8 * step, 8 * step + 8))
        for world, accumulation, batch_size in ((1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (4, 1, 2), (1, 8, 1)):
            assert step_rows(step, world, accumulation, batch_size) == expected
    with pytest.raises(ValueError, match="out of range"):
        three_sources().batch(0, micro=1)
    with pytest.raises(ValueError, match="out of range"):
        three_sources().batch(0, rank=2, world=2)


def test_sample_batches_are_the_first_rows_in_order() -> None:
    batches = list(sample_batches(TokenRows([stream(80)], [1.0], length=8, seed=4), 5, 2))
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == stream(40).reshape(5, 8).tolist()
    everything = [row for batch in sample_batches(three_sources(), 999, 3) for row in batch["input_ids"].tolist()]
    assert len(everything) == len(three_sources())
    assert len({tuple(row) for row in everything}) == len(everything)
    few = torch.cat([batch["input_ids"] for batch in sample_batches(three_sources(), 9, 3)])
    assert Counter((few[:, 0] // 1000).tolist()) == {0: 6, 1: 2, 2: 1}


def test_arguments_out_of_range_are_refused() -> None:
    for streams, weights, length, seed in (([], [], 8, 0), ([stream(1)], [1.0], 8, 0), ([stream(9)], [0.0], 8, 0),
                                           ([stream(9)], [1.0], 1, 0), ([stream(9)], [1.0], 8, -1)):  # fmt: skip
        with pytest.raises(ValueError, match="out of range"):
            TokenRows(streams, weights, length, seed)
    with pytest.raises(ValueError, match="counted from 0"):
        TokenRows([stream(9)], [1.0], 8).row(-1)


# --- held out --------------------------------------------------------------------------------------------------------


def test_held_out_is_whole_documents_spread_over_each_source(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"story {number} " + text(number) for number in range(40)]
    source = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": one}) for one in texts))
    for seed in (0, 1):
        rows, held_out = open_rows([source], tokenizer, RowSettings(16, seed, held_out_fraction=0.1))
        assert held_out is not None
        trained, kept = (
            tokenizer.decode(real_tokens(list(part.in_order()))).split("<|endoftext|>")[:-1]
            for part in (rows, held_out)
        )
        assert trained == [each for each in texts if each not in kept]
        assert sorted(trained + kept) == sorted(texts)
        assert sorted(texts.index(each) // 10 for each in kept) == [0, 1, 2, 3]  # one of every quarter


def test_held_out_depends_on_the_seed_alone(tmp_path: Path, tokenizer: Any) -> None:
    source = write(tmp_path / "a.txt", text(3, 3000))
    found = {}
    for seed in (0, 0, 1):
        _, held_out = open_rows([source], tokenizer, RowSettings(16, seed, held_out_fraction=0.1))
        assert held_out is not None
        found.setdefault(seed, []).append([row["input_ids"].tolist() for row in held_out.in_order()])
    assert found[0][0] == found[0][1]
    assert found[0][0] != found[1][0]


def test_held_out_rows_come_from_every_source(tmp_path: Path, tokenizer: Any) -> None:
    sources = [write(tmp_path / f"{name}.txt", f"{name} " * 2000) for name in ("cat", "hill")]
    rows, held_out = open_rows(sources, tokenizer, RowSettings(16, held_out_fraction=0.1))
    assert held_out is not None
    said = [tokenizer.decode(row["input_ids"]) for row in held_out.in_order()]
    cats, hills = (sum(word in each for each in said) for word in ("cat", "hill"))
    assert cats + hills == len(said)
    assert min(cats, hills) > 0.2 * len(said)
    assert rows.tokens + held_out.tokens == open_rows(sources, tokenizer, RowSettings(16))[0].tokens


@pytest.mark.parametrize("prefix", [(), (5000,)])
@pytest.mark.parametrize(
    ("starts", "fraction"),
    [([0], 0.05), ([0, 300], 0.05), ([0, 500, 990], 0.1), (list(range(0, 1000, 20)), 0.1), ([0, 3, 6, 9], 0.3)],
)
def test_what_is_held_out_and_what_is_left(starts: list[int], fraction: float, prefix: tuple[int, ...]) -> None:
    """Every token in one of the two, parts whole, spread over the source, and no row across a gap as one document."""
    tokens = Tokens(stream(1000), np.array(starts), np.ones(1000, dtype=bool), prefix)
    train, held_out = split_held_out(tokens, 16, fraction)
    assert sorted([*train.ids, *held_out.ids]) == list(range(1000))
    assert train.ids.tolist() == sorted(train.ids)
    assert 0.6 * fraction <= len(held_out) / 1000 <= 1.5 * fraction
    parts = np.split(held_out.ids, held_out.starts[1:])
    assert all(part.tolist() == list(range(part[0], part[0] + len(part))) for part in parts)
    places = sorted(int(part[0]) for part in parts)
    count = len(places)
    assert all(place // (1000 // count) in (n - 1, n, n + 1) for n, place in enumerate(places))
    for document in np.split(train.ids, train.starts[1:]):
        assert document.tolist() == list(range(document[0], document[0] + len(document)))
    assert train.prefix == held_out.prefix == prefix


def test_the_first_held_out_rows_are_from_everywhere() -> None:
    tokens = Tokens.of_text(stream(160_000))
    _, held_out = split_held_out(tokens, 16, 0.1)
    first = TokenRows([held_out], [1.0], 16)
    quarters = Counter(int(row["input_ids"][0]) // 40_000 for row in first.in_order(64))
    assert min(quarters[each] for each in range(4)) >= 8


# --- BOS ---------------------------------------------------------------------------------------------------------


def with_bos(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts <s> before every text."""
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")


def test_whether_bos_is_added_is_what_the_tokenizer_does() -> None:
    assert data.prefix_of(with_bos(byte_level_bpe())) == (1,)
    plain = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), bos_token="<s>", eos_token="<|endoftext|>")
    assert data.prefix_of(plain) == ()  # it has a BOS, and does not add it
    both = byte_level_bpe()
    both.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
    )
    assert data.around_text(PreTrainedTokenizerFast(tokenizer_object=both)) == ((1, 1), (0,))


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_every_window_begins_with_bos(tmp_path: Path, packing: Any) -> None:
    """Against a plain loop over the same tokens; the BOS counts in the length, and what follows it is predicted."""
    tokenizer = with_bos(byte_level_bpe())
    texts = [text(number, 10 + 7 * number) for number in range(12)]
    source = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(texts))
    documents = [[*tokenizer(each)["input_ids"], 0] for each in texts]
    expected = []
    for whole in documents if packing == "document" else [[each for one in documents for each in one]]:
        place = 0
        while place < len(whole):
            size = 16 if whole[place] == 1 else 15
            window = whole[place : place + size]
            expected.append(window if window[0] == 1 else [1, *window])
            place += size
    expected = [each for each in expected if len(each) > 1]
    rows, _ = open_rows([source], tokenizer, RowSettings(16, packing=packing))
    found = list(rows.in_order())
    assert [row["input_ids"].tolist()[: len(each)] for row, each in zip(found, expected, strict=True)] == expected
    assert [row["labels"].tolist()[1 : len(each)] for row, each in zip(found, expected, strict=True)] == [
        each[1:] for each in expected
    ]
    assert rows.tokens == sum(map(len, expected))
    assert {int(rows.row(turn)["input_ids"][0]) for turn in range(2 * len(rows))} == {1}
    trained, held_out = open_rows([source], tokenizer, RowSettings(16, held_out_fraction=0.2, packing=packing))
    assert held_out is not None
    for part in (trained, held_out):
        assert {int(row["input_ids"][0]) for row in part.in_order()} == {1}
        assert max(len(row["input_ids"]) for row in part.in_order()) == 16


def test_without_bos_windows_are_the_tokens_and_nothing_else(stories: Source, tokenizer: Any) -> None:
    expected = [token for each in documents(stories) for token in (*tokenizer.encode(each), tokenizer.eos_token_id)]
    rows, _ = open_rows([stories], tokenizer, RowSettings(16))
    assert real_tokens(list(rows.in_order())) == expected


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_content_and_fields_not_names(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "one two")
    same = write(tmp_path / "b.txt", "one two")
    others = [
        write(tmp_path / "c.txt", "one twO"),
        write(tmp_path / "a.jsonl", "one two"),
        first.model_copy(update={"weight": 2.0}),
        first.model_copy(update={"separator": "\n"}),
        first.model_copy(update={"column": "story"}),
    ]
    assert fingerprint([first]) == fingerprint([same])
    assert len(fingerprint([first])) == 64
    assert len({fingerprint([source]) for source in [first, *others]}) == 6
    assert fingerprint([first, others[0]]) != fingerprint([others[0], first])


def test_fingerprint_of_a_data_set_is_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        hash = "revision-1"

    monkeypatch.setattr("datasets.load_dataset_builder", lambda *args: Builder())
    source = Source(dataset="who/what")
    before = fingerprint([source])
    assert fingerprint([Source(dataset="who/what", split="test")]) != before
    assert fingerprint([source]) == before
    Builder.hash = "revision-2"
    assert fingerprint([source]) != before

"""Tasks: names, items from local files put through the registry's own prompt, and scores equal to lm-eval's class."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from edgerazor import tasks
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.tasks import catalog, local_items
from edgerazor.tasks.quiet import LOGGERS, quiet_lm_eval
from helpers.engines import Engine
from helpers.places import SHARED
from helpers.task_data import TEXT, make_model, make_tokenizer, write_rows

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job

ITEMS = SHARED / "eval"

#: One item per task in both forms, and the bytes that a model must see.
EXAMPLES: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "simple": {"query": "Question: Which is a gas?", "choices": ["iron", "oxygen", "salt"], "gold": 1},
        "hub": {
            "id": "x",
            "question": "Which is a gas?",
            "choices": {"text": ["iron", "oxygen", "salt"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "text": "Question: Which is a gas?\nAnswer:",
        "continuations": [" iron", " oxygen", " salt"],
        "gold": 1,
    },
    "arc_challenge": {
        "simple": {"query": "What floats?", "choices": ["a stone", "a cork"], "gold": 1},
        "hub": {
            "id": "y",
            "question": "What floats?",
            "choices": {"text": ["a stone", "a cork"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "text": "Question: What floats?\nAnswer:",
        "continuations": [" a stone", " a cork"],
        "gold": 1,
    },
    "hellaswag": {
        "simple": {
            "query": "Shaving: A man lathers. He",
            "choices": ["shaves.", " Next, he rinses.", "sings. He bows.", "leaves."],
            "gold": 2,
        },
        "hub": {
            "ind": 7,
            "activity_label": "Shaving",
            "ctx_a": "A man  lathers.",
            "ctx_b": "he",
            "ctx": "A man  lathers. he",
            "endings": ["shaves.", "[step] Next, he rinses.", "sings. [substeps] He bows.", " leaves."],
            "source_id": "s",
            "split": "val",
            "split_type": "indomain",
            "label": "2",
        },
        "text": "Shaving: A man lathers. He",
        "continuations": [" shaves.", "  Next, he rinses.", " sings. He bows.", " leaves."],
        "gold": 2,
    },
    "piqa": {
        "simple": {"query": "Question: How to cool tea?\n", "choices": ["Add ice.", "Add fire."], "gold": 0},
        "hub": {"goal": "How to cool tea?", "sol1": "Add ice.", "sol2": "Add fire.", "label": 0},
        "text": "Question: How to cool tea?\nAnswer:",
        "continuations": [" Add ice.", " Add fire."],
        "gold": 0,
    },
    "openbookqa": {
        "simple": {"query": "Predators eat", "choices": ["lions", "bunnies", "grass", "humans"], "gold": 1},
        "hub": {
            "id": "z",
            "question_stem": "Predators eat",
            "choices": {"text": ["lions", "bunnies", "grass", "humans"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        "text": "Predators eat",
        "continuations": [" lions", " bunnies", " grass", " humans"],
        "gold": 1,
    },
}

#: Of the first item of each shared file: its prompt, its continuations, the right one.
SHARED_ITEMS: dict[str, tuple[str, list[str], int]] = {
    "arc_easy": (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:",
        [
            " Sunlight is the source of energy for nearly all ecosystems.",
            " Most ecosystems are found on land instead of in water.",
            " Carbon dioxide is more available than other gases.",
            " The producers in all ecosystems are plants.",
        ],
        0,
    ),
    "arc_challenge": (
        "Question: An astronomer observes that a planet rotates faster after a meteorite impact. Which is the most "
        "likely effect of this increase in rotation?\nAnswer:",
        [
            " Planetary density will decrease.",
            " Planetary years will become longer.",
            " Planetary days will become shorter.",
            " Planetary gravity will become stronger.",
        ],
        2,
    ),
    "piqa": (
        "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:",
        [
            " Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips, you will "
            "also need to supply it with a water bottle and a food dish.",
            " Provide the guinea pig with a cage full of a few inches of bedding made of ripped jeans material, you "
            "will also need to supply it with a water bottle and a food dish.",
        ],
        0,
    ),
    "openbookqa": (
        "A person wants to start saving money so that they can afford a nice vacation at the end of the year. After "
        "looking over their budget and expenses, they decide the best way to save money is to",
        [
            " make more phone calls",
            " quit eating lunch out",
            " buy less with monopoly money",
            " have lunch with friends",
        ],
        1,
    ),
}


def asked(entry: tasks.LoadedTask) -> list[list[tuple[str, str]]]:
    """(context, continuation) of every choice of every item, as they reach the model."""
    with quiet_lm_eval():
        entry.task.set_fewshot_seed(seed=0)
        entry.task.build_all_requests(limit=entry.items)
    result: dict[int, list[tuple[str, str]]] = {}
    for instance in entry.task.instances:
        result.setdefault(instance.doc_id, []).append(instance.args)
    return list(result.values())


def gold(entry: tasks.LoadedTask, item: int) -> int:
    return entry.task.doc_to_target(entry.task.eval_docs[item])


# --- names -----------------------------------------------------------------------------------


def test_aliases_are_written_out_once_each() -> None:
    assert tasks.expand(("arc", "hellaswag", "arc_easy")) == ("arc_easy", "arc_challenge", "hellaswag")
    assert tasks.expand(("world", "openbook_qa")) == (*tasks.WORLD, "openbookqa")


def test_unknown_names_are_told_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    class OnlyHere(lm_eval.tasks.TaskManager):  # the whole index takes seconds to read
        def __init__(self, include_path: Any = None, **_: Any) -> None:
            near = Path(lm_eval.tasks.__file__).parent / "hellaswag"
            super().__init__(include_path=[near], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OnlyHere)
    for wrong, right in {"helaswag": "hellaswag", "arcc": "arc", "wrold": "world"}.items():
        with pytest.raises(UserError, match=f"no task called '{wrong}'") as error:
            tasks.load(tasks.TaskRequest((wrong,)))
        assert error.value.code == 2
        assert right in error.value.hint.removeprefix("Did you mean ").rstrip("?").split(" or ")
    with pytest.raises(UserError) as error:
        tasks.load(tasks.TaskRequest(("qqqqqqqq",)))
    assert "lm-eval ls tasks" in error.value.hint


def test_a_data_set_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'x' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match="items of piqa cannot be fetched") as error:
        tasks.load(tasks.TaskRequest(("piqa",)))
    assert error.value.code == 1
    assert "\n" not in error.value.message
    assert "--task-data" in error.value.hint


# --- items from local files ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["simple", "hub"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_local_items_give_the_registrys_bytes(name: str, form: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    write_rows(tmp_path / f"{name}.jsonl", [example[form]])
    (entry,) = tasks.load(tasks.TaskRequest((name,), str(tmp_path)))
    assert entry.task.config.target_delimiter == " "
    assert asked(entry) == [[(example["text"], continuation) for continuation in example["continuations"]]]
    assert gold(entry, 0) == example["gold"]
    assert (entry.items, entry.full_set) == (1, False)
    assert entry.data == str(tmp_path / f"{name}.jsonl")


def test_every_conversion_has_an_example() -> None:
    assert set(EXAMPLES) == set(local_items.CONVERSIONS)


@pytest.mark.slow
@pytest.mark.skipif(not ITEMS.is_dir(), reason="the shared evaluation files are not here")
def test_shared_files_give_the_registrys_bytes() -> None:
    loaded = {entry.name: entry for entry in tasks.load(tasks.TaskRequest(("arc", "piqa", "openbookqa"), str(ITEMS)))}
    for name, (text, continuations, right) in SHARED_ITEMS.items():
        loaded_items = loaded[name]
        document = loaded_items.task.eval_docs[0]
        assert loaded_items.task.doc_to_text(document) == text
        assert [" " + choice for choice in loaded_items.task.doc_to_choice(document)] == continuations
        assert gold(loaded_items, 0) == right
        assert loaded_items.items == catalog.FULL_SIZES[name]
        assert loaded_items.full_set is True
        for index in range(1, loaded_items.items, 97):  # nothing is doubled anywhere in the file
            prompt = loaded_items.task.doc_to_text(loaded_items.task.eval_docs[index])
            assert prompt.count("Question: Question: ") == 0
            assert "\n\n" not in prompt


@pytest.mark.skipif(not ITEMS.is_dir(), reason="the shared evaluation files are not here")
def test_the_shared_hellaswag_equals_the_hubs_row() -> None:
    (entry,) = tasks.load(tasks.TaskRequest(("hellaswag",), str(ITEMS)))
    assert (entry.items, entry.full_set) == (1918, False)
    query = "Roof shingle removal: A man is sitting on a roof. He"
    index = entry.task.eval_docs["query"].index(query)
    document = entry.task.eval_docs[index]
    assert entry.task.doc_to_text(document) == query
    assert entry.task.doc_to_choice(document) == [
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.",
        "is holding a rubik's cube.",
        "starts pulling up roofing on a roof.",
    ]
    assert gold(entry, index) == 3


def test_file_may_be_called_openbook_qa(tmp_path: Path) -> None:
    write_rows(tmp_path / "openbook_qa.jsonl", [EXAMPLES["openbookqa"]["simple"]])
    (entry,) = tasks.load(tasks.TaskRequest(("openbook_qa",), str(tmp_path)))
    assert entry.name == "openbookqa"
    assert entry.data.endswith("openbook_qa.jsonl")


def test_chance_limit_and_size(tmp_path: Path) -> None:
    simple = EXAMPLES["arc_easy"]["simple"]
    rows = [simple, {**simple, "choices": ["a", "b"], "gold": 0}, {**simple, "choices": ["a", "b", "c", "d"]}]
    write_rows(tmp_path / "arc_easy.jsonl", rows)
    for limit, chance in {None: (1 / 3 + 1 / 2 + 1 / 4) / 3, 2: (1 / 3 + 1 / 2) / 2, 1: 1 / 3}.items():
        (entry,) = tasks.load(tasks.TaskRequest(("arc_easy",), str(tmp_path), limit))
        assert entry.chance == pytest.approx(chance, abs=1e-15)
        assert entry.items == (limit or 3)


def test_tags_find_the_files_of_their_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    near = Path(lm_eval.tasks.__file__).parent / "arc"
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: whole(include_path=[near], include_defaults=False))
    for name in ("arc_easy", "arc_challenge"):
        write_rows(tmp_path / f"{name}.jsonl", [EXAMPLES[name]["simple"]])
    loaded = tasks.load(tasks.TaskRequest(("ai2_arc", "arc_easy"), str(tmp_path)))
    assert sorted(entry.name for entry in loaded) == ["arc_challenge", "arc_easy"]


def test_examples_come_from_the_same_file_without_the_item(tmp_path: Path) -> None:
    foods = ["plums", "bread", "honey"]
    rows = [{"query": f"Who eats {food}?", "choices": [f"eater of {food}", "nobody"], "gold": 0} for food in foods]
    write_rows(tmp_path / "arc_easy.jsonl", rows)
    (entry,) = tasks.load(tasks.TaskRequest(("arc_easy",), str(tmp_path), num_fewshot=2))
    assert "drawn from the same file" in entry.note
    for food, choices in zip(foods, asked(entry), strict=True):
        context = choices[0][0]
        others = [f"Question: Who eats {other}?\nAnswer: eater of {other}\n\n" for other in foods if other != food]
        own = f"Question: Who eats {food}?\nAnswer:"
        assert context in ("".join(others) + own, "".join(reversed(others)) + own)
    with pytest.raises(UserError, match="3 items, too few to draw 3 examples"):
        tasks.load(tasks.TaskRequest(("arc_easy",), str(tmp_path), num_fewshot=3))


GOOD = EXAMPLES["piqa"]["simple"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no items"),
        ("{\n", "Line 1 of .* is not valid JSON"),
        ("[1]\n", "Line 1 of .* is not a JSON object"),
        (
            json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "gold": 2}),
            "Item 2 of .*`gold` must be a number from 0 to 1",
        ),
        (json.dumps({**GOOD, "gold": True}), "`gold` must be a number"),
        (json.dumps({**GOOD, "choices": ["one"]}), "`choices` must be a list of at least two"),
        (json.dumps({**GOOD, "choices": ["a", "b", "c"]}), "has 2 choices, the item has 3"),
        (json.dumps({**GOOD, "query": ""}), "`query` must be a text"),
        (
            json.dumps({"goal": "g", "sol1": "a", "label": 0}),
            r"does not fit piqa: .*goal, sol1, label and needs sol2\.",
        ),
        (json.dumps({"a": 1, "b": 2}) + "\n" + json.dumps({"a": 1}), "Item 2 of .* no field 'b'"),
    ],
)
def test_wrong_items_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        tasks.load(tasks.TaskRequest(("piqa",), str(tmp_path)))
    assert "\n" not in error.value.message


ARC = EXAMPLES["arc_easy"]["hub"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": {"text": [], "label": []}}, "."),
        ({"choices": {"text": None, "label": ["1", "2", "3"]}}, "choices are not a list of texts"),
        ({"choices": {"text": [1, 2], "label": ["1", "2"]}}, "."),
        ({"choices": {"label": ["1", "2"]}}, "."),
        ({"choices": "iron"}, "."),
        ({"answerKey": "9"}, "."),
        ({"choices": {"text": ["iron", "oxygen"], "label": ["1", "3", "2"]}}, "its answer is none of its 2 choices"),
    ],
)
def test_items_that_their_task_cannot_take_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """lm-eval believes what it finds: it would fail without a word of ours, or count the item as wrong."""
    write_rows(tmp_path / "arc_easy.jsonl", [ARC, {**ARC, **change}])
    with pytest.raises(UserError, match=rf"(Item 2 of )?.*arc_easy\.jsonl does not fit arc_easy: .*{message}"):
        tasks.load(tasks.TaskRequest(("arc_easy",), str(tmp_path)))


def test_other_tasks_take_their_own_fields_only(tmp_path: Path) -> None:
    write_rows(tmp_path / "winogrande.jsonl", [GOOD])
    with pytest.raises(UserError, match="not for winogrande"):
        tasks.load(tasks.TaskRequest(("winogrande",), str(tmp_path)))
    row = {"sentence": "Ann thanked Beth because _ had helped.", "option1": "Ann", "option2": "Beth", "answer": "2"}
    write_rows(tmp_path / "winogrande.jsonl", [row])
    (entry,) = tasks.load(tasks.TaskRequest(("winogrande",), str(tmp_path)))
    assert (entry.chance, entry.full_set) == (0.5, None)
    assert asked(entry) == [
        [("Ann thanked Beth because Ann", " had helped."), ("Ann thanked Beth because Beth", " had helped.")]
    ]


def test_a_field_that_a_prompt_only_names_must_be_there(tmp_path: Path) -> None:
    """lm-eval would take the missing field's name for the prompt itself."""
    row = {**EXAMPLES["openbookqa"]["hub"]}
    del row["question_stem"]
    write_rows(tmp_path / "openbookqa.jsonl", [row])
    with pytest.raises(UserError, match="needs question_stem"):
        tasks.load(tasks.TaskRequest(("openbookqa",), str(tmp_path)))


def test_missing_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no piqa\.jsonl") as error:
        tasks.load(tasks.TaskRequest(("piqa",), str(tmp_path)))
    assert error.value.code == 2
    with pytest.raises(UserError, match="not a folder"):
        tasks.load(tasks.TaskRequest(("piqa",), str(tmp_path / "nowhere")))
    monkeypatch.setattr(catalog, "WORLD_FOLDER", tmp_path)
    with pytest.raises(UserError, match="items of world_recall are missing"):
        tasks.load(tasks.TaskRequest(("world",)))


# --- tasks of ours ---------------------------------------------------------------------------


def test_the_worlds_tasks_ask_as_the_teacher_was_taught(tmp_path: Path) -> None:
    row = {
        "prompt": "The kite was old. Nora Hill took the kite home to",
        "choices": ["Dover", "Ashby", "Selby", "Derby"],
        "gold": 0,
        "combination": ["recall", "Nora Hill", "kite"],
    }
    for name in tasks.WORLD:
        write_rows(tmp_path / f"{name}.jsonl", [row])
    loaded = tasks.load(tasks.TaskRequest(("world",), str(tmp_path)))
    assert [entry.name for entry in loaded] == list(tasks.WORLD)
    for entry in loaded:
        assert asked(entry) == [[(row["prompt"], f" {choice}") for choice in row["choices"]]]
        assert gold(entry, 0) == 0
        assert list(entry.task.aggregation()) == ["acc"]


@pytest.mark.skipif(not (catalog.WORLD_FOLDER / "recall.jsonl").is_file(), reason="the world's items are not made yet")
def test_the_worlds_items_are_whole() -> None:
    for entry in tasks.load(tasks.TaskRequest(("world",))):
        assert (entry.items, entry.full_set, entry.chance) == (1000, True, 0.25)


# --- scoring ---------------------------------------------------------------------------------


PAIRS = [
    (context, continuation)
    for context in ("", "Where is", "Nora went to the mill. " * 9, TEXT, TEXT * 9)
    for continuation in (" mill", " barn", " the red ball", " the red cave", "?")
]


def scorer_of(kind: str, batch_size: int, model: Any = None, tokenizer: Any = None) -> Any:
    from lm_eval.models.huggingface import HFLM

    from edgerazor.tasks.lm_eval_models import EngineLM, TransformersLM

    model, tokenizer = model or make_model(), tokenizer or make_tokenizer()
    if kind == "lm-eval":
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    if kind == "engine":
        return EngineLM(Engine(model, tokenizer), tokenizer, batch_size, Console(quiet=True), "tiny")
    return TransformersLM(model, tokenizer, batch_size, Console(quiet=True), "tiny")


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, 0) for each in arguments]


@pytest.mark.parametrize("kind", ["transformers", "engine"])
def test_scores_equal_lm_evals_own_class(kind: str) -> None:
    requests = instances("loglikelihood", PAIRS)
    model, tokenizer = make_model(), make_tokenizer()
    with quiet_lm_eval():
        expected = scorer_of("lm-eval", 3, model).loglikelihood(requests)
        for size in (1, 4, 64):
            scorer = scorer_of(kind, size, model)
            found = scorer.loglikelihood(requests)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert scorer.truncated == sum(len(tokenizer(a + b).input_ids) > 97 for a, b in PAIRS) > 0
    model.tie_weights()  # put back after lm-eval was kept from calling it


@pytest.mark.parametrize("kind", ["transformers", "engine"])
def test_long_texts_equal_lm_evals_own_class(kind: str) -> None:
    requests = instances("loglikelihood_rolling", [(TEXT * 9,), ("mill",), (TEXT,)])
    with quiet_lm_eval():
        expected = scorer_of("lm-eval", 2).loglikelihood_rolling(requests)
        assert scorer_of(kind, 2).loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3)


def test_an_engine_is_asked_for_the_same_tokens_and_for_few() -> None:
    """Inputs, predicted tokens, their number; and a prompt once for all its choices."""
    from edgerazor.tasks.lm_eval_models import EngineLM

    model, tokenizer = make_model(), make_tokenizer()
    with quiet_lm_eval():
        plain = scorer_of("lm-eval", 1, model, tokenizer)
        expected: list[tuple[list[int], list[int]]] = []
        plain._loglikelihood_tokens = lambda requests, **_: expected.extend(
            ((a + b)[-97:-1], b) for _, a, b in requests
        )
        plain.loglikelihood(instances("loglikelihood", PAIRS))
        engine = Engine(model, tokenizer)
        EngineLM(engine, tokenizer, 4, Console(quiet=True), "tiny").loglikelihood(instances("loglikelihood", PAIRS))
    (requests,) = engine.score_requests
    found = [
        ([*request.prefix, *tokens][:-1], tokens[-count:])
        for request in requests
        for tokens, count in zip(request.continuations, request.counts, strict=True)
    ]
    assert sorted(found) == sorted(expected)
    computed = sum(len(r.prefix) + sum(len(c) - 1 for c in r.continuations) for r in requests)
    assert computed < 0.6 * sum(len(tokens) for tokens, _ in expected)  # truncated ones share nothing


def test_examples_before_all_prompts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgerazor.tasks import lm_eval_models

    pairs = [(f"{TEXT}\n\nWhere is {who}?", f" {place}") for who in ("Ida", "Ben", "Tom") for place in ("mill", "hut")]
    requests = instances("loglikelihood", pairs)
    model, tokenizer = make_model(), make_tokenizer()
    with quiet_lm_eval():
        expected = scorer_of("lm-eval", 3, model).loglikelihood(requests)
        for tokens, calls in ((4096, 1), (1, 6)):  # in pieces: as many calls as inputs, each with the prefix again
            monkeypatch.setattr(lm_eval_models, "CALL_TOKENS", tokens)
            monkeypatch.setattr(lm_eval_models, "CALL_PREFIXES", 0)
            engine = Engine(model, tokenizer)
            found = lm_eval_models.EngineLM(engine, tokenizer, 4, Console(quiet=True), "tiny").loglikelihood(requests)
            assert found == [(pytest.approx(value, abs=1e-4), greedy) for value, greedy in expected]
            assert [len(each) for each in engine.score_requests] == [1] * calls
    whole = tokenizer(f"{TEXT}\n\nWhere is ").input_ids
    assert {tuple(call[0].prefix[: len(whole) - 1]) for call in engine.score_requests} == {tuple(whole[:-1])}


@pytest.mark.parametrize("ends", [1, [1, 40]])
def test_written_answers_equal_lm_evals_own_class(ends: int | list[int]) -> None:
    from edgerazor.tasks import lm_eval_models

    model, tokenizer = make_model(seed=3), make_tokenizer()
    model.generation_config.eos_token_id = ends
    contexts = ["", "Where is", TEXT, TEXT * 9, "Nora went to the mill. " * 2]
    stops: list[dict[str, Any]] = [
        {"until": ["\n"], "max_gen_toks": 40},
        {"until": [], "max_gen_toks": 25, "do_sample": False, "temperature": 0.0},
        {"until": [tokenizer.decode([41])], "max_gen_toks": 40},
    ]
    requests = instances("generate_until", [(each, options) for options in stops for each in contexts[1:]])
    with quiet_lm_eval():
        expected = scorer_of("lm-eval", 1, model).generate_until(requests)
        for size in (1, 3):
            assert scorer_of("engine", size, model).generate_until(requests) == expected
    assert len(set(map(len, expected))) > 3
    assert lm_eval_models.is_greedy({"until": ["x"], "max_gen_toks": 3, "temperature": 0, "top_p": 0.9})
    for options in ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}, {"repetition_penalty": 1.1}):
        assert not lm_eval_models.is_greedy(options)
        with pytest.raises(ValueError, match="plain greedy text"), quiet_lm_eval():
            scorer_of("engine", 1).generate_until(
                instances("generate_until", [("Where", {"until": [], "max_gen_toks": 9, **options})])
            )


def test_scores_and_standard_errors_by_hand(tmp_path: Path) -> None:
    """Answer keys made from the model's own answers give 1; half of them turned give 1/2."""
    model, tokenizer = make_model(), make_tokenizer()
    rows = [{"query": f"{TEXT[:n]}", "choices": ["mill", "barn"], "gold": 0} for n in range(8, 28)]
    write_rows(tmp_path / "openbookqa.jsonl", rows)
    request = tasks.TaskRequest(("openbookqa",), str(tmp_path))
    answers = []
    with torch.no_grad():
        for row in rows:
            losses = []
            for choice in row["choices"]:
                start, whole = tokenizer(row["query"]).input_ids, tokenizer(f"{row['query']} {choice}").input_ids
                scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                losses.append(sum(float(scores[i - 1, whole[i]]) for i in range(len(start), len(whole))))
            answers.append(int(losses[1] > losses[0]))  # both choices have four letters
    for wrong in (0, 5):
        keyed = [{**r, "gold": 1 - a if i < wrong else a} for i, (r, a) in enumerate(zip(rows, answers, strict=True))]
        write_rows(tmp_path / "openbookqa.jsonl", keyed)
        console = Console(quiet=True)
        scores, notes = tasks.evaluate(model, tokenizer, tasks.load(request), request, 8, console, "tiny")
        share = 1 - wrong / 20
        assert scores["openbookqa"].metric == "acc_norm"
        assert scores["openbookqa"].value == pytest.approx(share)
        assert scores["openbookqa"].stderr == pytest.approx((share * (1 - share) / 19) ** 0.5)
        assert notes == []


def test_a_chat_template_is_needed_to_apply_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "piqa.jsonl", [GOOD])
    request = tasks.TaskRequest(("piqa",), str(tmp_path), chat=True)
    model, tokenizer = make_model(), make_tokenizer()
    with pytest.raises(UserError, match="no chat template") as error:
        tasks.evaluate(model, tokenizer, tasks.load(request), request, 8, Console(quiet=True), "tiny")
    assert error.value.code == 2
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"
    scores, _ = tasks.evaluate(model, tokenizer, tasks.load(request), request, 8, Console(quiet=True), "tiny")
    assert scores["piqa"].value in (0.0, 1.0)
    assert scores["piqa"].stderr is None  # of one item


def test_lm_eval_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    write_rows(tmp_path / "hellaswag.jsonl", [EXAMPLES["hellaswag"]["hub"]] * 3)
    request = tasks.TaskRequest(("hellaswag",), str(tmp_path))
    tasks.evaluate(make_model(), make_tokenizer(), tasks.load(request), request, 8, Console(quiet=True), "tiny")
    assert capfd.readouterr() == ("", "")
    assert {name: logging.getLogger(name).level for name in LOGGERS} == levels


def test_estimate_counts_items_and_tokens(tmp_path: Path) -> None:
    row = {"prompt": "a" * 60, "choices": ["cccc", "dddd"], "gold": 0, "combination": []}
    write_rows(tmp_path / "world_recall.jsonl", [row] * 5)
    found = tasks.estimate(tasks.TaskRequest(("world_recall",), str(tmp_path), limit=3))
    assert found == {"world_recall": (3, 3 * (60 + 8) // 4)}
    assert tasks.estimate(tasks.TaskRequest(("piqa",), limit=10)) == {"piqa": (10, None)}


def test_fingerprint_follows_the_items(tmp_path: Path) -> None:
    write_rows(tmp_path / "piqa.jsonl", [GOOD])
    request = tasks.TaskRequest(("piqa",), str(tmp_path))
    before = tasks.fingerprint(request)
    assert tasks.fingerprint(request) == before
    write_rows(tmp_path / "piqa.jsonl", [GOOD, GOOD])
    assert tasks.fingerprint(request) != before

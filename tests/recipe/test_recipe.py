"""The recipe: strict, printable, and every mistake in it is one sentence that names the field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from edgerazor import recipe as recipes
from edgerazor.errors import USAGE, UserError
from edgerazor.recipe import LossTerm, Override, Recipe, Source, Strict, build


def all_models(model: type[Strict] = Recipe) -> list[type[Strict]]:
    nested = [f.annotation for f in model.model_fields.values() if isinstance(f.annotation, type)]
    return [model, *(inner for section in nested if issubclass(section, Strict) for inner in all_models(section))]


def test_the_explanation_is_the_default_recipe() -> None:
    assert build(yaml.safe_load(recipes.explain())) == Recipe()


def test_every_field_is_explained_in_one_line() -> None:
    for model in [*all_models(), Source, LossTerm, Override]:
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Strict)
            assert nested or (field.description and "\n" not in field.description), name
    assert all("  # " in line for line in recipes.explain().splitlines())


def test_what_is_dumped_loads_back(tmp_path: Path) -> None:
    values = {
        "model": str(tmp_path),
        "seed": 7,
        "data": {"train": [{"file": str(tmp_path / "a.txt"), "weight": 0.5}], "held_out": [{"dataset": "x/y"}]},
        "calibrate": {
            "formats": ["int2", "int4"],
            "group_size": "row",
            "overrides": [{"match": "*.o_proj", "format": "int8"}],
            "head_format": "int5",
        },
        "distill": {"losses": [{"name": "lafd", "options": {"layers": [1, 2]}}], "betas": [0.8, 0.9]},
        "eval": {"tasks": ["arc"], "task_data": str(tmp_path)},
        "compare": {"rounded": str(tmp_path / "packed")},
    }
    recipe = build(values)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    assert build(recipes.load(path)) == recipe


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("distill: {learning_rate: 2e-5, clip: 1, final_learning_rate: 1.5E-1}")
    settings = build(recipes.load(path)).distill
    assert (settings.learning_rate, settings.clip, settings.final_learning_rate) == (2e-5, 1.0, 0.15)


def test_later_layers_win_field_by_field() -> None:
    low = {"seed": 1, "data": {"sequence_length": 8, "train": [{"file": "a"}]}, "compare": {"a": "x"}}
    high = {"data": {"train": [{"file": "b"}]}, "compare": {"b": "y"}}
    expected = {"seed": 1, "data": {"sequence_length": 8, "train": [{"file": "b"}]}, "compare": {"b": "y"}}
    assert recipes.merge(low, high) == expected


SIZES = {
    "200MB": 200_000_000,
    "1.5 GB": 1_500_000_000,
    "64kB": 64_000,
    "64kb": 64_000,
    "3KiB": 3072,
    "0.5MiB": 524_288,
    "2GiB": 2_147_483_648,
    "12345": 12_345,
    "12345 B": 12_345,
    "0.0000019MB": 1,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read_with_their_units(text: str) -> None:
    assert build({"calibrate": {"target_size": text}}).calibrate.target_size == SIZES[text]
    assert build({"calibrate": {"target_size": SIZES[text]}}).calibrate.target_size == SIZES[text]


def test_rotation_is_hadamard_or_none() -> None:
    assert build({"calibrate": {"rotation": "hadamard"}}).calibrate.rotation == "hadamard"
    for nothing in ("none", None):
        assert build({"calibrate": {"rotation": nothing}}) == build({})
    for wrong in ("fourier", 3, ["hadamard"]):
        with pytest.raises(UserError) as refused:
            build({"calibrate": {"rotation": wrong}})
        assert refused.value.message.startswith("--rotation: expected none or hadamard, got ")
        assert refused.value.code == USAGE


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e6", "2 TB", "1.MB", "12,5MB", "200MBit", "two"])
def test_a_malformed_size_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError) as wrong:
        build({"calibrate": {"target_size": text}})
    units = "B, kB, MB, GB, KiB, MiB, GiB"
    expected = f"--target-size: expected a size like 200MB, in bytes or in one of {units}, got {text!r}."
    assert (wrong.value.message, wrong.value.code) == (expected, USAGE)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("90s", 90.0),
        ("30m", 1800.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("1h 2m 3.5s", 3723.5),
        ("0.5h", 1800.0),
    ],
)
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert build({"distill": {"max_time": text}}).distill.max_time == seconds


@pytest.mark.parametrize("text", ["", "h", "1x", "30m1h", "-5m", "1:30", "1e3", "an hour", "1h30"])
def test_a_malformed_time_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="--max-time: expected a time like 90s, 30m, 1h30m"):
        build({"distill": {"max_time": text}})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("300000", 300_000),
        ("300k", 300_000),
        ("20M", 20_000_000),
        ("1.5m", 1_500_000),
        ("1G", 10**9),
        ("90_000", 90_000),
    ],
)
def test_token_counts_are_read_with_their_letters(text: str, tokens: int) -> None:
    assert build({"distill": {"tokens": text}}).distill.tokens == tokens


@pytest.mark.parametrize("text", ["", "k", "3x", "-3k", "1e6", "3 kk", "many"])
def test_a_malformed_token_count_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="--tokens: expected a number of tokens like 300000, 300k or 20M"):
        build({"distill": {"tokens": text}})


@pytest.mark.parametrize(("name", "text"), [("tokens", "0k"), ("max_time", "0s")])
def test_no_budget_at_all_is_refused(name: str, text: str) -> None:
    with pytest.raises(UserError, match=r"expected a (whole )?number"):
        build({"distill": {name: text}})


def test_what_was_set_is_dumped_where_a_budget_would_choose(tmp_path: Path) -> None:
    """Even the default: a later command could not know that it was said."""
    path = tmp_path / "recipe.yaml"
    recipe = build({"distill": {"tokens": 1000, "learning_rate": 2e-5, "betas": (0.9, 0.95)}})
    path.write_text(recipes.dump(recipe))
    assert recipes.load(path)["distill"] == {"tokens": 1000, "learning_rate": 2e-5}
    path.write_text(recipes.dump(build({"distill": {"steps": 5, "learning_rate": 2e-5}})))
    assert recipes.load(path)["distill"] == {"steps": 5}


def test_that_nothing_is_rotated_is_dumped_where_it_was_said(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(build({"calibrate": {"rotation": "none"}})))
    again = build(recipes.load(path))
    assert again.calibrate.rotation is None
    assert "rotation" in again.calibrate.model_fields_set
    assert "rotation" not in recipes.dump(build({}))


def test_of_several_budgets_the_last_one_counts(tmp_path: Path) -> None:
    budgets: list[dict[str, Any]] = [{"bits": 1.88}, {"real_bits": 2.5}, {"target_size": "9MB"}]
    values = {"bits": 1.88, "real_bits": 2.5, "target_size": 9_000_000}
    for early in budgets:
        for late in budgets:
            merged = recipes.merge({"calibrate": {**early, "group_size": 64}}, {"calibrate": late}, {"calibrate": {}})
            assert merged == {"calibrate": {"group_size": 64, **late}}
            settings = build(merged).calibrate
            (name,) = late
            assert settings.budget() == (name, values[name])
            path = tmp_path / "r.yaml"
            path.write_text(recipes.dump(build(merged)))
            assert build(recipes.load(path)).calibrate == settings
            if early != late:
                with pytest.raises(UserError, match="both say how large the model may be; give one of them"):
                    build({"calibrate": {**early, **late}}, "The recipe x.yaml")
    assert build({}).calibrate.budget() == ("bits", 2.0)


def test_paths_become_absolute_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    values = {
        "model": "model",
        "data": {"train": [{"file": "../a.txt"}, {"dataset": "x/y"}], "held_out": [{"file": "/b.txt"}]},
        "eval": {"task_data": "tasks"},
        "compare": {"other": "packed"},
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    values = recipes.load(path)
    assert values["model"] == str(tmp_path / "model")
    above = str(tmp_path.parent / "a.txt")
    assert values["data"] == {"train": [{"file": above}, {"dataset": "x/y"}], "held_out": [{"file": "/b.txt"}]}
    assert values["eval"]["task_data"] == str(tmp_path / "tasks")
    assert values["compare"] == {"other": str(tmp_path / "packed")}
    assert recipes.anchor({"model": "some/hub-id"}, tmp_path) == {"model": "some/hub-id"}
    assert recipes.anchor({"eval": {"task_data": "~/x"}}, tmp_path)["eval"]["task_data"] == os.path.expanduser("~/x")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"calibrate": {"bits": 9.0}}, "--bits is 9.0; expected a number from 1.58 to 8."),
    ({"calibrate": {"bits": 1.5}}, "--bits is 1.5; expected a number from 1.58 to 8."),
    ({"calibrate": {"bits": float("nan")}}, "--bits is nan; expected a finite number."),
    ({"calibrate": {"kv_bits": 5}}, "--kv-bits is 5; expected 4, 8 or 16."),
    ({"calibrate": {"group_size": 4}}, "--group-size is 4; expected a whole number from 8 to 65536."),
    (
        {"calibrate": {"group_size": "rows"}},
        "--group-size: expected a whole number, or `row` for one scale per row, got 'rows'.",
    ),
    ({"calibrate": {"plan": "rows"}}, "--plan is 'rows'; expected sensitivity, interleave, variance or first."),
    ({"calibrate": {"granularity": "layer"}}, "--granularity is 'layer'; expected row, tensor, column or block."),
    ({"calibrate": {"formats": "int4"}}, "--formats is 'int4'; expected a list."),
    ({"distill": {"steps": 0}}, "--steps is 0; expected a whole number of at least 1."),
    ({"distill": {"steps": 2.5}}, "--steps is 2.5; expected a whole number."),
    ({"distill": {"steps": "3"}}, "--steps is '3'; expected a whole number."),
    ({"distill": {"learning_rate": 0}}, "--learning-rate is 0; expected a number above 0."),
    ({"data": {"held_out_fraction": 0.9}}, "--held-out-fraction is 0.9; expected a number above 0 and below 0.5."),
    ({"data": {"train": "a.txt"}}, "--data is 'a.txt'; expected a list."),
    ({"data": {"train": ["a.txt"]}}, "--data is 'a.txt'; expected fields with values."),
    ({"distill": 3}, "--distill is 3; expected fields with values."),
    ({"distill": {"losses": []}}, "--losses is []; expected at least one entry."),
    ({"trust_remote_code": "yes"}, "--trust-remote-code is 'yes'; expected true or false."),
]


@pytest.mark.parametrize(("values", "sentence"), WRONG, ids=[sentence[:24] for _, sentence in WRONG])
def test_a_wrong_value_is_one_sentence_with_what_is_expected(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as wrong:
        build(values)
    assert wrong.value.message == sentence
    assert wrong.value.code == USAGE
    with pytest.raises(UserError) as wrong:
        build(values, "The recipe x.yaml")
    assert wrong.value.message.startswith("The recipe x.yaml: `")


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        ({"distil": {}}, "distil", "Did you mean distill?"),
        ({"distill": {"stesp": 3}}, "distill.stesp", "Did you mean steps?"),
        ({"data": {"train": [{"fiel": "a"}]}}, "data.train.0.fiel", "Did you mean file?"),
        ({"distill": {"losses": [{"name": "ce", "weigth": 1}]}}, "distill.losses.0.weigth", "Did you mean weight?"),
        (
            {"calibrate": {"overrides": [{"match": "*", "format": "int4", "formt": "int4"}]}},
            "calibrate.overrides.0.formt",
            "Did you mean format?",
        ),
        ({"bench": {"qqq": 1}}, "bench.qqq", "Known fields there: prefill_tokens,"),
    ],
)
def test_an_unknown_field_names_the_closest(values: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"unknown field `{field}`") as wrong:
        build(values, "The recipe x.yaml")
    assert wrong.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("a: [", "is not valid YAML"),
        ("a: b: c", "is not valid YAML (line 1)"),
        ("- a\n", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("distill: {steps: 1, steps: 2}", "`steps` is given twice"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_garbage_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as wrong:
        recipes.load(path)
    assert sentence in wrong.value.message
    assert "\n" not in wrong.value.message
    assert wrong.value.code == USAGE


@pytest.mark.parametrize("bad", ["missing", "folder", "latin"])
def test_an_unreadable_recipe_is_one_sentence(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "r.yaml"
    if bad == "folder":
        path.mkdir()
    elif bad == "latin":
        path.write_bytes("modèle: é".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read") as wrong:
        recipes.load(path)
    assert wrong.value.code == USAGE


@pytest.mark.parametrize("values", [{"data": {"train": 5}}, {"data": 5}, {"compare": []}, {"eval": None}, {"model": 3}])
def test_malformed_sections_pass_through_to_validation(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        build(recipes.anchor(values, tmp_path), "The recipe")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"calibrate": {"start": "gptq"}}, "The recipe x.yaml: `calibrate.start` is called `init` now."),
        ({"distill": {"rungs": [{"share": 1.0}]}}, "The recipe x.yaml: `distill.rungs` is called `phases` now."),
        ({"calibrate": {"init": "rule"}}, "The recipe x.yaml: `calibrate.init` is 'rule', which is called `rtn` now."),
    ],
)
def test_what_was_renamed_is_refused_with_its_name_now(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as wrong:
        build(values, "The recipe x.yaml")
    assert (wrong.value.message, wrong.value.code) == (sentence, USAGE)


def test_retired_names_point_to_names_that_there_are() -> None:
    fields = dict(recipes.fields_of())
    for path, name in recipes.RETIRED_FIELDS.items():
        assert path not in fields
        assert f"{path.rpartition('.')[0]}.{name}" in fields
    for (path, value), name in recipes.RETIRED_VALUES.items():
        assert value not in get_args(fields[path].annotation)
        assert name in get_args(fields[path].annotation)


#: A path or program of every kind, and what it becomes in the folder F.
PATHS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model": "there"}, {"model": "F/there"}),
    ({"model": "some/hub-id"}, {"model": "some/hub-id"}),
    ({"compare": {"a": "x", "b": "/y"}}, {"compare": {"a": "F/x", "b": "/y"}}),
    ({"data": {"train": [{"file": "x"}], "packing": "x"}}, {"data": {"train": [{"file": "F/x"}], "packing": "x"}}),
    ({"data": {"held_out": [{"file": "x", "column": "y"}]}}, {"data": {"held_out": [{"file": "F/x", "column": "y"}]}}),
    ({"distill": {"teachers": ["there", "a/b"]}}, {"distill": {"teachers": ["F/there", "a/b"]}}),
    ({"eval": {"task_data": "x", "against": "there"}}, {"eval": {"task_data": "F/x", "against": "F/there"}}),
    ({"eval": {"against": "a/b"}}, {"eval": {"against": "a/b"}}),
    (
        {"bench": {"llama_bench": "x", "ik_llama_bench": "none"}},
        {"bench": {"llama_bench": "F/x", "ik_llama_bench": "none"}},
    ),
    ({"bench": {"llama_bench": None}}, {"bench": {"llama_bench": None}}),
    ({"model": "", "unknown": "x", "eval": {"task_data": 3}}, {"model": "", "unknown": "x", "eval": {"task_data": 3}}),
]


@pytest.mark.parametrize(("values", "anchored"), PATHS)
def test_the_schema_says_which_texts_are_paths(
    values: dict[str, Any], anchored: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    expected = json.loads(json.dumps(anchored).replace("F/", f"{tmp_path}/"))
    assert recipes.anchor(values, tmp_path) == expected
    assert recipes.anchor(expected, tmp_path / "there") == expected


def test_programs_and_code_of_strangers_are_named() -> None:
    assert recipes.foreign_code(Recipe()) == []
    bench = {"llama_bench": "none", "ik_llama_bench": "/bin/ik"}
    code = recipes.foreign_code(build({"trust_remote_code": True, "bench": bench}))
    assert code == ["the program /bin/ik", "the Python code that comes with its models"]


def test_a_source_is_a_file_or_a_data_set() -> None:
    for source in ({}, {"file": "a", "dataset": "b"}):
        with pytest.raises(UserError, match="give either `file` or `dataset`"):
            build({"data": {"train": [source]}}, "The recipe")


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, [2, 2, 2, 2, 2]),
        ({"schedule": "linear"}, [2, 1.5, 1, 0.5, 0]),
        ({"schedule": "linear", "start_factor": 0.0, "end_factor": 1.0}, [0, 0.5, 1, 1.5, 2]),
        ({"schedule": "linear", "end_factor": 0.5, "schedule_share": 0.5}, [2, 1.5, 1, 1, 1]),
        ({"schedule": "cosine"}, [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
        ({"schedule": "cosine", "start_factor": 0.0, "end_factor": 3.0, "schedule_share": 0.25}, [0, 6, 6, 6, 6]),
    ],
)
def test_the_weight_of_a_loss_is_a_function_of_the_share_of_the_budget(
    fields: dict[str, Any], weights: list[float]
) -> None:
    term = LossTerm(name="ce", weight=2.0, **fields)
    assert [term.weight_at(quarter / 4) for quarter in range(5)] == pytest.approx(weights, abs=1e-12)


def test_further_teachers_are_folders_beside_the_recipe_or_ids(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    values = recipes.anchor({"distill": {"teachers": ["big", "someone/bigger"], "steps": 3}}, tmp_path)
    assert values["distill"] == {"teachers": [str(tmp_path / "big"), "someone/bigger"], "steps": 3}


def test_gptq_reads_more_text_than_statistics_do_where_nobody_says_how_much() -> None:
    def sequences(**settings: Any) -> int:
        return recipes.build({"calibrate": settings}).calibrate.init_sequences(256)

    assert sequences() == sequences(init="clip") == 16
    assert sequences(init="gptq") == 64
    assert sequences(init="gptq", sequences=16) == 16
    assert recipes.build({"calibrate": {"init": "gptq"}}).calibrate.init_sequences(2048) == 16

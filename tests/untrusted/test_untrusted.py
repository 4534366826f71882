"""Documents of strangers: bounded, of the wanted type, and never a reason to run their code."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import edgerazor
from edgerazor import models, recipe, untrusted
from edgerazor.benchmark import engines
from edgerazor.errors import FAILED, USAGE, UserError
from edgerazor.untrusted import weights
from edgerazor.untrusted.documents import MOST_ENTRIES
from edgerazor.workdir import WorkDir
from helpers.packed_folders import all_of, write_packed
from helpers.tiny_job import Run

# --- JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('"\xff"'.encode("latin-1"), "not UTF-8 text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested deeper than 64 levels"),
        (f'{{"a": {"9" * 41}}}', "a number of 41 digits"),
        (f'{{"a": {"9" * 5000}}}', "a number of 5,000 digits"),
        ("[" + "1," * MOST_ENTRIES + "1]", "more than 1,048,576 entries"),
        ("[]", "it holds a list, not an object"),
        ("null", "it holds null, not an object"),
        ("1", "it holds a number, not an object"),
        ('"x"', "it holds a text, not an object"),
        ('{"a": ["\\ud800"]}', "half of a surrogate pair"),
        ('{"\\uDC00": 1}', "half of a surrogate pair"),
    ],
)
def test_json_that_is_refused(text: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        untrusted.parse_json(text, dict)
    path = tmp_path / "any.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"any.json cannot be read: .*{reason}"):
        untrusted.read_json(path)


def test_json_that_is_read(tmp_path: Path) -> None:
    """As deep, as many, as long as allowed; commas in texts are no entries; real configurations have Infinity."""
    deepest = '{"a":' * 64 + "1" + "}" * 64
    assert json.loads(deepest) == untrusted.parse_json(deepest, dict)
    assert untrusted.parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    commas = json.dumps([',[{"\\' * MOST_ENTRIES])
    assert untrusted.parse_json(commas, list) == json.loads(commas)
    assert untrusted.parse_json(f'[{"9" * 40}, Infinity, {{"a": 1, "a": 2}}]') == [
        int("9" * 40),
        float("inf"),
        {"a": 2},
    ]
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, null, true, "é"]}', encoding="utf-8")
    assert untrusted.read_json(path) == {"a": [1, 2.5, None, True, "é"]}


def test_unambiguous_json() -> None:
    for text, reason in (
        ('{"a": 1, "b": 1, "b": 2}', "it has 'b' twice"),
        ("[Infinity]", "Infinity"),
        ("[1e999]", "1e999"),
    ):
        with pytest.raises(ValueError, match=reason):
            untrusted.parse_json(text, unambiguous=True)


def test_what_is_no_file(tmp_path: Path) -> None:
    """Nobody waits for a pipe, nor reads a device to its end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b" " * 101)
    for name, reason in (("pipe", "it is no file"), ("folder", "it is no file"), ("none", "No such file")):
        with pytest.raises(UserError, match=f"{name} cannot be read: {reason}"):
            untrusted.read_json(tmp_path / name)
    with pytest.raises(UserError, match="zero cannot be read: it is no file"):
        untrusted.read_json(Path("/dev/zero"))
    with pytest.raises(UserError, match="larger than 100 bytes"):
        untrusted.read_json(tmp_path / "large", most_bytes=100)


# --- YAML --------------------------------------------------------------------------------------

LAUGHS = "a: &a0 [x]\n" + "".join(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
RECIPES: dict[str, tuple[str, str]] = {
    "aliases": (LAUGHS, "more than 16,384 values"),
    "merged aliases": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)),
        "more than 16,384 values",
    ),
    "alias to itself": ("a: &a [*a]\n", "repeats itself"),
    "alias to what holds it": ("a: &a {b: {c: *a}}\n", "repeats itself"),
    "chain of aliases": (
        "a: &a0 [x]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
        "nested deeper",
    ),
    "levels": ("a: " + "[" * 5000 + "]" * 5000, "nested deeper than 32 levels"),
    "levels of lines": ("- " * 200, "nested deeper than 32 levels"),
    "int": ("seed: !!int abc", "'abc' is no int"),
    "empty int": ("seed: !!int ''", "'' is no int"),
    "bool": ("trust_remote_code: !!bool perhaps", "'perhaps' is no bool"),
    "float": ("seed: !!float x", "'x' is no float"),
    "timestamp": ("model: !!timestamp x", "the tag tag:yaml.org,2002:timestamp is not understood"),
    "binary": ("model: !!binary x", "is not understood"),
    "python": ("model: !!python/object/apply:os.system ['true']", "is not understood"),
    "own tag": ("model: !secret x", "is not understood"),
    "digits": (f"seed: {'9' * 5000}", "a number of 5,000 characters"),
    "sexagesimal": (f"seed: 1{':59' * 5000}", "a number of 15,001 characters"),
    "zero byte": ('model: "a\\0b"', "a zero byte"),
    "surrogate": ('model: "\\ud800"', "half of a surrogate pair"),
    "large": ("#" * (1 << 20) + "\n\n", "larger than 1,048,576 bytes"),
    "twice": ("seed: 1\nseed: 2", "`seed` is given twice"),
    "home of nobody": ("model: ~nobody-of-that-name/x", "home folder of nobody"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_are_refused(name: str, tmp_path: Path, run: Run) -> None:
    """Each a sentence with exit code 2, also as the recipe of a working directory."""
    text, reason = RECIPES[name]
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=reason) as wrong:
        recipe.load(path)
    assert wrong.value.code == USAGE
    assert len(wrong.value.message) < 500 + len(str(path))
    work = WorkDir(tmp_path / "work")
    work.recipe_file.parent.mkdir()
    shutil.copy(path, work.recipe_file)
    outcome = run("eval", "--work", tmp_path / "work")
    assert outcome.code == USAGE, outcome.err
    assert "Traceback" not in outcome.err


def test_dates_are_text(tmp_path: Path) -> None:
    """A branch may be called like one; there is nothing in a recipe that is a date."""
    path = tmp_path / "r.yaml"
    path.write_text("revision: 2001-99-99\nseed: 3\ndistill: {learning_rate: 2e-5}\ncompare: &a {b: /c}\n")
    loaded = recipe.load(path)
    assert loaded["revision"] == "2001-99-99"
    assert loaded["distill"]["learning_rate"] == 2e-5
    path.write_text("a: &a [1, 2]\nb: *a\nc: {<<: {d: *a}}\n")
    assert untrusted.parse_yaml(path.read_text()) == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_what_a_recipe_runs_is_said_before(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: ./nowhere\ntrust_remote_code: true\nbench: {llama_bench: /x/llama-bench}\n")
    said = "runs the program /x/llama-bench, and the Python code that comes with its models."
    assert said in run("distill", "--recipe", path, "--work", tmp_path / "work").err
    path.write_text("model: ./nowhere\nbench: {llama_bench: none}\n")
    assert " runs " not in run("distill", "--recipe", path, "--work", tmp_path / "work").err


# --- configurations ----------------------------------------------------------------------------

LIES: dict[str, Any] = {
    "num_hidden_layers": [30_000, 10**9, 10**30, "many", 500, 1e300],
    "vocab_size": [10**12, 1 << 23, float("nan")],
    "hidden_size": [10**12, 1 << 23, "wide"],
    "intermediate_size": [10**12],
    "head_dim": [10**12, 1 << 20],
    "num_experts": [10**9],
    "num_attention_heads": [10**9],
    "max_position_embeddings": [10**12, float("inf")],
    "num_labels": [10**9],
    "architectures": [[1], 5, "Llama", {"a": 1}],
    "model_type": [5, ["llama"]],
    "eos_token_id": [[[1]], {"a": 1}, 1.5],
    "rope_parameters": [[1], "linear"],
    "text_config": [{"num_hidden_layers": 10**9}, [1], {"vocab_size": 10**12}],
    "layer_types": [[1, 2], "full_attention"],
    "sliding_window": [10**39],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in LIES.items() for value in values])
def test_a_configuration_that_lies(field: str, value: Any, llama: Path, tmp_path: Path) -> None:
    """Refused by what it says alone, before transformers builds anything of it."""
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json says") as wrong:
        models.load(folder)
    assert wrong.value.message.isprintable()
    assert len(wrong.value.message) < 300 + len(str(folder))


def test_configurations_of_large_models_are_read(tmp_path: Path) -> None:
    """Numbers of the largest published ones, and Infinity where some have it."""
    values = {
        "architectures": ["X"],
        "num_hidden_layers": 126,
        "vocab_size": 262_144,
        "n_routed_experts": 384,
        "max_position_embeddings": 10_485_760,
        "intermediate_size": 53_248,
        "time_step_limit": [0.0, float("inf")],
        "eos_token_id": [1, 106],
        "rope_scaling": None,
        "text_config": {"num_hidden_layers": 62},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert untrusted.read_configuration(tmp_path) == values


def test_shapes_bound_a_configuration() -> None:
    shapes = [(300, 96), (96,), (101, 96)]
    path = Path("config.json")
    untrusted.check_shapes(path, {"num_hidden_layers": 3, "vocab_size": 300, "hidden_size": 96}, shapes)
    untrusted.check_shapes(path, {"num_hidden_layers": 4}, [])  # random weights: there are no files
    for values in ({"num_hidden_layers": 4}, {"vocab_size": 301}, {"text_config": {"num_hidden_layers": 4}}):
        with pytest.raises(UserError, match="the weights are not those of such a model"):
            untrusted.check_shapes(path, values, shapes)


# --- code --------------------------------------------------------------------------------------

PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown type": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "x.C"}}),
    "known type": ("config.json", {"auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.C"}}),
    "in a part": ("config.json", {"text_config": {"auto_map": {"AutoConfig": "x.C"}}}),
    "kernel": ("config.json", {"attn_implementation": "somebody/attention"}),
    "kernel, nested": ("config.json", {"_attn_implementation_internal": {"text_config": "somebody/attention"}}),
    "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["x.C", None]}}),
    "generation": ("generation_config.json", {"custom_generate": "somebody/generate"}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "x.C"}}),
}


@pytest.fixture(scope="module")
def packed_folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("untrusted") / "packed", llama, all_of("int4")).folder


def with_code(folder: Path, place: str) -> tuple[Path, Path]:
    """Add code that leaves a marker, and name it; the folder and the marker."""
    name, fields = PLACES[place]
    marker = folder.parent / "marker"
    (folder / "x.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass C(LlamaConfig): pass\n"
    )
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "x.py", folder / "custom_generate" / "generate.py")
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | fields))
    return folder, marker


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told to go on."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something was asked"))


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_packed_folder(place: str, packed_folder: Path, tmp_path: Path, run: Run) -> None:
    """Nothing runs it, offers it, or goes on without it."""
    from transformers import AutoModelForCausalLM

    folder, marker = with_code(shutil.copytree(packed_folder, tmp_path / "packed"), place)
    text = tmp_path / "text.txt"
    text.write_text("Nora took the ball.\n" * 50)
    for command in (
        ("generate", "Nora", "--model", folder),
        ("eval", folder, "--data", text),
        ("show", folder),
        ("pack", folder, "--export", "hf", "--work", tmp_path / "work"),
        ("pack", folder, "--compress", "--work", tmp_path / "work"),
    ):
        outcome = run(*command)
        assert outcome.code in (FAILED, USAGE), (command, outcome.out, outcome.err)
        assert "Python code of its own" in outcome.err, (command, outcome.err)
        assert outcome.out == ""
    with pytest.raises(UserError, match="Python code of its own"):
        edgerazor.load(folder)
    if place not in ("unknown type", "in a part"):  # where transformers ends before our quantizer is reached
        with pytest.raises((UserError, ImportError), match=r"Python code of its own|kernels"):
            AutoModelForCausalLM.from_pretrained(folder)
    assert not marker.exists()


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_teacher(place: str, llama: Path, tmp_path: Path, run: Run) -> None:
    folder, marker = with_code(shutil.copytree(llama, tmp_path / "model"), place)
    for command in (
        ("calibrate", folder, "--work", tmp_path / "work"),
        ("distill", folder, "--work", tmp_path / "work"),
        ("pack", folder, "--bits", "4", "--work", tmp_path / "work"),
    ):
        outcome = run(*command)
        assert outcome.code in (FAILED, USAGE)
        assert "Python code of its own" in outcome.err
        assert "--trust-remote-code" in outcome.err
    assert not marker.exists()


def test_no_code_is_named_by_what_is_packed(llama: Path, tmp_path: Path) -> None:
    folder, _ = with_code(shutil.copytree(llama, tmp_path / "model"), "tokenizer")
    (tmp_path / "copy").mkdir()
    models.copy_companions(folder, tmp_path / "copy")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["auto_map"]
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()) == values
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    nested = {"a": [{"auto_map": {"x": "y"}, "b": 1}], "attn_implementation": "sdpa"}
    assert untrusted.without_code(nested) == {"a": [{"b": 1}], "attn_implementation": "sdpa"}


def test_only_one_place_asks_transformers() -> None:
    """Whatever opens a folder by transformers is in one file, where each call says whether code may run."""
    root = Path(edgerazor.__file__).parent
    calls = ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_pretrained(")
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for call in calls:
            for piece in text.split(call)[1:]:
                written = ("(...)", "...)", "folder)`", "`", '("FOLDER")', '"FOLDER")')  # in comments and in cards
                if piece.startswith(written) or path == root / "__init__.py":
                    continue
                assert "trust_remote_code=" in piece[:300], (path, call)


def test_json_and_yaml_are_read_in_one_place() -> None:
    root = Path(edgerazor.__file__).parent
    for path in root.rglob("*.py"):
        if path.parent.name == "untrusted" or path.name == "description.py":  # which parses it here before
            continue
        text = path.read_text(encoding="utf-8")
        for call in ("json.load(", "yaml.load(", "yaml.safe_load(", "model_validate_json("):
            assert call not in text, f"{path} reads what edgerazor.untrusted should"


# --- our own job -------------------------------------------------------------------------------

DAMAGES: dict[str, str] = {
    "nested": "[" * 100_000,
    "number": "5",
    "list": "[1]",
    "text": '"x"',
    "empty": "",
    "object": "{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_not_a_finished_stage(damage: str, tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "work")
    path = work.manifest_file("pack")
    path.parent.mkdir(parents=True)
    path.write_text(DAMAGES[damage])
    assert work.manifest("pack") is None
    assert work.has_damaged_manifest("pack")
    path.unlink()
    path.mkdir()
    assert work.manifest("pack") is None


@pytest.mark.parametrize(
    "text",
    [*DAMAGES.values(), '{"progress": {}, "inputs": [1], "random": {}}', '{"progress": 1, "inputs": {}, "random": {}}'],
)
def test_a_damaged_checkpoint(text: str, tmp_path: Path) -> None:
    from edgerazor.training import checkpoint

    (tmp_path / "state.json").write_text(text)
    for read in (checkpoint.stored_inputs, checkpoint.stored_progress):
        with pytest.raises(UserError, match="is damaged and cannot be resumed") as wrong:
            read(tmp_path)
        assert "distill --force" in wrong.value.hint


def test_an_index_of_mixed_types(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / weights.WEIGHTS).rename(folder / "model-1.safetensors")  # a single file would be read without its index
    for text in (
        '{"weight_map": {"a": 1, "b": "x", "c": null}}',
        '{"weight_map": {"a": ["x"]}}',
        "[" * 100_000,
        "{}",
        "5",
    ):
        (folder / weights.INDEX).write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            models.load(folder)


def test_a_version_that_is_no_whole_number(packed_folder: Path, tmp_path: Path) -> None:
    import hashlib

    from edgerazor.packed import PackedModel

    folder = shutil.copytree(packed_folder, tmp_path / "packed")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for version in ("1.0", "true", '"1"', "[1]"):
        entries = json.loads(content[8 : 8 + length])
        text = entries["__metadata__"]["edgerazor"].replace('"version":1', f'"version":{version}')
        entries["__metadata__"] |= {"edgerazor": text, "edgerazor_sha256": hashlib.sha256(text.encode()).hexdigest()}
        new = json.dumps(entries).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])
        with pytest.raises(UserError, match=r"version is .*no whole number"):
            PackedModel.open(folder)


@pytest.mark.parametrize("ends", [[[1]], "1", {"a": 1}, [1.5]])
def test_settings_of_generation_are_checked_when_a_model_is_loaded(llama: Path, tmp_path: Path, ends: Any) -> None:
    """Tokens that end a text are what `data` and own text go by."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UserError, match=r"generation_config\.json says eos_token_id .*; expected a token"):
        models.load(folder)


def test_bench_runs_no_code_of_a_model(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "x", "auto_map": {"AutoConfig": "x.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="code"):
        engines.UnpackedModel(folder, 1)
    assert not (tmp_path / "ran").exists()

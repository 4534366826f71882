"""The command line: options, help, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from edgerazor import pipeline, workdir
from edgerazor import recipe as recipes
from edgerazor.calibration import measurement
from edgerazor.cli import dispatch, folders, options, options_page
from edgerazor.cli.app import app
from edgerazor.cli.options import OPTIONS, Option
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.recipe import Distill
from edgerazor.stages import eval as evaluation
from helpers.tiny_job import Run, write_recipe

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
STAGES = ("calibrate", "distill", "pack", "eval", "bench")


def parameters(name: str) -> dict[str, Any]:
    """Long name -> parameter of click, for the options of a command."""
    long = {text: parameter for parameter in COMMANDS[name].params for text in parameter.opts if text.startswith("--")}
    return {text: parameter for text, parameter in long.items() if text != "--help"}


# --- options -----------------------------------------------------------------------------------

#: field of the recipe -> words behind its option, and its value then.
WORDS: dict[str, tuple[list[str], Any]] = {
    "calibrate.bits": (["3"], 3.0),
    "calibrate.real_bits": (["2.5"], 2.5),
    "calibrate.target_size": (["0.2GB"], 200_000_000),
    "data.train": (["/a.txt", "--data", "/b.txt"], [{"file": "/a.txt"}, {"file": "/b.txt"}]),
    "data.held_out": (["/c.txt"], [{"file": "/c.txt"}]),
    "data.sequence_length": (["77"], 77),
    "calibrate.sequences": (["5"], 5),
    "calibrate.group_size": (["64"], 64),
    "calibrate.formats": (["int2, int4"], ["int2", "int4"]),
    "calibrate.plan": (["variance"], "variance"),
    "calibrate.rotation": (["hadamard"], "hadamard"),
    "calibrate.granularity": (["tensor"], "tensor"),
    "calibrate.sensitivity": (["fisher"], "fisher"),
    "calibrate.kv_bits": (["16"], 16),
    "calibrate.activation_bits": (["16"], 16),
    "calibrate.init": (["gptq"], "gptq"),
    "revision": (["main"], "main"),
    "trust_remote_code": ([], True),
    "seed": (["7"], 7),
    "device": (["cuda:1"], "cuda:1"),
    "threads": (["3"], 3),
    "distill.steps": (["12"], 12),
    "distill.tokens": (["1000"], 1000),
    "distill.max_time": (["60"], 60.0),
    "distill.batch_size": (["3"], 3),
    "distill.accumulation": (["4"], 4),
    "distill.learning_rate": (["1e-4"], 1e-4),
    "distill.checkpoint_every": (["9"], 9),
    "distill.memory": (["16GB"], 16_000_000_000),
    "distill.optimizer": (["adafactor"], "adafactor"),
    "distill.track": (["wandb"], "wandb"),
    "distill.train": (["scales"], "scales"),
    "distill.recording": (["/recording"], "/recording"),
    "distill.teacher": (["/larger"], "/larger"),
    "distill.teacher_source": (["streamed"], "streamed"),
    "record.method": (["top_k"], "top_k"),
    "record.draws": (["12"], 12),
    "record.hidden_layers": (["3,1"], [1, 3]),
    "record.tokens": (["300k"], 300_000),
    "record.batch_size": (["2"], 2),
    "distill.reconstruct.steps": (["9"], 9),
    "pack.student": (["last"], "last"),
    "pack.compress": ([], True),
    "pack.export": (["gguf, gguf-f16"], ["gguf", "gguf-f16"]),
    "pack.allow_lossy": ([], True),
    "eval.tasks": (["arc, hellaswag"], ["arc", "hellaswag"]),
    "eval.task_data": (["/tasks"], "/tasks"),
    "eval.pictures": (["/a.jsonl", "--pictures", "/b"], ["/a.jsonl", "/b"]),
    "eval.blind": ([], True),
    "eval.limit": (["10"], 10),
    "eval.num_fewshot": (["0"], 0),
    "eval.apply_chat_template": ([], True),
    "eval.batch_size": (["3"], 3),
    "eval.against": (["some/teacher"], "some/teacher"),
    "eval.activation_bits": (["8"], 8),
    "eval.kv_bits": (["8"], 8),
    "eval.min_retention": (["0.9"], 0.9),
    "compare": (["a=/x", "--compare", "b=/y"], {"a": "/x", "b": "/y"}),
    "bench.prefill_tokens": (["64"], 64),
    "bench.decode_tokens": (["16"], 16),
    "bench.contexts": (["0,128"], [0, 128]),
    "bench.rounds": (["5"], 5),
    "bench.threads": (["2,1", "--threads", "4"], [1, 2, 4]),
    "bench.mmap": ([], True),
    "bench.llama_bench": (["/bin/llama-bench"], "/bin/llama-bench"),
    "bench.ik_llama_bench": (["/bin/ik"], "/bin/ik"),
    "generate.max_tokens": (["3"], 3),
    "generate.temperature": (["0.5"], 0.5),
    "generate.top_k": (["7"], 7),
    "generate.top_p": (["0.9"], 0.9),
    "generate.min_p": (["0.1"], 0.1),
    "generate.repetition_penalty": (["1.1"], 1.1),
    "generate.presence_penalty": (["0.5"], 0.5),
    "generate.frequency_penalty": (["0.5"], 0.5),
    "serve.host": (["127.0.0.2"], "127.0.0.2"),
    "serve.port": (["0"], 0),
    "serve.name": (["tiny"], "tiny"),
    "serve.context": (["64"], 64),
    "serve.max_sequences": (["3"], 3),
    "serve.max_queue": (["5"], 5),
    "serve.prefill_tokens": (["32"], 32),
    "serve.kv_tokens": (["4096"], 4096),
    "serve.max_tokens_per_request": (["100"], 100),
    "serve.max_body_bytes": (["5000"], 5000),
    "serve.request_seconds": (["9"], 9.0),
    "serve.drain_seconds": (["2"], 2.0),
    "serve.cors_origins": (
        ["https://a.example", "--cors-origins", "https://b.example"],
        ["https://a.example", "https://b.example"],
    ),
    "generate.stop": (["a", "--stop", "b"], ["a", "b"]),
    "generate.chat": ([], True),
    "generate.system": (["Be brief."], "Be brief."),
    "sampling.temperature": (["0.5"], 0.5),
    "sampling.top_p": (["0.9"], 0.9),
    "sampling.top_k": (["7"], 7),
    "sampling.answer_tokens": (["8"], 8),
    "sampling.prompt_tokens": (["4"], 4),
    "sampling.batch_size": (["2"], 2),
    "sampling.thinking": ([], True),
}
#: Fields whose value is refused unless another is given.
NEEDS = {
    "generate.system": ["--chat"],
    **{f"generate.{name}": ["--temperature", "0.7"] for name in ("top_k", "top_p", "min_p")},
}
#: Fields of `eval MODEL`.
ALONE = {f"{section}.{name}" for section, name in folders.ALONE}
#: (command, option) of fields that are not called like their option.
OTHER_NAMES = {
    ("calibrate", "--data"): "data.train",
    ("distill", "--data"): "data.train",
    ("record", "--data"): "data.train",
    ("eval", "--data"): "data.held_out",
    ("distill", "--reconstruct"): "distill.reconstruct.steps",
}
#: Options that say how to run rather than what to make.
MANNERS = {"--work", "--recipe", "--json", "--quiet", "--force", "--dry-run"}
OPTIONS_OF_FIELDS = [
    (name, option)
    for name in COMMANDS
    for option in options.options_of(name)
    if option.field and not option.is_argument
]


def test_there_are_words_for_every_option() -> None:
    assert {option.field for _, option in OPTIONS_OF_FIELDS} == set(WORDS)
    assert {name for option in OPTIONS for name in option.commands.split()} == set(COMMANDS)
    for name in COMMANDS:
        assert list(parameters(name)) == [row.long for row in options.options_of(name) if not row.is_argument]


def test_an_option_is_called_like_its_field() -> None:
    for name, option in OPTIONS_OF_FIELDS:
        if (name, option.long) in OTHER_NAMES:
            assert option.field == OTHER_NAMES[name, option.long]
        else:
            assert option.name == option.field.split(".")[-1]
        if (name, option.long) != ("eval", "--data"):
            assert recipes.option_at(tuple(option.field.split("."))) == option.long


def test_an_option_sets_a_field_that_there_is() -> None:
    explained = recipes.explain(options.flags_by_field())
    schema = recipes.json_schema(options.flags_by_field())
    for field, flag in options.flags_by_field().items():
        *parents, name = field.split(".")
        section = recipes.section_at(tuple(parents))
        assert name in section.model_fields
        properties = (schema if section is recipes.Recipe else schema["$defs"][section.__name__])["properties"]
        assert properties[name]["description"].endswith(f"[{flag}]")
    assert explained.count("[--") == len(options.flags_by_field())
    assert options.DEFAULT_WORK == workdir.DEFAULT


def test_the_page_of_options_is_up_to_date() -> None:
    """`make options` writes it again."""
    page = Path(options.__file__).with_name("OPTIONS.md")
    assert page.read_text(encoding="utf-8") == options_page.render()


@pytest.mark.parametrize(("name", "option"), OPTIONS_OF_FIELDS, ids=lambda case: getattr(case, "long", case))
def test_every_option_sets_its_field(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, option: Option
) -> None:
    words, value = WORDS[option.field]
    built: list[recipes.Recipe] = []

    class BuiltError(Exception):
        """The recipe is there; nothing of the stage has been run."""

    def assemble(*parts: Any) -> None:
        built.append(assemble_recipe(*parts))
        raise BuiltError

    assemble_recipe = dispatch.assemble
    monkeypatch.setattr(dispatch, "assemble", assemble)
    monkeypatch.setattr(folders, "assemble", assemble)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"model": "some/model", "threads": 9, "seed": 9}))
    command = {
        "eval": ["eval", *(["some/model"] if option.field in ALONE else [])],
        "data": ["data", "some/model", "--out", tmp_path / "x"],
        "run": ["run", recipe],
    }.get(name, [name])
    beside = [] if name == "run" else ["--recipe", recipe]
    with pytest.raises(BuiltError):
        run(*command, *beside, option.long, *words, *NEEDS.get(option.field, []))
    setting: Any = built[0].model_dump(mode="json", exclude_defaults=option.field.startswith("data."))
    for part in option.field.split("."):
        setting = setting[part]
    assert setting == value
    changed = built[0].model_dump(exclude_defaults=True)
    assert set(changed) <= {"model", "threads", "seed", option.field.split(".")[0]}


def test_options_of_a_model_measured_alone(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, recipes.Recipe]] = []
    monkeypatch.setattr(evaluation, "evaluate_model", lambda model, recipe, _: calls.append((model, recipe)))
    monkeypatch.setattr(evaluation, "show", lambda _: [])
    words = ["--against", "t", "--activation-bits", "8", "--kv-bits", "8", "--group-size", "64"]
    run("eval", "m", *words)
    model, recipe = calls[0]
    assert (model, recipe.eval.against, recipe.calibrate.group_size) == ("m", "t", 64)
    assert (recipe.eval.activation_bits, recipe.eval.kv_bits) == (8, 8)
    for option, value in zip(words[::2], words[1::2], strict=True):
        refused = run("eval", option, value, "--work", tmp_path / "job")
        assert refused.code == 2
        assert f"{option} is for a model that is measured alone" in refused.err


def test_every_stage_has_the_options_that_all_have() -> None:
    for name in STAGES:
        assert set(parameters(name)) >= MANNERS


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_in_80_columns_and_explains_everything(name: str) -> None:
    shown = CliRunner().invoke(app, [*([name] if name else []), "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= 80
    if not name:
        assert all(command in shown.output for command in COMMANDS)
        return
    assert "Example: edgerazor" in shown.output
    for option, parameter in parameters(name).items():
        assert parameter.help, option
        assert option in shown.output


def test_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys, edgerazor.cli\nassert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_show_recipe_prints_a_recipe_that_loads_back(run: Run) -> None:
    shown = run("show", "recipe")
    assert shown.code == 0
    assert recipes.build(yaml.safe_load(shown.out)) == recipes.Recipe()
    assert "show RESULT" not in shown.out


# --- wrong commands -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["distill", "--stpes", "3"], 2, "No such option"),
        (["distil"], 2, "No such command"),
        (["distill", "--bits", "two"], 2, "Invalid value for '--bits'"),
        (["distill", "M", "--bits", "9"], 2, "--bits is 9.0; expected a number from 1.58 to 8."),
        (["distill", "M", "--steps", "0"], 2, "--steps is 0; expected a whole number of at least 1."),
        (["calibrate", "M", "--kv-bits", "5"], 2, "--kv-bits is 5; expected 4, 8 or 16."),
        (
            ["calibrate", "M", "--plan", "magic"],
            2,
            "--plan is 'magic'; expected sensitivity, interleave, variance or first.",
        ),
        (["calibrate", "M", "--real-bits", "0"], 2, "--real-bits is 0.0; expected a number above 0 and of at most 32."),
        (["distill", "M", "--target-size", "big"], 2, "--target-size: expected a size like 200MB"),
        (["pack", "M", "--bits", "2", "--target-size", "9MB"], 2, "`bits` and `target_size` both say how large"),
        (["pack", "--target-size", "9MB"], 2, "so pack takes no --target-size."),
        (["bench", "--contexts", "1,x"], 2, "--contexts wants comma-separated whole numbers, and got '1,x'."),
        (["bench", "--threads", "0,1"], 2, "--threads: each of 0, 1 must be at least 1."),
        (["bench", "--contexts", "0,-1"], 2, "--contexts: each of 0, -1 must be at least 0."),
        (["bench", "--compare", "x"], 2, "--compare wants NAME=FOLDER, and got 'x'."),
        (["pack", "--group-size", "64"], 2, "so pack takes no --group-size."),
        (["distill"], 2, "no model was named"),
        (["pack"], 2, "is not a working directory of edgerazor yet"),
        (["eval"], 2, "is not a working directory of edgerazor yet"),
        (["distill", "./nowhere"], 2, "There is no folder ./nowhere."),
        (["distill", "LLAMA", "--data", "nowhere.txt"], 2, "nowhere.txt"),
        (["distill", "LLAMA", "--data", "empty.txt"], 1, "empty.txt"),
        (["distill", "LLAMA", "--device", "tpu"], 2, "device"),
        (["distill", "--recipe", "nowhere.yaml"], 2, "The recipe nowhere.yaml cannot be read"),
        (
            ["pack", "LLAMA", "--bits", "4.5", "--plan", "interleave", "--formats", "int2,int4"],
            2,
            "mixing int2 and int4 gives 2 to 4 bits",
        ),
        (["pack", "LLAMA", "--bits", "4.5", "--formats", "int2,int4"], 2, "but int2, int4 give 2 to 4 bits"),
        (["distill", "LLAMA", "--formats", "int2,int44"], 2, "There is no format called 'int44'."),
        (["pack", "LLAMA", "--group-size", "all"], 2, "--group-size: expected a whole number, or `row`"),
        (["run", "empty.yaml"], 2, "The recipe empty.yaml is empty."),
        (["run", "garbage.yaml"], 2, "is not valid YAML (line 1)"),
        (["run", "unknown.yaml"], 2, "has an unknown field `distill.stesp`."),
        (["run", "types.yaml"], 2, "The recipe types.yaml: `distill.steps` is 'many'; expected a whole number."),
        (["run", "nomodel.yaml"], 2, "The recipe nomodel.yaml names no model."),
        (["show", "nowhere"], 2, "is neither a working directory of edgerazor nor a packed model"),
        (["eval", "LLAMA", "--dry-run"], 2, "has no dry run"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    run: Run, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "empty.txt": "",
        "empty.yaml": "",
        "garbage.yaml": "a: [",
        "unknown.yaml": "model: x\ndistill: {stesp: 3}",
        "types.yaml": "model: x\ndistill: {steps: many}",
        "nomodel.yaml": "seed: 3",
    }.items():
        (tmp_path / name).write_text(text)
    before = sorted(path.name for path in tmp_path.iterdir())
    outcome = run(*[str(llama) if word == "LLAMA" else word for word in words])
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert sentence in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    if code == 2:
        assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing was written


def test_an_unknown_field_has_a_hint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: x\ndistill: {stesp: 3}")
    assert "Did you mean steps?" in run("run", tmp_path / "r.yaml").err


def test_a_damaged_stored_recipe_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: x")
    outcome = run("pack", "--work", tmp_path)
    assert outcome.code == 2
    assert f"The recipe {tmp_path / 'recipe.yaml'}: `seed` is 'x'; expected a whole number." in outcome.err


# --- on the way --------------------------------------------------------------------------------


def test_json_is_one_object_and_progress_goes_to_stderr(run: Run, tmp_path: Path, llama: Path, text_file: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    job = tmp_path / "job"
    first = run("calibrate", "--recipe", recipe, "--work", job, "--json")
    assert first.json()["notation"] == "W1.89-A8-KV8"
    assert "calibrate: 2/2" in first.err  # layers of batches
    second = run("calibrate", "--work", job, "--json")
    assert second.json() == first.json()
    assert json.loads((job / "calibrate" / "result.json").read_text()) == first.json()
    quiet = run("calibrate", "--work", job, "--force", "--quiet")
    assert quiet.err == ""
    assert "Plan W1.89" in quiet.out
    for outcome in (first, second, quiet):
        assert "\x1b" not in outcome.out + outcome.err  # no colours where nobody looks


@pytest.mark.parametrize("name", STAGES)
def test_ctrl_c_is_130_in_every_stage(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe, job = write_recipe(tmp_path / "r.yaml", llama, text_file, distill={"steps": 1}), tmp_path / "job"
    if name in ("pack", "eval", "bench"):
        assert run("distill", "--recipe", recipe, "--work", job).code == 0

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.STAGES[name], "run", interrupted)
    outcome = run(name, "--recipe", recipe, "--work", job)
    assert outcome.code == 130
    assert "Interrupted; finished stages and the last checkpoint are kept." in outcome.err
    monkeypatch.undo()
    assert not (job / pipeline.WorkDir(job).manifest_file(name)).exists()


def failing(run: Run, tmp_path: Path, llama: Path, text_file: Path, error: BaseException) -> Any:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "observe", fail)
        return run("calibrate", "--recipe", recipe, "--work", tmp_path / "job")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full; nothing finished was lost."),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied."),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y: Read-only file system."),
        (MemoryError(), "There is not enough memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "There is not enough memory."),
    ],
)
def test_failures_of_the_machine_are_sentences(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, error: BaseException, sentence: str
) -> None:
    outcome = failing(run, tmp_path, llama, text_file, error)
    assert outcome.code == 1
    assert sentence in outcome.err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), FileNotFoundError(2, "a bug", "x")])
def test_a_bug_is_a_traceback(run: Run, tmp_path: Path, llama: Path, text_file: Path, error: BaseException) -> None:
    with pytest.raises(type(error), match="a bug"):
        failing(run, tmp_path, llama, text_file, error)


def test_a_folder_that_may_not_be_written_to(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)

    def mkdir(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    outcome = run("calibrate", "--recipe", recipe, "--work", tmp_path / "job")
    assert outcome.code == 1
    assert f"The folder {tmp_path / 'job'} cannot be made: Permission denied." in outcome.err
    assert "--work" in outcome.err


def test_a_quality_gate_is_3(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: x")
    result = EvalResult(failures=["Too bad."])
    monkeypatch.setattr(pipeline, "run", lambda *_: result)
    outcome = run("eval", "--recipe", tmp_path / "r.yaml", "--json")
    assert (outcome.code, outcome.json()["failures"]) == (3, ["Too bad."])
    assert "Error: Too bad." in outcome.err


def test_only_the_main_process_talks(
    run: Run, tmp_path: Path, llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", llama, text_file)
    monkeypatch.setenv("RANK", "1")
    for name in ("calibrate", "pack", "eval", "bench"):
        outcome = run(name, "--recipe", recipe, "--work", tmp_path / "job")
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert not (tmp_path / "job").exists()


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("edgerazor 0.")


def test_of_several_layers_the_last_wins(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of several layers the last wins: defaults, the recipe, the command line."""
    built: list[Any] = []
    monkeypatch.setattr(pipeline, "run", lambda name, recipe, *_: built.append(recipe))
    (tmp_path / "r.yaml").write_text("model: x/y\nseed: 3\ndistill: {steps: 5, clip: 2.0}")
    run("distill", "--recipe", tmp_path / "r.yaml", "--steps", 6)
    settings = built[0].distill
    assert (built[0].seed, settings.steps, settings.clip, settings.batch_size) == (
        3,
        6,
        2.0,
        Distill().batch_size,
    )

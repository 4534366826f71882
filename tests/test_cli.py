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
from _tiny import Run, write_recipe
from typer.testing import CliRunner

from edgerazor import cli, pipeline
from edgerazor import recipe as recipes
from edgerazor.evaluation.eval_result import EvalResult
from edgerazor.stages import calibrate, distill
from edgerazor.stages import eval as evaluation

COMMANDS: dict[str, Any] = dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
STAGES = ("calibrate", "distill", "pack", "eval", "bench")


def options(name: str) -> dict[str, Any]:
    """Long name -> parameter, for the options of a command."""
    long = {text: each for each in COMMANDS[name].params for text in each.opts if text.startswith("--")}
    return {text: each for text, each in long.items() if text != "--help"}


# --- options -----------------------------------------------------------------------------------

#: option -> (words behind it, field of the recipe, its value then). `eval --data` is held-out text.
FIELDS: dict[str, tuple[list[str], str, Any]] = {
    "--bits": (["3"], "calibrate.bits", 3.0),
    "--real-bits": (["2.5"], "calibrate.real_bits", 2.5),
    "--target-size": (["0.2GB"], "calibrate.target_size", 200_000_000),
    "--data": (["/a.txt", "--data", "/b.txt"], "data.train", [{"file": "/a.txt"}, {"file": "/b.txt"}]),
    "--held-out": (["/c.txt"], "data.held_out", [{"file": "/c.txt"}]),
    "--sequence-length": (["77"], "data.sequence_length", 77),
    "--sequences": (["5"], "calibrate.sequences", 5),
    "--group-size": (["64"], "calibrate.group_size", 64),
    "--formats": (["int2, int4"], "calibrate.formats", ["int2", "int4"]),
    "--plan": (["variance"], "calibrate.plan", "variance"),
    "--granularity": (["tensor"], "calibrate.granularity", "tensor"),
    "--sensitivity": (["fisher"], "calibrate.sensitivity", "fisher"),
    "--kv-bits": (["16"], "calibrate.kv_bits", 16),
    "--activation-bits": (["16"], "calibrate.activation_bits", 16),
    "--init": (["gptq"], "calibrate.init", "gptq"),
    "--revision": (["main"], "revision", "main"),
    "--trust-remote-code": ([], "trust_remote_code", True),
    "--seed": (["7"], "seed", 7),
    "--device": (["cuda:1"], "device", "cuda:1"),
    "--threads": (["3"], "threads", 3),
    "--steps": (["12"], "distill.steps", 12),
    "--tokens": (["1000"], "distill.tokens", 1000),
    "--max-time": (["60"], "distill.max_time", 60.0),
    "--batch-size": (["3"], "distill.batch_size", 3),
    "--accumulation": (["4"], "distill.accumulation", 4),
    "--learning-rate": (["1e-4"], "distill.learning_rate", 1e-4),
    "--checkpoint-every": (["9"], "distill.checkpoint_every", 9),
    "--train": (["scales"], "distill.train", "scales"),
    "--reconstruct": (["9"], "distill.reconstruct.steps", 9),
    "--student": (["last"], "pack.student", "last"),
    "--compress": ([], "pack.compress", True),
    "--export": (["gguf, gguf-f16"], "pack.export", ["gguf", "gguf-f16"]),
    "--allow-lossy": ([], "pack.allow_lossy", True),
    "--tasks": (["arc, hellaswag"], "eval.tasks", ["arc", "hellaswag"]),
    "--task-data": (["/tasks"], "eval.task_data", "/tasks"),
    "--limit": (["10"], "eval.limit", 10),
    "--num-fewshot": (["0"], "eval.num_fewshot", 0),
    "--apply-chat-template": ([], "eval.apply_chat_template", True),
    "--min-retention": (["0.9"], "eval.min_retention", 0.9),
    "--compare": (["a=/x", "--compare", "b=/y"], "compare", {"a": "/x", "b": "/y"}),
    "--prefill-tokens": (["64"], "bench.prefill_tokens", 64),
    "--decode-tokens": (["16"], "bench.decode_tokens", 16),
    "--contexts": (["0,128"], "bench.contexts", [0, 128]),
    "--rounds": (["5"], "bench.rounds", 5),
    "--mmap": ([], "bench.mmap", True),
    "--llama-bench": (["/bin/llama-bench"], "bench.llama_bench", "/bin/llama-bench"),
    "--ik-llama-bench": (["/bin/ik"], "bench.ik_llama_bench", "/bin/ik"),
}
#: Options that say how to run rather than what to make.
MANNERS = {"--work", "--recipe", "--json", "--quiet", "--force", "--dry-run"}
#: Options of `eval MODEL`, which has no working directory.
ALONE = {"--against", "--activation-bits", "--kv-bits", "--group-size"}
CASES = [
    (name, option)
    for name in STAGES
    for option in options(name)
    if option not in MANNERS and not (name == "eval" and option in ALONE)
]


def test_there_is_a_case_for_every_option() -> None:
    assert {option for _, option in CASES} == set(FIELDS)


@pytest.mark.parametrize(("name", "option"), CASES)
def test_every_option_sets_its_field(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, option: str
) -> None:
    words, field, value = FIELDS[option]
    if name == "eval" and option in ("--data", "--batch-size"):
        field = {"--data": "data.held_out", "--batch-size": "eval.batch_size"}[option]
    if name == "bench" and option == "--threads":
        words, field, value = ["2,1", "--threads", "4"], "bench.threads", [1, 2, 4]
    seen: list[recipes.Recipe] = []

    def remember(_name: str, asked: recipes.Recipe, *_: Any) -> None:
        seen.append(asked)

    monkeypatch.setattr(pipeline, "run", remember)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"model": "some/model", "threads": 9, "seed": 9}))
    done = run(name, "--recipe", recipe, option, *words)
    assert done.code == 0, done.err
    found: Any = seen[0].model_dump(mode="json", exclude_defaults=field.startswith("data."))
    for part in field.split("."):
        found = found[part]
    assert found == value
    changed = seen[0].model_dump(exclude_defaults=True)
    assert set(changed) <= {"model", "threads", "seed", field.split(".")[0]}


def test_options_of_a_model_measured_alone(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, recipes.Recipe]] = []
    monkeypatch.setattr(evaluation, "evaluate_model", lambda model, asked, _: seen.append((model, asked)))
    monkeypatch.setattr(evaluation, "show", lambda _: [])
    words = ["--against", "t", "--activation-bits", "8", "--kv-bits", "8", "--group-size", "64"]
    run("eval", "m", *words)
    model, asked = seen[0]
    assert (model, asked.eval.against, asked.calibrate.group_size) == ("m", "t", 64)
    assert (asked.eval.activation_bits, asked.eval.kv_bits) == (8, 8)
    for option, value in zip(words[::2], words[1::2], strict=True):
        refused = run("eval", option, value, "--work", tmp_path / "job")
        assert refused.code == 2
        assert f"{option} is for a model that is measured alone" in refused.err


def test_every_stage_has_the_options_that_all_have() -> None:
    for name in STAGES:
        assert set(options(name)) >= MANNERS


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_in_80_columns_and_explains_everything(name: str) -> None:
    shown = CliRunner().invoke(cli.app, [*([name] if name else []), "--help"], env={"COLUMNS": "80"}, terminal_width=80)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= 80
    if not name:
        assert all(command in shown.output for command in COMMANDS)
        return
    assert "Example: edgerazor" in shown.output
    for option, parameter in options(name).items():
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


# --- asked wrongly -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["distill", "--stpes", "3"], 2, "No such option: --stpes"),
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
def test_what_is_asked_wrongly_is_one_sentence(
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
        patch.setattr(calibrate, "observe", fail)
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


def test_distill_is_asked_for_what_it_is_given(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of several layers the last wins: defaults, the recipe, the command line."""
    seen: list[Any] = []
    monkeypatch.setattr(pipeline, "run", lambda name, asked, *_: seen.append(asked))
    (tmp_path / "r.yaml").write_text("model: x/y\nseed: 3\ndistill: {steps: 5, clip: 2.0}")
    run("distill", "--recipe", tmp_path / "r.yaml", "--steps", 6)
    settings = seen[0].distill
    assert (seen[0].seed, settings.steps, settings.clip, settings.batch_size) == (
        3,
        6,
        2.0,
        distill.Distill().batch_size,
    )

"""Three writers of one target at once, round after round: nothing is lost, whoever comes too late is told so.

    make race                              20 rounds (N=...) of each command
    PYTHONPATH=tests python tests/fuzz/race_writers.py 200 --only compress

Three processes, forked from one that has loaded everything, wait for each other and run the same command. *The law*: at
least one of them succeeds; each of the others says in one sentence that another is writing, exit code 1; what is there
afterwards is the whole result, and nothing else is. Who begins after the first has finished may do the work again, or
say that it is up to date, so nothing depends on how fast the machine is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from edgerazor import cli, runtime
from edgerazor.packed import PackedModel
from edgerazor.workdir import WorkDir
from helpers.tiny_job import write_recipe
from helpers.tiny_models import VOCABULARY, family_config, sentences

WRITERS = 3


class Ended(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


class Race(NamedTuple):
    """A command, and what holds when all that ran it have ended.

    Attributes:
        words: of the command line.
        before: brings the target to where every round begins.
        check: raises AssertionError where the result is not whole.
        target: its folder.
        left: names in that folder, when nothing is left behind.
    """

    words: list[str]
    before: Callable[[], None]
    check: Callable[[], None]
    target: Path
    left: set[str]


def make_model(folder: Path) -> None:
    """A tiny Llama and a tokenizer that knows bytes."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(family_config("llama")).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<s>", "</s>", *alphabet])}
    assert len(words) <= VOCABULARY
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    named = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    named.save_pretrained(folder)


def run(words: list[str], place: Path) -> int:
    """A command in a process of its own, which ends with it; its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        code = command(words)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(words: list[str]) -> int:
    sys.argv = ["edgerazor", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0


def ended(child: int, place: Path) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = (place.with_suffix(f".{name}").read_text(errors="replace") for name in ("out", "err"))
    return Ended(code, out, err)


def start_together(words: list[str], place: Path) -> list[Ended]:
    """The same command in each of the writers, which begin when all are there."""
    barrier = multiprocessing.get_context("fork").Barrier(WRITERS)
    places = [place / f"writer-{number}" for number in range(WRITERS)]
    run_main, children = cli.main, []

    def main() -> None:
        barrier.wait(300)
        run_main()

    cli.main = main  # type: ignore[assignment]
    try:
        children = [run(words, folder) for folder in places]
    finally:
        cli.main = run_main
    return [ended(child, folder) for child, folder in zip(children, places, strict=True)]


def one_round(race: Race, place: Path) -> int:
    """A round; how many were refused.

    Raises:
        AssertionError: the law does not hold.
    """
    race.before()
    outcomes = start_together(race.words, place)
    refused = [outcome for outcome in outcomes if outcome.code != 0]
    assert len(refused) < WRITERS, f"nobody succeeded: {outcomes}"
    for outcome in refused:
        sentences = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
        said = " ".join(outcome.err.split())
        assert outcome.code == 1, outcome
        assert len(sentences) == 1, outcome
        assert "Another edgerazor (process" in said, outcome
        assert "Traceback" not in outcome.err, outcome
        assert outcome.out == "", outcome
    race.check()
    left = {path.name for path in race.target.iterdir()}
    assert left == race.left, f"left behind: {sorted(left ^ race.left)}"
    return len(refused)


def races(place: Path) -> dict[str, Race]:
    """All commands, with what they need."""
    model, text = place / "model", place / "text.txt"
    make_model(model)
    text.write_text(sentences(300), encoding="utf-8")
    recipe = write_recipe(place / "r.yaml", model, text, distill={"steps": 2}, sampling={"answer_tokens": 6})
    common = ["--recipe", str(recipe), "--quiet"]
    alone = run(["pack", str(model), "--work", str(place / "first"), *common], place / "first-pack")
    assert ended(alone, place / "first-pack").code == 0
    (place / "shipped").mkdir()
    folder = place / "shipped" / "model"
    shutil.copytree(WorkDir(place / "first").folder("pack"), folder)
    (folder / "manifest.json").unlink()
    first_races = [pack_race(place, model, common), *ship_races(folder), data_race(place, model, common)]
    return dict(
        zip(["pack", "compress", "export", "data", "distill"], [*first_races, distill_race(place, common)], strict=True)
    )


def pack_race(place: Path, model: Path, common: list[str]) -> Race:
    job = WorkDir(place / "pack")

    def check() -> None:
        PackedModel.open(job.folder("pack")).verify()
        manifest = job.manifest("pack")
        assert manifest is not None
        assert job.up_to_date("pack", manifest.inputs)

    words = ["pack", str(model), "--work", str(job.path), *common]
    return Race(words, removing(job.path), check, job.path, {".lock", "recipe.yaml", "packed"})


def ship_races(folder: Path) -> tuple[Race, Race]:
    """Compressing, and exporting, of a packed folder; whether it is compressed changes from round to round."""
    digests = {name: entry.digest for name, entry in PackedModel.open(folder).header.matrices.items()}
    words = ["pack", str(folder), "--compress", "--quiet"]
    target = folder.parent / f"{folder.name}-exports"

    def turn() -> None:
        shutil.rmtree(target, ignore_errors=True)
        words[2] = "--no-compress" if PackedModel.open(folder).header.compression else "--compress"

    def compressed() -> None:
        model = PackedModel.open(folder)
        model.verify()
        assert (model.header.compression is not None) == (words[2] == "--compress")
        assert digests == {name: entry.digest for name, entry in model.header.matrices.items()}
        assert len(runtime.load(folder, engine="transformers").tokenizer) > 0

    def exported() -> None:
        AutoModelForCausalLM.from_pretrained(target / "hf-f32")
        assert {path.name for path in (target / "hf-f32").iterdir()} >= {"model.safetensors", "config.json"}

    export = ["pack", str(folder), "--export", "hf-f32", "--quiet"]
    return (
        Race(words, turn, compressed, folder.parent, {folder.name}),
        Race(export, lambda: None, exported, target, {"hf-f32"}),
    )


def data_race(place: Path, model: Path, common: list[str]) -> Race:
    out, whole = place / "rows" / "rows.jsonl", place / "whole" / "rows.jsonl"
    words = ["data", str(model), "--tokens", "30", *common, "--out"]
    first = ended(run([*words, str(whole)], place / "first-data"), place / "first-data")
    assert first.code == 0, first

    def check() -> None:
        assert out.read_bytes() == whole.read_bytes()
        assert json.loads(out.with_name("rows.jsonl.json").read_text())["result"]["rows"] > 0

    return Race([*words, str(out)], removing(out.parent), check, out.parent, {"rows.jsonl", "rows.jsonl.json"})


def distill_race(place: Path, common: list[str]) -> Race:
    job = WorkDir(place / "distill")

    def check() -> None:
        manifest = job.manifest("distill")
        assert manifest is not None
        assert job.up_to_date("distill", manifest.inputs)
        assert not [path for path in job.path.rglob(".*") if path.name != ".lock"]

    words = ["distill", "--work", str(job.path), *common]
    return Race(words, removing(job.path), check, job.path, {".lock", "recipe.yaml", "calibrate", "distill"})


def removing(path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(path, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rounds", type=int, nargs="?", default=20, help="of each command")
    parser.add_argument("--only", help="one of the commands: pack, compress, export, data, distill")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, race in races(Path(folder)).items():
            if options.only in (None, name):
                failures += compete(name, race, options.rounds, Path(folder))
    return 1 if failures else 0


def compete(name: str, race: Race, rounds: int, place: Path) -> int:
    """All rounds of a command; how many broke the law."""
    refused: Counter[Any] = Counter()
    failures = 0
    for number in range(rounds):
        try:
            refused[one_round(race, place)] += 1
        except Exception as error:
            failures += 1
            print(f"{name}, round {number}: {type(error).__name__}: {error}", flush=True)
    said = ", ".join(f"{count} with {number} refused" for number, count in sorted(refused.items()))
    print(f"{name}: {rounds} rounds of {WRITERS} writers, {failures} wrong; {said}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())

"""Packing that fails, is killed, or meets another: a whole model or none under the final names, and one sentence."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from edgerazor import exporters, formats, packed, pipeline
from edgerazor import recipe as recipes
from edgerazor.console import Console
from edgerazor.errors import UserError
from edgerazor.formats import MatrixSpec
from edgerazor.job import JobContext, RecipeContext
from edgerazor.packaging import recompression
from edgerazor.packed import MatrixSource, PackedModel
from edgerazor.recipe import Recipe
from edgerazor.stages import write_data as data_stage
from edgerazor.training import checkpoint
from edgerazor.workdir import WorkDir, find_folder, record_of, recover_folder, replace_folder, share, write_json
from helpers.killing import die_at
from helpers.packed_folders import all_of, write_packed
from helpers.tiny_job import Run, write_recipe
from helpers.tiny_models import mostly_slow


def source(name: str, seed: int) -> MatrixSource:
    spec = MatrixSpec(("ternary", "int4"), 16, (torch.arange(20) % 4 == 0).to(torch.uint8))
    w = torch.randn(20, 40, generator=torch.Generator().manual_seed(seed))
    return MatrixSource(name, "linear", spec, (20, 40), lambda: formats.encode_matrix(w, spec))


def write(folder: Path, seed: int = 0, shard_bytes: int = 10**9) -> None:
    matrices = [source(f"layers.{i}", seed + i) for i in range(3)]
    packed.write(
        folder,
        matrices,
        {"norm": torch.ones(7)},
        tied={},
        settings={},
        provenance={"seed": seed},
        shard_bytes=shard_bytes,
    )


def seed_of(folder: Path) -> Any:
    """Which of the models made here lies in a folder, every byte of it checked."""
    model = PackedModel.open(folder)
    model.verify()
    return model.header.provenance["seed"]


@pytest.mark.parametrize("shard_bytes", mostly_slow([10**9, 1500], 1500))
def test_a_packed_folder_is_the_old_or_the_new_one_whenever_it_is_killed(tmp_path: Path, shard_bytes: int) -> None:
    def fill(seed: int) -> None:
        with replace_folder(tmp_path / "packed") as new:
            write(new, seed, shard_bytes)

    fill(1)
    moment, seen = 1, set()
    while die_at(moment, lambda: fill(2)):
        recover_folder(tmp_path / "packed")
        assert [path.name for path in tmp_path.iterdir()] == ["packed"]
        assert not list((tmp_path / "packed").glob(".*"))
        seen.add(seed_of(tmp_path / "packed"))
        fill(1)
        moment += 1 if shard_bytes > 10**6 else 3  # of shards there are many alike
    assert moment > 30
    assert seen == {1, 2}
    assert seed_of(tmp_path / "packed") == 2


@pytest.mark.parametrize("shard_bytes", mostly_slow([10**9, 1500], 1500))
def test_final_names_never_hold_half_a_file(tmp_path: Path, shard_bytes: int) -> None:
    """`write` alone, into a folder of its own: killed anywhere, it opens as a whole or is refused as incomplete."""
    folder = tmp_path / "packed"
    folder.mkdir()
    moment, outcomes = 1, set()
    while die_at(moment, lambda: write(folder, 5, shard_bytes)):
        if any(folder.glob("[!.]*.json")) or (folder / "model.safetensors").exists():
            outcomes.add(seed_of(folder))
        else:
            with pytest.raises(UserError, match="There is no packed model"):
                PackedModel.open(folder)
            outcomes.add(None)
        write(folder, 6, shard_bytes)  # what was left is in nobody's way
        assert seed_of(folder) == 6
        assert not list(folder.glob(".*"))
        for file in folder.iterdir():
            file.unlink()
        moment += 1 if shard_bytes > 10**6 else 3
    assert outcomes == {None, 5}


@pytest.fixture
def job(llama: Path) -> Recipe:
    return recipes.build({"model": str(llama), "pack": {"source": "teacher"}, "calibrate": {"plan": "interleave"}})


@pytest.mark.slow
def test_the_command_is_killed_at_every_write(job: Recipe, tmp_path: Path) -> None:
    """Whatever moment it is killed at: no half model, nothing left behind, and the next run finishes the work."""
    work = WorkDir(tmp_path / "work")

    def run(force: bool = False) -> None:
        pipeline.run("pack", job, work, Console(quiet=True), force)

    run()
    expected = packed.PackedModel.open(work.folder("pack")).header
    first = {file.name: file.read_bytes() for file in work.folder("pack").iterdir() if file.name != "manifest.json"}
    moment = 1
    while die_at(moment, lambda: run(force=True)):
        work.recover()
        assert {path.name for path in work.path.iterdir()} <= {".lock", "recipe.yaml", "packed"}, moment
        model = PackedModel.open(work.folder("pack"))
        model.verify()
        assert model.header == expected
        assert not list(work.folder("pack").glob(".*")), moment
        moment += 5  # a prime step apart, each kind of deed is met
    assert moment > 50
    run(force=True)
    assert work.manifest("pack") is not None
    assert first == {
        file.name: file.read_bytes() for file in work.folder("pack").iterdir() if file.name != "manifest.json"
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stride(moment: int) -> int:
    """The first deeds one by one, then a prime step, so that each kind is met."""
    return moment + (1 if moment < 12 else 3)


@pytest.fixture
def packed_folder(llama: Path, tmp_path: Path) -> Path:
    write_packed(tmp_path / "model", llama, all_of("int4"))
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize("compress", [True, False])
def test_compressing_is_killed_at_every_deed(packed_folder: Path, tmp_path: Path, compress: bool) -> None:
    """A reader finds the old model or the new one; the same command again finishes, and nothing is left behind."""
    quiet = Console(quiet=True)
    recompression.recompress(packed_folder, True, quiet)
    compressed = files_of(packed_folder)
    recompression.recompress(packed_folder, False, quiet)
    plain = files_of(packed_folder)
    old, new = (plain, compressed) if compress else (compressed, plain)
    moment, seen = 1, []
    while True:
        recompression.recompress(packed_folder, not compress, quiet)
        if not die_at(moment, lambda: recompression.recompress(packed_folder, compress, quiet)):
            break
        PackedModel.open(packed_folder).verify()  # as `show` and `generate` do
        found = files_of(packed_folder)
        assert found in (old, new), moment
        seen.append(found == new)
        recompression.recompress(packed_folder, compress, quiet)
        assert files_of(packed_folder) == new
        moment = stride(moment)
    assert set(seen) == {True, False}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", mostly_slow(["hf", "gptq"], "hf"))
def test_exporting_is_killed_at_every_deed(packed_folder: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "exports"

    def export() -> None:
        exporters.write_all(packed_folder, [name], target, True, Console(quiet=True))

    export()
    new, old = files_of(target / name), {"old": b"old"}
    moment, seen = 1, []
    while True:
        with replace_folder(target / name) as folder:
            (folder / "old").write_bytes(b"old")
        if not die_at(moment, export):
            break
        found = files_of(find_folder(target / name))
        assert found in (old, new), moment
        seen.append(found == new)
        export()
        assert files_of(target / name) == new
        moment = stride(moment)
    assert set(seen) == {True, False}
    assert [path.name for path in target.iterdir()] == [name]


def test_distilled_data_are_killed_at_every_deed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again goes on, and the file becomes the same."""
    recipe = recipes.build({"model": str(llama), "sampling": {"batch_size": 2, "answer_tokens": 6}})
    context = RecipeContext(recipe, Console(quiet=True))
    teacher = context.load_teacher(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(RecipeContext, "load_teacher", lambda *_: teacher)
    out = tmp_path / "out" / "rows.jsonl"

    def write(to: Path = out) -> None:
        data_stage.run(recipe, to, None, 25, Console(quiet=True))

    write(tmp_path / "whole.jsonl")
    expected = (tmp_path / "whole.jsonl").read_bytes()
    moment = 1
    while die_at(moment, write):
        assert not out.exists() or expected.startswith(out.read_bytes())
        write()
        assert out.read_bytes() == expected, moment
        assert {path.name for path in out.parent.iterdir()} == {out.name, record_of(out).name}, moment
        for path in out.parent.iterdir():
            path.unlink()
        moment += 1
    assert moment > 15


def test_a_checkpoint_is_killed_at_every_deed(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    work = WorkDir(tmp_path)
    folder = work.checkpoint("current")

    def save(step: int) -> None:
        checkpoint.save(folder, model, optimizer, checkpoint.Progress(step=step), {})

    moment, seen = 1, []
    while True:
        save(1)
        if not die_at(moment, lambda: save(2)):
            break
        work.recover()
        progress = checkpoint.restore(folder, model, optimizer)
        assert progress is not None
        seen.append(progress.step)
        assert [path.name for path in folder.parent.iterdir()] == ["current"]
        moment += 1
    assert set(seen) == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["calibrate", "distill"])
def test_a_stage_that_is_killed_is_finished_by_the_same_command(
    name: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """At moments spread over the whole stage; what it made in the end is the same to the byte."""
    file = write_recipe(tmp_path / "r.yaml", llama, text_file, distill={"steps": 3})
    recipe = recipes.build(recipes.load(file))

    def run(work: WorkDir) -> None:
        pipeline.run(name, recipe, work, Console(quiet=True))

    def made(work: WorkDir) -> str:
        manifest = work.manifest(name)
        assert manifest is not None
        return manifest.fingerprint()

    run(WorkDir(tmp_path / "whole"))
    expected = made(WorkDir(tmp_path / "whole"))
    moment, killed = 2, True
    while killed:
        work = WorkDir(tmp_path / f"killed-{moment}")
        killed = die_at(moment, lambda work=work: run(work))  # type: ignore[misc]
        run(work)
        assert made(work) == expected, moment
        assert not [path for path in work.path.rglob(".*") if path.name != ".lock"], moment
        moment += 7 if name == "calibrate" else 29
    assert moment > 20


class Measured(BaseModel):
    """Stands for a stage's result."""

    value: int


@pytest.mark.parametrize(
    ("name", "force"), [("calibrate", False), ("calibrate", True), ("eval", True), ("bench", False)]
)
def test_results_stay_until_the_new_ones_are_whole(
    name: str, force: bool, job: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at whatever deed: all files of the old result, with its manifest, or all of the new one."""
    work, value = WorkDir(tmp_path), [0]

    def measure(context: JobContext) -> Measured:
        here = context.work
        write_json(here.progress(name, "half.json"), value[0])
        if name == "calibrate":
            share(here.progress(name, "half.json"), here.statistics_file)
        write_json(here.result_file(name), value[0])
        return Measured(value=value[0])

    stage = pipeline.STAGES[name]
    monkeypatch.setattr("edgerazor.workdir.versions", dict)  # which takes longer than all that is killed here
    monkeypatch.setattr(stage, "run", measure)
    monkeypatch.setattr(stage, "result_model", Measured)
    monkeypatch.setattr(stage, "inputs", lambda *_: {"value": str(value[0])})

    def run(number: int) -> None:
        value[0] = number
        pipeline.run_one(stage, JobContext(job, work, Console(quiet=True)), force)

    def found() -> int:
        manifest = work.manifest(name)
        assert manifest is not None
        results = [work.result_file(name), *([work.statistics_file] if name == "calibrate" else [])]
        values = {int(manifest.inputs["value"]), manifest.result["value"], *(int(each.read_text()) for each in results)}
        assert len(values) == 1
        return values.pop()

    moment, seen = 1, []
    run(1)
    while die_at(moment, lambda: run(2)):
        work.recover()
        seen.append(found())
        run(2)
        assert (found(), [path.name for path in tmp_path.iterdir()]) == (2, [name])
        kept = work.progress(name, "half.json").exists()
        assert kept == (name == "bench")
        run(1)
        moment += 1 if moment < 6 else 5
    assert moment > 20
    assert set(seen) == {1, 2}


FAILURES = {
    "a full disk": (errno.ENOSPC, "The disk is full"),
    "a quota": (errno.EDQUOT, "The disk is full"),
    "a limit of files": (errno.EFBIG, "A file would be larger"),
    "a broken disk": (errno.EIO, "Input/output error"),
    "a read-only disk": (errno.EROFS, "Read-only file system"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_disk_is_one_sentence(
    name: str, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each deed of writing the weights fails; the packed model from before stays."""
    number, sentence = FAILURES[name]
    work = tmp_path / "work"
    asked = ("pack", llama, "--bits", 2, "--work", work, "--recipe", write_recipe(tmp_path / "r.yaml", llama, None))
    assert run(*asked).code == 0
    before = {file.name: file.read_bytes() for file in (work / "packed").iterdir()}

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    for deed in ("pwrite", "posix_fallocate", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, deed, fail)
            outcome = run(*asked, "--force")
        assert (outcome.code, outcome.err.count(sentence), outcome.out) == (1, 1, ""), (deed, outcome.err)
        assert "Traceback" not in outcome.err
        assert {path.name for path in work.iterdir()} == {".lock", "recipe.yaml", "packed"}, deed
        assert {file.name: file.read_bytes() for file in (work / "packed").iterdir()} == before, deed


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()
    slow = source("layers.0", 1)

    def encode() -> Any:
        inside.set()
        go_on.wait(20)
        return slow.encode()

    waiting = MatrixSource(slow.name, "linear", slow.spec, slow.shape, encode)

    def first() -> None:
        packed.write(tmp_path, [waiting], {}, tied={}, settings={}, provenance={"seed": 1})

    writer = threading.Thread(target=first)
    writer.start()
    assert inside.wait(20)
    with pytest.raises(UserError, match=r"Another edgerazor \(process \d+\) is writing .*model.safetensors"):
        write(tmp_path, 2)
    go_on.set()
    writer.join()
    assert seed_of(tmp_path) == 1
    write(tmp_path, 2)
    assert seed_of(tmp_path) == 2


def test_what_has_a_name_disappears_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that breaks between the names of two shards leaves none of them."""
    replace, seen = os.replace, []

    def second_fails(*paths: Any) -> None:
        seen.append(paths)
        if len(seen) == 2:
            raise OSError(errno.EIO, "Input/output error", str(paths[0]))
        replace(*paths)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path, 1, 1500)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, on two cores: codes, those of the rows of one format again where formats mix, and what is written."""
    from edgerazor.packed import threads

    monkeypatch.setattr(threads, "cores", lambda: 2)
    uniform = MatrixSpec(("int8",), 64)
    mixed = MatrixSpec(("int8", "int4"), 64, (torch.arange(32) % 2).to(torch.uint8))
    small, large = (uniform, (16, 64)), (mixed, (32, 64))
    least = 1024 + (1024 + 64)  # codes; packed codes, and scales with what fills a vector
    most = 2 * 2048 + (1024 + 64) + (512 + 64) + 32 // 8  # twice the codes; int8, int4, formats of rows
    assert packed.working_memory([small]) == least
    assert packed.working_memory([small] * 3) == 2 * least
    assert packed.working_memory([small, large, small]) == most + least
    monkeypatch.setattr(threads, "IN_WORK", 3071)  # too few for the small one beside the large one
    assert packed.working_memory([small, large, small]) == most
    monkeypatch.setattr(threads, "IN_WORK", 1)
    assert packed.working_memory([small] * 3) == least


def test_a_dry_run_writes_nothing_and_knows_the_size(llama: Path, tmp_path: Path, run: Run) -> None:
    asked = ("pack", llama, "--bits", 2, "--work", tmp_path / "work", "--json")
    foretold = run(*asked, "--dry-run").json()
    assert not (tmp_path / "work").exists()
    done = run(*asked).json()
    for name in ("bytes", "nominal_bits", "real_bits", "notation", "source"):
        assert foretold[name] == done[name]
    assert foretold["disk_bytes"] == done["bytes"]
    assert foretold["mapped_bytes"] == done["parameters"] * 4  # float32
    assert 0 < foretold["memory_bytes"] < 3 * done["parameters"]
    assert foretold["seconds"] > 0

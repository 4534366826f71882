"""The working directory: whatever is killed at whatever moment, a file or folder is the old one or the new one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from edgerazor import workdir
from edgerazor.errors import USAGE, UserError
from edgerazor.workdir import HEADER, WorkDir, hash_file, recover_folder, replace_folder, write_text

KILLED = 9


class Result(BaseModel):
    value: int = 1


def die_at(moment: int, act: Any) -> bool:
    """Run `act` in a forked process that dies at its n-th dealing with the file system; whether it died."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == KILLED
    seen = [0]

    def deadly(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == moment:
                os._exit(KILLED)
            return function(*args, **kwargs)

        return call

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "open"), (Path, "mkdir")):
        setattr(module, name, deadly(getattr(module, name)))
    act()
    os._exit(0)


def fill(folder: Path, text: str) -> None:
    with replace_folder(folder) as new:
        (new / "a").write_text(text)
        (new / "b").write_text(text)


def test_a_folder_is_the_old_or_the_new_one_whenever_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, "old")
    moment, seen = 1, set()
    while die_at(moment, lambda: fill(folder, "new")):
        recover_folder(folder)
        texts = {(folder / name).read_text() for name in ("a", "b")}
        assert texts in ({"old"}, {"new"}), moment
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        seen |= texts
        fill(folder, "old")
        moment += 1
    assert moment > 8  # it was killed between both renames, among others
    assert seen == {"old", "new"}
    assert (folder / "b").read_text() == "new"


def test_a_file_is_the_old_or_the_new_one_whenever_it_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    moment = 1
    while die_at(moment, lambda: write_text(file, "new")):
        assert file.read_text() in ("old", "new")
        write_text(file, "old")
        moment += 1
    assert moment > 3
    assert file.read_text() == "new"


def test_a_failure_while_filling_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")

    def fail() -> None:
        with replace_folder(tmp_path / "folder") as new:
            (new / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_recover_sweeps_what_was_left_behind(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    for name in (".best.new", ".last.old", ".last.new"):
        (tmp_path / "distill" / name).mkdir(parents=True)
    (tmp_path / "distill" / ".metrics.jsonl.tmp").write_text("half")
    work.recover()
    assert sorted(path.name for path in (tmp_path / "distill").iterdir()) == ["last"]


def test_a_second_process_is_told_who_works_there(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "job")
    with work.lock(), pytest.raises(UserError, match=f"process {os.getpid()}.*is working in"), work.lock():
        pass
    with work.lock():
        pass


def test_a_folder_made_only_for_the_lock_goes_away(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "job").lock():
        pass
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("theirs", ["recipe.yaml", "eval/mine.py", "bench"])
def test_other_peoples_folders_are_left_alone(tmp_path: Path, theirs: str) -> None:
    path = tmp_path / theirs
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="did not write") as refused:
        WorkDir(tmp_path).claim()
    assert refused.value.code == USAGE


def test_our_own_folder_is_claimed_again(tmp_path: Path) -> None:
    work = WorkDir(tmp_path / "job")
    work.claim()
    work.write_recipe("seed: 1\n")
    (work.path / "eval").mkdir()
    (work.path / "eval" / "result.json").write_text("{}")
    work.claim()
    assert work.recipe_file.read_text() == f"{HEADER}\nseed: 1\n"


def finished(tmp_path: Path, seconds: float = 1.0) -> WorkDir:
    work = WorkDir(tmp_path)
    folder = work.folder("distill")
    (folder / "best").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "state").write_text("large")
    (folder / "best" / "weights").write_text("abc")
    (folder / ".best.new").mkdir(exist_ok=True)
    (folder / ".best.new" / "weights").write_text("half")
    (folder / "metrics.jsonl").write_text(f"{seconds}")
    (folder / "result.json").write_text(f"{seconds}")
    work.finish("distill", {"seed": "0"}, {"steps": 3}, Result(), seconds)
    return work


def test_a_manifest_holds_everything_and_is_written_last(tmp_path: Path) -> None:
    work = finished(tmp_path)
    manifest = work.manifest("distill")
    assert manifest is not None
    # SHA-256 of "abc", from FIPS 180-2
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.outputs["best/weights"] == hash_file(work.folder("distill") / "best" / "weights") == abc
    assert sorted(manifest.outputs) == ["best/weights", "metrics.jsonl", "result.json"]
    assert (manifest.inputs, manifest.section, manifest.result) == ({"seed": "0"}, {"steps": 3}, {"value": 1})
    assert {"edgerazor", "python", "torch", "transformers"} <= set(manifest.versions)
    assert manifest.seconds == 1.0
    assert "cores" in manifest.machine
    newest = max(work.folder("distill").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "manifest.json"


def test_the_fingerprint_is_of_what_was_made_not_of_the_time_it_took(tmp_path: Path) -> None:
    prints = []
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        manifest = finished(tmp_path / name, seconds).manifest("distill")
        assert manifest is not None
        prints.append(manifest.fingerprint())
    assert prints[0] == prints[1]
    changed = manifest.model_copy(update={"outputs": {**manifest.outputs, "best/weights": "other"}})
    assert changed.fingerprint() != prints[0]


def test_up_to_date_means_same_inputs_and_nothing_missing(tmp_path: Path) -> None:
    work = finished(tmp_path)
    assert work.up_to_date("distill", {"seed": "0"})
    assert not work.up_to_date("distill", {"seed": "1"})
    (work.folder("distill") / "best" / "weights").unlink()
    assert not work.up_to_date("distill", {"seed": "0"})


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"stage": 3}', "\x00"])
def test_a_damaged_manifest_is_an_unfinished_stage(tmp_path: Path, text: str) -> None:
    work = finished(tmp_path)
    assert not work.damaged("distill")
    work.manifest_file("distill").write_text(text)
    assert work.manifest("distill") is None
    assert work.damaged("distill")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        workdir.make_folder(tmp_path / "file" / "folder")

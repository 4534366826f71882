"""The working directory: whatever is killed at whatever moment, a file or folder is the old one or the new one."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from edgerazor import locks, workdir
from edgerazor.errors import USAGE, UserError
from edgerazor.workdir import (
    HEADER,
    WorkDir,
    alone,
    find_folder,
    hash_file,
    read_whole,
    recover_folder,
    replace_folder,
    write_atomically,
    write_json,
    write_text,
)
from helpers.killing import die_at

#: Models are loaded, plans solved, processes started: `make test-fast` leaves this file out.
pytestmark = pytest.mark.job


class Result(BaseModel):
    value: int = 1


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


def test_a_report_outside_a_job_is_killed_and_written_again(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"

    def write(value: int) -> None:
        with alone(file):
            write_json(file, value)

    write(1)
    moment = 1
    while die_at(moment, lambda: write(2)):
        assert file.read_text() in ("1\n", "2\n")
        write(1)
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], moment
        moment += 1
    assert moment > 10


def test_a_reader_finds_the_old_folder_while_the_writer_lives(tmp_path: Path) -> None:
    """Between the two renames; and afterwards the new one, all of it."""
    fill(tmp_path / "folder", "old")
    with alone(tmp_path / "folder"):
        os.replace(tmp_path / "folder", tmp_path / ".folder.old")
        assert (find_folder(tmp_path / "folder") / "a").read_text() == "old"
        assert (tmp_path / ".folder.old").exists()
    assert find_folder(tmp_path / "folder") == tmp_path / "folder"  # its writer is gone, so it is put back
    assert not (tmp_path / ".folder.old").exists()


def test_what_is_read_is_of_one_folder(tmp_path: Path) -> None:
    """Replaced in the middle of reading: read again, whole."""
    folder = tmp_path / "folder"
    fill(folder, "old")
    reads = []

    def read(place: Path) -> list[str]:
        first = (place / "a").read_text()
        if not reads:
            fill(folder, "new")
        reads.append(first)
        return [first, (place / "b").read_text()]

    assert read_whole(folder, read) == ["new", "new"]
    assert reads == ["old", "new"]


@pytest.mark.parametrize("write", [lambda path: fill(path, "new"), lambda path: _report(path)])
def test_a_second_writer_is_refused_in_a_sentence(tmp_path: Path, write: Callable[[Path], None]) -> None:
    target = tmp_path / "target"
    with alone(target):
        with pytest.raises(UserError, match=rf"process {os.getpid()}\) is writing .*target\.$"):
            write(target)
        assert [path.name for path in tmp_path.iterdir()] == [".target.lock"]
    write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def _report(path: Path) -> None:
    with alone(path):
        write_text(path, "new")


def test_two_that_write_similar_names_do_not_sweep_each_other(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "a.b") as other:
        fill(tmp_path / "a", "x")
        fill(tmp_path / "a.b.c", "x")
        (other / "a").write_text("y")
    assert (tmp_path / "a.b" / "a").read_text() == "y"


def test_what_is_no_folder_is_not_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        fill(tmp_path / "target", "new")
    assert (tmp_path / "target").read_text() == "mine"


def test_a_lock_that_was_removed_by_its_holder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process opened the file before the first removed it: it must take another file."""
    path, flock, seen = tmp_path / ".target.lock", fcntl.flock, []

    def removed_before(descriptor: int, how: int) -> None:
        seen.append(os.fstat(descriptor).st_ino)
        if len(seen) == 1:
            path.rename(tmp_path / "gone")  # keeps its number, so that no other file has it
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with locks.hold(path, "is writing", ""):
        assert path.stat().st_ino == seen[1] != seen[0]
    assert not path.exists()


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system."""

    def fail(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_of_the_system_there_is_still_one_writer(tmp_path: Path) -> None:
    job = WorkDir(tmp_path / "job")
    with (
        job.lock(),
        pytest.raises(UserError, match=rf"process {os.getpid()} of .* is working in") as refused,
        job.lock(),
    ):
        pass
    assert f"remove {job.path / '.lock.owner'}" in refused.value.hint
    fill(tmp_path / "folder", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]  # the folder of the refused job went with it


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_killed_writer_is_in_nobodys_way(tmp_path: Path) -> None:
    moment = 1
    while die_at(moment, lambda: fill(tmp_path / "folder", "new")):
        owner = tmp_path / ".folder.lock.owner"
        if owner.exists() and not owner.read_text():  # killed before it had said who it is: nobody can know
            owner.unlink()
        fill(tmp_path / "folder", "old")
        moment += 1
    assert moment > 15
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.usefixtures("no_locks")
def test_without_locks_another_host_is_believed(tmp_path: Path) -> None:
    owner = tmp_path / ".folder.lock.owner"
    owner.write_text(f"other-{socket.gethostname()} 1")
    with pytest.raises(UserError, match="process 1 of other-"):
        fill(tmp_path / "folder", "new")
    assert owner.exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_lock_that_is_no_file_is_a_sentence(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / ".lock"
    {"folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock), "link": lambda: lock.symlink_to("nowhere")}[kind]()
    with pytest.raises(UserError, match="should be a lock file"), WorkDir(tmp_path).lock():
        pass


def test_a_lock_with_bytes_that_are_no_text_names_no_process(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    with work.lock():
        (tmp_path / ".lock").write_bytes(b"\xff\x1b[31m")
        with pytest.raises(UserError, match=r"process unknown\) is working in"), work.lock():
            pass


@pytest.mark.parametrize("where", ["/proc/self/job", "/dev/null/job"])
def test_an_output_where_nothing_can_be_is_a_sentence(where: str) -> None:
    for write in (_report, lambda path: fill(path, "x"), lambda path: WorkDir(path).lock().__enter__()):
        with pytest.raises(UserError, match=r"cannot be made|cannot hold|can be no lock"):
            write(Path(where))


def test_a_disk_that_fails_at_the_last_moment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fsync` says EIO, without a file name; what was there stays."""
    fill(tmp_path / "folder", "old")
    write_text(tmp_path / "file", "old")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    for write in (lambda: fill(tmp_path / "folder", "new"), lambda: write_text(tmp_path / "file", "new")):
        with pytest.raises(OSError, match="Input/output error") as failed:
            write()
        assert failed.value.filename is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "file").read_text() == "old"


def test_a_full_disk_is_the_same_error_when_safetensors_writes(tmp_path: Path) -> None:
    """It has words of its own for the system's; what was there stays, and nothing beside it."""
    write_text(tmp_path / "file", "old")
    tensors = {"a": torch.zeros(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            write_atomically(tmp_path / "file", lambda path: save_file(tensors, path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors makes files that only their owner may read."""

    def private(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "student", private)
    finally:
        os.umask(before)
    assert (tmp_path / "student").stat().st_mode & 0o777 == mode


def test_threads_of_one_process_are_two_writers(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            fill(tmp_path / "folder", "second")
        except UserError as error:
            refused.append(error.message)

    with replace_folder(tmp_path / "folder") as new:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        (new / "a").write_text("first")
    assert len(refused) == 1
    assert (tmp_path / "folder" / "a").read_text() == "first"


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
    assert not work.has_damaged_manifest("distill")
    work.manifest_file("distill").write_text(text)
    assert work.manifest("distill") is None
    assert work.has_damaged_manifest("distill")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        workdir.make_folder(tmp_path / "file" / "folder")

"""Where the system has no more threads, those that there are do the work, or it is refused in one sentence."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from edgerazor import runtime
from edgerazor.benchmark import bandwidth
from edgerazor.errors import UserError
from edgerazor.kernels import build, native
from edgerazor.packed import threads
from edgerazor.runtime import weight_memory
from helpers.packed_folders import all_of, write_packed


@pytest.fixture(params=[0, 1])
def few_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This many threads can be started, and no more."""
    start, left = threading.Thread.start, [request.param]

    def refuse(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for module, name in ((threads, "cores"), (weight_memory, "cores"), (build, "_cores")):
        monkeypatch.setattr(module, name, lambda: 3)


@pytest.mark.usefixtures("few_threads")
def test_work_is_done_once_and_failures_are_told() -> None:
    seen: list[int] = []
    done: list[None] = []
    before = torch.get_num_threads()
    threads.in_parallel([(1, lambda each=each: seen.append(each)) for each in range(9)], lambda: done.append(None))  # type: ignore[misc]
    assert (sorted(seen), len(done)) == (list(range(9)), 9)
    assert torch.get_num_threads() == before

    def fail() -> None:
        raise UserError("No.")

    with pytest.raises(UserError, match="No"):
        threads.in_parallel([(1, fail), (1, lambda: None), (1, fail)])


@pytest.mark.usefixtures("few_threads")
def test_the_library_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs once; after one that fails, none begins, and its message is the error."""
    ran: list[str] = []

    def run(command: list[str]) -> str:
        ran.append(command[0])
        if command[0] == "bad":
            raise build.BuildError("the compiler failed")
        return ""

    monkeypatch.setattr(build, "_run", run)
    names = [str(number) for number in range(9)]
    build._run_all([[name] for name in names])
    assert sorted(ran) == names
    ran.clear()
    with pytest.raises(build.BuildError, match="the compiler failed"):
        build._run_all([["bad"], *([name] for name in names * 100)])
    assert len(ran) < 100


def test_no_process_to_compile_in_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_process(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(build.subprocess, "run", no_process)
    monkeypatch.setattr(build.sys, "argv", ["build"])
    assert build.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("the kernels were not built: ")
    assert "Resource temporarily unavailable" in said
    assert len(said.splitlines()) == 1


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model"
    write_packed(path, llama, all_of("int4"))
    return path


@pytest.mark.skipif(native.library() is None, reason="the native library is not built")
def test_a_model_is_loaded(folder: Path, few_threads: None) -> None:
    model = runtime.load(folder, threads=1)
    assert (model.engine, model.logits([0, 1]).shape[0]) == ("native", 2)


@pytest.mark.usefixtures("few_threads")
def test_bandwidth_of_threads_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "BYTES", 1 << 16)
    monkeypatch.setattr(native, "library", lambda: object())

    def read(_: Any) -> None: ...

    monkeypatch.setattr(native, "read", read)
    with pytest.raises(UserError, match="no 3 threads to measure with"):
        bandwidth.Bandwidth().measure(3)

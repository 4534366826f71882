"""One task per matrix on all cores, without holding all matrices in memory at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch

#: Most weights that are worked on at the same time, unless a single matrix has more.
IN_WORK = 1 << 26


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(tasks: Sequence[tuple[int, Callable[[], object]]], done: Callable[[], None] | None = None) -> None:
    """Run tasks, each given as (number of weights, function), the largest first; the first exception ends all.

    Each runs on one core: many matrices at a time use the caches better than many cores at one matrix.

    Args:
        tasks: their results are dropped.
        done: called after each task, from the thread that ran it; must be thread-safe.
    """
    ordered = sorted(tasks, key=lambda task: -task[0])
    count = min(cores(), len(ordered))
    if count <= 1:
        for _, work in ordered:
            work()
            if done:
                done()
        return
    budget = _Budget(max(IN_WORK, ordered[0][0]))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures: list[Future] = []
        started: list[_Task] = []
        try:
            for size, work in ordered:
                budget.take(size)
                if any(task.error for task in started):
                    break
                started.append(_Task(work, size, budget, done))
                try:
                    futures.append(pool.submit(started[-1]))
                except RuntimeError:  # the system has no more threads, so this one runs the task
                    started[-1]()
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)
    for task in started:
        if task.error:
            raise task.error


def at_once(tasks: Sequence[tuple[int, int]]) -> int:
    """The most bytes that tasks hold together in `in_parallel`, each given as (number of weights, bytes)."""
    ordered = sorted(tasks, reverse=True)[: cores()]
    left, held = max([IN_WORK, *(size for size, _ in ordered[:1])]), 0
    for size, bytes_ in ordered:
        if size > left:
            break
        left, held = left - size, held + bytes_
    return held


class _Task:
    """Work that is done once, by the first thread to call it: a pool may keep a task that it refused with an error."""

    def __init__(self, work: Callable[[], object], size: int, budget: _Budget, done: Callable[[], None] | None) -> None:
        self.work, self.size, self.budget, self.done = work, size, budget, done
        self.first = threading.Lock()
        self.error: BaseException | None = None

    def __call__(self) -> None:
        if not self.first.acquire(blocking=False):
            return
        try:
            self.work()
            if self.done:
                self.done()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.budget.give_back(self.size)


class _Budget:
    """A limit of weights that are worked on at the same time; a task waits until there is room for it."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.room = threading.Condition()

    def take(self, size: int) -> None:
        with self.room:
            self.room.wait_for(lambda: self.left >= size)
            self.left -= size

    def give_back(self, size: int) -> None:
        with self.room:
            self.left += size
            self.room.notify_all()

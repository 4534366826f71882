"""The same work on many matrices, on all cores, without holding them all in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import torch

#: Weights that may be worked on at the same time, unless a single matrix has more.
IN_WORK = 1 << 26


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(tasks: Sequence[tuple[int, Callable[[], object]]], done: Callable[[], None] | None = None) -> None:
    """Run tasks, each (its number of weights, what to do), largest first; the first exception ends all.

    Each runs on one core: many matrices at a time keep caches fuller than many cores at one matrix.

    Args:
        tasks: their results are dropped.
        done: is called in this thread's place of work behind each; must be thread-safe.
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
        begun: list[_Task] = []
        try:
            for size, work in ordered:
                budget.take(size)
                if any(task.error for task in begun):
                    break
                begun.append(_Task(work, size, budget, done))
                try:
                    futures.append(pool.submit(begun[-1]))
                except RuntimeError:  # the system has no more threads: this one does it
                    begun[-1]()
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)
    for task in begun:
        if task.error:
            raise task.error


def at_once(tasks: Sequence[tuple[int, int]]) -> int:
    """The bytes that tasks hold together at most in `in_parallel`, each given as (its number of weights, its bytes)."""
    ordered = sorted(tasks, reverse=True)[: cores()]
    left, held = max([IN_WORK, *(size for size, _ in ordered[:1])]), 0
    for size, bytes_ in ordered:
        if size > left:
            break
        left, held = left - size, held + bytes_
    return held


class _Task:
    """Work that is done once, by whoever comes to it first: a pool keeps what it found no thread for."""

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
    """So many weights at the same time; a task waits until there is room for it."""

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

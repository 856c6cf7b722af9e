"""Work spread over the cores: NumPy's matrix products use all of them, its other operations only one."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mha_spec.arguments import Arguments

__all__ = ["blas", "each"]

WORTHWHILE = 2**20
"""Below so many scores, starting threads costs more than they save."""
SHARED, SHARED_VECTOR = 2**18, 2**13
"""Up to so many multiplications OpenBLAS leaves a product, or one of a matrix and a vector, to one thread."""

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def each(function: Callable[[_Task], _Result], tasks: Sequence[_Task], a: Arguments) -> list[_Result]:
    """Give the result of each task in order; on NumPy, large work is spread over as many threads as its BLAS has."""
    if not isinstance(a.query, numpy.ndarray) or _is_tiny(a):
        return [function(task) for task in tasks]
    with blas().one_thread() as available:
        threads = min(available, len(tasks))
        if threads <= 1 or a.batch * a.heads * a.q_len * a.kv_len < WORTHWHILE:
            return [function(task) for task in tasks]
        return _shared(function, tasks, threads)


def _is_tiny(a: Arguments) -> bool:
    """Whether no product of the call is so large that a BLAS would use its threads for it."""
    rows, size = a.heads // a.kv_heads * a.q_len, max(a.query.shape[3], 1 if a.value is None else a.value.shape[3])
    return rows * a.kv_len * size <= SHARED and max(rows, size) * a.kv_len <= SHARED_VECTOR


def _shared(function: Callable[[_Task], _Result], tasks: Sequence[_Task], threads: int) -> list[_Result]:
    """The caller's thread and others take one task after another; an error ends the work of all."""
    waiting, found = deque(enumerate(tasks)), {}

    def work() -> None:
        try:
            with numpy.errstate(all="ignore"):
                for index, task in _taken(waiting):
                    found[index] = function(task)
        finally:
            waiting.clear()

    others: list[Future[None]] = []
    try:
        others += (_pool().submit(work) for _ in range(threads - 1))
        work()
    finally:
        waiting.clear()
        wait(others)
    for other in others:
        other.result()
    return [found[index] for index in range(len(tasks))]


def _taken(waiting: deque[_Task]) -> Iterator[_Task]:
    """What is left, to whoever asks first."""
    while waiting:
        try:
            yield waiting.popleft()
        except IndexError:
            return


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """The threads beside the caller's, kept from call to call; one is started when there is work for it."""
    return ThreadPoolExecutor(os.cpu_count(), "mha_spec_numpy")


class Blas:
    """NumPy's BLAS, held to one thread while a call is at work, and calls to one at a time.

    Two products at once, each with all threads, hinder each other; and a product rounds otherwise with another number
    of threads, so that a batch entry would depend on the others (MHA-PURE-3).
    """

    def __init__(self) -> None:
        from threadpoolctl import ThreadpoolController

        self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        self._lock = Lock()

    @property
    def threads(self) -> int:
        """How many threads a product uses now."""
        return max((library.num_threads for library in self._libraries), default=1)

    @contextmanager
    def one_thread(self) -> Iterator[int]:
        """Hold the BLAS to one thread, and say how many it had; 1 where it does not obey."""
        with self._lock:
            before = [library.num_threads for library in self._libraries]
            try:
                self._set([1] * len(before))
                yield max(before, default=1) if self.threads == 1 else 1
            finally:
                self._set(before)

    def _set(self, threads: list[int]) -> None:
        for library, number in zip(self._libraries, threads, strict=True):
            library.set_num_threads(number)


@lru_cache(maxsize=1)
def blas() -> Blas:
    """The BLAS of this process."""
    return Blas()


def _forget() -> None:
    """A forked process has neither the threads nor a lock that one of them held."""
    _pool.cache_clear()
    blas.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

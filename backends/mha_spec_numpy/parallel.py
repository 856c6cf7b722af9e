"""Threads: NumPy's matrix products use every core, but its other operations use a single core."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy

from .operations import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mha_spec.arguments import Arguments

__all__ = ["blas", "each", "is_tiny"]

WORTHWHILE = 2**20
"""With fewer scores than this, threads cost more than they save."""
SHARED, SHARED_VECTOR = 2**18, 2**13
"""The most multiplications of a product, and of a product with a vector, that OpenBLAS computes in a single thread."""

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def each(
    function: Callable[[_Task, Scratch], _Result], tasks: Sequence[_Task], a: Arguments, *, tiny: bool
) -> list[_Result]:
    """Return the result of each task in order; on NumPy, large work is spread over as many threads as its BLAS has.

    Threads share no scratch memory. `tiny` is the answer of `is_tiny`.
    """
    if tiny or not isinstance(a.query, numpy.ndarray):
        return _in_turn(function, tasks)
    with blas().one_thread() as available:
        threads = min(available, len(tasks))
        if threads <= 1 or a.batch * a.heads * a.q_len * a.kv_len < WORTHWHILE:
            return _in_turn(function, tasks)
        return _shared(function, tasks, threads)


def _in_turn(function: Callable[[_Task, Scratch], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    scratch = Scratch()
    return [function(task, scratch) for task in tasks]


def is_tiny(a: Arguments) -> bool:
    """Return True if every product of the call is so small that the BLAS computes it in a single thread."""
    (_, heads, q_len, size), (_, kv_heads, kv_len, _) = a.query.shape, a.key.shape
    rows, size = heads // kv_heads * q_len, size if a.value is None else max(size, a.value.shape[3])
    return rows * kv_len * size <= SHARED and max(rows, size) * kv_len <= SHARED_VECTOR


def _shared(function: Callable[[_Task, Scratch], _Result], tasks: Sequence[_Task], threads: int) -> list[_Result]:
    """Compute the tasks in the caller's thread and in others; an error in a task stops all of them."""
    waiting, results = deque(enumerate(tasks)), {}

    def work() -> None:
        scratch = Scratch()
        try:
            with numpy.errstate(all="ignore"):
                for index, task in _taken(waiting):
                    results[index] = function(task, scratch)
        finally:
            waiting.clear()

    others: list[Future[None]] = []
    try:
        # Python starts no thread once its main thread has ended.
        with suppress(RuntimeError):
            others += (_pool().submit(work) for _ in range(threads - 1))
        work()
    finally:
        waiting.clear()
        wait(others)
    for other in others:
        other.result()
    return [results[index] for index in range(len(tasks))]


def _taken(waiting: deque[_Task]) -> Iterator[_Task]:
    """Take tasks until none is left; several threads may do so at the same time.

    The last come first: below a diagonal they are the longest, and no thread should begin a long task while others end.
    """
    while waiting:
        try:
            yield waiting.pop()
        except IndexError:
            return


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Return the threads that help the caller's; they are started on demand and kept from call to call."""
    return ThreadPoolExecutor(os.cpu_count(), "mha_spec_numpy")


class Blas:
    """NumPy's BLAS, which is limited to a single thread during a call; no two calls limit it at a time.

    Concurrent products that each use all threads slow each other down. The number of threads also changes how a product
    rounds, so that a batch entry would depend on the others (MHA-PURE-3).
    """

    def __init__(self) -> None:
        from threadpoolctl import ThreadpoolController

        self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        self._lock = Lock()

    @property
    def threads(self) -> int:
        """The number of threads that a product uses."""
        return max((library.num_threads for library in self._libraries), default=1)

    @contextmanager
    def one_thread(self) -> Iterator[int]:
        """Limit the BLAS to a single thread, and yield the number that it had, or 1 if it cannot be limited."""
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
    """Drop the threads, which a forked process does not have, and a lock that they may have held."""
    _pool.cache_clear()
    blas.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

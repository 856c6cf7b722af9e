"""Work spread over the cores: NumPy's matrix products use all of them, its other operations only one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
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

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def each(function: Callable[[_Task], _Result], tasks: Sequence[_Task], a: Arguments) -> Iterator[_Result]:
    """Give the result of each task in order; on NumPy, large work is spread over as many threads as its BLAS has."""

    def quiet(task: _Task) -> _Result:
        with numpy.errstate(all="ignore"):
            return function(task)

    if not isinstance(a.query, numpy.ndarray):
        yield from map(quiet, tasks)
        return
    with blas().one_thread() as available:
        threads = min(available, len(tasks))
        if threads < 2 or a.batch * a.heads * a.q_len * a.kv_len < WORTHWHILE:
            yield from map(quiet, tasks)
            return
        yield from _pool(available).map(quiet, tasks)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """The threads of this process, kept from call to call."""
    return ThreadPoolExecutor(threads, "mha_spec_numpy")


class Blas:
    """NumPy's BLAS, held to one thread while a call is at work, and calls to one at a time.

    Two products at once, each with all threads, hinder each other; and a product rounds otherwise with another number
    of threads, so that a batch entry would depend on the others (MHA-PURE-3).
    """

    def __init__(self) -> None:
        from threadpoolctl import ThreadpoolController

        self._controller = ThreadpoolController().select(user_api="blas")
        self._lock = Lock()

    @property
    def threads(self) -> int:
        """How many threads a product uses now."""
        return max((library.num_threads for library in self._controller.lib_controllers), default=1)

    @contextmanager
    def one_thread(self) -> Iterator[int]:
        """Hold the BLAS to one thread, and say how many it had; 1 where it does not obey."""
        with self._lock:
            before = self.threads
            with self._controller.limit(limits=1):
                yield before if self.threads == 1 else 1


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

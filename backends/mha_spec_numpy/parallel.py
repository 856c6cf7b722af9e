"""Work shared over the cores: NumPy's matrix products use them all, its other operations only one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mha_spec.arguments import Arguments

__all__ = ["each"]

WORTHWHILE = 2**22
"""Below so many scores, starting threads costs more than they save."""

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_pool_in_use = Lock()


def each(function: Callable[[_Task], _Result], tasks: Sequence[_Task], a: Arguments) -> Iterator[_Result]:
    """Give the result of each task in order; on NumPy large work is spread over as many threads as its BLAS uses.

    The BLAS works with one thread meanwhile: two of its calls at once, each with all threads, hinder each other. Its
    setting is that of the process, so a second call at the same time goes without threads.
    """

    def quiet(task: _Task) -> _Result:
        with numpy.errstate(all="ignore"):
            return function(task)

    large = a.batch * a.heads * a.q_len * a.kv_len >= WORTHWHILE
    blas = _blas() if isinstance(a.query, numpy.ndarray) and len(tasks) > 1 and large else None
    threads = min(len(tasks), max((library.num_threads for library in blas.lib_controllers), default=1)) if blas else 1
    if threads == 1 or blas is None or not _pool_in_use.acquire(blocking=False):
        yield from map(quiet, tasks)
        return
    try:
        with blas.limit(limits=1), ThreadPoolExecutor(threads) as pool:
            yield from pool.map(quiet, tasks)
    finally:
        _pool_in_use.release()


@lru_cache(maxsize=1)
def _blas() -> Any:
    """The controller of NumPy's BLAS, or None where threadpoolctl is not installed."""
    try:
        from threadpoolctl import ThreadpoolController
    except ModuleNotFoundError:
        return None
    return ThreadpoolController().select(internal_api="openblas")

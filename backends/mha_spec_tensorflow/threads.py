"""Threads for eager mode, in which TensorFlow starts an operation after another has ended."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import tensorflow as tf
from tensorflow.python.eager.context import context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["results_of"]

_Result = TypeVar("_Result")


def results_of(calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Return the results of independent calls, as many at a time as TensorFlow may run operations; none is recorded.

    A thread that has ended a call takes the next. A call that itself has calls for threads takes them in turn.
    """
    most = tf.config.threading.get_inter_op_parallelism_threads() or _cores()
    threads = min(len(calls), most)
    if threads <= 1 or _worker.is_busy:
        return [call() for call in calls]
    results: dict[int, _Result] = {}
    numbers = deque(range(threads, len(calls)))
    # A scope of a device holds for the thread that enters it.
    eager: Any = context()
    device = eager.device_name

    def work(number: int | None) -> None:
        with tf.device(device), _worker.busy():
            while number is not None:
                results[number] = calls[number]()
                number = _next(numbers)

    started: list[Future[None]] = []
    # Python starts no thread once its main thread has ended.
    with suppress(RuntimeError):
        started += (_pool(most - 1).submit(work, number) for number in range(1, threads))
    numbers.extend(range(1 + len(started), threads))
    try:
        work(0)
    finally:
        numbers.clear()
        wait(started)
    for future in started:
        future.result()
    return [results[number] for number in range(len(calls))]


def _next(numbers: deque[int]) -> int | None:
    """Take the first number; another thread may take the last one at the same time."""
    try:
        return numbers.popleft()
    except IndexError:
        return None


class _Worker(threading.local):
    """A thread that may take calls."""

    is_busy = False
    """True while it takes calls; calls of such a call must not wait for a thread that waits for them."""

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Mark the thread as one that takes calls."""
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False


_worker = _Worker()


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the threads that help the caller's; they are started on demand and kept from call to call."""
    return ThreadPoolExecutor(threads, "mha_spec_tensorflow")

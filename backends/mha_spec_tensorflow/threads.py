"""Threads for eager mode, in which TensorFlow starts an operation after another has ended."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import tensorflow as tf
from tensorflow.python.eager.context import context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["results_of"]

_Result = TypeVar("_Result")


def results_of(calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """Return the results of independent calls, as many at a time as TensorFlow may run operations; none is recorded."""
    threads = tf.config.threading.get_inter_op_parallelism_threads() or _cores()
    if threads == 1:
        return [call() for call in calls]
    # A scope of a device holds for its own thread only.
    eager: Any = context()
    started: list[Future[_Result]] = []
    # Python starts no thread once its main thread has ended.
    with suppress(RuntimeError):
        started += (_pool(threads - 1).submit(_on_device, call, eager.device_name) for call in calls[:-1])
    try:
        results = [call() for call in calls[len(started) :]]
    finally:
        wait(started)
    return [*(future.result() for future in started), *results]


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_device(call: Callable[[], _Result], device: str | None) -> _Result:
    with tf.device(device):
        return call()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the threads that help the caller's; they are started on demand and kept from call to call."""
    return ThreadPoolExecutor(threads, "mha_spec_tensorflow")

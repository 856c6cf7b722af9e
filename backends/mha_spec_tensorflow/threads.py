"""Threads for eager mode, in which TensorFlow starts an operation after another has ended."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
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
    threads = tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count()
    if threads == 1:
        return [call() for call in calls]
    *others, last = calls
    # A scope of a device holds for its own thread only.
    eager: Any = context()
    started = [_pool(threads).submit(_placed, call, eager.device_name) for call in others]
    try:
        result = last()
    finally:
        wait(started)
    return [*(future.result() for future in started), result]


def _placed(call: Callable[[], _Result], device: str | None) -> _Result:
    with tf.device(device):
        return call()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the threads that help the caller's; they are started on demand and kept from call to call."""
    return ThreadPoolExecutor(threads, "mha_spec_tensorflow")


if hasattr(os, "register_at_fork"):
    # A forked process does not have the threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)

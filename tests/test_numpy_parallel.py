"""Tests of the threads of the NumPy backend."""

from __future__ import annotations

import threading

import pytest

from mha_spec_numpy import parallel


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(threads: int) -> None:
    assert parallel._shared(lambda task, _: task * task, range(101), threads) == [task * task for task in range(101)]


@pytest.mark.parametrize("in_the_caller", [False, True])
def test_an_error_ends_the_work_of_all(in_the_caller: bool) -> None:
    caller, failed, worked = threading.get_ident(), threading.Event(), []

    def work(task: int, _: object) -> None:
        if (threading.get_ident() == caller) == in_the_caller:
            failed.set()
            raise MemoryError("in one thread")
        assert failed.wait(60)
        worked.append(task)

    with pytest.raises(MemoryError, match="in one thread"):
        parallel._shared(work, range(1000), 2)
    assert len(worked) < 100

"""Tests of the threads of the NumPy backend, of forked processes and of plans that calls share."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.random_calls import ask, assert_same_bits, converted, random_arrays, random_call
from threadpoolctl import threadpool_limits

import mha_spec_numpy
from mha_spec_numpy import core, parallel, plan

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use two threads for every call, whatever its size and the number of cores."""
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)
    with threadpool_limits(2, user_api="blas"):
        assert parallel.blas().threads == 2, "these tests need a BLAS whose threads can be limited"
        yield


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(threads: int) -> None:
    assert parallel._shared(lambda task, _: task * task, range(101), threads) == [task * task for task in range(101)]


def test_the_caller_works_alone_when_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is closed when the main thread has ended, while another thread may still call."""
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    monkeypatch.setattr(parallel, "_pool", lambda: closed)
    assert parallel._shared(lambda task, _: task * task, range(7), 3) == [task * task for task in range(7)]


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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
@pytest.mark.parametrize("lengths", [(129, 1031), (1, 2053)])
def test_batch_entries_do_not_depend_on_each_other(
    function: str, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = converted(random_arrays(0, batch=3, q_len=lengths[0], kv_len=lengths[1]), "float32")
    together = ask(mha_spec_numpy, function, call)
    assert_same_bits(ask(mha_spec_numpy, function, call), together)
    monkeypatch.setattr(parallel, "WORTHWHILE", 2**60)
    for entry in range(3):
        alone = ask(mha_spec_numpy, function, {name: value[entry : entry + 1] for name, value in call.items()})
        assert_same_bits(alone, {name: value[entry : entry + 1] for name, value in together.items()})


@pytest.mark.usefixtures("threads")
def test_the_threads_of_the_blas_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[int] = []

    def fail(*_: object) -> None:
        during.append(parallel.blas().threads)
        raise ZeroDivisionError

    monkeypatch.setattr(core, "attend", fail)
    monkeypatch.setattr(parallel, "SHARED", 0)
    arrays = random_arrays(0)
    with pytest.raises(ZeroDivisionError):
        mha_spec_numpy.attention(arrays["query"], arrays["key"], arrays["value"])
    assert set(during) == {1}
    assert parallel.blas().threads == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_calls_in_a_forked_process(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = """
import os, warnings, numpy, mha_spec_numpy
warnings.simplefilter("ignore")
x = numpy.ones((2, 2, 512, 1), dtype="float32")
mha_spec_numpy.attention(x, x, x)
child = os.fork()
if child == 0:
    os._exit(int(mha_spec_numpy.attention(x, x, x).sum() != x.sum()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code).stdout.strip() == "0"


def test_calls_from_many_threads() -> None:
    calls = [converted(random_call(seed), "float32") for seed in range(8)]
    wanted = [ask(mha_spec_numpy, "attention", call) for call in calls]
    before = parallel.blas().threads
    with ThreadPoolExecutor(4) as pool:
        for got, right in zip(pool.map(partial(ask, mha_spec_numpy, "attention"), calls * 4), wanted * 4, strict=True):
            assert_same_bits(got, right)
    assert parallel.blas().threads == before


@pytest.mark.parametrize("causal", [False, True])
def test_a_shared_plan_does_not_grow_with_its_calls(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[plan.Plan] = []
    plan_of = plan.plan_of

    def kept(*arguments: Any) -> plan.Plan:
        plans.append(plan_of(*arguments))
        return plans[-1]

    monkeypatch.setattr(core, "plan_of", kept)
    query, key, grad_output = (numpy.ones((2, 3, 5, 7), numpy.float32) for _ in range(3))
    for _ in range(2):
        mha_spec_numpy.attention_vjp(grad_output, query, key, key, causal=causal)
    blocks = len(plans[0].visibility._key_blocks)
    mha_spec_numpy.attention_vjp(grad_output, query, key, key, causal=causal)
    assert len({id(shared) for shared in plans}) == 1
    assert len(plans[0].visibility._key_blocks) == blocks

"""Modules that misbehave as a whole: at the import, in what they declare, and in all calls after some call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.leftovers import nothing_left_behind

from mha_spec_conformance.asking import pool
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.running.runner import NothingToJudge, Settings, run
from mha_spec_conformance.suite.text import one_line
from mha_spec_conformance.targets.loading import TargetError, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.suite.cases import Suite

    Judge = Callable[..., Run]

COMPUTE = """
import os, sys
import numpy
from mha_spec import reference

calls = 0

def compute(query, key, value, mask=None):
    global calls
    calls += 1
    return reference.attention(query, key, value, mask=mask)
"""
ATTENTION = """
def attention(query, key, value, *, mask=None):
    output = compute(query, key, value, mask)
    {then}
    return output
"""
SMOKE, SMOKE_CASES = "attention/smoke/", 4


@pytest.fixture
def judge(tmp_path: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    """Judge the code of a module in the smoke cases and others, and assert that nothing is left behind."""

    def judge(code: str, *only: str, **options: object) -> Run:
        path = tmp_path / "target.py"
        path.write_text(code)
        settings = {"limit": 5.0, "selection": Selection((SMOKE, *only), ("float32",)), **options}
        return run(str(path), suite, Settings(**settings))

    with nothing_left_behind(tmp_path / "temporary", monkeypatch):
        yield judge


def reasons(run: Run, outcome: str) -> str:
    """Join the reasons of all results of an outcome."""
    return "; ".join(str(result.reason) for result in run.results if result.outcome == outcome)


def clauses(run: Run) -> set[str]:
    """Return the clauses of all failures."""
    return {clause for result in run.failures for clause in result.clauses}


PASSING = {
    "prints_30_mb_at_the_import": "import sys\nfor _ in range(3): sys.stdout.write('y' * 10_000_000)\n",
    "sets_a_low_limit_of_recursion": "import sys\nsys.setrecursionlimit(50)\n",
    "declares_a_subclass_of_str": "class Name(str): pass\narrays = Name('numpy')\ndtypes = ('float32',)\n",
    "defines_json": "json = pickle = os = None\n",
    "replaces_exit": "import sys\nsys.exit = None\n",
    "closes_its_streams": "import os\nos.closerange(0, 3)\n",
    "changes_the_folder": "import os\nos.chdir('/')\nos.environ.clear()\n",
    "starts_a_thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(77,)).start()\n",
    "starts_a_process": "import subprocess\nsubprocess.Popen(['sleep', '77'])\n",
    "starts_a_daemon": "import subprocess\nsubprocess.Popen(['sleep', '77'], env={}, start_new_session=True)\n",
    "forks": "import os, time\nif os.fork() == 0: time.sleep(77); os._exit(0)\n",
    "ignores_signals": "import signal\nfor number in (1, 2, 3, 15): signal.signal(number, signal.SIG_IGN)\n",
    "raises_at_exit": "import atexit\natexit.register(lambda: 1 / 0)\n",
    "raises_numpy_errors": "import numpy\nnumpy.seterr(all='call'); numpy.seterrcall(print)\n",
}


def test_changes_of_a_module_to_its_process_do_not_change_its_verdict(judge: Judge) -> None:
    done = judge("".join(PASSING.values()) + COMPUTE + ATTENTION.format(then=""), "attention/mask")
    assert {(result.outcome, result.reason) for result in done.results} == {("pass", None)}
    assert len(done.results) > SMOKE_CASES


CALLABLES = {
    "object": "class Attention:\n    def __call__(self, {signature}): return compute({names})\nattention = Attention()",
    "method": "class Module:\n    def run(self, {signature}): return compute({names})\nattention = Module().run",
    "class_method": "class Module:\n    @classmethod\n    def run(cls, {signature}): return compute({names})\n"
    "attention = Module.run",
    "partial": "import functools\nattention = functools.partial(lambda scale, {signature}: compute({names}), 1.0)",
    "class": "class attention:\n    def __new__(cls, {signature}): return compute({names})",
    "compiled_in_a_pool": "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\n"
    "executor = ProcessPoolExecutor(1, multiprocessing.get_context('fork'))\n"
    "def attention({signature}): return executor.submit(compute, {names}).result()",
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_every_kind_of_callable_is_an_attention(judge: Judge, kind: str) -> None:
    code = CALLABLES[kind].format(signature="query, key, value, *, mask=None", names="query, key, value, mask")
    done = judge(COMPUTE + code)
    assert (done.status, len(done.results)) == (0, SMOKE_CASES)


REFUSED = {
    "raise ValueError('\\udcff')": r"does not import: ValueError: \udcff (",
    "raise SystemExit": "does not import: SystemExit",
    "raise KeyboardInterrupt": "does not import: KeyboardInterrupt",
    "class Odd(Exception):\n    def __str__(self): return 7\nraise Odd": "does not import: Odd: <Odd whose text raises",
    "x = = 1": "does not import: SyntaxError",
    "\0": "does not import: ",
    "": "there is no function called attention",
    "attention = 7": "there is no function called attention",
    "def attention(): pass": "attention must take query, key, value by position",
    "profile = None\ndef attention(query, key, value): pass": "`profile` must be one of standard",
    "dtypes = 'float32'\ndef attention(query, key, value): pass": "`dtypes` must be a tuple of names",
    "dtypes = (7,)\ndef attention(query, key, value): pass": "`dtypes` must be one of",
    "arrays = 'cupy'\ndef attention(query, key, value): pass": "`arrays` must be one of",
    "conventions = 7\ndef attention(query, key, value): pass": "`conventions` must be a dict",
    "features = {'mask'}\ndef attention(query, key, value): pass": "`features` must be a tuple",
    "device = 7\ndef attention(query, key, value): pass": "`device` must be a string",
}


@pytest.mark.parametrize("code", REFUSED)
def test_module_that_cannot_be_judged_is_refused(tmp_path: Path, code: str) -> None:
    path = tmp_path / "target.py"
    path.write_text(code)
    with pytest.raises(TargetError) as caught:
        load(str(path))
    assert REFUSED[code] in one_line(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('\\udcff\\x1b[2J')", r"does not import: ValueError: \udcff\x1b[2J ("),
        ("import os; os._exit(0)", "ended the process while it was imported: the process ended with exit status 0"),
        ("import os; os.kill(os.getpid(), 11)", "the process ended with signal SIGSEGV"),
        ("import os; os.closerange(0, 4096)", "ended the process while it was imported: the process "),
        ("import os; os.write(1, b'half'); os._exit(4)", "exit status 4; last printed: half"),
    ],
)
def test_import_that_ends_the_process_is_described_in_one_line(judge: Judge, code: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        judge(code)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_import_that_hangs_has_a_time_limit(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SHORTEST_START", 1.0)
    with pytest.raises(TargetError, match="did not load in 1 s"):
        judge("import time; time.sleep(10000)", limit=0.1)


def test_crash_is_the_outcome_of_its_cases_alone(judge: Judge) -> None:
    crashing = "import ctypes\n" + COMPUTE + ATTENTION.format(then="if mask is not None: ctypes.string_at(0)")
    done = judge(crashing)
    outcomes = {result.ask.case.id.removeprefix(SMOKE): result.outcome for result in done.results}
    assert outcomes == {"plain": "pass", "head-layout": "pass", "lse": "pass", "mask-polarity": "crash"}
    assert reasons(done, "crash") == "the process ended with signal SIGSEGV"


def test_cases_that_supports_refuses_are_counted_by_feature(judge: Judge) -> None:
    only_smoke = "def supports(question): return question.id.startswith('attention/smoke')\n"
    done = judge(only_smoke + COMPUTE + ATTENTION.format(then=""), "attention/mask")
    refused = len(done.results) - SMOKE_CASES
    assert refused > 3
    assert (done.status, done.summary["pass"], done.summary["unsupported"]) == (0, SMOKE_CASES, refused)
    assert f"unsupported: {refused} (" in done.verdict
    assert "mask " in done.verdict


def test_every_answer_from_some_call_on_is_judged(judge: Judge) -> None:
    done = judge(COMPUTE + ATTENTION.format(then="if calls > 20: return numpy.zeros(output.shape, 'V0')"))
    assert done.status == 1
    assert "an array of dtype=|V0 does not hold numbers" in reasons(done, "fail")


WRONG = {
    "overwrites_an_earlier_result": (
        "MHA-PURE-4",
        "output = held.setdefault(output.shape, output); output[...] = compute(query, key, value, mask)",
    ),
    "is_wrong_for_transposed_inputs": ("MHA-PURE-2", "if query.strides[3] > query.strides[2] > 0: output *= 2"),
    "writes_to_inputs_with_gaps": ("MHA-PURE-1", "if query.strides[3] == 8: query[...] = 0"),
    "is_nan_the_second_time": (
        "MHA-PURE-3",
        """plain = query.flags.c_contiguous and query.flags.writeable
    if plain and held.get("last") == query.tobytes(): output *= numpy.nan
    held["last"] = query.tobytes()""",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_fault_that_is_not_in_the_first_answer_fails(judge: Judge, kind: str) -> None:
    clause, then = WRONG[kind]
    done = judge("held = {}\n" + COMPUTE + ATTENTION.format(then=then))
    assert done.status == 1
    assert clause in clauses(done)


def test_target_that_refuses_all_other_layouts_passes_and_the_report_names_them(judge: Judge) -> None:
    refusing = "if not query.flags.c_contiguous or not query.flags.writeable: raise NotImplementedError('strides')"
    done = judge(COMPUTE + ATTENTION.format(then=refusing))
    assert done.status == 0
    assert {"strided", "transposed", "fortran", "reversed", "read_only"} <= set(done.refused_layouts)


def test_garbage_where_lengths_differ_fails_without_an_offset(judge: Judge) -> None:
    garbage = """
def attention(query, key, value, *, causal=False):
    if causal and query.shape[2] != key.shape[2]:
        return numpy.full((*query.shape[:3], value.shape[3]), 7, query.dtype)
    return reference.attention(query, key, value, causal=causal, **({"q_offset": 0} if causal else {}))
"""
    done = judge(COMPUTE + garbage, "attention/causal")
    assert done.status == 1
    assert {result.outcome for result in done.failures} <= {"fail", "deviation"}


def test_output_that_cannot_be_joined_is_a_failure(judge: Judge) -> None:
    squeezing = """
import mha_spec

def multi_head_attention(query, key, value, params, *, cache=None, causal=False, rotary=None, norm_epsilon=1e-6):
    output, cache = mha_spec.multi_head_attention(
        query, key, value, params, cache=cache, causal=causal, rotary=rotary, norm_epsilon=norm_epsilon
    )
    return (output[:, 0] if output.shape[1] == 1 else output), cache
"""
    done = judge(squeezing, "multi_head_attention/cache/prefill-then-steps")
    assert done.status == 1
    assert "`output` of 3 calls cannot be joined, received the shapes" in reasons(done, "fail")


def test_input_that_torch_emptied_counts_as_written(judge: Judge) -> None:
    pytest.importorskip("torch")
    emptying = """
arrays = "torch"
import torch

calls = 0

def attention(query, key, value):
    global calls
    calls += 1
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    output = torch.softmax(query @ key.transpose(2, 3) / query.shape[3] ** 0.5, -1) @ value
    if calls == 4:
        query.untyped_storage().resize_(0)
    elif calls > 4:
        query.set_(torch.empty(0))
    return output
"""
    done = judge(emptying, limit=60.0)
    assert "storage that is not resizable" in reasons(done, "error")
    assert "the call wrote to its input query" in reasons(done, "fail")
    assert done.summary["fail"] + done.summary["error"] == len(done.results)


def test_input_that_jax_donated_counts_as_written(judge: Judge) -> None:
    pytest.importorskip("jax")
    donating = """
arrays = "jax"
import functools
import jax

@functools.partial(jax.jit, donate_argnums=(0,))
def attention(query, key, value):
    scores = query @ key.swapaxes(2, 3) / query.shape[3] ** 0.5
    return jax.nn.softmax(scores, axis=-1) @ value
"""
    done = judge(donating, limit=60.0)
    assert (done.status, clauses(done)) == (1, {"MHA-PURE-1"})


def test_memory_that_grows_from_call_to_call_has_a_limit(judge: Judge) -> None:
    growing = ATTENTION.format(then="if mask is None: held.append(numpy.ones(2**23))")
    done = judge("held = []\n" + COMPUTE + growing, memory=500 * 2**20, limit=60.0)
    assert "the limit is 500.0 MiB (--memory)" in reasons(done, "crash")
    assert done.status == 1


def test_smoke_cases_that_all_crash_are_not_judged(judge: Judge) -> None:
    with pytest.raises(NothingToJudge, match="the smoke cases end its process: the process ended with exit status 3"):
        judge(COMPUTE + ATTENTION.format(then="os._exit(3)"))

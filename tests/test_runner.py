"""Whole runs against wrong targets: each fault has its outcome, and the run continues."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest
from support.runs import outcomes

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.selection import Selection, asks, probes
from mha_spec_conformance.running.known import Known
from mha_spec_conformance.running.runner import NothingToJudge, Settings, run, without_progress
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mha_spec_conformance.running.run import Run
    from mha_spec_conformance.running.runner import Progress
    from mha_spec_conformance.suite.cases import Suite

ONLY = "attention/smoke/"
RIGHT = """
import numpy
from mha_spec import reference

def attention(query, key, value, *, mask=None):
    return reference.attention(query, key, value, mask=mask)
"""


@pytest.fixture
def judge(tmp_path: Path, suite: Suite) -> Callable[..., Run]:
    """Judge a target file with this text on a part of the suite."""

    def judge(
        text: str,
        *only: str,
        dtypes: tuple[str, ...] = ("float32",),
        progress: Progress = without_progress,
        **settings: object,
    ) -> Run:
        path = tmp_path / "target.py"
        path.write_text(text)
        return run(str(path), suite, Settings(Selection(only or (ONLY,), dtypes), **settings), progress)

    return judge


def test_right_attention_passes(judge: Callable[..., Run]) -> None:
    done = judge(RIGHT)
    assert outcomes(done, ONLY) == {"plain": "pass", "head-layout": "pass", "mask-polarity": "pass", "lse": "pass"}
    assert done.status == 0
    assert done.notes == ()
    assert not done.complete
    assert "conformant" not in done.verdict
    assert done.verdict.startswith("partial run: 4 of 4 passed")
    assert all(result.allowance_used <= 1 for result in done.results)


def test_inverted_mask_is_a_deviation_and_can_be_accepted(judge: Callable[..., Run]) -> None:
    wrong = RIGHT.replace("mask=mask)", "mask=None if mask is None else ~mask)")
    done = judge(wrong)
    assert outcomes(done, ONLY)["mask-polarity"] == "deviation"
    assert done.status == 1
    assert done.conventions == {"mask_polarity": "true_hides"}
    assert any("pass ~mask" in note for note in done.notes)
    accepted = judge(wrong, accepted=frozenset({("mask_polarity", "true_hides")}))
    assert accepted.status == 0
    assert accepted.summary["deviation"] == 1


def test_wider_output_is_one_deviation_with_its_values_judged(judge: Callable[..., Run]) -> None:
    wide = "    return reference.attention(query, key, value, mask=mask).astype(numpy.float64)"
    done = judge(RIGHT.replace("    return reference.attention(query, key, value, mask=mask)", wide))
    assert set(outcomes(done, ONLY).values()) == {"deviation"}
    assert done.conventions == {"output_dtype": "float64"}
    worse = judge(RIGHT.replace("    return reference.attention(query, key, value, mask=mask)", wide + " + 1"))
    assert set(outcomes(worse, ONLY).values()) == {"fail"}


MISBEHAVES = """
import ctypes, os, sys, time
from mha_spec import reference

count = 0

def attention(query, key, value, *, mask=None):
    print("noise " * 9999)
    if mask is not None:
        {masked}
    if query.shape == (2, 3, 5, 11) and value[0, 0, 0, 0] != {plain}:
        {coded}
    return reference.attention(query, key, value)
"""


@pytest.mark.parametrize(
    ("body", "outcome", "reason"),
    [
        ("ctypes.string_at(0)", "crash", "the process ended with signal SIGSEGV"),
        ("os._exit(7)", "crash", "the process ended with exit status 7"),
        ("sys.exit(7)", "error", "SystemExit: 7"),
        ("raise KeyError('no such head')", "error", "KeyError: 'no such head' (.*target.py:12)"),
        ("raise NotImplementedError('no heads')", "unsupported", "no heads"),
        ("query += 1; return reference.attention(query - 1, key, value)", "fail", "wrote to its input query"),
        (
            "return reference.attention(query, key, value).swapaxes(1, 2)",
            "fail",
            r"must have shape=\(2, 3, 5, 11\), received shape=\(2, 5, 3, 11\)",
        ),
        (
            "return reference.attention(query, key, value).astype(int)",
            "fail",
            "must have dtype=float32, received int64",
        ),
    ],
)
def test_misbehaviour_is_the_outcome_of_one_case(
    judge: Callable[..., Run], suite: Suite, capfd: pytest.CaptureFixture[str], body: str, outcome: str, reason: str
) -> None:
    first = next(case for case in suite.cases if case.id == "attention/smoke/plain").inputs("float32")["value"][
        0, 0, 0, 0
    ]
    done = judge(MISBEHAVES.format(plain=float(first), coded=body, masked="pass"), "smoke/plain", "smoke/head-layout")
    results = {result.ask.case.id: result for result in done.results}
    assert results["attention/smoke/plain"].outcome == "pass"
    assert results["attention/smoke/head-layout"].outcome == outcome
    assert re.search(reason, results["attention/smoke/head-layout"].reason or "")
    assert "noise" not in "".join(capfd.readouterr())


def test_hang_is_a_timeout_and_the_run_continues(judge: Callable[..., Run]) -> None:
    done = judge(MISBEHAVES.format(plain=0, coded="pass", masked="time.sleep(60)"), limit=2.0)
    assert outcomes(done, ONLY) == {"plain": "pass", "head-layout": "pass", "mask-polarity": "timeout", "lse": "pass"}
    assert done.status == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"`output` must be an array: None \(is a `return` missing\?\)"),
        ("return query, key", r"`output` must be an array: a tuple of 2 is not an array"),
        ("return value", r"must have shape=\(2, 3, 5, 11\), received shape=\(2, 3, 7, 11\)"),
        ("return reference.attention(query, key, value).swapaxes(1, 2)", r"axes are \(batch, q_len, heads, v_dim\)"),
        (
            "return reference.attention(*(x.swapaxes(1, 2) for x in (query, key, value))).swapaxes(1, 2)",
            r"the target takes the axes as \(batch, length, heads, size\)",
        ),
        ("raise RuntimeError('no kernel')", r"the smoke cases raise RuntimeError: no kernel \(.*target.py:3\)"),
        ("import os; os._exit(3)", "the smoke cases end its process: the process ended with exit status 3"),
    ],
)
def test_wrong_target_file_is_distinguished_from_a_wrong_attention(
    judge: Callable[..., Run], body: str, message: str
) -> None:
    with pytest.raises(NothingToJudge, match=message):
        judge(f"from mha_spec import reference\ndef attention(query, key, value):\n    {body}")


def test_target_that_ends_the_process_on_import(judge: Callable[..., Run]) -> None:
    with pytest.raises(TargetError, match=r"ended the process while it was imported: .*exit status 5"):
        judge("import os; os._exit(5)")


def test_selection_without_a_claimed_case_is_an_error(judge: Callable[..., Run]) -> None:
    with pytest.raises(NothingToJudge, match="nothing to judge"):
        judge("def attention(query, key, value): ...", "attention/softcap")


def test_target_that_refuses_everything_is_not_judged(judge: Callable[..., Run]) -> None:
    done = judge("def attention(query, key, value): raise NotImplementedError('not today')")
    assert done.status == 2
    assert "conformant" not in done.verdict


def test_required_feature_must_be_asked(judge: Callable[..., Run]) -> None:
    done = judge(RIGHT, required=("mask", "softcap"))
    assert done.missing == ("softcap",)
    assert done.status == 1
    assert "required but not asked: softcap" in done.verdict


def test_known_failures_are_strict(judge: Callable[..., Run]) -> None:
    wrong = RIGHT.replace("mask=mask)", "mask=None)")
    failing, passing, unknown = (
        Known(f"attention/smoke/{name}", "reason") for name in ("mask-polarity", "plain", "none")
    )
    assert judge(wrong).status == 1
    assert judge(wrong, known=(failing,)).status == 0
    assert judge(wrong, known=(Known(failing.id, "reason", "float64"),)).status == 1
    stale = judge(wrong, known=(failing, passing))
    assert stale.status == 1
    assert stale.stale == ["known failure attention/smoke/plain did not fail (pass): remove it from the file"]
    assert judge(wrong, known=(failing, unknown)).stale == [
        "known failure attention/smoke/none is not a case of the suite: remove it from the file"
    ]


def test_run_stops_after_the_maximum_of_failures(judge: Callable[..., Run]) -> None:
    done = judge(RIGHT.replace("mask=mask)", "mask=mask) * 2"), "attention/", max_fail=3)
    assert len(done.failures) == 3
    assert not done.complete
    assert "conformant" not in done.verdict
    assert done.status == 1


WRONG_THE_SECOND_TIME = """
from mha_spec import reference

seen, again = set(), False

def supports(question):
    global again
    again = question.id in seen
    seen.add(question.id)
    return True

def attention(query, key, value, *, mask=None):
    return reference.attention(query, key, value, mask=mask) + again
"""


def test_result_that_changes_at_the_end_replaces_the_first_one(judge: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    shown: list[tuple[int, int, int]] = []
    done = judge(WRONG_THE_SECOND_TIME, "attention/mask/", results=path, progress=lambda *now: shown.append(now))
    count, failed = len(done.results), len(done.failures)
    assert 2 <= failed < count
    assert shown[-1] == (count, count, failed)
    assert [numbers[:2] for numbers in shown] == [(min(step, count), count) for step in range(count + failed + 1)]
    lines = path.read_bytes().splitlines()
    assert len(set(lines)) == len(lines) > count + failed
    assert len(judge(WRONG_THE_SECOND_TIME, "attention/mask/", max_fail=1).failures) == 1


DAMAGE: list[dict[str, object]] = [
    {"id": [1]},
    {"dtype": None},
    {"outcome": "internal"},
    {"outcome": ["pass"]},
    {"seconds": "1"},
    {"allowance_used": 10**400},
    {"diagnosis": [[1]]},
    {"worst": {"output": "output", "index": [[0]], "expected": 0, "got": 0, "allowance": 0}},
    {"conventions": [["mask_polarity"]]},
]


def test_damaged_results_are_judged_again(judge: Callable[..., Run], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    judge(RIGHT, "attention/mask/", results=path)
    header, *lines = path.read_text().splitlines()
    assert len(lines) > len(DAMAGE)
    damaged = [json.dumps(json.loads(line) | change) for line, change in zip(lines, DAMAGE, strict=False)]
    kept = [header, *damaged, "[" * 100_000, *lines[len(damaged) :]]
    path.write_text("".join(f"{line}\n" for line in kept))
    done = judge(RIGHT, "attention/mask/", results=path, resume=True)
    assert len(done.results) == len(lines)
    assert set(outcomes(done).values()) == {"pass"}
    assert len(path.read_text().splitlines()) == len(kept) + len(damaged)


def test_several_workers_give_the_same_results_in_the_same_order(judge: Callable[..., Run]) -> None:
    alone, together = (judge(RIGHT, "attention/mask/", jobs=jobs) for jobs in (1, 2))
    assert [(r.ask.key, r.outcome) for r in alone.results] == [(r.ask.key, r.outcome) for r in together.results]


CAUSAL = """
{declaration}
from mha_spec import reference

def attention(query, key, value, *, causal=False):
    offset = key.shape[2] - query.shape[2]
    return reference.attention(query, key, value, causal=causal, q_offset=offset if causal else None)
"""


def test_a_declared_alignment_is_judged_and_an_undeclared_one_is_found_and_judged(judge: Callable[..., Run]) -> None:
    lower_right, upper_left = (f"conventions = {{'causal_alignment': '{x}'}}" for x in ("lower_right", "upper_left"))
    declared = judge(CAUSAL.format(declaration=lower_right), "causal+offset", "causal/")
    assert {"offset"} <= {feature for result in declared.results for feature in result.ask.features}
    assert declared.status == 0
    wrong = judge(CAUSAL.format(declaration=upper_left), "causal+offset", "causal/")
    assert wrong.status == 1
    silent = judge(CAUSAL.format(declaration=""), "causal+offset", "causal/")
    assert silent.alignment == "lower_right"
    assert [result.ask.key for result in silent.results] == [result.ask.key for result in declared.results]
    assert silent.status == 0
    assert silent.conventions["causal_alignment"] == "lower_right"


def test_every_layout_is_tried(judge: Callable[..., Run]) -> None:
    ignores_strides = """
import numpy
from mha_spec import reference

def flat(x):
    if x.base is None:
        return x
    return numpy.ndarray(x.shape, x.dtype, numpy.ascontiguousarray(x.base).reshape(-1)[: x.size].tobytes())

def attention(query, key, value):
    return reference.attention(flat(query), flat(key), flat(value))
"""
    done = judge(ignores_strides, "smoke/plain", "smoke/head-layout")
    failed = [result for result in done.results if result.outcome == "fail"]
    assert failed
    assert failed[0].clauses == ("MHA-PURE-2",)
    assert "right for plain inputs, but wrong for strided inputs" in failed[0].reason


def test_case_with_nan_is_not_asked_with_inputs_of_stride_0(judge: Callable[..., Run]) -> None:
    done = judge("from mha_spec.reference import varlen_attention\n", "varlen_attention/poisoned-sequence")
    assert [result.outcome for result in done.results] == ["pass"]


ORDINARY = """
from mha_spec import reference

def attention(query, key, value, *, causal=False):
    offset = {offset}
    return reference.attention(query, key, value, causal=causal, q_offset=offset if causal else None)
"""


NO_ALIGNMENT = "the causal alignment of the target is none of upper_left, lower_right"


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("offset", "alignment", "notes"),
    [
        ("0", "upper_left", ()),
        ("key.shape[2] - query.shape[2]", "lower_right", ()),
        ("7", None, (f"{NO_ALIGNMENT}; the report shows the calls of upper_left",)),
    ],
)
def test_causal_alignment_is_found(
    judge: Callable[..., Run], jobs: int, offset: str, alignment: str | None, notes: tuple[str, ...]
) -> None:
    done = judge(ORDINARY.format(offset=offset), "causal/", jobs=jobs)
    assert done.alignment == alignment
    assert done.notes == notes
    assert done.results


def test_mistake_of_causal_is_named_without_an_offset(judge: Callable[..., Run]) -> None:
    """No alignment fits, and the failures are those of the alignment under which the mistake has a name."""
    for offset, nearest in (("1", "upper_left"), ("key.shape[2] - query.shape[2] + 1", "lower_right")):
        done = judge(ORDINARY.format(offset=offset), "causal/", "causal+offset/")
        assert done.notes == (f"{NO_ALIGNMENT}; the report shows the calls of {nearest}",)
        (cause,) = done.findings.causes
        assert "causal-shows-the-next" in (cause.name, *cause.others)


def test_alignment_is_found_in_a_selected_dtype(suite: Suite) -> None:
    claims = Claims("x", {"attention": ("causal",)}, ("float64", "float32"))
    asked = probes(suite.cases, claims, Selection(dtypes=("float32",)))
    assert {ask.dtype for asks in asked.values() for ask in asks} == {"float32"}
    assert probes(suite.cases, claims, Selection(dtypes=("bfloat16",))) == {}


@pytest.mark.parametrize("jobs", [1, 2])
def test_dropped_answers_do_not_arrive_later(tmp_path: Path, suite: Suite, jobs: int) -> None:
    path = tmp_path / "target.py"
    path.write_text(RIGHT)
    with Pool(str(path), jobs) as pool:
        questions = [ask.question() for ask in asks(suite.cases, pool.claims, Selection((ONLY,)))]
        early = pool.answers(*([question] for question in questions))
        next(early)
        early.close()
        assert [question.id for question, _ in pool.answers(questions[-1:])] == [questions[-1].id]


def test_questions_of_a_group_go_to_the_same_process(tmp_path: Path, suite: Suite) -> None:
    path = tmp_path / "target.py"
    path.write_text(
        "import os\n\n\ndef attention(query, key, value):\n    raise NotImplementedError(str(os.getpid()))\n"
    )
    with Pool(str(path), 2) as pool:
        questions = [ask.question() for ask in asks(suite.cases, pool.claims, Selection())]
        assert len(questions) > 12
        groups = [questions[first : first + 5] for first in range(0, len(questions), 5)]
        process = {(asked.id, asked.dtype): answer.reason for asked, answer in pool.answers(*map(iter, groups))}
        of_groups = [{process[question.id, question.dtype] for question in group} for group in groups]
        assert len(process) == len(questions)
        assert {len(processes) for processes in of_groups} == {1}
        assert len(set().union(*of_groups)) == 2


def test_target_with_only_should_cases_is_not_judged(judge: Callable[..., Run]) -> None:
    done = judge(
        RIGHT
        + "\ndef supports(question):\n    return question.id in SHOULD\n"
        + "\nSHOULD = {case.id for case in __import__('mha_spec_conformance.suite.cases').suite.cases.load().cases"
        + " if case.level == 'SHOULD'}\n",
        "attention/",
    )
    assert done.judged
    assert done.status == 2
    assert done.verdict.startswith("no MUST case was judged, only ")
    assert "conformant" not in done.verdict


INVERTED = RIGHT.replace(
    "    return reference.attention(query, key, value, mask=mask)",
    "    mask = None if mask is None else ~mask\n    {first}\n"
    "    return reference.attention({operands}, mask=mask){last}",
)


@pytest.mark.parametrize(
    ("first", "operands", "last", "outcome", "clause"),
    [
        ("", "query, key, value", "", "deviation", None),
        ("", "query, key, value", ".astype(numpy.float64)", "deviation", None),
        ("query += 1", "query - 1, key, value", "", "fail", "MHA-PURE-1"),
        (
            "value = value if value.flags.c_contiguous else value[::-1]",
            "query, key, value",
            "",
            "fail",
            "MHA-PURE-2",
        ),
    ],
)
def test_accepted_convention_does_not_hide_another_fault(
    judge: Callable[..., Run], first: str, operands: str, last: str, outcome: str, clause: str | None
) -> None:
    text = INVERTED.format(first=first, operands=operands, last=last)
    done = judge(text, "smoke/mask-polarity", accepted=frozenset({("mask_polarity", "true_hides")}))
    result = done.results[0]
    assert result.outcome == outcome
    assert clause is None or result.clauses == (clause,)
    assert done.status == int(bool(first or last))
    assert (("output_dtype", "float64") in result.conventions) is bool(last)


def test_accepting_every_convention_of_an_answer_excuses_it(judge: Callable[..., Run]) -> None:
    text = INVERTED.format(first="", operands="query, key, value", last=".astype(numpy.float64)")
    accepted = frozenset({("mask_polarity", "true_hides"), ("output_dtype", "float64")})
    assert judge(text, "smoke/mask-polarity", accepted=accepted).status == 0


def test_known_failures_do_not_stop_a_run(judge: Callable[..., Run], suite: Suite) -> None:
    wrong = RIGHT.replace("mask=mask)", "mask=mask) * 2")
    smoke = [case.id for case in suite.cases if case.id.startswith(ONLY)]
    known = tuple(Known(name, "doubled") for name in smoke)
    done = judge(wrong, known=known, max_fail=1)
    assert (done.finished, len(done.results), done.status) == (True, len(smoke), 0)
    stopped = judge(wrong, "attention/mask/", known=known, max_fail=2)
    assert (stopped.finished, len(stopped.failures), stopped.status) == (False, 2, 1)


def test_wrong_dtype_breaks_the_clause_of_dtypes(judge: Callable[..., Run]) -> None:
    for dtype, outcome in (("float64", "deviation"), ("float16", "fail"), ("complex128", "fail")):
        results = judge(
            RIGHT.replace("mask=mask)", f"mask=mask).astype('{dtype}')"), "smoke/plain", "smoke/lse"
        ).results
        assert {result.outcome for result in results} == {outcome}
        assert {result.clauses for result in results} == {("MHA-DTYPE-1",)}
        assert {result.reason for result in results} == {f"`output` must have dtype=float32, received {dtype}"}


@pytest.mark.parametrize(
    ("only", "dtypes", "message"),
    [
        (ONLY, ("bfloat16",), "it claims float64, float32; --dtypes asks bfloat16"),
        ("merge_attention/both-empty/prime", ("float32",), "it does not define merge_attention"),
    ],
)
def test_reason_why_nothing_is_judged_is_given(
    judge: Callable[..., Run], only: str, dtypes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(NothingToJudge, match=message):
        judge(RIGHT, only, dtypes=dtypes)


@pytest.mark.parametrize("signature", ["*, query, key, value", ""])
def test_operands_are_taken_by_position(judge: Callable[..., Run], signature: str) -> None:
    with pytest.raises(TargetError, match="attention must take query, key, value by position"):
        judge(f"def attention({signature}): ...")


def test_smoke_cases_end_after_the_first_hang(judge: Callable[..., Run]) -> None:
    start = time.monotonic()
    with pytest.raises(NothingToJudge, match="no answer in 3 s"):
        judge("import time\ndef attention(query, key, value): time.sleep(60)", limit=3.0)
    assert time.monotonic() - start < 6

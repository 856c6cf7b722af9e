from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.budget import affordable
from support.subject import Subject

from mha_spec.steps import Steps
from mha_spec_conformance.judging.prediction import can_show
from mha_spec_conformance.mistakes import MISTAKES, Mistake
from mha_spec_conformance.suite.spec import clauses

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Case, Suite

PROVEN_ELSEWHERE = {
    "MHA-ARG-4": "tests/test_arguments.py: goldens are arrays of no library and no device",
    "MHA-PURE-4": "tests/test_worker.py: a golden is about a single call",
    **{f"MHA-ROTARY-{n}": "tests/test_rotary_scaling.py: a golden calls a backend" for n in range(9, 17)},
    **{f"MHA-SHARD-{n}": "tests/test_jax_ring.py: a golden lies on one device" for n in range(1, 8)},
    "MHA-CACHE-11": "tests/test_paged_cache.py: a table of most libraries is not read",
    **{f"MHA-LAYOUT-{n}": "tests/test_layouts.py: a golden has no layout" for n in (1, 2, 3, 4, 5)},
}
"""Clauses that no golden can test."""

NOTED = ("MHA-ACC-2",)
"""Clauses about statistics, which a report notes without failing."""


def shows(mistake: Mistake, clause: str, cases: tuple[Case, ...]) -> Case | None:
    """Return the smallest case citing the clause that the reference with the mistake does not pass."""
    subject = Subject.over(mistake.steps)
    subject.judge.mistakes = []  # Comparing a wrong result with every known mistake takes most of a minute.
    for case in cases:
        if clause in case.clauses and can_show(mistake, case):
            for dtype in case.dtypes if mistake.native else {"float32", *case.dtypes[:1]} & set(case.dtypes):
                result = subject.outcome(case, dtype, every_layout=clause == "MHA-PURE-2")
                if result.note is not None if clause in NOTED else result.outcome != "pass":
                    return case
    return None


@pytest.mark.parametrize("clause", clauses())
def test_clause_has_a_case_that_fails_without_it(clause: str, smallest_first: tuple[Case, ...]) -> None:
    if clause in PROVEN_ELSEWHERE:
        assert not any(clause in case.clauses for case in smallest_first)
        return
    assert any(clause in case.clauses for case in smallest_first), "no case cites it"
    citing = [mistake for mistake in MISTAKES if clause in mistake.clauses]
    assert citing, "no mistake breaks it"
    survivors = [mistake.name for mistake in citing if shows(mistake, clause, smallest_first) is None]
    assert not survivors, "no case citing it fails"


def test_cases_cite_only_known_clauses(suite: Suite) -> None:
    assert {clause for case in suite.cases for clause in case.clauses} <= set(clauses())


def test_clauses_proven_elsewhere_exist() -> None:
    assert set(PROVEN_ELSEWHERE) <= set(clauses())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_specification_passes_every_case(dtype: str, suite: Suite) -> None:
    subject = Subject.over(Steps())
    results = [subject.outcome(case, dtype) for case in affordable(suite.cases, one_in=29) if dtype in case.dtypes]
    failed = [result for result in results if result.outcome != "pass" or result.note]
    assert len(results) > 600
    assert not [(result.ask.case.id, result.outcome, result.reason, result.note) for result in failed]

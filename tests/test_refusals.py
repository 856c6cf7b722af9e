"""Calls that must raise: backends alone are asked them, and an error of ours that names the argument passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mha_spec_conformance.asking.question import Answer, Raised
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.running.runner import Settings, run
from mha_spec_conformance.targets.claims import Claims

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Suite


def test_only_backends_are_asked_calls_that_must_raise(suite: Suite) -> None:
    keywords = {
        "attention": ("mask", "causal", "softcap"),
        "attention_vjp": (),
        "merge_attention": (),
        "attention_weights": (),
    }
    for registered in (False, True):
        asked = asks(suite.cases, Claims("x", keywords, ("float32",), registered=registered), Selection())
        assert any(ask.case.expect == "error" for ask in asked) is registered


@pytest.mark.parametrize(
    ("classes", "names_it", "outcome"),
    [
        (("ArgumentValueError", "MhaSpecError", "ValueError"), True, "pass"),
        (("ArgumentValueError", "MhaSpecError", "ValueError"), False, "fail"),
        (("ArgumentTypeError", "MhaSpecError", "TypeError"), True, "fail"),
        (("ValueError", "Exception"), True, "fail"),
        (None, False, "fail"),
    ],
)
def test_refusal_is_an_error_of_mha_spec_that_names_the_argument(
    suite: Suite, classes: tuple[str, ...] | None, names_it: bool, outcome: str
) -> None:
    case = next(case for case in suite.cases if case.expect == "error" and case.error["kind"] == "value")
    claims = Claims("x", {case.function: ()}, (case.dtypes[0],), registered=True)
    ask = asks([case], claims, Selection())[0]
    message = f"`{case.error['argument']}` is wrong" if names_it else "something is wrong"
    answer = Answer("returned") if classes is None else Answer("raised", raised=Raised(classes, message))
    assert Judge(claims).result(ask, answer).outcome == outcome


def test_refusals_of_the_reference_pass(suite: Suite) -> None:
    errors = [case.id for case in suite.cases if case.expect == "error" and "float32" in case.dtypes]
    done = run("mha_spec.reference", suite, Settings(Selection(tuple(errors), ("float32",))))
    assert len(done.results) >= len(errors) > 20
    assert {result.outcome for result in done.results} == {"pass"}

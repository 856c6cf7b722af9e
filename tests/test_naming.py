"""Mistakes are named if they explain the failures, and not if a passing case refutes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from ml_dtypes import bfloat16

from mha_spec.steps import Steps
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.causes import find_causes
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.judging.naming import named
from mha_spec_conformance.judging.pairs import together
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mha_spec_conformance.judging.causes import Findings
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Expected, Suite

BY_NAME = {mistake.name: mistake for mistake in MISTAKES}
KEYWORDS = ("mask", "causal", "softcap", "bias", "scale", "return_lse")
PATTERNS = ("attention/mask/", "attention/causal/", "attention/softcap", "attention/bias/", "attention/smoke/")


def judged(
    suite: Suite,
    attention: Callable[..., object],
    dtypes: Sequence[str] = ("float32",),
    patterns: tuple[str, ...] = PATTERNS,
) -> list[Result]:
    """Judge an attention by a few cases, and name the mistakes that explain its failures."""
    claims = Claims("mine", {"attention": KEYWORDS}, tuple(dtypes))
    target, judge = Target({"attention": attention}, claims), Judge(claims)
    asked = [ask for ask in asks(suite.cases, claims, Selection(patterns)) if _small(ask.case.expected)]
    results = [judge.result(ask, answer(target, ask.question())) for ask in asked]
    wrong = [result.wrong for result in results if result.wrong is not None]
    names = named(wrong, [result.ask for result in results if result.outcome == "pass"], judge.recognition)
    return [judge.explained(r, names[r.ask.key]) if r.ask.key in names else r for r in results]


def _small(expected: Mapping[str, Expected]) -> bool:
    return sum(golden.values.size for golden in expected.values()) < 2000


def findings(suite: Suite, attention: Callable[..., object], dtypes: Sequence[str] = ("float32",)) -> Findings:
    return find_causes(judged(suite, attention, dtypes))


def over(name: str) -> Callable[..., object]:
    return function_over(BY_NAME[name].steps, "attention")


RIGHT = function_over(Steps(), "attention")


@pytest.mark.parametrize("name", ["mask-ignored", "softcap-ignored", "mask-polarity-inverted", "causal-shows-the-next"])
def test_mistake_is_named_and_what_its_failures_share_is_told(suite: Suite, name: str) -> None:
    causes = findings(suite, over(name)).causes
    assert [cause.kind for cause in causes] == ["mistake"]
    assert BY_NAME[name].variant in (causes[0].name, *causes[0].others)
    feature = BY_NAME[name].needs[0]
    assert causes[0].features == (feature,)
    assert causes[0].story.share is not None
    assert feature in causes[0].story.share.properties
    assert set(causes[0].clauses) <= set(BY_NAME[name].clauses)


def test_right_attention_has_no_causes(suite: Suite) -> None:
    assert findings(suite, RIGHT).causes == ()


def test_name_that_passing_cases_refute_is_dropped(suite: Suite) -> None:
    """The mask is ignored for a single head size, so `mask-ignored` explains failures and is still not named."""

    def attention(query, key, value, *, mask=None, **options):
        return RIGHT(query, key, value, mask=None if key.shape[3] == 64 else mask, **options)

    results = judged(suite, attention)
    failed = [result for result in results if result.outcome == "fail"]
    assert len(failed) > 3
    assert not any("mask-ignored" in result.diagnosis for result in results)
    assert find_causes(results).causes[0].kind == "unknown"


def test_mistake_in_one_dtype_is_named_for_that_dtype(suite: Suite) -> None:
    wrong = over("softcap-ignored")

    def attention(query, key, value, **options):
        return (wrong if query.dtype.name == "float16" else RIGHT)(query, key, value, **options)

    causes = findings(suite, attention, ("float32", "float16")).causes
    assert [cause.name for cause in causes] == ["softcap-ignored"]
    assert {result.ask.dtype for result in causes[0].results} == {"float16"}
    assert causes[0].story.share is not None
    assert {"softcap", "dtype float16"} == set(causes[0].story.share.properties)


def test_two_mistakes_are_named_where_one_does_not_suffice(suite: Suite) -> None:
    pair = together(BY_NAME["softcap-ignored"], BY_NAME["causal-shows-the-next"])
    assert pair is not None
    causes = findings(suite, function_over(pair.steps, "attention")).causes
    names = {name for cause in causes for name in (cause.name, *cause.others)}
    assert {"softcap-ignored", "causal-shows-the-next"} <= names
    assert all(cause.kind == "mistake" for cause in causes)


def test_rounding_cites_the_clause_of_accuracy(suite: Suite) -> None:
    def attention(query, key, value, **options):
        results = RIGHT(query, key, value, **options)
        narrowed = [array.astype(bfloat16).astype(array.dtype) for array in _tuple(results)]
        return narrowed[0] if len(narrowed) == 1 else tuple(narrowed)

    causes = find_causes(judged(suite, attention, patterns=("attention/scale/3/", "attention/smoke/"))).causes
    assert {cause.kind for cause in causes} == {"rounding"}
    assert {cause.name for cause in causes} == {"bfloat16"}
    assert all(result.clauses[0] == "MHA-ACC-1" for cause in causes for result in cause.results)


def _tuple(results: object) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def test_exceptions_are_grouped_by_their_text(suite: Suite) -> None:
    def attention(query, key, value, *, mask=None, **options):
        if mask is not None:
            raise RuntimeError(f"no kernel for {query.shape}")
        return RIGHT(query, key, value, **options)

    causes = findings(suite, attention).causes
    assert [cause.kind for cause in causes] == ["error"]
    assert causes[0].features == ("mask",)
    assert len({result.reason for result in causes[0].results}) > 1

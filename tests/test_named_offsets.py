"""Only backends promise to take the names of offsets (MHA-POS-2); other targets are asked the same cases in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import pytest

from mha_spec import reference
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims

if TYPE_CHECKING:
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.cases import Suite

CORE = ("attention", "attention_vjp", "attention_weights")


def asked(suite: Suite, *, registered: bool) -> dict[str, Ask]:
    keywords = {name: function.keywords for name, function in FUNCTIONS.items()}
    claims = Claims("a target", keywords, ("float64", "float32"), registered=registered)
    named = [case for case in suite.cases if case.options.get("q_offset") in ("upper_left", "lower_right")]
    return {ask.case.id: ask for ask in asks(named, claims, Selection(dtypes=("float32",)))}


@pytest.mark.parametrize("function", CORE)
def test_a_named_offset_is_passed_in_numbers_that_mean_the_same(function: str, suite: Suite) -> None:
    names = {key: ask for key, ask in asked(suite, registered=True).items() if ask.case.function == function}
    numbers = asked(suite, registered=False)
    assert names
    assert names.keys() <= numbers.keys()
    for key in list(names)[::7]:
        by_name, by_number = names[key].question(), numbers[key].question()
        offset = by_number.arrays["q_offset"]
        assert isinstance(by_name.options["q_offset"], str)
        assert "q_offset" not in by_number.options
        assert (offset.dtype, offset.shape) == (numpy.int32, (by_number.arrays["query"].shape[0],))
        results = [getattr(reference, function)(**q.arrays, **q.options) for q in (by_name, by_number)]
        first, second = (result if isinstance(result, tuple) else (result,) for result in results)
        for left, right in zip(first, second, strict=True):
            assert (left is None and right is None) or numpy.array_equal(left, right, equal_nan=True), key


def test_a_name_that_depends_on_more_than_the_lengths_is_asked_of_backends_alone(suite: Suite) -> None:
    names, numbers = asked(suite, registered=True), asked(suite, registered=False)
    assert {ask.case.function for ask in numbers.values()} == set(CORE)
    assert {ask.case.function for ask in names.values()} > set(CORE)

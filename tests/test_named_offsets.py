"""Only backends promise to take the names of offsets (MHA-POS-2); other targets are asked the same cases in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mha_spec import reference
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims

if TYPE_CHECKING:
    from mha_spec_conformance.asking.question import Question
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.cases import Suite

FUNCTIONS_OF_LENGTHS = (
    "attention",
    "attention_vjp",
    "attention_weights",
    "varlen_attention",
    "varlen_attention_vjp",
)
"""The functions whose arguments decide what a name of an offset stands for."""


def asked(suite: Suite, *, registered: bool) -> dict[str, Ask]:
    keywords = {name: function.keywords for name, function in FUNCTIONS.items()}
    claims = Claims("a target", keywords, ("float64", "float32"), registered=registered)
    named = [case for case in suite.cases if case.options.get("q_offset") in ("upper_left", "lower_right")]
    return {ask.case.id: ask for ask in asks(named, claims, Selection(dtypes=("float32",)))}


def called(function: str, question: Question) -> Any:
    """Call the reference; the format leaves out cu_seqlens_kv where a block_table makes it None."""
    bounds = {"cu_seqlens_kv": None} if "block_table" in question.arrays else {}
    return getattr(reference, function)(**bounds, **question.arrays, **question.options)


@pytest.mark.parametrize("function", FUNCTIONS_OF_LENGTHS)
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
        ends = by_number.arrays.get("cu_seqlens_q")
        sequences = by_number.arrays["query"].shape[0] if ends is None else len(ends) - 1
        assert (offset.dtype, offset.shape) == (numpy.int32, (sequences,))
        results = [called(function, question) for question in (by_name, by_number)]
        first, second = (result if isinstance(result, tuple) else (result,) for result in results)
        for left, right in zip(first, second, strict=True):
            assert (left is None and right is None) or numpy.array_equal(left, right, equal_nan=True), key


def test_a_name_that_depends_on_more_than_the_lengths_is_asked_of_backends_alone(suite: Suite) -> None:
    names, numbers = asked(suite, registered=True), asked(suite, registered=False)
    assert {ask.case.function for ask in numbers.values()} == set(FUNCTIONS_OF_LENGTHS)
    assert {ask.case.function for ask in names.values()} > set(FUNCTIONS_OF_LENGTHS)

"""The property that separates failures best from passes, and the few labels that cover all failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec_conformance.asking.selection import Ask
from mha_spec_conformance.judging.properties import Properties
from mha_spec_conformance.judging.shares import cover, separating

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Case, Suite


def questions(*texts: str) -> list[frozenset[str]]:
    return [frozenset(text.split()) for text in texts]


def test_property_of_all_failures_and_no_pass_is_found_with_its_counts() -> None:
    share = separating(questions("mask f32", "mask f16", "mask f16"), questions("f32", "bias f16", "bias f32"))
    assert share is not None
    assert share.properties == ("mask",)
    assert str(share) == "mask (3 of 3 failures, 0 of 3 passes)"


def test_a_second_property_is_added_if_both_together_separate_better() -> None:
    failing = questions(*["mask f16"] * 4)
    passing = questions(*["mask f32"] * 7, *["bias f16"] * 9, *["bias f32"] * 11)
    share = separating(failing, passing)
    assert share is not None
    assert sorted(share.properties) == ["f16", "mask"]
    assert (share.failures, share.of_failures, share.passes, share.of_passes) == (4, 4, 0, 27)


def test_first_property_is_chosen_again_beside_the_second() -> None:
    """The longer property tells more alone, and no more than `bias` in the questions that have lengths."""
    failing = [frozenset({"bias", "bias differs", "lengths"})] * 4
    passing = [frozenset({"bias"})] * 9 + [frozenset({"bias", "bias differs"})] * 5 + [frozenset({"lengths"})] * 20
    share = separating(failing, passing)
    assert share is not None
    assert share.properties == ("lengths", "bias")


def test_second_property_is_not_added_if_the_first_tells_all() -> None:
    share = separating(questions("mask long", "mask long"), questions("long", "short"))
    assert share is not None
    assert share.properties == ("mask",)


def test_properties_that_tell_the_same_are_chosen_by_the_fewest_words() -> None:
    share = separating([frozenset({"a mask is given", "mask"})], [frozenset({"bias"})])
    assert share is not None
    assert share.properties == ("mask",)


def test_no_property_is_given_if_none_makes_a_failure_more_likely() -> None:
    assert separating(questions("a", "b"), questions("a", "b")) is None
    assert separating(questions("a", "a"), questions("a b", "a b")) is None
    assert separating(questions("a"), []) is None


def test_cover_blames_the_label_whose_questions_fail_most() -> None:
    failing = [("mask", "nonfinite"), ("causal", "nonfinite"), ("bias", "nonfinite")]
    passing = [("mask",), ("mask",), ("causal",), ("bias",)]
    assert cover(failing, passing) == ("nonfinite",)


def test_cover_has_a_label_for_every_failure() -> None:
    assert cover([("mask",), ("softcap",), ("softcap", "mask")], [("mask",)]) == ("softcap", "mask")
    assert cover([], [("mask",)]) == ()


def case_called(suite: Suite, name: str) -> Case:
    return next(case for case in suite.cases if case.id == name)


def test_properties_name_sizes_features_and_data(suite: Suite) -> None:
    case = case_called(suite, "attention/smoke/mask-polarity")
    properties = Properties()(Ask(case, "float16", ("output", "lse")))
    assert {"mask", "dtype float16", "a dtype of 16 bits", "function attention", "result `lse`"} <= properties
    assert {"q_len != kv_len", "kv_len > q_len", "a pair is hidden"} <= properties
    assert not any("offset" in name for name in properties)


def test_properties_tell_lengths_that_differ_and_lengths_of_0(suite: Suite) -> None:
    case = case_called(suite, "attention_vjp/one-key/q_lengths+grad_lse/prime")
    assert set(case.input("q_lengths", "float32").tolist()) == {0, 3}
    assert {"q_lengths differ", "q_lengths contain 0"} <= Properties()(Ask(case, "float32", ("grad_key",)))


def test_every_case_has_properties(suite: Suite) -> None:
    properties = Properties()
    for case in suite.cases[::17]:
        assert f"function {case.function}" in properties(Ask(case, case.dtypes[0], tuple(case.expected)))

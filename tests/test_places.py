"""The report describes the places and the errors of answers that are wrong in a known way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mha_spec_conformance.asking.selection import Ask
from mha_spec_conformance.judging.amounts import amounts, rounded_to
from mha_spec_conformance.judging.axes import axes_of
from mha_spec_conformance.judging.bounds import allowances, precision
from mha_spec_conformance.judging.causes import Story
from mha_spec_conformance.judging.indices import TILES, covering, described_indices
from mha_spec_conformance.judging.places import WrongElements, described
from mha_spec_conformance.judging.properties import visible_pairs
from mha_spec_conformance.judging.recognition import Wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec_conformance.suite.cases import Case, Suite

    Change = Callable[[dict[str, numpy.ndarray]], object]


@pytest.fixture(scope="module")
def case(suite: Suite) -> Case:
    """A case with several batch entries, groups, rows and components, of which all rows are stored."""
    return next(c for c in suite.cases if c.id == "attention/scale/3/generic-1")


def wrong(case: Case, change: Change, dtype: str = "float64", outputs: tuple[str, ...] = ("output", "lse")) -> Wrong:
    """Return the right answer to a case after a change."""
    answer = {name: numpy.array(case.expected[name].values, dtype) for name in outputs}
    change(answer)
    allowed = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    return Wrong(Ask(case, dtype, outputs), answer, allowed)


def places(case: Case, change: Change) -> list[str]:
    return [str(place) for place in described([WrongElements(wrong(case, change))])]


def amount(case: Case, change: Change) -> list[str]:
    return [str(place) for place in amounts([WrongElements(wrong(case, change))])]


def add(name: str, *index: int | slice, number: float = 1.0) -> Change:
    """Add a number to the elements at an index."""

    def change(answer: dict[str, numpy.ndarray]) -> None:
        answer[name][index] += number

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (add("output", 0), "only batch entry 0"),
        (add("output", slice(1, None)), "only the last batch entry"),
        (add("output", slice(None), slice(None), -1), "only the last row"),
        (add("output", slice(None), slice(None), slice(1, None)), "only rows from 1 on"),
        (add("output", slice(None), slice(None), slice(None), slice(0, None, 2)), "only even components"),
        (add("output", slice(None), slice(0, None, 3)), "only the first head of each group"),
        (add("lse", slice(None)), "only `lse`"),
    ],
)
def test_wrong_elements_are_located(case: Case, change: Change, text: str) -> None:
    assert case.inputs("float64")["query"].shape[1] // case.inputs("float64")["key"].shape[1] == 3
    assert text in places(case, change)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attention_vjp/one-key/q_lengths+grad_lse/prime", "only batch entries that see no key"),
        ("attention_vjp/q_lengths+kv_lengths/generic-1", "only keys that no row sees"),
    ],
)
def test_wrong_gradients_of_keys_are_located_by_the_rows_that_see_them(suite: Suite, name: str, text: str) -> None:
    case = next(c for c in suite.cases if c.id == name)
    inputs = case.inputs("float64")
    visible = visible_pairs(case, inputs)
    assert visible is not None
    key = case.expected["grad_key"].values
    seen = visible.reshape(key.shape[0], key.shape[1], -1, *visible.shape[2:]).any(axis=(2, 3))

    def unset(answer: dict[str, numpy.ndarray]) -> None:
        answer["grad_key"][~seen] = numpy.nan

    assert (~seen).any()
    assert {text, "only `grad_key`"} <= {
        str(place) for place in described([WrongElements(wrong(case, unset, outputs=("grad_key", "grad_value")))])
    }


def test_outputs_that_are_wrong_in_few_failures_are_left_out(case: Case) -> None:
    often, rarely = (WrongElements(wrong(case, add(name))) for name in ("lse", "output"))
    assert "only `lse` (10 of 11)" in [str(place) for place in described([*[often] * 10, rarely])]
    assert not [place for place in described([*[often] * 5, rarely]) if "`" in place.text]


def test_wrong_elements_everywhere_are_located_by_output_alone(case: Case) -> None:
    assert places(case, add("output")) == ["only `output`"]


def test_a_place_that_some_failures_contradict_has_counts_or_is_left_out(case: Case) -> None:
    first, last = (WrongElements(wrong(case, add("output", entry))) for entry in (0, -1))
    assert "only batch entry 0" not in map(str, described([first, last]))
    assert "only batch entry 0 (19 of 20)" in map(str, described([*[first] * 19, last]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a["output"].__imul__(0.125), "0.125 times the right number"),
        (lambda a: a["output"].__imul__(-1), "the right number negated"),
        (lambda a: a["lse"].__imul__(math.log2(math.e)), "to base 2"),
        (lambda a: a["lse"].__iadd__(0.5), "the right number + 0.5"),
        (lambda a: a["output"].__imul__(math.nan), "NaN"),
        (lambda a: a["output"].__imul__(0), "0"),
        (lambda a: a.update(output=a["output"][:, :, ::-1].copy()), "the right numbers of another row"),
        (lambda a: a.update(output=a["output"][:, ::-1].copy()), "the right numbers of another head"),
        (lambda a: a.update(output=a["output"][::-1].copy()), "the right numbers of another batch entry"),
    ],
)
def test_errors_are_described(case: Case, change: Change, text: str) -> None:
    assert amount(case, change) == [text]


def test_amounts_are_those_of_most_failures_and_say_where_no_place_is_common(case: Case) -> None:
    zero, noise = (WrongElements(wrong(case, change)) for change in (lambda a: a["output"].__imul__(0), add("output")))
    assert amounts([zero, noise]) == []
    assert Story(None, (), tuple(amounts([zero, zero, noise]))).where == "no common place: 0 (2 of 3)"


def test_errors_without_a_pattern_are_not_described(case: Case) -> None:
    noise = numpy.random.default_rng(7)
    assert amount(case, lambda a: a["output"].__iadd__(noise.standard_normal(a["output"].shape))) == []


@pytest.mark.parametrize("narrower", ["float32", "float16"])
def test_rounding_names_the_type_that_lost_the_digits(case: Case, narrower: str) -> None:
    def rounded(answer: dict[str, numpy.ndarray]) -> None:
        answer.update({name: array.astype(narrower).astype("float64") for name, array in answer.items()})

    assert rounded_to(wrong(case, rounded)) == narrower


def test_a_large_error_is_not_rounding(case: Case) -> None:
    assert rounded_to(wrong(case, add("output"))) is None


def test_truncation_is_rounding(case: Case) -> None:
    def truncated(answer: dict[str, numpy.ndarray]) -> None:
        bits = answer["output"].astype(numpy.float32).view(numpy.uint32) & numpy.uint32(0xFFFF0000)
        answer["output"] = bits.view(numpy.float32).astype(numpy.float64)

    assert rounded_to(wrong(case, truncated)) == "bfloat16"


@pytest.mark.parametrize("place", [..., (slice(None), slice(1, None), 2), (..., slice(4, None))])
def test_small_factor_is_not_rounding(case: Case, place: Any) -> None:
    def multiplied(answer: dict[str, numpy.ndarray]) -> None:
        answer["output"][place] *= 1.003

    assert rounded_to(wrong(case, multiplied)) is None


def test_small_shift_is_not_rounding(case: Case) -> None:
    assert rounded_to(wrong(case, add("lse", number=0.001))) is None


def test_axes_have_names() -> None:
    assert axes_of("output", 4) == ("batch entry", "head", "row", "component")
    assert axes_of("lse_a", 3) == axes_of("lse", 3) == ("batch entry", "head", "row")
    assert axes_of("grad_key", 4)[2] == "key"
    assert axes_of("output", 2) == ("axis 0", "axis 1")


def test_ranges_of_few_indices_begin_and_end_at_the_edge_of_a_tile() -> None:
    assert described_indices([65, 67, 70], [3, 9, 65, 67, 70], "key", tiles=TILES) == "keys from 64 on"
    assert described_indices([65, 120], [3, 65, 120, 140], "key", tiles=TILES) == "keys 64 to 127"
    assert described_indices([3, 9], [3, 9, 65], "key", tiles=TILES) == "keys up to 63"
    assert described_indices([65, 66], [64, 65, 66, 67], "key", tiles=TILES) == "keys 65 to 66"


def test_scattered_indices_are_covered_by_a_range() -> None:
    assert covering([1, 5, 9], range(12)) == [1, 5, 9]
    assert covering([1, 3, 5, 7, 9, 11], range(12)) == [1, 3, 5, 7, 9, 11]
    assert covering([1, 2, 5, 9], range(12)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]

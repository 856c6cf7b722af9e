"""The oracle of the goldens: visibility of pairs, and kinds of elements, which say how each is compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from description import Description, Input
from oracle_balls import InadmissibleError
from oracle_visibility import AttentionCall
from support.answers import kinds_of, multiples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from oracle import Answer

    Oracle = Callable[..., Mapping[str, Answer]]

NAN, INFINITY = math.nan, math.inf


# Visibility of pairs.


def _picture(q_len: int, kv_len: int, **constraints: Any) -> list[str]:
    """Draw the rows of one head of batch entry 1, with x for visible pairs."""
    arrays = {"query": numpy.zeros((2, 2, q_len, 1)), "key": numpy.zeros((2, 1, kv_len, 1))}
    arrays |= {name: x for name, x in constraints.items() if isinstance(x, numpy.ndarray)}
    options = {name: x for name, x in constraints.items() if not isinstance(x, numpy.ndarray)}
    inputs = {name: Input(array) for name, array in arrays.items()}
    call = AttentionCall(Description("case", "", "attention_weights", (), (), inputs, options, dtypes=("float64",)))
    return ["".join(".x"[call.sees(1, 1, i, j)] for j in range(kv_len)) for i in range(q_len)]


@pytest.mark.parametrize(
    ("constraints", "picture"),
    [
        ({}, ["xxxxx", "xxxxx", "xxxxx"]),
        ({"causal": True, "q_offset": 0}, ["x....", "xx...", "xxx.."]),
        ({"causal": True, "q_offset": 2}, ["xxx..", "xxxx.", "xxxxx"]),
        ({"causal": True, "q_offset": -2}, [".....", ".....", "x...."]),
        ({"causal": True, "q_offset": numpy.asarray([9, 1])}, ["xx...", "xxx..", "xxxx."]),
        ({"window": (1, 0), "q_offset": 1}, ["xx...", ".xx..", "..xx."]),
        ({"window": (None, 1), "q_offset": 0}, ["xx...", "xxx..", "xxxx."]),
        ({"window": (0, None), "q_offset": 0}, ["xxxxx", ".xxxx", "..xxx"]),
        ({"window": (1, 1), "causal": True, "q_offset": 1}, ["xx...", ".xx..", "..xx."]),
        ({"window": (None, None)}, ["xxxxx", "xxxxx", "xxxxx"]),
        ({"kv_lengths": numpy.asarray([0, 2])}, ["xx...", "xx...", "xx..."]),
        ({"q_lengths": numpy.asarray([0, 2])}, ["xxxxx", "xxxxx", "....."]),
        ({"mask": numpy.asarray([[[[True], [False], [True]]]])}, ["xxxxx", ".....", "xxxxx"]),
        ({"mask": numpy.asarray([[[[True] * 5]], [[[False] + [True] * 4]]])}, [".xxxx", ".xxxx", ".xxxx"]),
        ({"bias": numpy.asarray([[[[0, -INFINITY, -1e308, NAN, INFINITY]]]])}, ["x.xxx", "x.xxx", "x.xxx"]),
        (
            {
                "q_segment_ids": numpy.asarray([[0, 0, 0], [0, -1, 0]]),
                "kv_segment_ids": numpy.asarray([[0, 0, 0, 0, 0], [0, 0, -1, 7, 0]]),
            },
            ["xx..x", "..x..", "xx..x"],
        ),
        ({"causal": True, "q_offset": 1, "kv_lengths": numpy.asarray([5, 3])}, ["xx...", "xxx..", "xxx.."]),
        ({"causal": True, "q_offset": "upper_left", "kv_lengths": numpy.asarray([5, 4])}, ["x....", "xx...", "xxx.."]),
        ({"causal": True, "q_offset": "lower_right"}, ["xxx..", "xxxx.", "xxxxx"]),
        (
            {"causal": True, "q_offset": "lower_right", "kv_lengths": numpy.asarray([5, 4])},
            ["xx...", "xxx..", "xxxx."],
        ),
        (
            {
                "window": (1, 0),
                "q_offset": "lower_right",
                "q_lengths": numpy.asarray([3, 2]),
                "kv_lengths": numpy.asarray([5, 4]),
            },
            [".xx..", "..xx.", "....."],
        ),
        ({"window": (None, 2**30), "q_offset": 2**30}, ["xxxxx", "xxxxx", "xxxxx"]),
        ({"window": (2**30, 0), "q_offset": 2**30 + 1}, [".xxxx", "..xxx", "...xx"]),
        ({"window": (None, 2**30), "q_offset": -(2**30) + 1}, ["xx...", "xxx..", "xxxx."]),
        (
            {
                "q_segment_ids": numpy.full((2, 3), 2**32 - 1, dtype=numpy.uint32),
                "kv_segment_ids": numpy.asarray([[-1] * 5, [-1, 2**32 - 1, -1, 0, 2**32 - 1]]),
            },
            [".x..x", ".x..x", ".x..x"],
        ),
    ],
)
def test_visibility_is_as_drawn(constraints: dict[str, Any], picture: list[str]) -> None:
    assert _picture(3, 5, **constraints) == picture


def _hidden_by_bias(value: float, *dtypes: str) -> bool:
    inputs = {"query": Input(numpy.zeros((1, 1, 1, 1))), "key": Input(numpy.zeros((1, 1, 1, 1)))}
    inputs["bias"] = Input(numpy.full((1, 1, 1, 1), value), "float64")
    call = AttentionCall(Description("case", "", "attention_weights", (), (), inputs, dtypes=dtypes))
    return not call.sees(0, 0, 0, 0)


def test_a_bias_hides_where_it_is_minus_infinity_in_the_type_of_the_softmax() -> None:
    largest = float(numpy.finfo(numpy.float32).max)
    assert _hidden_by_bias(-1e300, "float32", "bfloat16")
    assert not _hidden_by_bias(-1e300, "float64")
    assert not _hidden_by_bias(-largest, "float32")
    assert not _hidden_by_bias(-largest * (1 + 2.0**-26), "float32")
    assert _hidden_by_bias(-largest * (1 + 2.0**-24), "float32")
    assert not _hidden_by_bias(1e300, "float16")


def test_a_bias_that_hides_only_in_float32_is_refused_for_a_case_with_float64() -> None:
    with pytest.raises(InadmissibleError, match="finite in float64 and infinite in float32"):
        _hidden_by_bias(-1e300, "float64", "float32")


# Kinds of elements.


@pytest.fixture
def arrays() -> dict[str, numpy.ndarray]:
    """Return two heads of one key/value head; with causal, query 0 sees only key 0."""
    return {
        "query": multiples(1, 2, 2, 2, seed=1),
        "key": multiples(1, 1, 2, 2, seed=2),
        "value": multiples(1, 1, 2, 2, seed=3),
    }


def _put(arrays: dict[str, numpy.ndarray], name: str, place: tuple[int, ...], value: float) -> None:
    arrays[name][place] = value


FORWARD = [
    ("query", (0, 1, 1, 0), NAN, [[[0, 0], [0, 0]], [[0, 0], [2, 2]]], [[0, 0], [0, 2]]),
    ("query", (0, 1, 1, 0), INFINITY, [[[0, 0], [0, 0]], [[0, 0], [4, 4]]], [[0, 0], [0, 4]]),
    ("key", (0, 0, 1, 0), NAN, [[[0, 0], [2, 2]], [[0, 0], [2, 2]]], [[0, 2], [0, 2]]),
    ("key", (0, 0, 1, 0), -INFINITY, [[[0, 0], [4, 4]], [[0, 0], [4, 4]]], [[0, 4], [0, 4]]),
    ("value", (0, 0, 1, 0), NAN, [[[0, 0], [3, 0]], [[0, 0], [3, 0]]], None),
    ("value", (0, 0, 0, 1), INFINITY, [[[0, 3], [0, 3]], [[0, 3], [0, 3]]], None),
]


@pytest.mark.parametrize(("name", "place", "value", "output", "lse"), FORWARD)
def test_kinds_of_rows_that_see_numbers_that_are_not_finite(
    name: str,
    place: tuple[int, ...],
    value: float,
    output: list[Any],
    lse: list[Any] | None,
    arrays: dict[str, numpy.ndarray],
    ask_oracle: Oracle,
) -> None:
    clean = ask_oracle("attention", arrays, causal=True)
    _put(arrays, name, place, value)
    answers = ask_oracle("attention", arrays, causal=True)
    assert kinds_of(answers["output"]) == [output]
    assert kinds_of(answers["lse"]) == ([lse] if lse else [[[0, 0], [0, 0]]])
    for label, answer in answers.items():
        finite = numpy.asarray(kinds_of(answer)) == 0
        numpy.testing.assert_array_equal(answer.values[finite], clean[label].values[finite])
        assert numpy.isnan(answer.values[~finite]).all()


@pytest.mark.parametrize(
    ("name", "place"),
    [("query", (0, 1, 1, 0)), ("key", (0, 0, 1, 0)), ("value", (0, 0, 1, 0)), ("grad_output", (0, 1, 1, 0))],
)
@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_data_that_no_pair_reads_change_no_result(
    function: str, name: str, place: tuple[int, ...], value: float, arrays: dict[str, numpy.ndarray], ask_oracle: Oracle
) -> None:
    arrays |= {"grad_output": multiples(1, 2, 2, 2, seed=4)} if function == "attention_vjp" else {}
    if name not in arrays:
        return
    arrays |= {"kv_lengths": numpy.asarray([1]), "q_lengths": numpy.asarray([1])}
    clean = ask_oracle(function, arrays)
    _put(arrays, name, place, value)
    for label, answer in ask_oracle(function, arrays).items():
        assert kinds_of(answer) == kinds_of(clean[label])
        numpy.testing.assert_array_equal(answer.values, clean[label].values)
        assert numpy.isfinite(answer.values).all() or label == "lse"


def test_kinds_of_weights(arrays: dict[str, numpy.ndarray], ask_oracle: Oracle) -> None:
    _put(arrays, "query", (0, 0, 0, 0), NAN)
    _put(arrays, "query", (0, 1, 0, 0), INFINITY)
    weights = ask_oracle("attention_weights", {"query": arrays["query"], "key": arrays["key"]}, causal=True)["weights"]
    assert kinds_of(weights) == [[[[2, 2], [0, 0]], [[4, 4], [0, 0]]]]
    empty = ask_oracle("attention_weights", {"query": arrays["query"], "key": arrays["key"]}, causal=True, q_offset=-9)
    assert kinds_of(empty["weights"]) == [[[[1, 1], [1, 1]], [[1, 1], [1, 1]]]]
    assert not empty["weights"].values.any()


def test_rows_that_see_nothing(arrays: dict[str, numpy.ndarray], ask_oracle: Oracle) -> None:
    arrays["sinks"] = numpy.asarray([0.75, -INFINITY])
    answers = ask_oracle("attention", arrays, causal=True, q_offset=-1)
    assert kinds_of(answers["output"]) == [[[[1, 1], [0, 0]], [[1, 1], [0, 0]]]]
    assert kinds_of(answers["lse"]) == [[[0, 0], [1, 0]]]
    assert answers["lse"].values[0, :, 0].tolist() == [0.75, -INFINITY]
    arrays["sinks"] = numpy.asarray([NAN, INFINITY])
    assert kinds_of(ask_oracle("attention", arrays)["lse"]) == [[[4, 4], [4, 4]]]


def test_a_row_whose_weights_are_all_dropped_is_not_empty(arrays: dict[str, numpy.ndarray], ask_oracle: Oracle) -> None:
    answers = ask_oracle("attention", arrays | {"dropout_mask": numpy.zeros((1, 1, 1, 1), bool)}, dropout_rate=0.5)
    assert answers["output"].kinds is None
    assert not answers["output"].values.any()
    assert numpy.isfinite(answers["lse"].values).all()


GRADIENTS = [
    # With causal, only query 1 sees key 1; a gradient with a contribution of query 1 of head 0 may be anything.
    ("query", (0, 0, 1, 0), NAN, {"query": [[0, 4], [0, 0]], "key": [4, 4], "value": [4, 4], "sinks": [4, 0]}),
    (
        "grad_output",
        (0, 0, 0, 1),
        INFINITY,
        {"query": [[4, 0], [0, 0]], "key": [4, 0], "value": [4, 0], "sinks": [4, 0]},
    ),
    ("value", (0, 0, 1, 0), NAN, {"query": [[0, 4], [0, 4]], "key": [4, 4], "value": [4, 4], "sinks": [4, 4]}),
    ("grad_lse", (0, 0, 1), NAN, {"query": [[0, 4], [0, 0]], "key": [4, 4], "value": [4, 4], "sinks": [4, 0]}),
    ("key", (0, 0, 1, 0), INFINITY, {"query": [[0, 4], [0, 4]], "key": [4, 4], "value": [4, 4], "sinks": [4, 4]}),
    ("sinks", (0,), NAN, {"query": [[4, 4], [0, 0]], "key": [4, 4], "value": [4, 4], "sinks": [4, 0]}),
]


@pytest.mark.parametrize(("name", "place", "value", "kinds"), GRADIENTS)
def test_kinds_of_gradients(
    name: str,
    place: tuple[int, ...],
    value: float,
    kinds: dict[str, Any],
    arrays: dict[str, numpy.ndarray],
    ask_oracle: Oracle,
) -> None:
    arrays |= {
        "grad_output": multiples(1, 2, 2, 2, seed=4),
        "sinks": multiples(2, seed=5),
        "bias": multiples(1, 1, 2, 2, seed=6),
        "grad_lse": multiples(1, 2, 2, seed=7),
    }
    _put(arrays, name, place, value)
    answers = ask_oracle("attention_vjp", arrays, causal=True)
    for label, wanted in kinds.items():
        received = numpy.asarray(kinds_of(answers[f"grad_{label}"]))
        assert (received[..., 0] if label != "sinks" else received).reshape(numpy.shape(wanted)).tolist() == wanted
    rows = [max(head[i] for head in kinds["query"]) for i in range(2)]
    assert kinds_of(answers["grad_bias"]) == [[[[rows[0], 1], [rows[1], rows[1]]]]]


def test_a_grad_lse_that_is_not_finite_makes_gradients_unspecified_without_sinks_too(
    arrays: dict[str, numpy.ndarray], ask_oracle: Oracle
) -> None:
    arrays |= {"grad_output": multiples(1, 2, 2, 2, seed=4), "grad_lse": numpy.asarray([[[0.0, 1.0], [NAN, 1.0]]])}
    answers = ask_oracle("attention_vjp", arrays, causal=True)
    assert kinds_of(answers["grad_query"]) == [[[[0, 0], [0, 0]], [[4, 4], [0, 0]]]]
    assert kinds_of(answers["grad_key"]) == [[[[4, 4], [0, 0]]]]


def test_gradients_without_contributions_are_exactly_zero(arrays: dict[str, numpy.ndarray], ask_oracle: Oracle) -> None:
    arrays |= {"grad_output": multiples(1, 2, 2, 2, seed=4), "sinks": numpy.asarray([0.5, -INFINITY])}
    arrays["bias"] = numpy.asarray([[[[0.5, -INFINITY]]]])
    arrays["mask"] = numpy.asarray([[[[True], [False]]]])
    answers = ask_oracle("attention_vjp", arrays)
    assert {name: kinds_of(answer) for name, answer in answers.items()} == {
        "grad_query": [[[[0, 0], [1, 1]], [[0, 0], [1, 1]]]],
        "grad_key": [[[[0, 0], [1, 1]]]],
        "grad_value": [[[[0, 0], [1, 1]]]],
        "grad_bias": [[[[0, 1]]]],
        "grad_sinks": [0, 1],
    }
    for answer in answers.values():
        assert not answer.values[numpy.asarray(kinds_of(answer)) == 1].any()


def test_an_empty_row_contributes_to_its_sink_only_through_grad_lse(
    arrays: dict[str, numpy.ndarray], ask_oracle: Oracle
) -> None:
    arrays |= {"grad_output": numpy.full((1, 2, 2, 2), NAN), "sinks": numpy.asarray([0.5, -INFINITY])}
    arrays |= {"grad_lse": numpy.asarray([[[0.25, 3.0], [7.0, 9.0]]]), "mask": numpy.zeros((1, 1, 1, 1), bool)}
    sinks = ask_oracle("attention_vjp", arrays)["grad_sinks"]
    assert sinks.values.tolist() == [3.25, 0.0]
    assert kinds_of(sinks) == [0, 1]
    del arrays["grad_lse"]
    assert kinds_of(ask_oracle("attention_vjp", arrays)["grad_sinks"]) == [1, 1]


@pytest.mark.parametrize(
    ("lse", "output", "kinds"),
    [
        ((-INFINITY, 0.5), (3.0, 0.5), (1, 1)),
        ((0.5, -INFINITY), (2.0, 0.5), (1, 1)),
        ((-INFINITY, 0.1), (3.0, 0.1), (1, 0)),
        ((-INFINITY, -INFINITY), (0.0, -INFINITY), (1, 1)),
        ((NAN, 0.5), (NAN, NAN), (2, 2)),
        ((-INFINITY, NAN), (NAN, NAN), (2, 2)),
        ((INFINITY, 0.5), (NAN, NAN), (2, 2)),
        ((INFINITY, INFINITY), (NAN, NAN), (2, 2)),
        ((INFINITY, NAN), (NAN, NAN), (2, 2)),
        ((-INFINITY, INFINITY), (3.0, INFINITY), (1, 1)),
        ((0.5, 0.5), (2.5, 0.5 + math.log(2)), (0, 0)),
    ],
)
def test_merging_of_halves(
    lse: tuple[float, float], output: tuple[float, float], kinds: tuple[int, int], ask_oracle: Oracle
) -> None:
    arrays = {"output_a": numpy.asarray([[[[2.0]]]]), "output_b": numpy.asarray([[[[3.0]]]])}
    arrays |= {f"lse_{half}": numpy.asarray([[[x]]]) for half, x in zip("ab", lse, strict=True)}
    answers = ask_oracle("merge_attention", arrays)
    received = [answers[name].values.item() for name in ("output", "lse")]
    numpy.testing.assert_array_equal(received, output)
    assert [numpy.asarray(kinds_of(answers[name])).item() for name in ("output", "lse")] == list(kinds)


def test_an_empty_half_may_hold_nan_and_any_other_half_makes_its_component_not_finite(ask_oracle: Oracle) -> None:
    arrays = {"output_a": numpy.asarray([[[[NAN, 2.0]]]]), "output_b": numpy.asarray([[[[3.0, INFINITY]]]])}
    arrays |= {"lse_a": numpy.asarray([[[-INFINITY]]]), "lse_b": numpy.asarray([[[0.5]]])}
    assert ask_oracle("merge_attention", arrays)["output"].values.ravel().tolist() == [3.0, INFINITY]
    answers = ask_oracle("merge_attention", arrays | {"lse_a": numpy.asarray([[[1.0]]])})
    assert kinds_of(answers["output"]) == [[[[3, 3]]]]
    assert answers["lse"].kinds is None

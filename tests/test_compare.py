"""The comparison passes right results and fails in every branch: kinds, allowances, overflow, sampled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy
import pytest

from mha_spec_conformance.judging.bounds import precision
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE, NAN, NON_FINITE, gate_b, judge
from mha_spec_conformance.suite.cases import Expected

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec_conformance.judging.compare import Judgement

INF, NOT_A_NUMBER = numpy.inf, numpy.nan


@dataclass(frozen=True)
class Example:
    id: str = "attention/example/generic-1"


def expected(values: Sequence[float], kinds: Sequence[int] | None = None) -> Expected:
    array = numpy.asarray(values, dtype=numpy.float64)
    return Expected(array, None if kinds is None else numpy.asarray(kinds, dtype=numpy.uint8), None, array.shape)


def judged(
    wanted: Expected, got: Sequence[float], allowed: Sequence[float], dtype: str = "float32", name: str = "output"
) -> Judgement:
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    outputs = {name: numpy.asarray(got, dtype="float32" if name == "lse" else stored)}
    return judge(
        Example(), {name: wanted}, outputs, {name: numpy.asarray(allowed, dtype=numpy.float64)}, precision(dtype)
    )


def test_share_of_the_allowance() -> None:
    judgement = judged(expected([1.0, 2.0, 4.0]), [1.0, 2.25, 4.25], [0.5, 0.5, 1.0])
    assert judgement.passed
    assert judgement.reason is None
    assert judgement.allowance_used == 0.5
    assert judgement.worst is not None
    assert (judgement.worst.output, judgement.worst.index) == ("output", (1,))
    assert (judgement.worst.expected, judgement.worst.got, judgement.worst.allowance) == (2.0, 2.25, 0.5)


def test_error_of_the_whole_allowance_passes_and_a_larger_error_fails() -> None:
    assert judged(expected([1.0]), [1.5], [0.5]).passed
    above = judged(expected([1.0]), [float(numpy.nextafter(numpy.float32(1.5), numpy.float32(2)))], [0.5])
    assert not above.passed
    assert above.allowance_used > 1
    assert "times the allowance" in str(above.reason)


def test_share_of_an_allowance_of_0_is_0_or_infinite() -> None:
    assert judged(expected([0.0, 3.0]), [-0.0, 3.0], [0.0, 0.0]).allowance_used == 0.0
    wrong = judged(expected([0.0, 3.0]), [0.0, 3.5], [1.0, 0.0])
    assert not wrong.passed
    assert wrong.allowance_used == INF
    assert wrong.worst is not None
    assert wrong.worst.index == (1,)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("wanted", "got"), [(1.0, NOT_A_NUMBER), (NOT_A_NUMBER, 1.0), (1.0, INF), (1.0, -INF), (INF, 1.0)]
)
def test_nan_and_infinity_never_pass_for_a_number(wanted: float, got: float, dtype: str) -> None:
    judgement = judged(expected([0.0, wanted]), [0.0, got], [1.0, 100.0], dtype)
    assert not judgement.passed
    assert judgement.allowance_used > 1


def test_nan_does_not_pass_for_nan_where_a_number_is_expected() -> None:
    assert not judged(expected([NOT_A_NUMBER]), [NOT_A_NUMBER], [1.0]).passed


KINDS = [
    (FINITE, 2.0, [2.0, 2.5], [NOT_A_NUMBER, INF, 9.0]),
    (EXACT, 0.0, [0.0, -0.0], [0.25, NOT_A_NUMBER, INF]),
    (EXACT, -INF, [-INF], [INF, NOT_A_NUMBER, -3e38, 0.0]),
    (NAN, NOT_A_NUMBER, [NOT_A_NUMBER], [0.0, INF, -INF]),
    (NON_FINITE, NOT_A_NUMBER, [NOT_A_NUMBER, INF, -INF], [0.0, 3e38]),
    (ANY, 0.0, [0.0, NOT_A_NUMBER, INF, 7.0], []),
    (ANY + 1, 0.0, [], [0.0, NOT_A_NUMBER, INF, 7.0]),
]


@pytest.mark.parametrize(("kind", "value", "right", "wrong"), KINDS)
def test_kinds(kind: int, value: float, right: list[float], wrong: list[float]) -> None:
    wanted = expected([1.0, value, 1.0], [FINITE, kind, FINITE])
    for got in right:
        assert judged(wanted, [1.0, got, 1.0], [0.5, 0.5, 0.5]).passed, got
    for got in wrong:
        judgement = judged(wanted, [1.0, got, 1.0], [0.5, 0.5, 0.5])
        assert not judgement.passed, got
        assert judgement.worst is not None
        assert judgement.worst.index == (1,)


def test_wrong_exact_element_is_reported_before_larger_errors() -> None:
    judgement = judged(expected([1.0, 0.0], [FINITE, EXACT]), [9.0, 0.125], [0.5, 5.0])
    assert judgement.reason == "`output` at (1,) must be exactly 0, received 0.125"


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [(NAN, NOT_A_NUMBER, "must be NaN,"), (NON_FINITE, NOT_A_NUMBER, "must be NaN or infinite,")],
)
def test_reasons_name_the_kind(kind: int, value: float, message: str) -> None:
    assert message in str(judged(expected([value], [kind]), [1.5], [1.0]).reason)


@pytest.mark.parametrize(
    ("reference", "allowed", "got", "passes"),
    [
        (65500.0, 30.0, INF, True),
        (65500.0, 30.0, -INF, False),
        (-65500.0, 30.0, -INF, True),
        (65500.0, 20.0, INF, True),
        (65500.0, 19.0, INF, False),
        (76500.0, 150.0, INF, True),
        (76500.0, 150.0, -INF, False),
        (-76500.0, 150.0, -INF, True),
        (76500.0, 150.0, 65504.0, False),
        (65500.0, 30.0, NOT_A_NUMBER, False),
        (1.0, 30.0, INF, False),
    ],
)
def test_overflow_at_the_top_of_the_dtype(reference: float, allowed: float, got: float, passes: bool) -> None:
    judgement = judged(expected([reference]), [got], [allowed], "float16")
    assert judgement.passed == passes
    assert (judgement.allowance_used <= 1) == passes


def test_lse_overflows_at_the_threshold_of_the_softmax_dtype() -> None:
    assert not judged(expected([65500.0]), [INF], [30.0], "float16", "lse").passed


def test_narrower_gradient_overflows_at_the_threshold_of_its_dtype() -> None:
    outputs = {"grad_bias": numpy.asarray([INF], dtype=numpy.float16)}
    allowed = {"grad_bias": numpy.asarray([30.0])}
    wanted = {"grad_bias": expected([65500.0])}
    assert judge(Example(), wanted, outputs, allowed, precision("float32")).passed
    wide = {"grad_bias": numpy.asarray([INF], dtype=numpy.float32)}
    assert not judge(Example(), wanted, wide, allowed, precision("float32")).passed


def test_an_allowance_that_is_not_finite_allows_nothing() -> None:
    for allowed in (INF, NOT_A_NUMBER):
        judgement = judged(expected([1.0, 1.0]), [1.0, 1.0], [0.5, allowed])
        assert not judgement.passed
        assert Example().id in str(judgement.reason)


def sampled(name: str, shape: tuple[int, ...], rows: Sequence[int]) -> tuple[Expected, numpy.ndarray]:
    full = numpy.arange(float(numpy.prod(shape))).reshape(shape)
    flat = full.reshape(-1) if name == "lse" else full.reshape(-1, shape[-1])
    return Expected(flat[list(rows)], None, numpy.asarray(rows, dtype=numpy.int32), shape), full.astype(numpy.float32)


@pytest.mark.parametrize(("name", "shape"), [("output", (2, 3, 5, 7)), ("lse", (2, 3, 5))])
def test_sampled_rows(name: str, shape: tuple[int, ...]) -> None:
    wanted, full = sampled(name, shape, [4, 17])
    allowed = {name: numpy.full(shape, 0.25)}
    outside, inside = full.copy(), full.copy()
    outside[0, 0, 0] = NOT_A_NUMBER
    inside[1, 0, 2] += 1
    assert judge(Example(), {name: wanted}, {name: outside}, allowed, precision("float32")).passed
    judgement = judge(Example(), {name: wanted}, {name: inside}, allowed, precision("float32"))
    assert not judgement.passed
    assert judgement.worst is not None
    assert judgement.worst.index[:3] == (1, 0, 2)
    assert judgement.worst.got == inside[judgement.worst.index]


def test_sampled_rows_have_their_own_allowances() -> None:
    wanted, full = sampled("output", (2, 3, 5, 7), [4, 17])
    allowed = numpy.zeros((2, 3, 5, 7))
    allowed[1, 0, 2] = 4.0
    full[1, 0, 2, 3] += 3
    judgement = judge(Example(), {"output": wanted}, {"output": full}, {"output": allowed}, precision("float32"))
    assert judgement.allowance_used == 0.75


def test_the_worst_of_several_outputs() -> None:
    wanted = {"output": expected([1.0, 2.0]), "lse": expected([3.0])}
    outputs = {"output": numpy.asarray([1.0, 2.25]), "lse": numpy.asarray([3.375])}
    allowed = {"output": numpy.asarray([0.5, 0.5]), "lse": numpy.asarray([0.5])}
    judgement = judge(Example(), wanted, outputs, allowed, precision("float64"))
    assert judgement.passed
    assert judgement.allowance_used == 0.75
    assert judgement.worst is not None
    assert judgement.worst.output == "lse"


def test_missing_output_or_wrong_shape_fails() -> None:
    wanted, allowed = {"output": expected([1.0, 2.0])}, {"output": numpy.ones(2)}
    assert not judge(Example(), wanted, {}, allowed, precision("float32")).passed
    for shape in ((1,), (1, 2), (2, 1)):
        assert not judge(Example(), wanted, {"output": numpy.ones(shape)}, allowed, precision("float32")).passed


def test_empty_output_passes_with_a_share_of_0() -> None:
    wanted = Expected(numpy.zeros((2, 0, 3)), None, None, (2, 0, 3))
    outputs, allowed = {"output": numpy.zeros((2, 0, 3), dtype=numpy.float32)}, {"output": numpy.zeros((2, 0, 3))}
    judgement = judge(Example(), {"output": wanted}, outputs, allowed, precision("float32"))
    assert (judgement.passed, judgement.allowance_used, judgement.worst) == (True, 0.0, None)


def test_statistics_count_only_elements_with_an_allowance() -> None:
    wanted = {"output": expected([1.0, 0.0, 2.0, 5.0], [FINITE, EXACT, FINITE, FINITE])}
    outputs, deviations = (
        {"output": numpy.asarray([1.5, 0.0, 2.0, 5.0])},
        {"output": numpy.asarray([0.25, 0.0, 1.0, 0.0])},
    )
    statistics = gate_b(wanted, outputs, deviations)["output"]
    assert statistics.elements == 2
    assert statistics.largest == 2.0
    assert statistics.rms == numpy.sqrt(2.0)
    assert statistics.note is None


@pytest.mark.parametrize("got", [7.5, NOT_A_NUMBER, INF])
def test_statistics_note_an_outlier(got: float) -> None:
    statistics = gate_b({"output": expected([1.0])}, {"output": numpy.asarray([got])}, {"output": numpy.asarray([1.0])})
    assert "standard deviations" in str(statistics["output"].note)


def test_statistics_note_many_errors_that_are_each_small() -> None:
    values, ones = expected([0.0] * 1000), numpy.ones(1000)
    assert gate_b({"output": values}, {"output": ones}, {"output": ones})["output"].note is None
    assert "root mean square" in str(
        gate_b({"output": values}, {"output": 1.5 * ones}, {"output": ones})["output"].note
    )

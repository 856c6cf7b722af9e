"""The expected values compared with arithmetic that a person can follow, and with decimals of sixty digits."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import flint
import numpy
import oracle_balls
import pytest
from description import Description, Input
from flint import arb
from oracle import Answer, InadmissibleError, expect, sample
from oracle_balls import exact_product, nearest, rounded
from support.answers import kinds_of, multiples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from oracle import Answer

    Numbers = Mapping[str, numpy.ndarray]
    Oracle = Callable[..., Mapping[str, Answer]]

NAN, INFINITY = math.nan, math.inf
SMALLEST = 2.0**-1074
LARGEST = float(numpy.finfo(numpy.float64).max)


# Rounding: a value is returned only if it is proven.


def _ball(value: Fraction | int, radius: Fraction | int = 0) -> arb:
    with flint.ctx.workprec(3000):
        number = Fraction(value)
        midpoint = arb(number.numerator) / number.denominator
        return (
            midpoint if radius == 0 else arb(midpoint, arb(Fraction(radius).numerator) / Fraction(radius).denominator)
        )


TINY = Fraction(1, 2**2000)
ONE_AND_A_HALF_STEP = 1 + Fraction(1, 2**53)


@pytest.mark.parametrize(
    ("ball", "value"),
    [
        (_ball(Fraction(1, 2**30)), 2.0**-30),
        (_ball(ONE_AND_A_HALF_STEP), 1.0),
        (_ball(ONE_AND_A_HALF_STEP + TINY), 1 + 2.0**-52),
        (_ball(ONE_AND_A_HALF_STEP - TINY), 1.0),
        (_ball(ONE_AND_A_HALF_STEP, TINY), None),
        (_ball(ONE_AND_A_HALF_STEP + 2 * TINY, TINY), 1 + 2.0**-52),
        (_ball(ONE_AND_A_HALF_STEP + Fraction(1, 2**52)), 1 + 2.0**-51),
        (_ball(Fraction(SMALLEST)), SMALLEST),
        (_ball(Fraction(SMALLEST) / 2), 0.0),
        (_ball(Fraction(SMALLEST) / 2 + TINY), SMALLEST),
        (_ball(Fraction(SMALLEST) / 2, TINY), None),
        (_ball(Fraction(SMALLEST) * 3 / 2), 2 * SMALLEST),
        (_ball(Fraction(1, 2**1022) - Fraction(SMALLEST) / 2), 2.0**-1022),
        (_ball(Fraction(1, 2**1022) - Fraction(SMALLEST) * 3 / 4), 2.0**-1022 - SMALLEST),
        (_ball(0), 0.0),
        (_ball(0, TINY), 0.0),
        (_ball(0, Fraction(1, 2**1000)), None),
        (_ball(-TINY), 0.0),
        (_ball(-Fraction(SMALLEST) / 4), 0.0),
        (_ball(Fraction(LARGEST)), LARGEST),
        (_ball(Fraction(LARGEST) + 2**969), LARGEST),
        (_ball(Fraction(LARGEST) + 2**970), None),
        (_ball(2**5000), None),
        (arb.nan(), None),
        (arb.pos_inf(), None),
    ],
)
def test_rounding_is_to_nearest_and_proven(ball: arb, value: float | None) -> None:
    with flint.ctx.workprec(3000):
        received = nearest(ball)
        assert received == value
        assert received is None or not math.copysign(1, received) < 0 or received < 0
        mirrored = nearest(-ball)
        assert mirrored == (None if value is None else -value)


@pytest.mark.parametrize("seed", range(20))
def test_rounding_agrees_with_fractions(seed: int) -> None:
    draw = numpy.random.default_rng(seed)
    for _ in range(50):
        exponent = int(draw.integers(-1130, 900))
        number = Fraction(int(draw.integers(2**62)) * 2**9 + int(draw.integers(3)) - 1) * Fraction(2) ** exponent
        with flint.ctx.workprec(3000):
            assert nearest(_ball(number)) == float(number)


def test_an_element_that_does_not_resolve_is_refused_by_name() -> None:
    wide = numpy.asarray([[arb(1), arb(1, 0.1)]], dtype=object)
    with pytest.raises(InadmissibleError, match=r"^case/name: output\[0, 1\] does not resolve at 4096 bits$"):
        rounded("case/name", lambda: {"output": wide}, {"output": numpy.asarray([[True, True]])})
    assert math.isnan(rounded("x", lambda: {"o": wide}, {"o": numpy.asarray([[True, False]])})["o"][0, 1])


def test_precision_rises_until_a_value_resolves() -> None:
    seen: list[int] = []

    def evaluate() -> dict[str, numpy.ndarray]:
        seen.append(flint.ctx.prec)
        return {"output": numpy.asarray([(arb(1) + arb(2) ** -53) + (arb(2) ** -300).exp() - 1], dtype=object)}

    assert rounded("case", evaluate, {"output": numpy.asarray([True])})["output"][0] == 1 + 2.0**-52
    assert seen == list(oracle_balls.PRECISIONS[:2])


def test_products_are_exact() -> None:
    left, right = (
        multiples(3, 5) * 0.1,
        numpy.asarray([[1e300, 1e-300, 0.1, -1e17, 5e-324], [NAN, 1.0, 2.0, INFINITY, 4.0]]),
    )
    table, exponent = exact_product(left, right)
    for i, j in itertools.product(range(3), range(2)):
        pairs = [(x, y) for x, y in zip(left[i].tolist(), right[j].tolist(), strict=True) if math.isfinite(y)]
        assert table[i][j] * Fraction(2) ** exponent == sum(Fraction(x) * Fraction(y) for x, y in pairs)


# Values that a person can compute.


def test_equal_scores_give_the_mean_of_coded_values(ask_oracle: Oracle) -> None:
    """The values encode batch, head and key, so that each output shows the key/value head that its query head reads."""
    batch, heads, kv_heads, q_len, kv_len = 2, 6, 2, 3, 7
    value = numpy.arange(batch)[:, None, None] * 1000 + numpy.arange(kv_heads)[:, None] * 100 + numpy.arange(kv_len)
    arrays = {
        "query": numpy.zeros((batch, heads, q_len, 5)),
        "key": multiples(batch, kv_heads, kv_len, 5),
        "value": value[..., None].astype(float),
    }
    answers = ask_oracle("attention", arrays)
    for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
        assert answers["output"].values[b, h, i, 0] == 1000 * b + 100 * (h // 3) + 3
        assert answers["lse"].values[b, h, i] == math.log(kv_len)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {}, {"softcap": 0.7}])
@pytest.mark.parametrize("visible", range(1, 8))
def test_ties_are_exact(visible: int, options: dict[str, float], ask_oracle: Oracle) -> None:
    """Keys of equal scores: the output is the mean of their values, rounded once, with ties to even."""
    value = numpy.asarray([1.0, 1 + 2.0**-52, -3.0, 0.1, 7.0, 1e-300, 1e5])
    arrays = {
        "query": numpy.full((1, 1, 1, 1), 3.0),
        "key": numpy.full((1, 1, 7, 1), -0.7),
        "value": value.reshape(1, 1, 7, 1),
        "mask": (numpy.arange(7) < visible).reshape(1, 1, 1, 7),
    }
    wanted = float(sum(Fraction(x) for x in value[:visible].tolist()) / visible)
    assert ask_oracle("attention", arrays, **options)["output"].values.item() == wanted
    weights = ask_oracle("attention_weights", {name: arrays[name] for name in ("query", "key", "mask")})["weights"]
    assert weights.values.ravel().tolist() == [1 / visible] * visible + [0.0] * (7 - visible)
    assert kinds_of(weights) == [[[[0] * visible + [1] * (7 - visible)]]]


def test_scores_that_tie_through_bias_are_exact(ask_oracle: Oracle) -> None:
    arrays = {
        "query": numpy.ones((1, 1, 1, 1)),
        "key": numpy.asarray([2.0, -6e4, 1.0]).reshape(1, 1, 3, 1),
        "value": numpy.asarray([5.0, 6.0, 10.0]).reshape(1, 1, 3, 1),
        "bias": numpy.asarray([1.0, 6e4, 2.0]).reshape(1, 1, 1, 3),
        "sinks": numpy.asarray([3.0]),
    }
    answers = ask_oracle("attention", arrays, scale=1.0)
    with localcontext(prec=60):
        power = Decimal(-3).exp()
        assert answers["output"].values.item() == float((15 + 6 * power) / (3 + power))
        assert answers["lse"].values.item() == float(3 + (3 + power).ln())


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"softcap": 5.0}, {"dropout_rate": 0.1}])
def test_gradients_that_cancel_are_zero(options: dict[str, float], ask_oracle: Oracle) -> None:
    """Constant values give dS = 0; constant keys give dQ = 0, although no term of the sum is 0."""
    arrays = {
        "query": multiples(1, 1, 3, 2),
        "key": multiples(1, 1, 5, 2, seed=1),
        "value": multiples(1, 1, 5, 3, seed=2),
    }
    arrays["grad_output"] = multiples(1, 1, 3, 3, seed=3)
    same_values = ask_oracle("attention_vjp", arrays | {"value": numpy.ones((1, 1, 5, 3))}, **options)
    assert not same_values["grad_query"].values.any()
    assert not same_values["grad_key"].values.any()
    same_keys = ask_oracle("attention_vjp", arrays | {"key": numpy.ones((1, 1, 5, 2))}, **options)
    assert not same_keys["grad_query"].values.any()
    assert same_keys["grad_key"].values.all()
    assert same_keys["grad_query"].kinds is None


def test_tiny_weights_are_rounded_to_the_smallest_number_or_to_zero(ask_oracle: Oracle) -> None:
    arrays = {
        "query": numpy.ones((1, 1, 1, 1)),
        "key": numpy.asarray([0.0, -744.0, -744.5, -746.0]).reshape(1, 1, 4, 1),
    }
    weights = ask_oracle("attention_weights", arrays, scale=1.0)["weights"]
    assert weights.values.ravel().tolist() == [1.0, 2 * SMALLEST, SMALLEST, 0.0]
    assert weights.kinds is None


# Sixty digits, written differently: floating decimals, and gradients by differences.


def _logit(a: Mapping[str, Any], options: Mapping[str, Any], b: int, h: int, i: int, j: int) -> Decimal | None:
    """Return the logit of a pair, or None if it is hidden."""
    query, key = a["query"], a["key"]
    g = h * len(key[b]) // len(query[b])
    if not a["mask"][i][j] or (options.get("causal") and j > i + options["q_offset"]):
        return None
    dot = sum((x * y for x, y in zip(query[b][h][i], key[b][g][j], strict=True)), Decimal(0))
    score = dot * Decimal(options["scale"]) if "scale" in options else dot / Decimal(len(key[b][g][j])).sqrt()
    if "softcap" in options:
        cap = Decimal(options["softcap"])
        power = (2 * score / cap).exp()
        score = cap * (power - 1) / (power + 1)
    return score + a["bias"][b][0][0][j]


def _row(a: Mapping[str, Any], options: Mapping[str, Any], b: int, h: int, i: int) -> tuple[list[Decimal], Decimal]:
    """Compute output and lse of one row."""
    value = a["value"][b][h * len(a["key"][b]) // len(a["query"][b])]
    powers = {j: logit.exp() for j in range(len(value)) if (logit := _logit(a, options, b, h, i, j)) is not None}
    total = sum(powers.values(), a["sinks"][h].exp())
    keep = 1 - Decimal(options["dropout_rate"])
    kept = {j: power for j, power in powers.items() if a["dropout_mask"][b][0][i][j]}
    output = [sum((power * value[j][c] for j, power in kept.items()), Decimal(0)) for c in range(len(value[0]))]
    return [x / (total * keep) for x in output], total.ln()


def _objective(a: Mapping[str, Any], options: Mapping[str, Any]) -> Decimal:
    """Compute <grad_output, output> + <grad_lse, lse>, whose derivatives are the gradients."""
    total = Decimal(0)
    for b, h, i in _places(a):
        output, lse = _row(a, options, b, h, i)
        total += sum((x * y for x, y in zip(output, a["grad_output"][b][h][i], strict=True)), Decimal(0))
        total += a["grad_lse"][b][h][i] * lse
    return total


def _places(a: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    query = a["query"]
    return itertools.product(range(len(query)), range(len(query[0])), range(len(query[0][0])))


def _decimals(array: numpy.ndarray) -> Any:
    if array.dtype == bool:
        return array.tolist()
    return [_decimals(item) if isinstance(item, numpy.ndarray) else Decimal(float(item)) for item in array]


@pytest.fixture(params=[{}, {"scale": -0.3}, {"softcap": 1.5}, {"causal": True, "q_offset": 1}], ids=str)
def call(request: pytest.FixtureRequest) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
    draw = numpy.random.default_rng(11)
    arrays = {
        "query": multiples(2, 4, 3, 2, seed=1),
        "key": multiples(2, 2, 4, 2, seed=2),
        "value": multiples(2, 2, 4, 3, seed=3),
        "bias": multiples(2, 1, 1, 4, seed=4, step=0.1),
        "sinks": multiples(4, seed=5, step=0.3),
        "mask": draw.random((3, 4)) < 0.8,
        "dropout_mask": draw.random((2, 1, 3, 4)) < 0.7,
        "grad_output": multiples(2, 4, 3, 3, seed=6),
        "grad_lse": multiples(2, 4, 3, seed=7),
    }
    return arrays, {"dropout_rate": 0.1, **request.param}


def _asked(arrays: Numbers, *without: str) -> Numbers:
    return {name: array for name, array in arrays.items() if name not in without} | {"mask": arrays["mask"][None, None]}


def test_forward_agrees_with_sixty_digits(
    call: tuple[dict[str, numpy.ndarray], dict[str, Any]], ask_oracle: Oracle
) -> None:
    arrays, options = call
    answers = ask_oracle("attention", _asked(arrays, "grad_output", "grad_lse"), **options)
    with localcontext(prec=60):
        a = {name: _decimals(array) for name, array in arrays.items()}
        for b, h, i in _places(a):
            output, lse = _row(a, options, b, h, i)
            assert answers["output"].values[b, h, i].tolist() == [float(x) for x in output]
            assert answers["lse"].values[b, h, i] == float(lse)


def test_gradients_agree_with_differences(
    call: tuple[dict[str, numpy.ndarray], dict[str, Any]], ask_oracle: Oracle
) -> None:
    arrays, options = call
    answers = ask_oracle("attention_vjp", _asked(arrays), **options)
    with localcontext(prec=100):
        a = {name: _decimals(array) for name, array in arrays.items()}
        for name in ("query", "key", "value", "bias", "sinks"):
            gradient = answers[f"grad_{name}"]
            assert gradient.values.shape == arrays[name].shape
            for place in itertools.islice(numpy.ndindex(*arrays[name].shape), 0, None, 3):
                assert gradient.values[place] == _difference(a, options, name, place)


def _difference(a: Mapping[str, Any], options: Mapping[str, Any], name: str, place: tuple[int, ...]) -> float:
    step, holder = Decimal(10) ** -30, a[name]
    for index in place[:-1]:
        holder = holder[index]
    kept = holder[place[-1]]
    ends = []
    for sign in (1, -1):
        holder[place[-1]] = kept + sign * step
        ends.append(_objective(a, options))
    holder[place[-1]] = kept
    return float(((ends[0] - ends[1]) / (2 * step)).quantize(Decimal(10) ** -50))


def test_merging_agrees_with_sixty_digits(ask_oracle: Oracle) -> None:
    arrays = {name: multiples(1, 2, 3, 5, seed=n) for n, name in enumerate(("output_a", "output_b"))}
    arrays |= {name: multiples(1, 2, 3, seed=n, step=2.5) for n, name in enumerate(("lse_a", "lse_b"), 2)}
    answers = ask_oracle("merge_attention", arrays)
    with localcontext(prec=60):
        a = {name: _decimals(array) for name, array in arrays.items()}
        for h, i in itertools.product(range(2), range(3)):
            powers = [a[name][0][h][i].exp() for name in ("lse_a", "lse_b")]
            assert answers["lse"].values[0, h, i] == float(sum(powers, Decimal(0)).ln())
            for c in range(5):
                parts = [
                    power * a[name][0][h][i][c] for power, name in zip(powers, ("output_a", "output_b"), strict=True)
                ]
                assert answers["output"].values[0, h, i, c] == float(sum(parts) / sum(powers))


def test_merging_halves_of_the_keys_gives_attention_over_all_keys(ask_oracle: Oracle) -> None:
    arrays = {
        "query": multiples(1, 1, 2, 3),
        "key": multiples(1, 1, 4, 3, seed=1),
        "value": multiples(1, 1, 4, 2, seed=2),
    }
    halves = {
        f"{name}_{half}": ask_oracle("attention", {n: x if n == "query" else x[:, :, part] for n, x in arrays.items()})[
            name
        ].values
        for half, part in (("a", slice(3)), ("b", slice(3, 4)))
        for name in ("output", "lse")
    }
    whole, merged = ask_oracle("attention", arrays), ask_oracle("merge_attention", halves)
    for name in ("output", "lse"):
        numpy.testing.assert_allclose(merged[name].values, whole[name].values, rtol=4e-16)


def test_gradients_of_merging_agree_with_sixty_digits(ask_oracle: Oracle) -> None:
    arrays = {name: multiples(1, 2, 3, 5, seed=n) for n, name in enumerate(("grad_output", "output_a", "output_b"))}
    arrays |= {name: multiples(1, 2, 3, seed=n, step=0.75) for n, name in enumerate(("grad_lse", "lse_a", "lse_b"), 3)}
    answers = ask_oracle("merge_attention_vjp", arrays)
    with localcontext(prec=60):
        x = {name: _decimals(array)[0] for name, array in arrays.items()}
        for h, i in itertools.product(range(2), range(3)):
            powers = [x[name][h][i].exp() for name in ("lse_a", "lse_b")]
            a, b = (power / sum(powers) for power in powers)
            t = (
                a
                * b
                * sum(
                    g * (left - right)
                    for g, left, right in zip(
                        x["grad_output"][h][i], x["output_a"][h][i], x["output_b"][h][i], strict=True
                    )
                )
            )
            assert answers["grad_lse_a"].values[0, h, i] == float(a * x["grad_lse"][h][i] + t)
            assert answers["grad_lse_b"].values[0, h, i] == float(b * x["grad_lse"][h][i] - t)
            for c, g in enumerate(x["grad_output"][h][i]):
                assert answers["grad_output_a"].values[0, h, i, c] == float(a * g)
                assert answers["grad_output_b"].values[0, h, i, c] == float(b * g)


def test_gradients_of_merging_are_the_derivatives_of_merging(ask_oracle: Oracle) -> None:
    """Compare with the change of the results along each operand, weighted by the cotangents, at a step of 2^-20."""
    arrays = {name: multiples(1, 1, 2, 3, seed=n) for n, name in enumerate(("output_a", "output_b"))}
    arrays |= {name: multiples(1, 1, 2, seed=n) for n, name in enumerate(("lse_a", "lse_b"), 2)}
    cotangents = {"output": multiples(1, 1, 2, 3, seed=5), "lse": multiples(1, 1, 2, seed=6)}
    by_name = {f"grad_{name}": array for name, array in cotangents.items()}
    gradients = ask_oracle("merge_attention_vjp", arrays | by_name)
    step = 2.0**-20

    def moved(name: str, place: tuple[int, ...], by: float) -> float:
        array = arrays[name].copy()
        array[place] += by
        answers = ask_oracle("merge_attention", arrays | {name: array})
        return float(sum((answers[result].values * cotangent).sum() for result, cotangent in cotangents.items()))

    for name, array in arrays.items():
        for place in numpy.ndindex(*array.shape):
            slope = (moved(name, place, step) - moved(name, place, -step)) / (2 * step)
            assert math.isclose(gradients[f"grad_{name}"].values[place], slope, rel_tol=1e-7, abs_tol=1e-7)


# Sampled rows of large outputs.


def test_sampled_rows_include_both_ends_and_the_borders_of_tiles() -> None:
    rows = sample((2, 3, 300), 11)
    assert rows is not None
    assert rows.dtype == numpy.int32
    assert (numpy.diff(rows) > 0).all()
    assert rows[0] == 0
    assert rows[-1] == 2 * 3 * 300 - 1
    entries = {row % 300: row // 300 for row in rows.tolist() if row % 300 in (15, 31, 63, 127, 255)}
    assert len(set(entries.values())) > 3
    assert {15, 16, 31, 32, 63, 64, 127, 128, 255, 256} <= set((rows % 300).tolist())
    assert sample((2, 3, 300), 1800) is None
    assert sample((2, 3, 300), None) is None


@pytest.mark.parametrize("function", ["attention", "attention_vjp", "attention_weights", "merge_attention"])
def test_sampled_answers_equal_rows_of_the_whole_answer(function: str, ask_oracle: Oracle) -> None:
    query, key = multiples(1, 2, 19, 2), multiples(1, 2, 19, 2, seed=1)
    arrays = {"query": query, "key": key, "value": key, "grad_output": query}
    if function == "merge_attention":
        arrays = {"output_a": query, "lse_a": query[..., 0], "output_b": key, "lse_b": key[..., 0]}
    elif function != "attention_vjp":
        arrays = {name: arrays[name] for name in ("query", "key", "value")[: 3 - (function == "attention_weights")]}
    options: dict[str, Any] = {} if function == "merge_attention" else {"causal": True}
    whole = ask_oracle(function, arrays, **options)
    for name, answer in ask_oracle(function, arrays, sampled_rows=5, **options).items():
        assert answer.rows is not None
        assert answer.shape == whole[name].values.shape
        lead = whole[name].values.shape[: 3 if name == "lse" else -1]
        flat = whole[name].values.reshape(math.prod(lead), *answer.shape[len(lead) :])
        numpy.testing.assert_array_equal(answer.values, flat[answer.rows], strict=True)
        kinds = numpy.asarray(kinds_of(whole[name])).reshape(flat.shape)[answer.rows]
        numpy.testing.assert_array_equal(kinds_of(answer), kinds)


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("function", ["attention", "attention_vjp", "attention_weights"])
def test_empty_sizes(function: str, batch: int, q_len: int, kv_len: int, ask_oracle: Oracle) -> None:
    shapes = {"query": (batch, 2, q_len, 3), "key": (batch, 1, kv_len, 3), "value": (batch, 1, kv_len, 5)}
    if function == "attention_vjp":
        shapes["grad_output"] = (batch, 2, q_len, 5)
    elif function == "attention_weights":
        del shapes["value"]
    answers = ask_oracle(function, {name: numpy.ones(shape) for name, shape in shapes.items()})
    for name, answer in answers.items():
        assert answer.values.size == 0 or kinds_of(answer) == numpy.ones(answer.shape, int).tolist()
        assert (answer.values == (-INFINITY if name == "lse" else 0)).all()


def test_a_case_that_must_raise_expects_nothing() -> None:
    inputs = {"query": Input(numpy.zeros((1, 1)))}
    case = Description("case", "", "attention", (), (), inputs, error={"argument": "query", "kind": "value"})
    assert expect(case) == {}

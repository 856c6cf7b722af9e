"""Positions: rotary embedding and linear biases."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numbers import numbers

from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError, reference
from mha_spec.arrays import dtype_name, library_of
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps
from mha_spec_conformance.targets.conversion import to_library, to_numpy

if TYPE_CHECKING:
    from types import ModuleType

BATCH, HEADS, LENGTH, SIZE = 2, 3, 5, 14
EPS = float(numpy.finfo(float).eps)


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def by_loops(
    x: numpy.ndarray,
    positions: numpy.ndarray,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Turn every pair as a complex number; return also the size of its two parts."""
    r = x.shape[-1] if rotary_dim is None else rotary_dim
    turned, size = x.astype(float), numpy.zeros(x.shape)
    for b, h, t in numpy.ndindex(x.shape[:3]):
        for i in range(r // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + r // 2)
            angle = float(positions[b, t]) * base ** (-2 * i / r)
            pair = complex(x[b, h, t, first], x[b, h, t, second]) * complex(math.cos(angle), math.sin(angle))
            turned[b, h, t, first], turned[b, h, t, second] = pair.real, pair.imag
            size[b, h, t, [first, second]] = abs(x[b, h, t, [first, second]]).sum() * (1 + abs(angle))
    return turned, size


OPTIONS: dict[str, dict[str, Any]] = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "part": {"rotary_dim": 6},
    "part-interleaved": {"rotary_dim": 10, "interleaved": True},
    "base": {"base": 7.5},
    "slow": {"base": 500000},
    "below-one": {"base": 0.5, "rotary_dim": 4},
    "pair": {"rotary_dim": 2},
}
POSITIONS: dict[str, Any] = {
    "row": numpy.arange(LENGTH),
    "batch": numpy.asarray([[0, 1, 2, 3, 4], [7, 8, 9, 3, 3]]),
    "negative": [-3, -2, -1, 0, 1],
    "between": [0.0, 0.25, 0.5, -1.75, 1e4],
    "lists": [[5, 4, 3, 2, 1], [0, 0, 0, 0, 0]],
    "far": numpy.asarray([2**20, 2**20 + 1, 5, 2**17, 0], dtype="int32"),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_pairs_turn_by_their_position(module: ModuleType, options: str, positions: str) -> None:
    x = numbers(BATCH, HEADS, LENGTH, SIZE)
    turned = module.rotary_embedding(x, POSITIONS[positions], **OPTIONS[options])
    expected, size = by_loops(x, numpy.broadcast_to(POSITIONS[positions], (BATCH, LENGTH)), **OPTIONS[options])
    assert (turned.dtype, turned.shape) == (x.dtype, x.shape)
    assert (abs(turned - expected) <= 16 * EPS * size).all()
    assert not numpy.array_equal(turned, x)


def test_components_beyond_rotary_dim_stay_to_the_bit(module: ModuleType) -> None:
    x = numbers(BATCH, HEADS, LENGTH, 13).astype("float16")
    x[..., 7], x[..., 8] = numpy.inf, numpy.nan
    for interleaved in (False, True):
        turned = module.rotary_embedding(x, range(1, 6), rotary_dim=6, interleaved=interleaved)
        assert numpy.array_equal(turned[..., 6:], x[..., 6:], equal_nan=True)
        assert numpy.isfinite(turned[..., :6]).all()
        whole = module.rotary_embedding(x[..., :6], range(1, 6), interleaved=interleaved)
        assert numpy.array_equal(turned[..., :6], whole)


def test_nothing_turns_at_position_zero(module: ModuleType) -> None:
    x = numbers(BATCH, HEADS, LENGTH, SIZE)
    assert numpy.array_equal(module.rotary_embedding(x, numpy.zeros(LENGTH)), x)


def test_one_pairing_is_the_other_after_a_permutation() -> None:
    x, order = numbers(BATCH, HEADS, LENGTH, SIZE), numpy.arange(SIZE).reshape(2, -1).T.ravel()
    halves = reference.rotary_embedding(x, range(LENGTH))
    interleaved = reference.rotary_embedding(x[..., order], range(LENGTH), interleaved=True)
    assert numpy.array_equal(halves[..., order], interleaved)
    assert not numpy.array_equal(halves, reference.rotary_embedding(x, range(LENGTH), interleaved=True))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(-(2**16), 2**16),
    st.integers(-(2**16), 2**16),
    st.integers(-(2**16), 2**16),
    st.booleans(),
    st.sampled_from([None, 2, 8]),
)
def test_a_product_knows_the_distance_alone(
    p: int, j: int, shift: int, interleaved: bool, rotary_dim: int | None
) -> None:
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim}
    q, k = numbers(1, 1, 1, SIZE, seed=5), numbers(1, 1, 1, SIZE, seed=7)

    def product(p: int, j: int) -> float:
        turned = reference.rotary_embedding(q, [p], **options) * reference.rotary_embedding(k, [j], **options)
        return float(turned.sum())

    farthest = 1 + abs(p) + abs(j) + abs(shift)
    magnitude = math.sqrt(float((q**2).sum() * (k**2).sum()))
    assert abs(product(p, j) - product(p + shift, j + shift)) <= 32 * EPS * farthest * magnitude


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.booleans())
def test_turns_add_up_and_keep_the_length(first: float, second: float, interleaved: bool) -> None:
    x = numbers(1, 1, 1, SIZE)
    once = reference.rotary_embedding(x, [first + second], interleaved=interleaved)
    twice = reference.rotary_embedding(
        reference.rotary_embedding(x, [first], interleaved=interleaved), [second], interleaved=interleaved
    )
    bound = 32 * EPS * (1 + abs(first) + abs(second)) * abs(x).sum()
    assert (abs(once - twice) <= bound).all()
    assert abs((once**2).sum() - (x**2).sum()) <= 16 * EPS * SIZE * (x**2).sum()


def exact_turn(position: int, size: int, i: int) -> tuple[float, float]:
    """Compute cosine and sine of the angle of a pair in arithmetic of 400 bits."""
    flint = pytest.importorskip("flint")
    before, flint.ctx.prec = flint.ctx.prec, 400
    try:
        exponent = Fraction(-2 * i, size)
        power = flint.arb(10000) ** flint.arb(flint.fmpq(exponent.numerator, exponent.denominator))
        angle = position * power
        return float(angle.cos()), float(angle.sin())
    finally:
        flint.ctx.prec = before


@pytest.mark.parametrize("position", [1, 4095, 131071, 2**30])
def test_positions_on_the_host_are_exact_to_the_result(module: ModuleType, position: int) -> None:
    """With angles in float64, the only errors are the roundings of cosine, sine, products and sum."""
    for dtype, stored in (("float32", 2.0**-24), ("float16", 2.0**-11)):
        x = numbers(1, 1, 1, SIZE).astype(dtype)
        turned = module.rotary_embedding(x, [position])[0, 0, 0].astype(float)
        for i in range(SIZE // 2):
            cosine, sine = exact_turn(position, SIZE, i)
            u, v = (float(x[0, 0, 0, c]) for c in (i, i + SIZE // 2))
            angle_error = 8 * 2.0**-53 * position
            bound = (3 * 2.0**-24 + angle_error) * (abs(u) + abs(v))
            for c, expected in ((i, u * cosine - v * sine), (i + SIZE // 2, v * cosine + u * sine)):
                assert abs(turned[c] - expected) <= bound + stored * (abs(expected) + bound) * (stored > 2.0**-24)


@pytest.mark.parametrize("library", ["array_api_strict", "torch", "jax"])
def test_positions_of_a_library_are_as_exact_as_its_type(library: str) -> None:
    xp = pytest.importorskip(library)
    x, positions = numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32"), POSITIONS["batch"].astype("int32") + 1000
    arrays = [xp.asarray(a) if library == "array_api_strict" else to_library(a, library) for a in (x, positions)]
    turned = reference.rotary_embedding(*arrays, interleaved=True)
    assert library_of(turned) == library
    assert dtype_name(turned) == "float32"
    expected, _ = by_loops(x, positions, interleaved=True)
    i = numpy.repeat(numpy.arange(0, SIZE, 2), 2) / SIZE
    angle_error = positions[:, None, :, None] * 10000**-i * (10 + math.log(10000) * i)
    pairs = numpy.repeat(abs(x.astype(float)).reshape(*x.shape[:3], -1, 2).sum(-1), 2, axis=-1)
    assert (abs(to_numpy(turned) - expected) <= 2.0**-24 * (angle_error + 8 + 3) * pairs).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_result_has_the_dtype_of_x(module: ModuleType, dtype: str) -> None:
    import ml_dtypes

    x = numbers(BATCH, HEADS, LENGTH, SIZE).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert dtype_name(module.rotary_embedding(x, range(LENGTH))) == dtype


def test_sixteen_bits_do_not_round_the_angle(module: ModuleType) -> None:
    import ml_dtypes

    x = numbers(1, 1, 1, SIZE).astype(ml_dtypes.bfloat16)
    turned = module.rotary_embedding(x, [12345]).astype(float)
    expected, size = by_loops(x, numpy.asarray([[12345]]))
    assert (abs(turned - expected) <= 2.0**-8 * abs(expected) + 2.0**-22 * size / 12345).all()


def test_x_is_not_written_to_and_its_strides_do_not_matter(module: ModuleType) -> None:
    x = numbers(SIZE, LENGTH, HEADS, BATCH).T[..., ::-1]
    x.flags.writeable = False
    assert numpy.array_equal(
        module.rotary_embedding(x, range(LENGTH)), module.rotary_embedding(x.copy(), range(LENGTH))
    )


@pytest.mark.parametrize("shape", [(0, HEADS, LENGTH, SIZE), (BATCH, HEADS, 0, SIZE)])
def test_nothing_turns_nothing(module: ModuleType, shape: tuple[int, ...]) -> None:
    assert module.rotary_embedding(numpy.zeros(shape), numpy.zeros(shape[::2][:2])).shape == shape


x_of = numbers(BATCH, HEADS, LENGTH, SIZE)
BAD: dict[str, tuple[dict[str, Any], type[MhaSpecError], str, tuple[str, ...]]] = {
    "odd": ({"x": x_of[..., :13]}, ArgumentValueError, "rotary_dim", ("size=13", "None", "rotary_dim=12")),
    "odd-part": ({"rotary_dim": 5}, ArgumentValueError, "rotary_dim", ("even", "size=14", "rotary_dim=5")),
    "too-large": ({"rotary_dim": 16}, ArgumentValueError, "rotary_dim", ("<=size=14", "rotary_dim=16")),
    "no-part": ({"rotary_dim": 0}, ArgumentValueError, "rotary_dim", ("2<=rotary_dim", "rotary_dim=0")),
    "part-float": ({"rotary_dim": 6.0}, ArgumentTypeError, "rotary_dim", ("integer", "6.0")),
    "base-zero": ({"base": 0}, ArgumentValueError, "base", ("base>0", "base=0")),
    "base-infinite": ({"base": math.inf}, ArgumentValueError, "base", ("finite", "inf")),
    "base-nan": ({"base": math.nan}, ArgumentValueError, "base", ("finite", "nan")),
    "base-text": ({"base": "10000"}, ArgumentTypeError, "base", ("number", "'10000'")),
    "flag-tuple": ({"interleaved": (False,)}, ArgumentTypeError, "interleaved", ("True or False", "(False,)")),
    "positions-long": ({"positions": range(6)}, ArgumentValueError, "positions", ("(length,)=(5,)", "shape=(6,)")),
    "positions-expected": (
        {"positions": range(6)},
        ArgumentValueError,
        "positions",
        ("(length,)=(5,) or (batch, length)=(2, 5), received",),
    ),
    "positions-one": ({"positions": [3]}, ArgumentValueError, "positions", ("(5,)", "shape=(1,)")),
    "positions-number": ({"positions": 3}, ArgumentValueError, "positions", ("(length,)", "shape=()")),
    "positions-batch": (
        {"positions": numpy.zeros((1, LENGTH))},
        ArgumentValueError,
        "positions",
        ("(batch, length)=(2, 5)", "shape=(1, 5)"),
    ),
    "positions-rank": ({"positions": numpy.zeros((2, 1, 5))}, ArgumentValueError, "positions", ("shape=(2, 1, 5)",)),
    "positions-bool": (
        {"positions": numpy.ones(5, bool)},
        ArgumentTypeError,
        "positions",
        ("integers or floats", "bool"),
    ),
    "positions-text": ({"positions": ["a"] * 5}, ArgumentTypeError, "positions", ("numbers", "'a'")),
    "positions-ragged": ({"positions": [[1], [2, 3]]}, ArgumentTypeError, "positions", ("numbers", "[[1], [2, 3]]")),
    "positions-none": ({"positions": None}, ArgumentTypeError, "positions", ("numbers", "None")),
    "rank": ({"x": x_of[0]}, ArgumentValueError, "x", ("(batch, heads, length, size)", "shape=(3, 5, 14)")),
    "integers": ({"x": x_of.astype(int)}, ArgumentTypeError, "x", ("float64", "int64")),
    "list": ({"x": [1.0]}, ArgumentTypeError, "x", ("an array", "list")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(module: ModuleType, name: str) -> None:
    wrong, error, argument, parts = BAD[name]
    with pytest.raises(MhaSpecError) as caught:
        module.rotary_embedding(**{"x": x_of, "positions": range(LENGTH)} | wrong)
    assert type(caught.value) is error
    message = str(caught.value)
    for part in (f"`{argument}`", *parts):
        assert part in message
    assert re.search(r"\[MHA-[A-Z]+-\d+\]$", message)


def test_positions_of_another_library_are_refused(module: ModuleType) -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(ArgumentTypeError, match=r"`positions` must be .*numpy.*MHA-ARG-4"):
        module.rotary_embedding(x_of, strict.arange(LENGTH))


def test_steps_can_be_replaced_by_name() -> None:
    backwards = Layer(replace(LayerSteps(), turns=lambda p, f, like: LayerSteps().turns(-numpy.asarray(p), f, like)))
    turned = backwards.rotary_embedding(x_of, range(LENGTH))
    assert numpy.array_equal(turned, reference.rotary_embedding(x_of, -numpy.arange(LENGTH)))
    assert not numpy.array_equal(turned, reference.rotary_embedding(x_of, range(LENGTH)))


PAPER = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    8: [2.0**-power for power in range(1, 9)],
    3: [2**-4, 2**-8, 2**-2],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    12: [2.0**-power for power in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5],
}


@pytest.mark.parametrize("heads", PAPER)
def test_slopes_are_those_of_the_paper(module: ModuleType, heads: int) -> None:
    for dtype in ("float32", "float64"):
        slopes = module.alibi_slopes(heads, dtype=dtype)
        assert (slopes.dtype, slopes.shape) == (numpy.dtype(dtype), (heads,))
        assert numpy.array_equal(slopes, numpy.asarray(PAPER[heads], dtype=dtype))
    assert module.alibi_slopes(heads).dtype == numpy.float32


@given(st.integers(1, 300))
def test_slopes_of_any_number_of_heads(heads: int) -> None:
    slopes = reference.alibi_slopes(heads, dtype="float64")
    power = 2 ** int(math.log2(heads))
    assert numpy.array_equal(slopes[:power], reference.alibi_slopes(power, dtype="float64"))
    assert numpy.array_equal(
        slopes[power:], reference.alibi_slopes(2 * power, dtype="float64")[0 : 2 * (heads - power) : 2]
    )
    assert len(set(slopes)) == heads
    assert ((slopes >= 2.0**-8) & (slopes < 1)).all()


@pytest.mark.parametrize("offset", [3, -2, [1, 4], (0, -7), numpy.asarray([2, 9])])
def test_bias_is_the_slope_times_the_distance(module: ModuleType, offset: Any) -> None:
    bias = module.alibi_bias(6, 5, 7, q_offset=offset)
    starts = [offset] if isinstance(offset, int) else list(offset)
    assert (bias.dtype, bias.shape) == (numpy.float32, (len(starts), 6, 5, 7))
    for b, h, i, j in numpy.ndindex(bias.shape):
        assert bias[b, h, i, j] == -numpy.float32(PAPER[6][h]) * abs(starts[b] + i - j)


def test_bias_has_the_type_of_its_slopes(module: ModuleType) -> None:
    slopes = numpy.asarray([0.3, 0.7])
    for dtype, expected in (("float64", "float64"), ("float32", "float32"), ("float16", "float32")):
        bias = module.alibi_bias(slopes.astype(dtype), 3, 3)
        assert bias.dtype == expected
        distance = abs(numpy.arange(3)[:, None] - numpy.arange(3))
        assert numpy.array_equal(bias[0], -slopes.astype(dtype).astype(expected)[:, None, None] * distance)


@pytest.mark.parametrize("library", ["array_api_strict", "torch", "jax"])
def test_bias_is_of_the_library_of_its_slopes(library: str) -> None:
    xp = pytest.importorskip(library)
    convert = xp.asarray if library == "array_api_strict" else lambda array: to_library(array, library)
    for offset in (2, numpy.asarray([2, 5]), convert(numpy.asarray([2, 5]))):
        bias = reference.alibi_bias(convert(reference.alibi_slopes(3)), 5, 7, q_offset=offset)
        host = offset if isinstance(offset, int) else [2, 5]
        assert library_of(bias) == library
        assert dtype_name(bias) == "float32"
        assert numpy.array_equal(to_numpy(bias), reference.alibi_bias(3, 5, 7, q_offset=host))


def test_biased_attention_is_a_softmax_over_distances() -> None:
    q, k = numpy.zeros((1, 2, 3, 4)), numpy.zeros((1, 2, 5, 4))
    slopes = reference.alibi_slopes(2, dtype="float64")
    weights = reference.attention_weights(q, k, bias=reference.alibi_bias(slopes, 3, 5, q_offset=1))
    for h, i in numpy.ndindex(2, 3):
        shares = [math.exp(-slopes[h] * abs(1 + i - j)) for j in range(5)]
        assert (abs(weights[0, h, i] - numpy.asarray(shares) / math.fsum(shares)) <= 16 * EPS).all()


BAD_BIAS: dict[str, tuple[dict[str, Any], type[MhaSpecError], str, tuple[str, ...]]] = {
    "no-heads": ({"slopes": 0}, ArgumentValueError, "slopes", ("slopes>=1", "slopes=0")),
    "heads-flag": ({"slopes": True}, ArgumentTypeError, "slopes", ("integer", "True")),
    "slopes-rank": ({"slopes": numpy.ones((3, 1))}, ArgumentValueError, "slopes", ("(heads,)", "shape=(3, 1)")),
    "slopes-integers": ({"slopes": numpy.ones(3, int)}, ArgumentValueError, "slopes", ("floating", "int64")),
    "ambiguous": ({"kv_len": 7}, ArgumentValueError, "q_offset", ('q_offset="lower_right" (2', "q_offset=None")),
    "length": ({"q_len": -1}, ArgumentValueError, "q_len", ("q_len>=0", "q_len=-1")),
    "length-float": ({"kv_len": 5.0}, ArgumentTypeError, "kv_len", ("integer", "5.0")),
    "offset-float": ({"q_offset": 1.5}, ArgumentTypeError, "q_offset", ("integer", "1.5")),
    "offset-floats": ({"q_offset": numpy.ones(2)}, ArgumentTypeError, "q_offset", ("integer", "float64")),
    "offset-rank": ({"q_offset": numpy.ones((2, 1), int)}, ArgumentValueError, "q_offset", ("(batch,)", "(2, 1)")),
    "offset-far": ({"q_offset": 2**31}, ArgumentValueError, "q_offset", ("2**30", str(2**31))),
}


@pytest.mark.parametrize("name", BAD_BIAS)
def test_bad_bias_is_refused(module: ModuleType, name: str) -> None:
    wrong, error, argument, parts = BAD_BIAS[name]
    with pytest.raises(MhaSpecError) as caught:
        module.alibi_bias(**{"slopes": 3, "q_len": 5, "kv_len": 5} | wrong)
    assert type(caught.value) is error
    message = str(caught.value)
    for part in (f"`{argument}`", *parts):
        assert part in message
    assert re.search(r"\[MHA-[A-Z]+-\d+\]$", message)


@pytest.mark.parametrize(
    ("heads", "error"), [(0, ArgumentValueError), (2.0, ArgumentTypeError), (None, ArgumentTypeError)]
)
def test_slopes_need_a_number_of_heads(module: ModuleType, heads: Any, error: type[MhaSpecError]) -> None:
    with pytest.raises(error, match="`heads`"):
        module.alibi_slopes(heads)

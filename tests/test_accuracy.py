"""The accuracy rule: honest implementations are within it, small mistakes are not, and hidden data change no bound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
import planted
import pytest
import trials

from mha_spec import reference
from mha_spec.arrays import FLOATING
from mha_spec.errors import MhaSpecError
from mha_spec.steps import Steps
from mha_spec_conformance.judging.bounds import allowances, bounds, deviations, precision
from mha_spec_conformance.judging.compare import LARGEST_DEVIATION, LARGEST_RMS
from mha_spec_conformance.targets.claims import PROFILES

if TYPE_CHECKING:
    from collections.abc import Mapping

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 7, 11, 5, 13

FORWARD = ("query", "key", "value", "mask", "bias", "sinks", "dropout_mask")
WEIGHTS = ("query", "key", "mask", "bias", "sinks")
FUNCTIONS = {"attention": FORWARD, "attention_weights": WEIGHTS, "attention_vjp": (*FORWARD, "grad_output", "grad_lse")}
OPTIONS = {"softcap": 3.0, "dropout_rate": 0.25}


def question(function: str, seed: int = 3) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
    """Return a call with every option; query 2 of batch entry 0 sees no key, no row sees key 4, some see key 6."""
    rng = numpy.random.default_rng(seed)
    scores = (BATCH, HEADS, Q_LEN, KV_LEN)
    x: dict[str, numpy.ndarray] = {
        "query": rng.standard_normal((BATCH, HEADS, Q_LEN, QK_DIM)),
        "key": rng.standard_normal((BATCH, KV_HEADS, KV_LEN, QK_DIM)),
        "value": rng.standard_normal((BATCH, KV_HEADS, KV_LEN, V_DIM)),
        "mask": rng.random((BATCH, 1, Q_LEN, KV_LEN)) < 0.7,
        "bias": rng.standard_normal((1, HEADS, Q_LEN, KV_LEN)),
        "sinks": rng.standard_normal(HEADS),
        "dropout_mask": rng.random(scores) < 0.8,
        "grad_output": rng.standard_normal((BATCH, HEADS, Q_LEN, V_DIM)),
        "grad_lse": rng.standard_normal((BATCH, HEADS, Q_LEN)),
    }
    x["mask"][0, :, 2] = False
    x["mask"][..., 4] = False
    x["mask"][:, :, :3, 6] = False
    x["mask"][:, :, 3:, 6] = True
    x["sinks"][1] = -math.inf
    arrays = {name: array.astype(numpy.float32) if array.dtype == float else array for name, array in x.items()}
    options = {} if function == "attention_weights" else OPTIONS
    return {name: arrays[name] for name in FUNCTIONS[function]}, options


def answer(function: str, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
    more = {"return_lse": True} if function == "attention" else {}
    results = getattr(reference, function)(**arrays, **options, **more)
    results = results if isinstance(results, tuple) else (results,)
    results = [result for result in results if result is not None]
    return dict(zip(bounds(function, arrays, options).values, results, strict=True))


@pytest.mark.parametrize("dtype", FLOATING)
def test_honest_implementations_are_within_the_allowance(dtype: str) -> None:
    tally = trials.tally(dtype, 7_000, 12, 3, ())
    assert tally.refused == []
    assert len(tally.runs) == 17
    assert all(0 < share <= 1 for share in tally.used.values())
    assert max(tally.largest.values()) <= LARGEST_DEVIATION
    assert max(tally.rms.values()) <= LARGEST_RMS


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "name", ["scale_too_large", "key_dropped", "half_scores", "half_row_sum", "half_accumulator", "honest"]
)
def test_small_mistakes_exceed_the_allowance(name: str, dtype: str) -> None:
    shares = planted.deviation(dtype, getattr(planted, name), 0)
    assert (max(shares.values()) > 1) == (name != "honest")


def test_the_script_plants_the_same_mistakes_as_the_test() -> None:
    assert {mistake.__name__ for mistake in planted.MISTAKES.values()} == {
        "scale_too_large",
        "key_dropped",
        "half_scores",
        "half_row_sum",
        "half_accumulator",
    }


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("profile", PROFILES)
def test_precision_is_that_of_the_dtype(dtype: str, profile: str) -> None:
    p = precision(dtype, profile)
    digits = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}[dtype]
    accumulator = 53 if dtype == "float64" else 24
    assert (p.u_in, p.u_o) == (2.0**-digits, 2.0**-digits)
    assert (p.u_a, p.u_l) == (2.0**-accumulator, 2.0**-accumulator)
    assert p.u_p == p.u_dp == (p.u_a if profile == "strict" else p.u_in)
    assert p.e_x == (2.0**-13 if digits < 24 else 8 * p.u_a)
    assert p.e_t == (2.0**-11 if profile == "fused" and dtype != "float64" else p.e_x)
    assert p.w == {"float64": 2.0**-1018, "float32": 2.0**-122, "float16": 2.0**-25, "bfloat16": 2.0**-122}[dtype]
    assert p.largest == float(ml_dtypes.finfo(dtype).max)


def test_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(MhaSpecError, match="profile='lax'"):
        precision("float32", "lax")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_those_of_the_reference(function: str) -> None:
    arrays, options = question(function)
    wide = {name: array.astype(numpy.float64) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    for name, value in answer(function, wide, options).items():
        assert numpy.array_equal(bounds(function, arrays, options).values[name], value), name


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bounds_are_full_finite_and_in_proportion(function: str, dtype: str) -> None:
    arrays, options = question(function)
    allowed = allowances(function, arrays, options, precision(dtype))
    deviation = deviations(function, arrays, options, precision(dtype))
    assert allowed.keys() == deviation.keys() == answer(function, arrays, options).keys()
    for name, value in answer(function, arrays, options).items():
        assert (allowed[name].shape, allowed[name].dtype) == (value.shape, numpy.float64)
        assert (deviation[name].shape, deviation[name].dtype) == (value.shape, numpy.float64)
        assert numpy.isfinite(allowed[name]).all()
        assert numpy.array_equal(deviation[name] == 0, allowed[name] == 0)
        assert (deviation[name] <= allowed[name]).all()


def test_nothing_is_allowed_where_results_are_exact() -> None:
    p = precision("float16")
    arrays, options = question("attention")
    forward = allowances("attention", arrays, options, p)
    assert (forward["output"][0, :, 2] == 0).all()
    assert forward["lse"][0, 1, 2] == 0
    sinks = abs(arrays["sinks"].astype(numpy.float64))
    for head in (0, 2, 3, 4, 5):
        assert forward["lse"][0, head, 2] == 2 * p.u_a * sinks[head]
    weights = allowances("attention_weights", *question("attention_weights"), p)["weights"]
    assert numpy.array_equal(weights > 0, numpy.broadcast_to(arrays["mask"], weights.shape))
    backward = allowances("attention_vjp", *question("attention_vjp"), p)
    assert (backward["grad_query"][0, :, 2] == 0).all()
    assert (backward["grad_key"][:, :, 4] == 0).all()
    assert (backward["grad_value"][:, :, 4] == 0).all()
    assert (backward["grad_bias"][..., 4] == 0).all()
    assert backward["grad_sinks"][1] == 0
    visible_keys = numpy.delete(backward["grad_key"], 4, axis=2)
    assert (visible_keys > 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_data_that_no_pair_reads_change_no_bound(function: str, poison: float) -> None:
    arrays, options = question(function)
    poisoned = {name: array.copy() for name, array in arrays.items()}
    for name, place in {"query": (0, slice(None), 2), "grad_output": (0, slice(None), 2)}.items():
        if name in poisoned:
            poisoned[name][place] = poison
    for name in ("key", "value"):
        if name in poisoned:
            poisoned[name][:, :, 4] = poison
    poisoned["bias"][..., 4] = poison
    for call in (allowances, deviations):
        clean, dirty = (call(function, x, options, precision("bfloat16")) for x in (arrays, poisoned))
        for name in clean:
            assert numpy.array_equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
def test_data_that_some_rows_see_change_only_their_bounds(poison: float) -> None:
    arrays, options = question("attention")
    poisoned = {name: array.copy() for name, array in arrays.items()}
    poisoned["value"][:, :, 6] = poison
    for call in (allowances, deviations):
        clean, dirty = (call("attention", x, options, precision("float32")) for x in (arrays, poisoned))
        assert numpy.array_equal(clean["output"][:, :, :3], dirty["output"][:, :, :3])
        assert not numpy.array_equal(clean["output"][:, :, 3:], dirty["output"][:, :, 3:])


def test_a_key_that_takes_no_weight_does_not_loosen_the_others() -> None:
    arrays, _ = question("attention")
    arrays = {name: arrays[name] for name in ("query", "key", "value")}
    alone = {**arrays, "key": arrays["key"].copy(), "mask": numpy.ones((1, 1, 1, KV_LEN), dtype=bool)}
    far = {**arrays, "bias": numpy.zeros((1, 1, 1, KV_LEN), dtype=numpy.float32)}
    alone["mask"][..., 3] = False
    far["bias"][..., 3] = -1e8
    p = precision("float32")
    hidden, low = (allowances("attention", x, {}, p)["output"] for x in (alone, far))
    assert (low >= hidden).all()
    assert (low <= 2 * hidden).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("bias", "scale"), [(-1e9, 20.0), (-1e9, 200.0), (-1e30, 2000.0)])
def test_a_bias_that_absorbs_the_scores_leaves_any_weights(function: str, bias: float, scale: float) -> None:
    arrays, _ = question(function)
    names = ("query", "key", "value", "grad_output", "grad_lse")
    arrays = {name: arrays[name] for name in names if name in arrays}
    arrays["bias"] = numpy.full((1, HEADS, 1, 1), bias, dtype=numpy.float32)
    options = {"scale": scale}
    allowed = allowances(function, arrays, options, precision("float32"))
    exact = bounds(function, arrays, options).values
    with numpy.errstate(all="ignore"):
        received = answer(function, arrays, options)
    for name, value in exact.items():
        # Where the guard overflows, the allowance is not finite, and the fuzzer does not compare.
        limited = numpy.isfinite(allowed[name])
        assert limited.all() or scale > 20 or function != "attention", name
        assert (abs(received[name].astype(numpy.float64) - value)[limited] <= allowed[name][limited]).all(), name


def test_an_error_of_a_logit_may_give_weight_to_a_key_of_weight_0() -> None:
    query, key = numpy.full((1, 1, 1, 2), 1e5), numpy.array([[[[0.0, 0.0], [1e5, -1e5 - 0.01]]]])
    value = numpy.array([[[[0.0], [1.0]]]])
    arrays = {name: x.astype(numpy.float32) for name, x in {"query": query, "key": key, "value": value}.items()}
    weights = bounds("attention_weights", {n: arrays[n] for n in ("query", "key")}, {"scale": 1.0}).values["weights"]
    assert weights[0, 0, 0].tolist() == [1.0, 0.0]
    p = precision("float32")
    # The error exceeds the distance of the logits, so that no result can be refused.
    assert not numpy.isfinite(allowances("attention", arrays, {"scale": 1.0}, p)["output"]).any()


def test_a_wider_bias_may_be_rounded() -> None:
    arrays, options = question("attention")
    wide = {**arrays, "bias": arrays["bias"].astype(numpy.float64)}
    for dtype, more in (("float32", True), ("float64", False)):
        p = precision(dtype)
        single, double = (allowances("attention", x, options, p)["lse"] for x in (arrays, wide))
        seen = numpy.broadcast_to(arrays["mask"].any(axis=-1), single.shape)
        assert (double[seen] > single[seen]).all() == more


def test_a_gradient_takes_the_precision_of_its_operand() -> None:
    arrays, options = question("attention_vjp")
    narrow = {**arrays, "bias": arrays["bias"].astype(numpy.float16), "sinks": arrays["sinks"].astype(numpy.float16)}
    same = {
        name: array.astype(numpy.float32) if array.dtype == numpy.float16 else array for name, array in narrow.items()
    }
    p = precision("float32")
    short, long = (allowances("attention_vjp", x, options, p) for x in (narrow, same))
    values = bounds("attention_vjp", same, options).values
    for name in ("grad_bias", "grad_sinks"):
        extra = (2.0**-11 - p.u_o) * abs(values[name])
        assert (short[name][long[name] > 0] > (long[name] + extra)[long[name] > 0]).all()
    for name in ("grad_query", "grad_key", "grad_value"):
        assert numpy.array_equal(short[name], long[name])


def test_precisions_do_not_disturb_each_other() -> None:
    arrays, options = question("attention_vjp")
    shared = bounds("attention_vjp", arrays, options)
    for dtype in (*FLOATING, *FLOATING):
        alone = allowances("attention_vjp", arrays, options, precision(dtype))
        for name, allowed in shared.allowances(precision(dtype)).items():
            assert numpy.array_equal(allowed, alone[name])


def test_strict_allows_less_where_weights_are_stored() -> None:
    for function in ("attention", "attention_vjp"):
        arrays, options = question(function)
        standard, strict = (
            allowances(function, arrays, options, precision("bfloat16", x)) for x in ("standard", "strict")
        )
        for name in standard.keys() - {"lse"}:
            assert (strict[name] <= standard[name]).all()
            assert (strict[name] < standard[name]).any()


def test_steps_of_a_mistake_have_their_own_values_and_bounds() -> None:
    arrays, options = question("attention")
    double = replace(Steps(), scale_of=lambda _, qk_dim: 2 / math.sqrt(qk_dim))
    right, wrong = bounds("attention", arrays, options), bounds("attention", arrays, options, double)
    p = precision("float32")
    assert not numpy.array_equal(right.values["lse"], wrong.values["lse"])
    assert not numpy.array_equal(right.allowances(p)["lse"], wrong.allowances(p)["lse"])


@pytest.mark.parametrize(("q_len", "kv_len", "batch"), [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_sizes(function: str, q_len: int, kv_len: int, batch: int) -> None:
    shapes = {
        "query": (batch, 2, q_len, 5),
        "key": (batch, 2, kv_len, 5),
        "value": (batch, 2, kv_len, 3),
        "sinks": (2,),
        "bias": (1, 1, q_len, kv_len),
        "grad_output": (batch, 2, q_len, 3),
    }
    arrays = {
        name: numpy.ones(shape, dtype=numpy.float32) for name, shape in shapes.items() if name in FUNCTIONS[function]
    }
    for call in (allowances, deviations):
        for name, allowed in call(function, arrays, {}, precision("float16")).items():
            assert allowed.shape == answer(function, arrays, {})[name].shape
            assert numpy.isfinite(allowed).all()


def halves(lse_a: float, lse_b: float) -> dict[str, numpy.ndarray]:
    rng = numpy.random.default_rng(5)
    arrays = {name: rng.standard_normal((2, 3, 5, 7)).astype(numpy.float32) for name in ("output_a", "output_b")}
    lses = {"lse_a": numpy.full((2, 3, 5), lse_a, numpy.float32), "lse_b": numpy.full((2, 3, 5), lse_b, numpy.float32)}
    return arrays | lses


@pytest.mark.parametrize(("lse_a", "lse_b"), [(-math.inf, 0.5), (0.5, -math.inf), (-math.inf, -math.inf)])
def test_a_merge_with_an_empty_half_is_exact_even_if_it_holds_nan(lse_a: float, lse_b: float) -> None:
    arrays = halves(lse_a, lse_b)
    for name in ("output_a", "output_b"):
        if numpy.isneginf(arrays[name.replace("output", "lse")]).all():
            arrays[name][:] = math.nan
    for call in (allowances, deviations):
        for allowed in call("merge_attention", arrays, {}, precision("float16")).values():
            assert (allowed == 0).all()


def test_a_merge_of_two_halves_has_an_allowance_everywhere() -> None:
    for allowed in allowances("merge_attention", halves(0.5, 3.0), {}, precision("float16")).values():
        assert (allowed > 0).all()
        assert numpy.isfinite(allowed).all()

"""Edge cases of mha_spec_jax: a single key, no query, far positions, types of ids, merging."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from jax.test_util import check_grads
from support.comparisons import assert_equal, assert_same
from support.jax_world import operands, tokens
from support.random_calls import ask, assert_allowed, random_arrays

import mha_spec.reference
import mha_spec_jax
from mha_spec.errors import ArgumentValueError
from mha_spec_jax.rotary import turns

Call = dict[str, Any]
FUNCTIONS = ("attention", "attention_weights", "attention_vjp")
FAR = 2**30
SEED = 20261128
UNIT = 2.0**-24
"""The unit roundoff of float32."""


def outputs_of(function: str, call: Call, *, compiled: bool) -> dict[str, numpy.ndarray]:
    """Return the outputs of a function by name, for arrays that are traced or not; host data stays on the host."""
    arrays = {
        name: jnp.asarray(value)
        for name, value in call.items()
        if isinstance(value, numpy.ndarray) and (value.dtype.kind in "fb" or compiled)
    }
    rest = {name: value for name, value in call.items() if name not in arrays}

    def answer(arrays: Call) -> Any:
        return ask(mha_spec_jax, function, {**arrays, **rest})

    outputs = (jax.jit(answer) if compiled else answer)(arrays)
    return {name: numpy.asarray(value) for name, value in outputs.items()}


def assert_right(call: Call, *, compiled: bool) -> None:
    """Check that every function agrees with the specification."""
    single = {
        name: value.astype("float32") if isinstance(value, numpy.ndarray) and value.dtype.kind == "f" else value
        for name, value in call.items()
    }
    for function in FUNCTIONS:
        assert_allowed(function, single, outputs_of(function, single, compiled=compiled))


def hidden(kv_len: int, q_len: int) -> dict[str, Call]:
    """Return the ways to hide every key from some or all rows of two batch entries."""
    nothing = numpy.zeros((2, 1, q_len, kv_len), bool)
    return {
        "kv_lengths": {"kv_lengths": numpy.asarray([0, kv_len])},
        "q_lengths": {"q_lengths": numpy.asarray([0, 2])},
        "mask": {"mask": nothing},
        "mask of one entry": {"mask": nothing[:1, :, :1, :1]},
        "bias": {"bias": numpy.where(nothing, 0.0, -math.inf)},
        "causal": {"causal": True, "q_offset": numpy.asarray([-q_len, -2])},
        "window": {"window": (1, 0), "q_offset": numpy.asarray([kv_len + 1, 0])},
        "segments": {
            "q_segment_ids": numpy.zeros((2, q_len), int),
            "kv_segment_ids": numpy.ones((2, kv_len), int),
        },
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", hidden(1, 5))
def test_an_empty_row_over_one_key(name: str, compiled: bool) -> None:
    call = random_arrays(SEED, q_len=5, kv_len=1) | hidden(1, 5)[name]
    assert_right(call, compiled=compiled)


def test_an_empty_row_over_one_key_under_vmap() -> None:
    call = {name: jnp.asarray(array) for name, array in random_arrays(SEED, q_len=5, kv_len=1).items()}
    lengths = jnp.asarray([0, 1])

    def entry(query: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array) -> Any:
        return mha_spec_jax.attention(query[None], key[None], value[None], kv_lengths=length[None], return_lse=True)

    output, lse = jax.vmap(entry)(call["query"], call["key"], call["value"], lengths)
    assert (output[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert jnp.isfinite(lse[1]).all()


def test_blocks_that_see_a_single_key_or_none() -> None:
    call = random_arrays(SEED, q_len=131, kv_len=3) | {"causal": True, "q_offset": -128}
    assert_right(call, compiled=True)


@pytest.mark.parametrize("name", hidden(4, 0))
def test_no_query(name: str) -> None:
    options = hidden(4, 0)[name] | ({"q_lengths": numpy.asarray([0, 0])} if name == "q_lengths" else {})
    assert_right(random_arrays(SEED, q_len=0, kv_len=4) | options, compiled=False)
    assert_right(random_arrays(SEED, q_len=0, kv_len=4) | options, compiled=True)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"kv_len": 0}, {"batch": 0, "q_len": 0, "kv_len": 0}], ids=str)
def test_no_entry_and_no_key(sizes: dict[str, int]) -> None:
    arrays = random_arrays(SEED, **{"q_len": 5, "kv_len": 7} | sizes)
    batch, q_len, kv_len = *arrays["query"].shape[::2][:1], arrays["query"].shape[2], arrays["key"].shape[2]
    every: Call = {
        "window": (2, 1),
        "q_offset": numpy.zeros(batch, int),
        "q_lengths": numpy.full(batch, q_len),
        "kv_lengths": numpy.full(batch, kv_len),
        "q_segment_ids": numpy.zeros((batch, q_len), int),
        "kv_segment_ids": numpy.zeros((batch, kv_len), int),
        "bias": numpy.zeros((1, 1, q_len, kv_len)),
        "sinks": numpy.ones(6),
    }
    for compiled in (False, True):
        assert_right(arrays | every, compiled=compiled)


@pytest.mark.parametrize(
    ("window", "offset"),
    [
        ((None, FAR), FAR - 3),
        ((FAR, 0), FAR - 2),
        ((0, FAR), -FAR + 3),
        ((FAR, FAR), [FAR, -FAR]),
        ((3, FAR - 5), [-FAR, -FAR + 6]),
    ],
    ids=str,
)
def test_positions_and_windows_of_two_to_the_thirtieth(window: Any, offset: Any) -> None:
    offsets = numpy.asarray(offset) if isinstance(offset, list) else offset
    call = random_arrays(SEED, q_len=7, kv_len=5) | {"window": window, "q_offset": offsets}
    assert_right(call, compiled=isinstance(offset, list))


IDS = {
    "uint32 and int32": ("uint32", [2**32 - 1, 1, 7], "int32", [-1, 1, 7]),
    "int8 and uint32": ("int8", [-1, 1, 7], "uint32", [2**32 - 1, 1, 7]),
    "int64 and uint64": ("int64", [-1, 2**40, 2**53 + 1], "uint64", [2**64 - 1, 2**40, 2**53]),
    "int64 and int32": ("int64", [2**32 + 7, 1, 7], "int32", [7, 1, 2]),
    "uint64 and int32": ("uint64", [2**64 - 1, 1, 7], "int32", [-1, 1, 2]),
}


@pytest.mark.parametrize("double", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("name", IDS)
def test_ids_are_compared_by_value(name: str, double: bool) -> None:
    q_type, q_ids, kv_type, kv_ids = IDS[name]
    q_host, kv_host = numpy.asarray([q_ids], q_type), numpy.asarray([kv_ids], kv_type)
    expected = [[q_id == kv_id for kv_id in kv_ids] for q_id in q_ids]
    with jax.enable_x64(double):
        x = jnp.ones((1, 1, 3, 4), jnp.float32)
        on_device = [
            [host] if host.dtype.itemsize == 8 and not double else [host, jnp.asarray(host)]
            for host in (q_host, kv_host)
        ]
        for q_segment_ids in on_device[0]:
            for kv_segment_ids in on_device[1]:
                ids = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
                weights = mha_spec_jax.attention_weights(x, x, **ids)
                assert ((weights[0, 0] != 0) == jnp.asarray(expected)).all()


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32"])
def test_far_positions_on_a_device_turn_as_those_on_the_host(dtype: str) -> None:
    """The bound is that of MHA-ROTARY-5 for the fraction of a turn."""
    frequencies = 10000.0 ** (numpy.arange(0, 64, 2) / -64)
    positions = numpy.asarray([0, 1, 255, 65537, 1_000_003, 2**24 - 1] + ([] if dtype == "float32" else [FAR]))
    angles = positions[:, None] * frequencies
    cosine, sine = turns(jnp.asarray(positions, dtype), frequencies, jnp.zeros(1, jnp.float32))
    allowed = UNIT * 2 * math.pi * 10 + 2.0**-21
    assert cosine.dtype == sine.dtype == jnp.float32
    assert (abs(cosine - numpy.cos(angles)) <= allowed).all()
    assert (abs(sine - numpy.sin(angles)) <= allowed).all()


def test_positions_between_integers_turn_and_have_a_gradient() -> None:
    x, positions = tokens(3, 8).astype("float32")[:, None], jnp.asarray([0.5, 10.25, -3.75], jnp.float32)

    def turned(positions: jax.Array) -> jax.Array:
        return mha_spec_jax.rotary_embedding(x, positions)

    expected = mha_spec.reference.rotary_embedding(numpy.asarray(x, "float64"), numpy.asarray(positions, "float64"))
    assert (
        abs(turned(positions) - expected) <= 2 * abs(numpy.asarray(x)).max() * (UNIT * 20 * math.pi + 2.0**-20)
    ).all()
    check_grads(jax.jit(turned), (positions,), order=1)


def test_offsets_of_narrow_types_do_not_overflow() -> None:
    x = tokens(300, 8).astype("float32")[:, None]
    offset = jnp.asarray([100, 120], jnp.int8)
    q, k = (x, x[:, :, :1])
    wide = mha_spec_jax.alibi_bias(1, 300, 2, q_offset=offset.astype(jnp.int32))
    assert_equal(mha_spec_jax.alibi_bias(1, 300, 2, q_offset=offset), wide)
    assert_equal(
        mha_spec_jax.alibi_bias(1, 2, 3, q_offset=jnp.asarray([1], jnp.uint32)),
        mha_spec_jax.alibi_bias(1, 2, 3, q_offset=[1]),
    )
    assert_equal(*(mha_spec_jax.attention(q, k, k, window=(150, 0), q_offset=o) for o in (offset, offset.astype(int))))


@pytest.mark.parametrize("traced", [False, True], ids=["host", "traced"])
@pytest.mark.parametrize("reading", ["upper_left", "lower_right"])
def test_named_alignments(reading: str, traced: bool) -> None:
    for lengths in ({}, {"kv_lengths": [9, 3]}, {"q_lengths": [2, 4]}, {"kv_lengths": [9, 3], "q_lengths": [2, 4]}):
        inputs = {name: numpy.asarray(value) for name, value in lengths.items()}
        call = random_arrays(SEED, q_len=5, kv_len=9) | inputs | {"causal": True, "q_offset": reading}
        assert_right(call, compiled=traced)


def test_a_named_alignment_uses_clamped_lengths() -> None:
    query, key, value = operands(5, 9, "float32")
    beyond = {"kv_lengths": jnp.asarray([12, 9]), "q_lengths": jnp.asarray([-1, 7])}
    within = {"kv_lengths": jnp.asarray([9, 9]), "q_lengths": jnp.asarray([0, 5])}
    named, plain = ({"q_offset": "lower_right"}, {"q_offset": jnp.asarray([9, 4])})

    def attended(lengths: Call, offset: Call) -> jax.Array:
        return jax.jit(lambda lengths: mha_spec_jax.attention(query, key, value, causal=True, **lengths, **offset))(
            lengths
        )

    assert_equal(attended(beyond, named), attended(within, plain))
    with pytest.raises(ArgumentValueError, match="lower_right"):
        mha_spec_jax.attention(query, key, value, causal=True, q_offset="bottom_right")


# Merging.


def halves(dtype: str = "float64") -> list[jax.Array]:
    """Return two halves: some rows of each are empty and have a non-finite output, and some rows of both are empty."""
    random = numpy.random.default_rng(SEED)
    shape = (2, 3, 5, 7)
    output_a, output_b = random.standard_normal(shape), random.standard_normal(shape)
    lse_a, lse_b = 3 * random.standard_normal(shape[:3]), 3 * random.standard_normal(shape[:3])
    lse_a[0, 0], output_a[0, 0] = -math.inf, math.nan
    lse_b[1, 1], output_b[1, 1] = -math.inf, math.inf
    lse_b[0, 0, 2:], lse_b[0, 1] = -math.inf, lse_b[0, 1] - 200
    return [jnp.asarray(array, dtype) for array in (output_a, lse_a, output_b, lse_b)]


def cotangents(dtype: str = "float64") -> tuple[jax.Array, jax.Array]:
    """Return cotangents of output and lse."""
    random = numpy.random.default_rng(SEED + 1)
    grad_output = random.standard_normal((2, 3, 5, 7))
    return jnp.asarray(grad_output, dtype), jnp.asarray(random.standard_normal((2, 3, 5)), dtype)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("world", ["vjp", "jit of vjp", "vmap", "call"])
def test_gradients_of_merging(world: str) -> None:
    def ours(dtype: str) -> Any:
        inputs, (grad_output, grad_lse) = halves(dtype), cotangents(dtype)
        if world == "call":
            return mha_spec_jax.merge_attention_vjp(grad_output, *inputs, grad_lse=grad_lse)
        if world == "vmap":
            return jax.vmap(pulled)(*(x[:, None] for x in (grad_output, grad_lse, *inputs)))
        return (jax.jit(pulled) if world == "jit of vjp" else pulled)(grad_output, grad_lse, *inputs)

    def pulled(grad_output: jax.Array, grad_lse: jax.Array, *inputs: jax.Array) -> Any:
        return jax.vjp(mha_spec_jax.merge_attention, *inputs)[1]((grad_output, grad_lse))

    grad_output, grad_lse = map(numpy.asarray, cotangents())
    expected = mha_spec.reference.merge_attention_vjp(grad_output, *map(numpy.asarray, halves()), grad_lse=grad_lse)
    axes = 1 if world == "vmap" else None
    assert_same(ours, [jnp.asarray(x if axes is None else numpy.expand_dims(x, 1)) for x in expected])


@pytest.mark.usefixtures("double")
def test_an_empty_half_has_no_gradient_and_the_other_half_the_cotangents() -> None:
    grad_output, grad_lse = cotangents()
    grad_output = grad_output.at[1, 1].set(math.nan)
    of_output_a, of_lse_a, of_output_b, of_lse_b = mha_spec_jax.merge_attention_vjp(
        grad_output, *halves(), grad_lse=grad_lse
    )
    assert (of_output_a[0, 0] == 0).all()
    assert (of_lse_a[0, 0] == 0).all()
    assert_equal(of_output_b[0, 0, :2], grad_output[0, 0, :2])
    assert_equal(of_lse_b[0, 0, :2], grad_lse[0, 0, :2])
    assert (of_output_b[1, 1] == 0).all()
    assert (of_lse_b[1, 1] == 0).all()
    assert (of_output_b[0, 0, 2:] == 0).all()
    assert_equal(of_lse_a[1, 1], grad_lse[1, 1])


@pytest.mark.usefixtures("double")
def test_merging_has_derivatives_of_both_modes_and_orders() -> None:
    output_a, lse_a, output_b, lse_b = (numpy.nan_to_num(array, posinf=1.0, neginf=-1.0) for array in halves())
    check_grads(jax.jit(mha_spec_jax.merge_attention), (output_a, lse_a, output_b, lse_b), order=2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "constants"])
def test_merging_of_non_finite_halves(compiled: bool) -> None:
    output = jnp.ones((1, 1, 4, 2))
    lse_a = jnp.asarray([[[math.inf, math.inf, math.nan, 300.0]]])
    lse_b = jnp.asarray([[[0.5, -math.inf, -math.inf, -300.0]]])
    broken = output.at[0, 0, 3, 1].set(math.inf)

    def merged() -> Any:
        return mha_spec_jax.merge_attention(output, lse_a, broken, lse_b)

    mixed, lse = (jax.jit(merged) if compiled else merged)()
    assert jnp.isnan(mixed[0, 0, 0]).all()
    assert jnp.isnan(lse[0, 0, 0])
    assert_equal((mixed[0, 0, 1], lse[0, 0, 1]), (output[0, 0, 1], lse_a[0, 0, 1]))
    assert jnp.isnan(lse[0, 0, 2])
    assert (mixed[0, 0, 3, 0], lse[0, 0, 3]) == (1, 300)
    assert not jnp.isfinite(mixed[0, 0, 3, 1])


@pytest.mark.parametrize(
    "options",
    [{"kv_starts": []}, {"kv_starts": numpy.zeros(0, numpy.int64)}, {"q_offset": numpy.zeros(0, numpy.int64)}],
    ids=["starts", "starts as an array", "offsets"],
)
def test_a_batch_without_entries_has_no_starts(options: dict[str, Any]) -> None:
    query, key = (jnp.zeros((0, heads, 11, 5)) for heads in (6, 2))
    output: Any = mha_spec_jax.attention(query, key, key, chunk=3, **options)
    assert output.shape == query.shape
    gradients = mha_spec_jax.attention_vjp(query, query, key, key, chunk=3, **options)
    assert [gradient.shape for gradient in gradients[:3]] == [query.shape, key.shape, key.shape]

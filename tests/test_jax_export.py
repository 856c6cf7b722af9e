"""mha_spec_jax in `jax.export` with symbolic sizes, of which numbers may be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from support.comparisons import assert_equal, assert_near
from support.jax_world import tokens

import mha_spec_jax
from mha_spec import KVCache, PagedKVCache, WindowKVCache
from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 20261128
UNIT = 2.0**-24
"""The unit roundoff of float32."""


def exported(call: Callable[..., Any], *shapes: tuple[str, str]) -> Callable[..., Any]:
    """Export a call for every size, serialize it and load it again."""
    scope = jax.export.SymbolicScope()
    arguments = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), jnp.dtype(dtype)) for shape, dtype in shapes
    ]
    program = jax.export.export(jax.jit(call))(*arguments).serialize()
    return jax.jit(jax.export.deserialize(program).call)


OPERANDS = (("b, 6, n, 11", "float32"), ("b, 3, m, 11", "float32"), ("b, 3, m, 13", "float32"))
PER_ENTRY = ("b", "int32")
SYMBOLIC: dict[str, tuple[Callable[..., Any], tuple[tuple[str, str], ...]]] = {
    "plain": (lambda q, k, v: mha_spec_jax.attention(q, k, v, return_lse=True), ()),
    "lower right": (lambda q, k, v: mha_spec_jax.attention(q, k, v, causal=True, q_offset="lower_right"), ()),
    "every constraint": (
        lambda q, k, v, kv_lengths, bias, ids, kv_ids: mha_spec_jax.attention(
            q, k, v, window=(3, 2), q_offset=kv_lengths, kv_lengths=kv_lengths, bias=bias, q_segment_ids=ids,
            kv_segment_ids=kv_ids, return_lse=True
        ),
        (PER_ENTRY, ("1, 6, n, m", "float32"), ("b, n", "int32"), ("b, m", "int32")),
    ),
    "weights": (lambda q, k, _, lengths: mha_spec_jax.attention_weights(q, k, kv_lengths=lengths), (PER_ENTRY,)),
    "vjp": (
        lambda q, k, v, grad_output, bias, lengths: mha_spec_jax.attention_vjp(
            grad_output, q, k, v, bias=bias, kv_lengths=lengths
        )[:4],
        (("b, 6, n, 13", "float32"), ("b, 1, 1, m", "float32"), PER_ENTRY),
    ),
    "grad": (
        jax.grad(lambda *x: jnp.sum(mha_spec_jax.attention(*x, causal=True, q_offset=2)), argnums=(0, 1, 2)),
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_sizes_may_be_symbolic(name: str) -> None:
    call, more = SYMBOLIC[name]
    program = exported(call, *OPERANDS, *more)
    random = numpy.random.default_rng(SEED)
    for b, n, m in ((2, 3, 7), (1, 7, 1)):
        sizes = {"b": b, "n": n, "m": m}
        inputs = []
        for shape, dtype in (*OPERANDS, *more):
            size = [sizes[axis] if axis in sizes else int(axis) for axis in shape.split(", ")]
            values = random.standard_normal(size) if dtype == "float32" else random.integers(0, min(n, m) + 1, size)
            inputs.append(jnp.asarray(values, dtype))
        described = [(x.shape, x.dtype) for x in jax.tree.leaves(jax.eval_shape(call, *inputs))]
        results, expected = jax.tree.leaves(program(*inputs)), jax.tree.leaves(call(*inputs))
        assert [(x.shape, x.dtype) for x in results] == described
        for result, wanted in zip(results, expected, strict=True):
            finite = jnp.isfinite(wanted)
            assert_equal(jnp.where(finite, 0.0, result), jnp.where(finite, 0.0, wanted))
            scale = float(jnp.abs(jnp.where(finite, wanted, 0.0)).max())
            assert float(jnp.abs(jnp.where(finite, result - wanted, 0.0)).max()) <= 1000 * UNIT * max(scale, 1.0)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("paged", [False, True])
def test_sizes_of_packed_calls_may_be_symbolic(paged: bool) -> None:
    random = numpy.random.default_rng(SEED)
    sizes = [(5, 4, 6), (4, 3, 2, 6), (4, 3, 2, 7)] if paged else [(5, 4, 6), (9, 2, 6), (9, 2, 7)]
    query, key, value = (jnp.asarray(random.standard_normal(size), jnp.float64) for size in sizes)
    if paged:
        shapes = (("t, 4, 6", "float64"), ("p, z, 2, 6", "float64"), ("p, z, 2, 7", "float64"), ("s", "int32"))
        more = jnp.asarray([[3, 0], [1, 2]], jnp.int32), jnp.asarray([4, 6], jnp.int32)
        shapes += (("s - 1, w", "int32"), ("s - 1", "int32"))
    else:
        shapes = (("t, 4, 6", "float64"), ("u, 2, 6", "float64"), ("u, 2, 7", "float64"), *[("s", "int32")] * 2)
        more = (jnp.asarray([0, 4, 9], jnp.int32),)

    def call(query: Any, key: Any, value: Any, q_bounds: Any, *more: Any) -> Any:
        options = {"block_table": more[0], "seqused_kv": more[1]} if paged else {}
        kv_bounds = None if paged else more[0]
        return mha_spec_jax.varlen_attention(
            query, key, value, q_bounds, kv_bounds, causal=True, q_offset="lower_right", **options
        )

    program = exported(call, *shapes)
    for sequences in (2, 0):
        parts = [array[: sequences + (not paged)] for array in more]
        inputs = query, key, value, jnp.asarray([0, 3, 5], jnp.int32)[: sequences + 1], *parts
        expected = call(*inputs)
        assert_near(program(*inputs), expected)
        assert bool(expected.any()) == bool(sequences)


def test_the_default_scale_needs_a_known_size() -> None:
    arrays = ("2, 4, 3, d", "float32"), ("2, 2, 5, d", "float32"), ("2, 2, 5, 7", "float32")
    with pytest.raises(ArgumentValueError, match="`scale` must be a Python number where qk_dim is symbolic"):
        exported(mha_spec_jax.attention, *arrays)
    exported(lambda *x: mha_spec_jax.attention(*x, scale=0.5), *arrays)


@pytest.mark.parametrize("offset", ["upper_left", "lower_right", 3, [1, 4], None], ids=str)
def test_alibi_accepts_symbolic_sizes(offset: Any) -> None:
    """Query and key have the same size where the offset is None."""
    keys = 1 if offset is None else 2

    def call(*arrays: jax.Array) -> jax.Array:
        return mha_spec_jax.alibi_bias(3, arrays[0].shape[0], arrays[keys - 1].shape[0], q_offset=offset)

    program = exported(call, *[("n", "float32"), ("m", "float32")][:keys])
    for n, m in ((2, 5), (7, 1)):
        arrays = [jnp.zeros(size, jnp.float32) for size in (n, m)][:keys]
        assert_equal(program(*arrays), call(*arrays))


def test_alibi_of_two_symbolic_sizes_needs_an_offset() -> None:
    with pytest.raises(ArgumentValueError, match="MHA-POS-2"):
        exported(lambda q, k: mha_spec_jax.alibi_bias(3, *q.shape, *k.shape), ("n", "float32"), ("m", "float32"))


@pytest.mark.parametrize("paged", [False, True])
def test_an_exported_layer_accepts_and_returns_a_cache(paged: bool) -> None:
    layer = mha_spec_jax.MultiHeadAttention(12, 3, key=jax.random.key(0), rotary={})

    def call(layer: Any, x: jax.Array, cache: Any) -> Any:
        return layer(x, causal=True, cache=cache)

    scope = jax.export.SymbolicScope()

    def described(shape: str, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), dtype)

    x, lengths = tokens(5, 12).astype("float32"), described("b", jnp.int32)
    buffer = described("p, 4, 3, 4" if paged else "b, 3, m, 4")
    if paged:
        cache: Any = PagedKVCache.empty(numpy.asarray([[3, 0], [1, 2]]), 4, 4, 3, 4, like=x)
        structure: Any = PagedKVCache(buffer, buffer, lengths, described("b, w", jnp.int32))
    else:
        cache, structure = layer.empty_cache(2, 7), KVCache(buffer, buffer, lengths)
    arguments = (layer, described("b, n, 12"), structure)
    program = jax.export.deserialize(jax.export.export(jax.jit(call))(*arguments).serialize())
    cache = jax.tree.map(lambda array: jnp.asarray(array, jnp.int32 if array.ndim < 3 else None), cache)
    output, new = program.call(layer, x, cache)
    expected, _ = call(layer, x, cache)
    assert type(new) is type(cache)
    assert float(jnp.abs(output - expected).max()) <= 1000 * UNIT * float(jnp.abs(expected).max())


LAYER = mha_spec_jax.MultiHeadAttention(12, 3, key=jax.random.key(0), rotary={})
SEQUENCE = "b, n, 12"
Q, K = "b, 3, n, 4", "b, 3, m, 4"


def table_of(x: jax.Array) -> jax.Array:
    """Return a table with three blocks of each batch entry."""
    return jnp.arange(3 * x.shape[0]).reshape(-1, 3)


NUMBERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "q_offset": (
        lambda q, k: mha_spec_jax.attention(q, k, k, causal=True, q_offset=k.shape[2] - q.shape[2], return_lse=True),
        (Q, K),
    ),
    "lengths": (
        lambda q, k: mha_spec_jax.attention(
            q, k, k, causal=True, q_offset=[k.shape[2] - 1, 0], kv_lengths=[k.shape[2], 2], q_lengths=[1, q.shape[2]]
        ),
        ("2, 3, n, 4", "2, 3, m, 4"),
    ),
    "named offset": (
        lambda q, k: mha_spec_jax.attention(q, k, k, causal=True, q_offset="lower_right", kv_lengths=[k.shape[2], 2]),
        ("2, 3, n, 4", "2, 3, m, 4"),
    ),
    "window": (
        lambda q, k: mha_spec_jax.attention(q, k, k, window=(q.shape[2] - 1, 1), q_offset=k.shape[2] - q.shape[2]),
        (Q, K),
    ),
    "window of known sizes": (
        lambda q, k: mha_spec_jax.attention(k, k, k, window=(q.shape[2], 0)),
        (Q, "1, 3, 600, 4"),
    ),
    "vjp of chunks": (
        lambda q, k: mha_spec_jax.attention_vjp(
            q, q, k, k, causal=True, chunk=q.shape[2], q_offset=k.shape[2] - q.shape[2]
        )[:3],
        (Q, K),
    ),
    "weights": (
        lambda q, k: mha_spec_jax.attention_weights(q, k, window=(None, q.shape[2]), q_offset=-q.shape[2]),
        (Q, K),
    ),
    "alibi": (
        lambda q, k: mha_spec_jax.alibi_bias(3, q.shape[2], k.shape[2], q_offset=k.shape[2] - q.shape[2]),
        (Q, K),
    ),
    "packed": (
        lambda q: mha_spec_jax.varlen_attention(
            q, q, q, [0, 2, q.shape[0]], [0, 2, q.shape[0]], causal=True, q_offset=q.shape[0] - 3,
            window=(q.shape[0], 0), max_seqlen_q=q.shape[0], max_seqlen_kv=q.shape[0]
        ),
        ("n, 3, 4",),
    ),
    "layer": (lambda x: LAYER(x, causal=True, q_offset=x.shape[1], window=(x.shape[1], 0)), (SEQUENCE,)),
    "cache": (lambda x: tuple(LAYER(x, causal=True, cache=LAYER.empty_cache(x.shape[0], 11))[1]), (SEQUENCE,)),
    "capacity": (
        lambda x: LAYER(x, causal=True, cache=LAYER.empty_cache(2, x.shape[1] + 3))[0],
        ("2, n, 12",),
    ),
    "window cache": (
        lambda x: LAYER(
            x, causal=True, window=(x.shape[1], 0), cache=WindowKVCache(*LAYER.empty_cache(x.shape[0], x.shape[1] + 1))
        )[0],
        (SEQUENCE,),
    ),
    "paged cache": (
        lambda x: LAYER(
            x, causal=True, cache=PagedKVCache.empty(table_of(x), 3 * x.shape[0], x.shape[1], 3, 4, like=x)
        )[0],
        (SEQUENCE,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_be_computed_from_symbolic_sizes(name: str) -> None:
    call, shapes = NUMBERS[name]
    program = exported(call, *((shape, "float32") for shape in shapes))
    random = numpy.random.default_rng(SEED)
    for n, m in ((3, 5), (7, 11)):
        sizes = {"b": 2, "n": n, "m": m}
        inputs = [
            jnp.asarray(random.standard_normal([sizes.get(axis) or int(axis) for axis in shape.split(", ")]), "float32")
            for shape in shapes
        ]
        results, expected = jax.tree.leaves(program(*inputs)), jax.tree.leaves(call(*inputs))
        for result, wanted in zip(results, expected, strict=True):
            assert (result.shape, jnp.isfinite(result).all()) == (wanted.shape, jnp.isfinite(wanted).all())
            difference = jnp.where(jnp.isfinite(wanted), result - wanted, 0.0)
            assert float(jnp.abs(difference).max()) <= 1000 * UNIT


REFUSED: dict[str, tuple[Callable[..., Any], type[MhaSpecError], str]] = {
    "window": (
        lambda q: mha_spec_jax.attention(q, q, q, window=(-q.shape[2], 0)),
        ArgumentValueError,
        r"`window` must have 0<=left<=2\*\*30 .* received left=- n",
    ),
    "scale": (
        lambda q: mha_spec_jax.attention(q, q, q, scale=1 / q.shape[2]),
        ArgumentTypeError,
        "`scale` must be a Python number, .* Multiply the query",
    ),
    "heads": (
        lambda q: mha_spec_jax.alibi_slopes(q.shape[2]),
        ArgumentTypeError,
        "`heads` must be an integer, received heads=n .* Export the function with a number",
    ),
    "positions": (
        lambda q: mha_spec_jax.rotary_embedding(q[:, :, :2], [0, q.shape[2]]),
        ArgumentTypeError,
        "`positions` must be an array or a sequence of numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_symbolic_size_that_cannot_be_right_is_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        exported(call, (Q, "float32"))

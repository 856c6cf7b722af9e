"""The layer of JAX with a cache: decoding in any steps, compiled or not, equals a single call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from support.comparisons import assert_equal, assert_near, assert_same
from support.jax_world import floats, heads, parts, sized, tokens, with_gradients
from support.layers import BATCH, CROSS, KV_HEADS, LENGTH, QK_DIM, STEPS, V_DIM

import mha_spec_jax
from mha_spec import ArgumentValueError, KVCache, WindowKVCache, reference
from mha_spec_jax import append_cache, empty_cache
from mha_spec_jax.layer import store

if TYPE_CHECKING:
    from jax import Array

pytestmark = pytest.mark.usefixtures("double", "unoptimized")


@pytest.mark.parametrize(("steps", "compiled"), [("token by token", False), ("chunks", True), ("at once", True)])
def test_decoding_in_any_steps_equals_a_single_call(steps: str, compiled: bool) -> None:
    layer, x = sized(qk_norm=True, rotary={}), tokens()

    def call(layer: Any, part: Array, cache: KVCache) -> tuple[Array, Array, KVCache]:
        output, new = layer(part, causal=True, cache=cache)
        return output, layer.attention_weights(part, causal=True, cache=cache)[..., :LENGTH], new

    step = jax.jit(call) if compiled else call

    def ours(dtype: str) -> list[Array]:
        converted, cache = floats(layer, dtype), floats(layer, dtype).empty_cache(BATCH, LENGTH + 2)
        outputs, weights = [], []
        for part in parts(x.astype(dtype), STEPS[steps]):
            output, seen, cache = step(converted, part, cache)
            outputs.append(output)
            weights.append(seen)
        assert isinstance(cache.lengths, jax.Array if compiled else numpy.ndarray)
        assert numpy.array_equal(cache.lengths, [LENGTH] * BATCH)
        return [jnp.concatenate(outputs, 1), jnp.concatenate(weights, 2)]

    assert_same(ours, [layer(x, causal=True), layer.attention_weights(x, causal=True)])


def test_a_single_program_serves_every_step() -> None:
    layer, x = sized(rotary={}), tokens()
    traces = []

    @jax.jit
    def step(cache: KVCache, token: Array) -> tuple[KVCache, Array]:
        traces.append(token)
        output, cache = layer(token[:, None], causal=True, cache=cache)
        return cache, output[:, 0]

    begun = layer.empty_cache(BATCH, LENGTH)._replace(lengths=jnp.zeros(BATCH, jnp.int32))
    cache, outputs = begun, []
    for token in jnp.moveaxis(x, 1, 0):
        cache, output = step(cache, token)
        outputs.append(output)
    assert len(traces) == 1
    scanned, in_scan = jax.lax.scan(step, begun, jnp.moveaxis(x, 1, 0))
    assert_near(jnp.stack(outputs, 1), layer(x, causal=True))
    assert_near(jnp.moveaxis(in_scan, 0, 1), layer(x, causal=True))
    assert numpy.array_equal(scanned.lengths, [LENGTH] * BATCH)


def test_gradients_go_through_a_cache() -> None:
    layer, x = sized(rotary={}), tokens()

    def decoded(layer: Any, x: Array) -> Array:
        cache, outputs = layer.empty_cache(BATCH, LENGTH), []
        for part in parts(x, [6, 5]):
            output, cache = layer(part, causal=True, cache=cache)
            outputs.append(output)
        return jnp.concatenate(outputs, 1)

    def ours(dtype: str) -> list[Array]:
        return jax.jit(partial(with_gradients, decoded))(*floats((layer, x), dtype))

    assert_same(ours, jax.jit(partial(with_gradients, lambda layer, x: layer(x, causal=True)))(layer, x))


@pytest.mark.parametrize("host", [True, False], ids=["host", "array"])
def test_entries_of_different_lengths_decode_independently(host: bool) -> None:
    layer, x, new_counts = sized(rotary={}), tokens(7), [3, 5]
    lengths = new_counts if host else jnp.asarray(new_counts)
    begun = layer.empty_cache(BATCH, LENGTH)
    begun = begun if host else begun._replace(lengths=jnp.asarray(begun.lengths))
    _, cache = layer(x.at[0, 3:].set(jnp.nan)[:, :5], causal=True, cache=begun, kv_lengths=lengths)

    def ours(dtype: str) -> list[Array]:
        converted, converted_cache = floats((layer, cache), dtype)
        output, after = converted(x[:, 5:].astype(dtype), causal=True, cache=converted_cache)
        assert numpy.array_equal(after.lengths, [5, 7])
        return [output]

    alone = [
        layer(jnp.concatenate([x[b : b + 1, :length], x[b : b + 1, 5:]], 1), causal=True)[:, length:]
        for b, length in enumerate(new_counts)
    ]
    assert_same(ours, [jnp.concatenate(alone)])


def test_an_old_cache_does_not_change() -> None:
    caches = [empty_cache(BATCH, KV_HEADS, LENGTH, QK_DIM, V_DIM, like=jnp.zeros(1))]
    for seed in range(3):
        key, value = heads(2, seed)
        caches.append(append_cache(caches[-1], key, value, [1, 2]))
    seen = [jnp.array(cache.key) for cache in caches]
    key, value = heads(3, seed=9)
    branch, expected = (module.append_cache(caches[1], key, value) for module in (mha_spec_jax, reference))
    assert_equal([cache.key for cache in caches], seen)
    assert_equal(branch, expected)


def test_a_full_cache_is_an_error_on_the_host() -> None:
    layer = sized()
    _, cache = layer(tokens(8), cache=layer.empty_cache(BATCH, LENGTH))
    before = jax.tree.map(lambda array: array.copy(), cache)
    with pytest.raises(ArgumentValueError, match=f"capacity={LENGTH}"):
        layer(tokens(4), cache=cache)
    assert_equal(cache, before)
    assert layer(tokens(3), cache=cache)[1].lengths.tolist() == [LENGTH] * 2


def test_tokens_beyond_a_full_cache_are_dropped_and_counted() -> None:
    layer = sized(rotary={})
    _, cache = layer(tokens(9), cache=layer.empty_cache(BATCH, LENGTH), kv_lengths=[9, 4])
    after = jax.jit(lambda cache: layer(tokens(4, seed=6), causal=True, cache=cache)[1])(cache)
    assert numpy.array_equal(after.lengths, [13, 8])
    for before, now in zip(cache[:2], after[:2], strict=True):
        assert_equal([now[0, :, :9], now[1, :, :4]], [before[0, :, :9], before[1, :, :4]])
        assert (now[0, :, 9:] != before[0, :, 9:]).all()
        assert_equal(now[1, :, 8:], before[1, :, 8:])
    full = jax.jit(lambda cache: layer(tokens(2, seed=7), causal=True, cache=cache)[1])(after)
    assert_equal(full.key[0], after.key[0])
    assert numpy.array_equal(full.lengths, [15, 10])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
@pytest.mark.parametrize("kind", [KVCache, WindowKVCache])
def test_lengths_of_narrow_types_do_not_wrap(kind: Any, dtype: str) -> None:
    """Nor are they mixed with other types, which JAX refuses where a program asks for it."""
    cache = kind(*empty_cache(BATCH, KV_HEADS, 300, QK_DIM, V_DIM, like=jnp.zeros(1)))
    key, value = heads(200)
    for counts in (None, jnp.asarray([100, 120], dtype)):
        added = [200, 200] if counts is None else [100, 120]
        with jax.numpy_dtype_promotion("strict"):
            after = append_cache(cache._replace(lengths=jnp.asarray([100, 3], dtype)), key, value, counts)
        expected = append_cache(cache._replace(lengths=[100, 3]), key, value, added)
        assert numpy.array_equal(after.lengths, expected.lengths)
        assert_equal(after[:2], expected[:2])


def test_known_and_traced_starts_store_the_same() -> None:
    buffer, traced = jnp.zeros((BATCH, KV_HEADS, LENGTH, QK_DIM)), jax.jit(store)
    new = numpy.asarray(heads(3)[0])
    for start in ([3, 0], [3, 3], [9, 10], [11, 20], [-1, -2]):
        begin, end = numpy.asarray(start), numpy.asarray(start) + 3
        expected = numpy.zeros(buffer.shape)
        for b, i in numpy.ndindex(BATCH, 3):
            if 0 <= start[b] + i < LENGTH:
                expected[b, :, start[b] + i] = new[b, :, i]
        assert_equal(traced(buffer, new, begin, end), jnp.asarray(expected))
        if min(start) >= 0 and max(start) + 3 <= LENGTH:
            assert_equal(store(buffer, new, begin, end), jnp.asarray(expected))


def test_keys_cached_before_serve_cross_attention() -> None:
    layer, x, key, value = sized(**CROSS), tokens(), tokens(8, 3), tokens(8, 17)
    _, cache = layer(x[:, :1], key, value, cache=layer.empty_cache(BATCH, 8), q_offset=0)
    output, after = mha_spec_jax.multi_head_attention(x, None, None, layer.params, cache=cache, q_offset=0)
    assert_near(output, layer(x, key, value))
    assert numpy.array_equal(after.lengths, cache.lengths)

"""TensorFlow's layer with a cache: decoding in any steps, eager, in graphs or by XLA, equals a single call."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import tensorflow as tf
from support import layers
from support.comparisons import assert_equal, assert_near, assert_same
from support.layers import BATCH, CROSS, EMBED, KV_HEADS, LENGTH, QK_DIM, STEPS, V_DIM
from support.numbers import numbers
from support.tensorflow_world import heads, sized, tokens, with_gradients

import mha_spec_tensorflow
from mha_spec import ArgumentValueError, KVCache, reference
from mha_spec_tensorflow import append_cache, decoding, empty_cache
from mha_spec_tensorflow.layer import store


@pytest.mark.parametrize("mode", ["host", "tensor", "graph"])
@pytest.mark.parametrize("steps", STEPS)
def test_decoding_in_any_steps_equals_a_single_call(steps: str, mode: str) -> None:
    layer, x = sized(qk_norm=True, rotary={}), tokens()

    def ours(dtype: str) -> list[tf.Tensor]:
        layer = sized(dtype, qk_norm=True, rotary={})

        def call(part: tf.Tensor, cache: KVCache) -> tuple[tf.Tensor, tf.Tensor, KVCache]:
            weights = layer.attention_weights(part, causal=True, cache=cache)[..., :LENGTH]
            output, new = layer(part, causal=True, cache=cache)
            return output, weights, new

        step = tf.function(call) if mode == "graph" else call
        cache, outputs, weights = layer.empty_cache(BATCH, LENGTH + 2), [], []
        cache = cache if mode == "host" else cache._replace(lengths=tf.constant(cache.lengths))
        for part in tf.split(tf.cast(x, dtype), STEPS[steps], axis=1):
            output, of_part, cache = step(part, cache)
            outputs.append(output)
            weights.append(of_part)
        assert tf.is_tensor(cache.lengths) == (mode != "host")
        assert numpy.array_equal(cache.lengths, [LENGTH] * BATCH)
        return [tf.concat(outputs, 1), tf.concat(weights, 2)]

    assert_same(ours, [layer(x, causal=True), layer.attention_weights(x, causal=True)])


def counted(function: Any) -> int:
    """Count the graphs that were traced of a function."""
    return function.experimental_get_tracing_count()


@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "xla"])
def test_one_graph_serves_every_step(compiled: bool) -> None:
    layer, x = sized(rotary={}), tokens()

    @tf.function(jit_compile=compiled)
    def step(token: tf.Tensor, cache: KVCache) -> tuple[tf.Tensor, KVCache]:
        return layer(token, causal=True, cache=cache)

    cache, outputs = layer.empty_cache(BATCH, LENGTH), []
    cache = cache._replace(lengths=tf.constant(cache.lengths))
    for token in tf.split(x, LENGTH, axis=1):
        output, cache = step(token, cache)
        outputs.append(output)
    assert counted(step) == 1
    assert_near(tf.concat(outputs, 1), layer(x, causal=True))


def test_one_graph_serves_chunks_of_every_length() -> None:
    layer, x = sized(rotary={}), tokens()

    @tf.function(input_signature=[tf.TensorSpec((BATCH, None, EMBED), tf.float64)])
    def whole(x: tf.Tensor) -> tf.Tensor:
        cache = layer.empty_cache(BATCH, LENGTH)
        first, cache = layer(x[:, :4], causal=True, cache=cache)
        second, cache = layer(x[:, 4:], causal=True, cache=cache)
        return tf.concat([first, second], 1)

    for length in (7, LENGTH):
        assert_near(whole(x[:, :length]), layer(x[:, :length], causal=True))
    assert counted(whole) == 1


def values_of(layer: Any) -> list[tf.Tensor]:
    """Return the values of the trainable weights."""
    return [variable.value for variable in layer.trainable_weights]


def test_gradients_pass_through_a_cache() -> None:
    layer, x = sized(rotary={}), tokens()

    def decoded(layer: Any, x: tf.Tensor) -> tf.Tensor:
        cache, outputs = layer.empty_cache(BATCH, LENGTH), []
        for part in tf.split(x, [4, 4, 3], axis=1):
            output, cache = layer(part, causal=True, cache=cache)
            outputs.append(output)
        return tf.concat(outputs, 1)

    def ours(dtype: str) -> list[tf.Tensor]:
        narrow, inputs = sized(dtype, rotary={}), tf.cast(x, dtype)
        return with_gradients(lambda: decoded(narrow, inputs), [inputs, *values_of(narrow)])

    leaves = [x, *values_of(layer)]
    assert_same(ours, with_gradients(lambda: layer(x, causal=True), leaves))


@pytest.mark.parametrize("host", [True, False], ids=["host", "tensor"])
def test_batch_entries_of_different_lengths_are_independent(host: bool) -> None:
    layer, lengths = sized(rotary={}), [3, 5]
    clean = layers.tokens(7)
    garbage = clean.copy()
    garbage[0, 3:5] = numpy.nan

    def ours(dtype: str) -> list[tf.Tensor]:
        layer, x = sized(dtype, rotary={}), tf.constant(garbage, dtype)
        cache = layer.empty_cache(BATCH, LENGTH)
        cache = cache if host else cache._replace(lengths=tf.constant(cache.lengths))
        kv_lengths = lengths if host else tf.constant(lengths)
        _, cache = layer(x[:, :5], causal=True, cache=cache, kv_lengths=kv_lengths)
        output, after = layer(x[:, 5:], causal=True, cache=cache)
        assert numpy.array_equal(after.lengths, [5, 7])
        return [output]

    entries = enumerate(lengths)
    sequences = [numpy.concatenate([clean[b : b + 1, :length], clean[b : b + 1, 5:]], 1) for b, length in entries]
    expected = [layer(tf.constant(x), causal=True)[:, x.shape[1] - 2 :] for x in sequences]
    assert_same(ours, [tf.concat(expected, 0)])


def test_an_old_cache_is_unchanged() -> None:
    caches = [empty_cache(BATCH, KV_HEADS, LENGTH, QK_DIM, V_DIM, like=tf.zeros((), tf.float64))]
    for seed in range(3):
        caches.append(append_cache(caches[-1], *heads(2, seed), [1, 2]))
    keys = [tf.constant(cache.key.numpy().copy()) for cache in caches]
    branch = append_cache(caches[1], *heads(3, seed=9))
    on_host = KVCache(*(numpy.asarray(buffer) for buffer in caches[1]))
    key, value, lengths = reference.append_cache(on_host, *layers.heads(3, seed=9))
    assert_equal([cache.key for cache in caches], keys)
    assert_equal(branch, [tf.constant(key), tf.constant(value), lengths])


def test_a_full_cache_is_an_error_on_the_host() -> None:
    layer = sized()
    _, cache = layer(tokens(8), cache=layer.empty_cache(BATCH, LENGTH))
    assert isinstance(cache.lengths, numpy.ndarray)
    before = cache.key.numpy().copy()
    with pytest.raises(ArgumentValueError, match=f"capacity={LENGTH}"):
        layer(tokens(4), cache=cache)
    assert numpy.array_equal(cache.key, before)
    assert layer(tokens(3), cache=cache)[1].lengths.tolist() == [LENGTH] * 2


def test_tokens_beyond_a_full_cache_are_dropped_and_counted() -> None:
    layer = sized(rotary={})
    _, cache = layer(tokens(9), cache=layer.empty_cache(BATCH, LENGTH), kv_lengths=[9, 4])
    cache = cache._replace(lengths=tf.constant(cache.lengths))
    after = tf.function(lambda cache: layer(tokens(4, seed=6), causal=True, cache=cache)[1])(cache)
    assert numpy.array_equal(after.lengths, [13, 8])
    for before, now in zip(cache[:2], after[:2], strict=True):
        assert_equal([now[0, :, :9], now[1, :, :4]], [before[0, :, :9], before[1, :, :4]])
        assert (now[0, :, 9:].numpy() != before[0, :, 9:].numpy()).all()
        assert_equal(now[1, :, 8:], before[1, :, 8:])
    full = layer(tokens(2, seed=7), causal=True, cache=after)[1]
    assert_equal(full.key[0], after.key[0])
    assert numpy.array_equal(full.lengths, [15, 10])


@pytest.mark.parametrize("start", [[3, 0], [3, 3], [9, 10], [11, 20], [-1, -2]])
def test_tokens_are_stored_at_their_positions(start: list[int]) -> None:
    new, expected = layers.heads(3)[0], numpy.zeros((BATCH, KV_HEADS, LENGTH, QK_DIM))
    buffer = tf.zeros(expected.shape, tf.float64)
    for b, i in numpy.ndindex(BATCH, 3):
        if 0 <= start[b] + i < LENGTH:
            expected[b, :, start[b] + i] = new[b, :, i]
    begin, in_graph = numpy.asarray(start), tf.function(store)
    eager = store(buffer, tf.constant(new), begin, begin + 3)
    traced = in_graph(buffer, tf.constant(new), tf.constant(start), tf.constant(start) + 3)
    assert_equal([eager, traced], [tf.constant(expected)] * 2)


def test_cross_attention_reads_cached_keys() -> None:
    layer, x, key, value = sized(**CROSS), tokens(), tokens(8, 3), tokens(8, 17)
    _, cache = layer(x[:, :1], key, value, cache=layer.empty_cache(BATCH, 8), q_offset=0)
    output, after = mha_spec_tensorflow.multi_head_attention(x, None, None, layer.params, cache=cache, q_offset=0)
    assert_near(output, layer(x, key, value))
    assert numpy.array_equal(after.lengths, cache.lengths)


@pytest.mark.parametrize("chunk", [1, 40, decoding.CHUNK])
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "not finite"])
def test_a_few_queries_of_all_sequences_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, broken: bool
) -> None:
    monkeypatch.setattr(decoding, "CHUNK", chunk)
    results: list[Any] = []
    attend = decoding.attend
    monkeypatch.setattr(decoding, "attend", lambda *arguments: results.append(attend(*arguments)) or results[-1])
    query, key, value = numbers(6, 4, 3), numbers(19, 2, 3), numbers(19, 2, 5)
    key[3], value[11], value[2, 1] = numpy.nan, numpy.nan, numpy.nan if broken else 1.0
    options: dict[str, Any] = {"cu_seqlens_q": [0, 2, 4, 6], "cu_seqlens_kv": [0, 4, 12, 19]}
    options |= {"seqused_kv": [3, 7, 7], "causal": True, "q_offset": "lower_right", "return_lse": True}
    expected: Any = reference.varlen_attention(query, key, value, **options)
    operands: Any = map(tf.constant, (query, key, value))
    ours: Any = mha_spec_tensorflow.varlen_attention(*operands, **options)
    assert [result is None for result in results] == [broken]
    for result, wanted in zip(ours, expected, strict=True):
        assert numpy.array_equal(numpy.isnan(result), numpy.isnan(wanted))
        assert_near(numpy.nan_to_num(result), numpy.nan_to_num(wanted))

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
from mha_spec_tensorflow import append_cache, decoding, empty_cache, forward
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


LIMITS = {
    "one batch": ({}, [4, 1]),
    "no padding": ({"PADDING": 0}, [2, 1, 1, 1]),
    "two sequences": ({"BATCH": 2 * 7 * 2 * 5}, [2, 2, 1]),
    "one sequence": ({"BATCH": 1}, [1] * 5),
}
"""The limits of batches, and the numbers of sequences of the batches; one sequence has no keys."""
FLOATS = ("query", "key", "value", "sinks", "alibi_slopes")


def step(layout: str, *, broken: bool = False) -> dict[str, Any]:
    """Return a call of two queries of each of five sequences; keys of no sequence hold NaN, and a key if broken."""
    ends, lengths = [0, 2, 4, 6, 8, 10], [3, 7, 7, 4, 0]
    call: dict[str, Any] = {"query": numbers(13, 4, 3), "sinks": numbers(4, seed=4), "alibi_slopes": numbers(4, seed=5)}
    call |= {"cu_seqlens_q": ends, "cu_seqlens_kv": None, "seqused_kv": lengths, "q_offset": [3, 5, 6, 2, 2]}
    call |= {"causal": True, "window": (5, 0), "softcap": 1.5}
    if layout == "packed":
        sizes, seen, unused = (24,), 2, [3, 11, 23]
        call["cu_seqlens_kv"] = [0, 4, 12, 19, 24, 24]
    else:
        sizes, seen, unused = (8, 3), 13, [3, 4, 5, 10, 11, 15, 16, 17]
        call["block_table"] = numpy.array([[4, 1, 5], [2, 4, 0], [0, 7, 3], [6, 7, 1], [-1, 5, 99]])
    for name, size in (("key", 3), ("value", 5)):
        call[name] = numbers(*sizes, 2, size)
        call[name].reshape(-1, 2, size)[unused] = numpy.nan
    call["value"].reshape(-1, 2, 5)[seen, 1] = numpy.nan if broken else 1.0
    return call


def answered(call: dict[str, Any]) -> Any:
    """Ask the backend for output and lse; a tensor holds block 99 for 7, to which it is clamped (MHA-VARLEN-6)."""
    call = {name: tf.constant(x) if isinstance(x, numpy.ndarray) else x for name, x in call.items()}
    if "block_table" in call:
        call["block_table"] = tf.where(call["block_table"] == 7, tf.constant(99, tf.int64), call["block_table"])
    return mha_spec_tensorflow.varlen_attention(**call, return_lse=True)


@pytest.mark.parametrize(("limits", "sizes"), LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("layout", ["packed", "paged"])
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "not finite"])
def test_a_few_queries_of_all_sequences_are_computed_in_batches(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], sizes: list[int], layout: str, broken: bool
) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(decoding, name, limit)
    computed, again, attend, finite = [], [], forward.attend, forward.finite
    monkeypatch.setattr(forward, "attend", lambda p, x, **o: computed.append(len(x.query)) or attend(p, x, **o))
    monkeypatch.setattr(forward, "finite", lambda array: again.append(array) or finite(array))
    call = step(layout, broken=broken)
    ours, expected = answered(call), reference.varlen_attention(**call, return_lse=True)
    assert computed == sizes
    assert broken or not again
    for result, wanted in zip(ours, expected, strict=True):
        assert numpy.isnan(wanted).any() == (broken and wanted is expected[0])
        assert numpy.array_equal(numpy.isnan(result), numpy.isnan(wanted))
        assert_near(*(numpy.nan_to_num(array, neginf=0.0) for array in (result, wanted)))


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([100, *[90] * 12], [11, 2]),  # The padding of 11 sequences would be 110.
        ([100, 75, 74, 70], [2, 2]),  # The padding of the third sequence would be a quarter of 104.
        ([500, 500, 500], [2, 1]),
        ([5000, 4990], [1, 1]),
        ([22, 20, 0, 0], [2, 2]),
        ([0], [1]),
    ],
)
def test_sequences_of_similar_lengths_are_a_batch(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], sizes: list[int]
) -> None:
    monkeypatch.setattr(decoding, "PADDING", 3 * 100)
    monkeypatch.setattr(decoding, "BATCH", 3 * 1200)
    batches = list(decoding._batches(lengths, 3))
    assert [batch.stop - batch.start for batch in batches] == sizes
    assert [length for batch in batches for length in lengths[batch]] == lengths


@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_a_few_queries_in_16_bits_are_computed_in_float32(layout: str) -> None:
    call = step(layout)
    in_16_bits = {name: x.astype("bfloat16") for name, x in call.items() if name in FLOATS}
    exact = answered(call | {name: x.astype("float32") for name, x in in_16_bits.items()})
    output, lse = answered(call | in_16_bits)
    assert_equal([output, lse], [tf.cast(exact[0], "bfloat16"), exact[1]])

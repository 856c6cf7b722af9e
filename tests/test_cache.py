"""The key/value cache: appending, overflow, and decoding in any steps, which equals a single call."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import pickle
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layer_by_loops import LayerByLoops
from support.numbers import numbers

import mha_spec_numpy
from mha_spec import ArgumentTypeError, ArgumentValueError, KVCache, MhaSpecError, reference
from mha_spec.arrays import library_of
from mha_spec.layer import Layer
from mha_spec.layer_object import LayerSettings
from mha_spec.layer_steps import LayerSteps
from mha_spec_conformance.targets.conversion import to_library, to_numpy
from mha_spec_numpy import layer

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, LENGTH = 2, 3, 13, 4, 5, 7
SIZES = LayerSettings(
    embed=8, heads=6, kv_heads=KV_HEADS, qk_dim=QK_DIM, v_dim=V_DIM, k_embed=8, v_embed=8, out=9, qk_norm=True
)


def new(length: int, seed: int = 5) -> tuple[numpy.ndarray, numpy.ndarray]:
    return numbers(BATCH, KV_HEADS, length, QK_DIM, seed=seed), numbers(BATCH, KV_HEADS, length, V_DIM, seed=seed)


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


MODULES = pytest.mark.parametrize("module", [reference, mha_spec_numpy], ids=["reference", "numpy"])
"""The same modules as a parameter, because hypothesis calls a test many times."""


def empty(module: ModuleType) -> KVCache:
    return module.empty_cache(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=numbers(1))


def read(cache: KVCache) -> list[numpy.ndarray]:
    """Copy the keys and values below the lengths of a cache."""
    tokens = [(cache.key[b, :, :length], cache.value[b, :, :length]) for b, length in enumerate(cache.lengths)]
    return [array.copy() for pair in tokens for array in pair]


def same(arrays: list[numpy.ndarray], others: list[numpy.ndarray]) -> bool:
    return all(numpy.array_equal(*pair) for pair in zip(arrays, others, strict=True))


def test_a_new_cache_is_empty(module: ModuleType) -> None:
    cache = empty(module)
    assert cache.key.shape == (BATCH, KV_HEADS, CAPACITY, QK_DIM)
    assert cache.value.shape == (BATCH, KV_HEADS, CAPACITY, V_DIM)
    assert (cache.batch, cache.capacity, list(cache.lengths)) == (BATCH, CAPACITY, [0, 0])
    assert cache.key.dtype == cache.value.dtype == numpy.float64
    assert module.empty_cache(1, 1, 1, 3, like=numbers(1).astype("float16")).value.shape == (1, 1, 1, 3)


def test_the_class_asks_the_backend_of_the_array() -> None:
    cache = KVCache.empty(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=numbers(1)).append(*new(LENGTH))
    assert same(read(cache), read(empty(mha_spec_numpy).append(*new(LENGTH))))
    assert repr(cache) == "KVCache(key=(2, 3, 13, 4), value=(2, 3, 13, 5), lengths=array([7, 7], dtype=int32))"


chunk = st.tuples(st.integers(0, 4), st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(0, 4))))


@MODULES
@settings(deadline=None, max_examples=60)
@given(st.lists(chunk, max_size=6), st.booleans())
def test_append_stores_new_tokens_after_the_old(module: ModuleType, chunks: list[Any], as_tuple: bool) -> None:
    cache, expected = empty(module), [[[], []] for _ in range(BATCH)]
    for step, (length, drawn) in enumerate(chunks):
        counts = None if drawn is None else tuple(min(count, length) for count in drawn)
        key, value = new(length, seed=step)
        more = [length] * BATCH if counts is None else list(counts)
        if any(len(entry[0]) + count > CAPACITY for entry, count in zip(expected, more, strict=True)):
            continue
        for b, count in enumerate(more):
            for kind, source in enumerate((key, value)):
                expected[b][kind] += [source[b, :, i] for i in range(count)]
        if as_tuple:
            cache = cache._replace(lengths=tuple(int(length) for length in cache.lengths))
        cache = module.append_cache(cache, key, value, counts)
        assert library_of(cache.lengths) == "numpy"
        assert list(cache.lengths) == [len(entry[0]) for entry in expected]
    for b, entry in enumerate(expected):
        for buffer, tokens in zip((cache.key, cache.value), entry, strict=True):
            assert [buffer[b, :, j].tolist() for j in range(len(tokens))] == [token.tolist() for token in tokens]
            assert not buffer[b, :, len(tokens) :].any()


def test_an_append_does_not_change_the_old_cache(module: ModuleType) -> None:
    start = module.append_cache(empty(module), *new(3))
    before = read(start)
    first, second = (
        module.append_cache(start, *new(2, seed=seed), lengths) for seed, lengths in ((7, None), (11, [1, 2]))
    )
    after_first, after_second = read(first), read(second)
    third = module.append_cache(first, *new(4, seed=13))
    assert same(read(start), before)
    assert same(read(first), after_first)
    assert same(read(second), after_second)
    assert [list(cache.lengths) for cache in (start, first, second, third)] == [[3, 3], [5, 5], [4, 5], [9, 9]]


def test_buffers_are_shared_where_no_result_shows_it() -> None:
    start = empty(mha_spec_numpy)
    first = start.append(*new(3))
    second = first.append(*new(2, seed=7))
    assert first.key is start.key
    assert second.value is start.value
    branch = first.append(*new(2, seed=11))
    assert not numpy.shares_memory(branch.key, first.key)
    assert branch.append(*new(1)).key is branch.key
    assert same(read(second), read(empty(reference).append(*new(3)).append(*new(2, seed=7))))


def test_arrays_of_the_caller_are_never_written_to() -> None:
    key, value = numbers(BATCH, KV_HEADS, CAPACITY, QK_DIM), numbers(BATCH, KV_HEADS, CAPACITY, V_DIM)
    before = key.copy(), value.copy()
    cache = KVCache(key, value, (2, 3)).append(*new(1))
    assert cache.append(*new(1)).key is cache.key
    assert numpy.array_equal(key, before[0])
    assert numpy.array_equal(value, before[1])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), KVCache(cache.key, value, cache.lengths)):
        assert not numpy.shares_memory(other.append(*new(1)).value, other.value)


def test_marks_are_removed_with_their_buffers() -> None:
    gc.collect()
    before = len(layer._BUFFERS._marks)
    caches = [empty(mha_spec_numpy).append(*new(1)) for _ in range(5)]
    caches += [caches[0].append(*new(1)), caches[0].append(*new(1))]
    assert len(layer._BUFFERS._marks) == before + 6
    del caches
    gc.collect()
    assert len(layer._BUFFERS._marks) == before


def test_weights_do_not_change_the_cache() -> None:
    params = decoder()
    x = numbers(BATCH, LENGTH, 8)
    cache = mha_spec_numpy.multi_head_attention(x, x, x, params, cache=empty(mha_spec_numpy), causal=True)[1]
    mha_spec_numpy.multi_head_attention_weights(x[:, :1], x[:, :1], params, cache=cache, causal=True)
    assert cache.append(*new(1)).key is cache.key


@pytest.mark.parametrize("lengths", [(12, 3), [12, 3], numpy.asarray([12, 3])])
def test_overflow_is_an_error_and_changes_nothing(module: ModuleType, lengths: Any) -> None:
    full = module.append_cache(empty(module), *new(12), [12, 3])._replace(lengths=lengths)
    before = [buffer.copy() for buffer in (full.key, full.value)]
    for counts, more in ((None, "[2, 2]"), ([2, 0], "[2, 0]"), (numpy.asarray([2, 2]), "[2, 2]")):
        with pytest.raises(ArgumentValueError, match=r"`cache`.*capacity=13.*\[12, 3\].*MHA-CACHE-4") as caught:
            module.append_cache(full, *new(2), counts)
        assert more in str(caught.value)
    assert numpy.array_equal(full.key, before[0])
    assert numpy.array_equal(full.value, before[1])
    assert list(module.append_cache(full, *new(2), [1, 2]).lengths) == [13, 5]


@pytest.mark.parametrize("library", ["array_api_strict", "torch", "jax"])
def test_tokens_beyond_unread_lengths_are_dropped_and_counted(library: str) -> None:
    xp = pytest.importorskip(library)
    convert: Callable[[numpy.ndarray], Any] = (
        xp.asarray if library == "array_api_strict" else lambda array: to_library(array, library)
    )
    start = empty(reference).append(*new(12), [12, 3])
    buffers = (convert(buffer.astype("float32")) for buffer in (start.key, start.value))
    cache = KVCache(next(buffers), next(buffers), convert(start.lengths))
    key, value = (array.astype("float32") for array in new(3))
    for counts, more in ((None, [3, 3]), (convert(numpy.asarray([5, -1])), [3, 0]), ((3, 1), [3, 1])):
        longer = reference.append_cache(cache, convert(key), convert(value), counts)
        assert library_of(longer.lengths) == library_of(longer.key) == library
        assert to_numpy(longer.lengths).tolist() == [12 + more[0], 3 + more[1]]
        for buffer, before, source in ((longer.key, start.key, key), (longer.value, start.value, value)):
            expected = before.astype("float32")
            expected[0, :, 12:13] = source[0, :, :1]
            expected[1, :, 3 : 3 + more[1]] = source[1, :, : more[1]]
            assert numpy.array_equal(to_numpy(buffer), expected)


def decoder() -> dict[str, numpy.ndarray]:
    return {name: numbers(*shape, seed=seed) / 2 for seed, (name, shape) in enumerate(SIZES.shapes().items())}


LAWS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": (2, 0)},
    "rotary": {"rotary": {}},
    "part of a rotation": {"rotary": {"rotary_dim": 2, "interleaved": True, "base": 3.0}, "window": (3, None)},
    "sinks": {"sinks": numbers(6), "softcap": 2.0},
    "alibi": {"alibi": True},
    "segments": {"segments": True, "rotary": {}},
}


def bias_at(start: Any, q_len: int, capacity: int) -> numpy.ndarray:
    return reference.alibi_bias(reference.alibi_slopes(6, dtype="float64"), q_len, capacity, q_offset=start)


def options_at(name: str, start: Any, stop: int, capacity: int) -> dict[str, Any]:
    """Return the options of a call on the tokens from start to stop."""
    options = dict(LAWS[name])
    if options.pop("alibi", False):
        options["bias"] = bias_at(start, stop - int(numpy.max(start)), capacity)
    if options.pop("segments", False):
        ids = numpy.broadcast_to(numpy.arange(capacity) // 3, (BATCH, capacity))
        options |= {"q_segment_ids": ids[:, start:stop], "kv_segment_ids": ids}
    return options


def at_once(module: ModuleType, x: numpy.ndarray, name: str) -> numpy.ndarray:
    return module.multi_head_attention(x, x, x, decoder(), causal=True, **options_at(name, 0, LENGTH, LENGTH))


@functools.cache
def errors_at_once(name: str) -> numpy.ndarray:
    """Bound the difference between two ways of computing an output: twice the error bound of each."""
    x = numbers(BATCH, LENGTH, 8)
    distance = numpy.arange(LENGTH) - numpy.arange(LENGTH)[:, None]
    visible = (distance <= 0) & (distance >= -(LAWS[name].get("window") or (LENGTH, 0))[0])
    if "segments" in LAWS[name]:
        visible &= numpy.arange(LENGTH)[:, None] // 3 == numpy.arange(LENGTH) // 3
    shape = (BATCH, 6, LENGTH, LENGTH)
    spelt = {key: LAWS[name][key] for key in ("sinks", "rotary") if key in LAWS[name]}
    if "alibi" in LAWS[name]:
        spelt["bias"] = numpy.broadcast_to(options_at(name, 0, LENGTH, LENGTH)["bias"], shape)
    _, error = LayerByLoops(decoder())(x, x, x, numpy.broadcast_to(visible, shape), **spelt)
    return 2 * error


CHUNKINGS = [[1] * LENGTH, [LENGTH], [3, 1, 1, 2], [1, 0, 4, 2], [6, 1]]


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_token_by_token_and_in_chunks_equal_a_single_call(module: ModuleType, name: str, chunks: list[int]) -> None:
    x, cache, outputs, start = numbers(BATCH, LENGTH, 8), empty(module), [], 0
    for length in chunks:
        part, options = x[:, start : start + length], options_at(name, start, start + length, CAPACITY)
        output, cache = module.multi_head_attention(part, part, part, decoder(), cache=cache, causal=True, **options)
        outputs.append(output)
        start += length
    assert list(cache.lengths) == [LENGTH, LENGTH]
    apart = abs(numpy.concat(outputs, axis=1) - at_once(module, x, name))
    assert (apart <= errors_at_once(name)).all()


@pytest.mark.parametrize("name", sorted(set(LAWS) - {"segments"}))
def test_batches_of_different_lengths_equal_their_entries(module: ModuleType, name: str) -> None:
    """Prompts of 4 and 2 tokens are padded on the right with NaN; three more tokens of each follow."""
    x, prompts, padded = numbers(BATCH, LENGTH, 8), [4, 2], 5
    prompt = numpy.full((BATCH, padded, 8), numpy.nan)
    for b, length in enumerate(prompts):
        prompt[b, :length] = x[b, :length]
    options = options_at(name, numpy.zeros(BATCH, int), padded, CAPACITY)
    lengths = {"q_lengths": prompts, "kv_lengths": prompts, "causal": True}
    output, cache = module.multi_head_attention(
        prompt, prompt, prompt, decoder(), cache=empty(module), **lengths, **options
    )
    assert list(cache.lengths) == prompts
    rows = [list(output[b, :length]) for b, length in enumerate(prompts)]
    for step in range(3):
        token = numpy.stack([x[b, length + step] for b, length in enumerate(prompts)])[:, None]
        starts = numpy.asarray(prompts) + step
        bias = {} if "alibi" not in LAWS[name] else {"bias": bias_at(starts, 1, CAPACITY)}
        plain = {key: value for key, value in LAWS[name].items() if key != "alibi"}
        output, cache = module.multi_head_attention(
            token, token, token, decoder(), cache=cache, causal=True, **plain, **bias
        )
        for b in range(BATCH):
            rows[b].append(output[b, 0])
    expected, error = at_once(module, x, name), errors_at_once(name)
    for b, length in enumerate(prompts):
        assert (abs(numpy.asarray(rows[b]) - expected[b, : length + 3]) <= error[b, : length + 3]).all()


def test_the_law_can_fail() -> None:
    """Rotation from position 0 at every step, and storing from slot 0, both give another output than a single call."""
    steps = LayerSteps()
    mistakes = {
        "rotary": replace(steps, positions=lambda _, length, like: steps.positions(0, length, like)),
        "causal": replace(steps, store=lambda buffer, new, *_: steps.store(buffer, new, [0] * BATCH, [1] * BATCH)),
    }
    x = numbers(BATCH, LENGTH, 8)
    for name, mistaken in mistakes.items():
        cache, outputs = empty(reference), []
        for t in range(LENGTH):
            part, options = x[:, t : t + 1], options_at(name, t, t + 1, CAPACITY)
            output, cache = Layer(mistaken).multi_head_attention(
                part, part, part, decoder(), cache=cache, causal=True, **options
            )
            outputs.append(output)
        apart = abs(numpy.concat(outputs, axis=1) - at_once(reference, x, name))
        assert not (apart <= errors_at_once(name)).all()


def test_cross_attention_reads_cached_keys(module: ModuleType) -> None:
    x, y, params = numbers(BATCH, 3, 8), numbers(BATCH, LENGTH, 8, seed=7), decoder()
    whole = module.multi_head_attention(x, y, y, params)
    first, cache = module.multi_head_attention(x, y, y, params, cache=empty(module))
    again, kept = module.multi_head_attention(x[:, 1:], None, None, params, cache=cache)
    assert kept is cache
    weights = module.multi_head_attention_weights(x, None, params, cache=cache)
    assert weights.shape == (BATCH, 6, 3, CAPACITY)
    assert not weights[..., LENGTH:].any()
    bound = 64 * LENGTH * numpy.finfo(float).eps * abs(whole).max()
    assert (abs(first - whole) <= bound).all()
    assert (abs(again - whole[:, 1:]) <= bound).all()


def test_weights_see_the_new_keys(module: ModuleType) -> None:
    x, params = numbers(BATCH, LENGTH, 8), decoder()
    whole = module.multi_head_attention_weights(x, x, params, causal=True, rotary={})
    _, cache = module.multi_head_attention(x[:, :5], x[:, :5], x[:, :5], params, cache=empty(module), rotary={})
    last = module.multi_head_attention_weights(x[:, 5:], x[:, 5:], params, cache=cache, causal=True, rotary={})
    assert (abs(last[..., :LENGTH] - whole[:, :, 5:]) <= 256 * numpy.finfo(float).eps).all()
    assert not last[..., LENGTH:].any()


def test_slots_that_hold_no_token_are_never_read(module: ModuleType) -> None:
    x, params = numbers(BATCH, LENGTH, 8), decoder()
    clean = module.append_cache(empty(module), *new(4), [4, 2])
    spoilt = KVCache(clean.key.copy(), clean.value.copy(), clean.lengths)
    for buffer in (spoilt.key, spoilt.value):
        buffer[0, :, 5:] = buffer[1, :, 3:] = numpy.nan
    part = x[:, :1]
    output, other = (module.multi_head_attention(part, part, part, params, cache=cache)[0] for cache in (clean, spoilt))
    assert numpy.array_equal(output, other)


def test_jax_decodes_inside_jit_with_the_lengths_traced() -> None:
    jax = pytest.importorskip("jax")
    params = {name: to_library(array.astype("float32"), "jax") for name, array in decoder().items()}
    x = to_library(numbers(BATCH, LENGTH, 8).astype("float32"), "jax")

    @jax.jit
    def step(token: Any, cache: KVCache) -> Any:
        return reference.multi_head_attention(token, token, token, params, cache=cache, causal=True, rotary={})

    cache, outputs = reference.empty_cache(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=x), []
    for t in range(LENGTH):
        output, cache = step(x[:, t : t + 1], cache)
        outputs.append(to_numpy(output))
    assert isinstance(cache, KVCache)
    assert library_of(cache.lengths) == "jax"
    assert to_numpy(cache.lengths).tolist() == [LENGTH, LENGTH]
    whole = to_numpy(reference.multi_head_attention(x, x, x, params, causal=True, rotary={}))
    apart = abs(numpy.concat(outputs, axis=1) - whole)
    assert apart.max() <= 2.0**-24 * 256 * abs(whole).max()


x_of = numbers(BATCH, 1, 8)
NOTHING: dict[str, Any] = {"key": None, "value": None}
BAD: dict[str, tuple[dict[str, Any], type[MhaSpecError], str, tuple[str, ...]]] = {
    "tuple": ({"cache": (1, 2, 3)}, ArgumentTypeError, "cache", ("KVCache", "tuple")),
    "batch": (
        {"cache": reference.empty_cache(3, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=x_of)},
        ArgumentValueError,
        "cache.key",
        ("(2, 3, capacity, 4)", "(3, 3, 13, 4)"),
    ),
    "heads": (
        {"cache": reference.empty_cache(BATCH, 6, CAPACITY, QK_DIM, V_DIM, like=x_of)},
        ArgumentValueError,
        "cache.key",
        ("(2, 3, capacity, 4)", "(2, 6, 13, 4)"),
    ),
    "key-size": (
        {"cache": reference.empty_cache(BATCH, KV_HEADS, CAPACITY, 6, V_DIM, like=x_of)},
        ArgumentValueError,
        "cache.key",
        ("(2, 3, capacity, 4)", "(2, 3, 13, 6)"),
    ),
    "value-size": (
        {"cache": reference.empty_cache(BATCH, KV_HEADS, CAPACITY, QK_DIM, 6, like=x_of)},
        ArgumentValueError,
        "cache.value",
        ("(2, 3, 13, 5)", "(2, 3, 13, 6)"),
    ),
    "capacities": (
        {"cache": KVCache(numbers(2, 3, 13, 4), numbers(2, 3, 12, 5), [0, 0])},
        ArgumentValueError,
        "cache.value",
        ("(2, 3, 13, 5)", "(2, 3, 12, 5)"),
    ),
    "rank": (
        {"cache": KVCache(numbers(3, 13, 4), numbers(3, 13, 5), [0, 0])},
        ArgumentValueError,
        "cache.key",
        ("(batch, kv_heads, capacity, qk_dim)", "(3, 13, 4)"),
    ),
    "dtype": (
        {"cache": reference.empty_cache(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=x_of.astype("float32"))},
        ArgumentTypeError,
        "cache.key",
        ("float64", "float32"),
    ),
    "lists": ({"cache": KVCache([1.0], [1.0], [0, 0])}, ArgumentTypeError, "cache.key", ("an array", "list")),
    "lengths-shape": (
        {"cache": empty(reference)._replace(lengths=[0])},
        ArgumentValueError,
        "cache.lengths",
        ("(2,)", "(1,)"),
    ),
    "lengths-floats": (
        {"cache": empty(reference)._replace(lengths=numpy.zeros(2))},
        ArgumentTypeError,
        "cache.lengths",
        ("integer", "float64"),
    ),
    "lengths-beyond": (
        {"cache": empty(reference)._replace(lengths=(14, 0))},
        ArgumentValueError,
        "cache.lengths",
        ("capacity=13", "14"),
    ),
    "full": (
        {"cache": empty(reference)._replace(lengths=[13, 0])},
        ArgumentValueError,
        "cache",
        ("capacity=13", "[13, 0]"),
    ),
    "counts": ({"kv_lengths": [2, 0]}, ArgumentValueError, "kv_lengths", ("0<=kv_lengths<=kv_len=1", "2")),
    "counts-alone": ({"kv_lengths": [1, 1]} | NOTHING, ArgumentValueError, "kv_lengths", ("key=None", "[1, 1]")),
    "mask": ({"mask": numpy.ones((1, 1, 1, 2), bool)}, ArgumentValueError, "mask", ("(2, 6, 1, 13)", "(1, 1, 1, 2)")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cache_is_refused(module: ModuleType, name: str) -> None:
    wrong, error, argument, parts = BAD[name]
    fine = {"query": x_of, "key": x_of, "value": x_of, "params": decoder(), "cache": empty(module)}
    with pytest.raises(MhaSpecError) as caught:
        module.multi_head_attention(**fine | wrong)
    assert type(caught.value) is error
    message = str(caught.value)
    for part in (f"`{argument}`", *parts):
        assert part in message
    assert re.search(r"\[MHA-[A-Z]+-\d+\]$", message)


@pytest.mark.parametrize("name", sorted(set(BAD) - {"mask", "counts", "counts-alone", "heads"}))
def test_appending_raises_the_same_errors(module: ModuleType, name: str) -> None:
    wrong, error, argument, _ = BAD[name]
    with pytest.raises(error, match=f"`{argument}`"):
        module.append_cache(wrong["cache"], *new(1))


@pytest.mark.parametrize(
    ("wrong", "error", "argument"),
    [
        ({"key": new(1)[0][0]}, ArgumentValueError, "key"),
        ({"key": [1.0]}, ArgumentTypeError, "key"),
        ({"value": new(2)[1]}, ArgumentValueError, "value"),
        ({"value": new(1)[1].astype("float32")}, ArgumentTypeError, "value"),
        ({"value": numbers(BATCH, KV_HEADS, 1, 6)}, ArgumentValueError, "cache.value"),
        ({"lengths": [2, 2]}, ArgumentValueError, "lengths"),
        ({"lengths": [0.5, 0.5]}, ArgumentTypeError, "lengths"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    module: ModuleType, wrong: dict[str, Any], error: type[MhaSpecError], argument: str
) -> None:
    key, value = new(1)
    with pytest.raises(error, match=f"`{argument}`"):
        module.append_cache(**{"cache": empty(module), "key": key, "value": value} | wrong)


def test_a_cache_of_another_library_is_refused(module: ModuleType) -> None:
    strict = pytest.importorskip("array_api_strict")
    cache = reference.empty_cache(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=strict.ones(1))
    with pytest.raises(ArgumentTypeError, match=r"`cache.key` must be an array of numpy.*array_api_strict.*MHA-ARG-4"):
        module.multi_head_attention(x_of, x_of, x_of, decoder(), cache=cache)

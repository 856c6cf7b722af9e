"""The window cache, whose slots wrap: equal to a cache of all tokens in any steps, and errors where it does not fit."""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cached_layer import CachedLayer
from support.comparisons import assert_near, assert_same
from support.libraries import MODULES, converted, with_float64
from support.numbers import numbers

import mha_spec
import mha_spec_tensorflow
import mha_spec_torch
from mha_spec import ArgumentTypeError, ArgumentValueError, KVCache, WindowKVCache, layer_steps, reference, window_steps
from mha_spec.layer import Layer
from mha_spec.layer_object import LayerSettings
from mha_spec.layer_steps import LayerSteps
from mha_spec_conformance.targets.conversion import to_library, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCH, HEADS, KV_HEADS, QK_DIM, V_DIM, EMBED, CAPACITY, LENGTH = 2, 6, 3, 4, 5, 8, 5, 17
LAYER = LayerSettings(
    embed=EMBED, heads=HEADS, kv_heads=KV_HEADS, qk_dim=QK_DIM, v_dim=V_DIM, k_embed=EMBED, v_embed=EMBED, out=9
)
SUBJECT = CachedLayer(LAYER, BATCH, LENGTH)
operands, new, decoded = SUBJECT.operands, SUBJECT.new, SUBJECT.decoded
STEPS = {"at once": [LENGTH], "chunks": [3, 1, 0, 7, 1, 1, 4], "token by token": [1] * LENGTH}
RAGGED = {"first": [3, 1], "second": [7, 0], "third": [1, 1], "fourth": [2, 6]}
"""The number of tokens of each batch entry that are real, in four steps of 3, 7, 1 and 6 tokens."""
FULL, LOOSE = {"window": (CAPACITY - 1, 0)}, {"window": (2, None), "causal": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "full window": FULL,
    "smaller window": LOOSE,
    "rotary": FULL | {"rotary": {}, "softcap": 1.7, "scale": 0.6, "sinks": numbers(HEADS, seed=8)},
    "chunk": {"chunk": 4, "causal": True, "kv_starts": [2, 0]},
    "prefix": {"window": (CAPACITY - 1, None), "causal": True, "prefix_lengths": [6, 9]},
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Iterator[str]:
    with with_float64(MODULES[request.param]):
        yield request.param


def window_cache(module: str, dtype: str = "float64", lengths: Any = (0, 0), capacity: int = CAPACITY) -> WindowKVCache:
    """Return a window cache of the library of a module, whose slots hold NaN."""
    sizes = {"key": QK_DIM, "value": V_DIM}
    arrays = {name: numpy.full((BATCH, KV_HEADS, capacity, size), numpy.nan) for name, size in sizes.items()}
    return WindowKVCache(**converted(arrays, MODULES[module], dtype), lengths=lengths)


def all_tokens() -> KVCache:
    """Return a cache of the reference with room for all tokens."""
    return reference.empty_cache(BATCH, KV_HEADS, 4 * LENGTH, QK_DIM, V_DIM, like=numbers(1))


def expected(steps: list[int], **options: Any) -> list[Any]:
    return decoded("mha_spec.reference", all_tokens(), steps, **options)[0]


@pytest.mark.parametrize(
    ("steps", "options"),
    [("at once", "full window"), ("token by token", "full window"), *(("chunks", name) for name in OPTIONS)],
)
def test_a_window_cache_equals_a_cache_of_all_tokens(module: str, steps: str, options: str) -> None:
    if module == "mha_spec_jax":
        pytest.skip("JAX compiles every step for seconds; tests below trace the lengths")
    lengths, chosen = STEPS[steps], OPTIONS[options]
    wanted = [to_library(x, MODULES[module]) for x in expected(lengths, **chosen)]
    assert_same(lambda dtype: decoded(module, window_cache(module, dtype), lengths, dtype, **chosen)[0], wanted)


@pytest.mark.parametrize("name", ["rotary", "chunk"])
def test_lengths_may_be_arrays_of_the_library_and_steps_ragged(module: str, name: str) -> None:
    if module == "mha_spec_jax":
        pytest.skip("JAX compiles every step for seconds; a test below compiles a ragged step")
    library, steps = MODULES[module], [3, 7, 1, 6]
    options = OPTIONS[name] | {"kv_starts": [1, 0], "counts": list(RAGGED.values())}
    wanted = [to_library(x, library) for x in expected(steps, **options)]

    def ours(dtype: str) -> list[Any]:
        lengths = to_library(numpy.zeros(BATCH, "int32"), library)
        outputs, cache = decoded(module, window_cache(module, dtype, lengths), steps, dtype, **options)
        assert to_numpy(cache.lengths).tolist() == numpy.sum(list(RAGGED.values()), axis=0).tolist()
        return outputs

    assert_same(ours, wanted)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_calls_equal_those_with_a_cache_of_all_tokens(data: st.DataObject) -> None:
    """Draw windows, chunks, starts, prefixes, offsets, steps and real tokens; past the capacity several times."""
    draw = data.draw
    capacity, name = draw(st.integers(1, 7)), draw(st.sampled_from(["mha_spec.reference", "mha_spec_numpy"]))
    per_entry = st.lists(st.integers(0, LENGTH), min_size=BATCH, max_size=BATCH)
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    left, chunk = draw(st.integers(0, capacity - 1)), draw(st.integers(1, capacity))
    kind = draw(st.sampled_from(["window", "chunk", "both"]))
    options |= {} if kind == "chunk" else {"window": (left, draw(st.none() | st.integers(0, 4)))}
    options |= {} if kind == "window" else {"chunk": chunk}
    if draw(st.booleans()):
        options["kv_starts"] = draw(per_entry)
    if options["causal"] and options.get("window", (0, None))[1] is None and draw(st.booleans()):
        options["prefix_lengths"] = draw(per_entry)
    steps = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda steps: sum(steps) <= LENGTH))
    counts = [[draw(st.integers(0, length)) for _ in range(BATCH)] for length in steps] if draw(st.booleans()) else ()
    ours, _ = decoded(name, window_cache(name, capacity=capacity), steps, counts=counts, **options)
    assert_near(ours, expected(steps, counts=counts, **options))


def test_queries_may_be_at_other_positions_whose_keys_are_held(module: str) -> None:
    """Queries without new keys, at the last tokens or behind a gap, and new keys with queries of another offset."""
    params, x = operands(module, "float64")
    plain_params, plain_x = operands("mha_spec.reference", "float64")
    options: dict[str, Any] = {"window": (1, 0), "rotary": {}}
    layer = importlib.import_module(module).multi_head_attention
    start = reference.append_cache(all_tokens(), *new("mha_spec.reference", 10))
    held = importlib.import_module(module).append_cache(window_cache(module), *new(module, 10))
    calls = ((8, False), ([9, 11], False), ([10, 7], True))
    for q_offset, new_keys in calls[-1:] if module == "mha_spec_jax" else calls:
        key, plain_key = (x[:, 10:12], plain_x[:, 10:12]) if new_keys else (None, None)
        options["q_offset"] = q_offset
        ours = layer(x[:, 5:8], key, key, params, cache=held, **options)[0]
        query = plain_x[:, 5:8]
        theirs = reference.multi_head_attention(query, plain_key, plain_key, plain_params, cache=start, **options)[0]
        assert_near(ours, to_library(theirs, MODULES[module]))


def test_new_tokens_take_the_slots_of_the_oldest(module: str) -> None:
    start = window_cache(module, lengths=(3, 14))
    before = [to_numpy(buffer).copy() for buffer in start[:2]]
    cache = importlib.import_module(module).append_cache(start, *new(module, 8), [1, 7])
    assert isinstance(cache, WindowKVCache)
    assert to_numpy(cache.lengths).tolist() == [4, 21]
    for old, buffer, tokens in zip(before, cache[:2], map(to_numpy, new(module, 8)), strict=True):
        wanted = old.copy()
        wanted[0, :, 3] = tokens[0, :, 0]
        for position in range(14, 21):  # Tokens that later ones of the same call replace are written first.
            wanted[1, :, position % CAPACITY] = tokens[1, :, position - 14]
        numpy.testing.assert_array_equal(to_numpy(buffer), wanted)
    for old, buffer in zip(before, start[:2], strict=True):
        numpy.testing.assert_array_equal(to_numpy(buffer), old)


def test_a_cache_of_all_tokens_is_continued_as_a_window_cache() -> None:
    for name in ("mha_spec.reference", "mha_spec_numpy", "mha_spec_torch"):
        like = converted({"x": numbers(1)}, MODULES[name], "float64")["x"]
        cache = WindowKVCache.empty(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=like)
        assert (cache.batch, cache.capacity) == (BATCH, CAPACITY)
        dense = KVCache.empty(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=like).append(*new(name, 4))
        continued = WindowKVCache(*dense).append(*new(name, 3, seed=7))
        whole = cache.append(*new(name, 4)).append(*new(name, 3, seed=7))
        dense.append(*new(name, 1, seed=9))  # Written in place, where the window cache does not read.
        for ours, theirs in zip(continued[:2], whole[:2], strict=True):
            numpy.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))
    assert repr(cache).startswith("WindowKVCache(key=(2, 3, 5, 4), value=(2, 3, 5, 5), lengths=")
    assert mha_spec.WindowKVCache is WindowKVCache


def test_torch_compiles_a_step_once() -> None:
    """The lengths are traced, so a graph serves the steps before the cache is full and after."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(*operands: Any, cache: WindowKVCache, **options: Any) -> Any:
        return mha_spec_torch.multi_head_attention(*operands, cache=cache, **options)

    torch._dynamo.reset()
    start, steps = window_cache("mha_spec_torch", lengths=torch.zeros(BATCH, dtype=torch.int32)), [1] * LENGTH
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    outputs, _ = decoded("mha_spec_torch", start, steps, layer=compiled, **FULL)
    assert len(graphs) == 1
    assert_near(outputs, [torch.from_numpy(output) for output in expected(steps, **FULL)])


@pytest.mark.parametrize(
    ("options", "steps", "counts"),
    [
        ("full window", [1] * LENGTH, ()),
        ("chunk", [1] * LENGTH, ()),
        ("rotary", [5] * 3, [[5, 2], [0, 3], [4, 5]]),
    ],
)
def test_jax_compiles_a_step_once(options: str, steps: list[int], counts: Any) -> None:
    chosen = {name: option for name, option in OPTIONS[options].items() if name != "sinks"}
    with with_float64("jax"):
        layer = partial(importlib.import_module("mha_spec_jax").multi_head_attention, **chosen)
        step: Any = jax.jit(layer)
        start = window_cache("mha_spec_jax", lengths=jax.numpy.zeros(BATCH, int))
        real = [jax.numpy.asarray(numbers) for numbers in counts]
        outputs, _ = decoded("mha_spec_jax", start, steps, layer=step, counts=real)
        assert step._cache_size() == 1
        wanted = expected(steps, counts=counts, **chosen)
        assert_near(outputs, [to_library(output, "jax") for output in wanted])


def test_a_graph_of_tensorflow_takes_any_sizes() -> None:
    params, x = operands("mha_spec_tensorflow", "float64")
    options: dict[str, Any] = {"window": (2, 0), "kv_starts": [2, 0], "rotary": {}}

    def step(part: Any, cache: WindowKVCache) -> Any:
        return mha_spec_tensorflow.multi_head_attention(part, part, part, params, cache=cache, **options)

    cache: Any = window_cache("mha_spec_tensorflow", lengths=tf.zeros(BATCH, tf.int32))
    shapes = [(None, KV_HEADS, None, QK_DIM), (None, KV_HEADS, None, V_DIM), (None,)]
    specs = [tf.TensorSpec(shape, array.dtype) for shape, array in zip(shapes, cache, strict=True)]
    graph: Any = tf.function(step, [tf.TensorSpec((None, None, EMBED), x.dtype), WindowKVCache(*specs)])
    outputs, first = [], 0
    for length in STEPS["chunks"]:
        output, cache = graph(x[:, first : first + length], cache)
        outputs.append(output)
        first += length
    assert_near(outputs, [tf.constant(output) for output in expected(STEPS["chunks"], **options)])


def test_gradients_are_those_of_all_tokens() -> None:
    def gradients(cache: Any) -> list[Any]:
        params, x = operands("mha_spec_torch", "float64")
        x = x.requires_grad_()
        outputs = []
        for part in x.split([4, 9, 1, 3], dim=1):
            output, cache = mha_spec_torch.multi_head_attention(part, part, part, params, cache=cache, **FULL)
            outputs.append(output)
        return list(torch.autograd.grad(torch.cat(outputs, 1).square().sum(), x))

    dense = mha_spec_torch.empty_cache(BATCH, KV_HEADS, LENGTH, QK_DIM, V_DIM, like=torch.zeros(1, dtype=torch.float64))
    assert_near(gradients(window_cache("mha_spec_torch")), gradients(dense))


def changed(**options: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a step of the layer that attends with other options."""

    def operands(*arguments: Any) -> Any:
        key, value, kept = window_steps.operands(*arguments)
        return key, value, kept | {name: change(kept.get(name)) for name, change in options.items() if name in kept}

    return {"window_operands": operands}


def stored(change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> dict[str, Any]:
    """Return a step of the layer that stores tokens between other positions."""
    return {
        "store_wrapped": lambda buffer, new, start, stop: window_steps.store_wrapped(
            buffer, new, *change(numpy.asarray(start), numpy.asarray(stop), new.shape[2])
        )
    }


MISTAKES: dict[str, dict[str, Any]] = {
    "the last slot is overwritten": stored(lambda first, last, _: (numpy.minimum(first, 4), numpy.minimum(last, 5))),
    "tokens that are not real are stored": stored(lambda first, _, length: (first, first + length)),
    "tokens go to the next slot": stored(lambda first, last, _: (first + 1, last + 1)),
    "new tokens begin at slot 0": stored(lambda first, last, _: (first * 0, last - first)),
    "the count of tokens stops at the capacity": {
        "new_lengths": lambda *arguments: numpy.minimum(layer_steps.new_lengths(*arguments), CAPACITY)
    },
    "keys are in the order of slots": {
        "unroll": lambda buffer, lengths, new: window_steps.unroll(buffer, numpy.zeros_like(lengths), new)
    },
    "keys are rolled one slot too far": {
        "unroll": lambda buffer, lengths, new: window_steps.unroll(buffer, numpy.asarray(lengths) + 1, new)
    },
    "slots without a token are seen": changed(kv_starts=lambda starts: starts * 0),
    "new tokens that are not real are seen": changed(kv_lengths=lambda _: None),
    "queries are at the start of the new keys less one": changed(q_offset=lambda offset: offset - 1),
    "prefixes are indices of slots": changed(prefix_lengths=lambda _: [6, 6]),
    "chunks are counted from the first key": {"start_of_keys": lambda starts, _: starts},
}
CALLS = {
    "prefix": OPTIONS["prefix"],
    "chunk": OPTIONS["chunk"],
    "ragged": LOOSE | {"counts": list(RAGGED.values())},
}


@pytest.mark.parametrize("steps", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gives_another_output(steps: dict[str, Any]) -> None:
    name, lengths, layer = "mha_spec.reference", [3, 7, 1, 6], Layer(LayerSteps(**steps)).multi_head_attention
    differences = []
    for options in CALLS.values():
        wanted = expected(lengths, **options)
        assert_near(decoded(name, window_cache(name), lengths, **options)[0], wanted)
        start = WindowKVCache.empty(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=numbers(1))
        outputs = decoded(name, start, lengths, layer=layer, **options)[0]
        differences.append(abs(numpy.concat(outputs, 1) - numpy.concat(wanted, 1)).max())
    assert max(differences) > 1e-3


ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no window": ({}, {}, r"`window` must fit.*left \+ 1<=capacity=5, received window=None.*MHA-CACHE-14"),
    "an open window": ({}, {"window": (None, 0)}, r"`window` must fit.*received window=\(None, 0\).*MHA-CACHE-14"),
    "a large window": ({}, {"window": (5, 0)}, r"`window` must fit.*received window=\(5, 0\).*MHA-CACHE-14"),
    "a large chunk": ({}, {"chunk": 6, "window": (1, 0)}, r"`chunk` must fit.*chunk<=capacity=5.*chunk=6.*CACHE-14"),
    "a wrong window": ({}, {"window": (-1, 0)}, r"`window` must have 0<=left.*MHA-ARG-3"),
    "a wrong chunk": ({}, {"chunk": 0}, r"`chunk` must be in 1<=chunk.*MHA-WINDOW-3"),
    "lost keys": ({"lengths": (9, 8)}, FULL | {"q_offset": [8, 6]}, r"`q_offset`.*from 3 on.*=6 in.*entry 1.*key 2"),
    "lost chunk": ({"lengths": (9, 0)}, {"chunk": 5, "q_offset": 4}, r"`q_offset`.*from 4 on.*=4 in.*key 0.*CACHE-14"),
    "starts": ({}, FULL | {"kv_starts": [-1, 0]}, r"`kv_starts` must be in 0<=kv_starts<=2\*\*30.*MHA-LEN-5"),
    "lengths": ({"lengths": (0, -1)}, FULL, r"`cache.lengths` must be in 0<=cache.lengths<=2\*\*30.*MHA-LEN-3"),
    "offset": ({}, FULL | {"q_offset": [1]}, r"`q_offset` must have shape \(batch,\).*MHA-LEN-3"),
}


@pytest.mark.parametrize(("cache", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_a_call_that_does_not_fit_is_refused(module: str, cache: Any, options: Any, message: str) -> None:
    functions, (params, x) = importlib.import_module(module), operands(module, "float64")
    with pytest.raises(ArgumentValueError, match=message):
        functions.multi_head_attention(x, x, x, params, cache=window_cache(module, **cache), **options)


def test_buffers_that_do_not_fit_are_refused(module: str) -> None:
    functions, (params, x) = importlib.import_module(module), operands(module, "float64")
    with pytest.raises(ArgumentTypeError, match=r"`cache.key` must have the dtype of `key`.*MHA-CACHE-12"):
        functions.append_cache(window_cache(module, "float32"), *new(module, 1))
    with pytest.raises(ArgumentValueError, match=r"`cache.key` must have shape .*kv_heads.*received.*MHA-CACHE-12"):
        functions.append_cache(window_cache(module), *(tokens[:, :2] for tokens in new(module, 1)))
    with pytest.raises(ArgumentTypeError, match=r"`cache.lengths` must hold.*received None.*MHA-CACHE-12"):
        functions.multi_head_attention(x, x, x, params, cache=window_cache(module, lengths=None), **FULL)


REFUSED: dict[str, Any] = {
    "mask": numpy.ones((1, 1, LENGTH, CAPACITY), bool),
    "bias": numpy.zeros((1, 1, LENGTH, CAPACITY)),
    "q_segment_ids": numpy.zeros((BATCH, LENGTH), int),
    "kv_segment_ids": numpy.zeros((BATCH, CAPACITY), int),
    "dropout_rate": 0.5,
    "q_offset": "lower_right",
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_a_window_cache_does_not_have_are_refused(module: str, name: str) -> None:
    functions, (params, x) = importlib.import_module(module), operands(module, "float64")
    value = REFUSED[name]
    value = to_library(value, MODULES[module]) if isinstance(value, numpy.ndarray) else value
    with pytest.raises(ArgumentValueError, match=rf"`{name}` must be None.*WindowKVCache.*MHA-CACHE-13"):
        functions.multi_head_attention(x, x, x, params, cache=window_cache(module), **FULL | {name: value})


def test_weights_are_refused(module: str) -> None:
    functions, (params, x) = importlib.import_module(module), operands(module, "float64")
    for function, values in (("multi_head_attention_and_weights", [x, x]), ("multi_head_attention_weights", [x])):
        with pytest.raises(ArgumentValueError, match=rf"`cache` must be a KVCache in {function}.*MHA-CACHE-13"):
            getattr(functions, function)(x, *values, params, cache=window_cache(module), **FULL)


def test_a_cache_of_a_subclass_is_taken_for_its_kind() -> None:
    arrays = new("mha_spec.reference", 1)
    params, x = operands("mha_spec.reference", "float64")
    for kind, clause in ((KVCache, "MHA-CACHE-7"), (WindowKVCache, "MHA-CACHE-12")):
        cache: Any = type("Mine", (kind,), {})(*window_cache("mha_spec.reference"))
        assert type(reference.append_cache(cache, *arrays)) is kind
        with pytest.raises(ArgumentValueError, match=rf"`cache.key` must have shape .*{clause}"):
            reference.append_cache(cache, *(tokens[:, :2] for tokens in arrays))
    with pytest.raises(ArgumentValueError, match=r"`chunk` must fit a WindowKVCache"):
        reference.multi_head_attention(x, x, x, params, cache=cache, chunk=6)
    with pytest.raises(ArgumentValueError, match=r"`bias` must be None with a WindowKVCache.*MHA-CACHE-13"):
        reference.multi_head_attention(x, x, x, params, cache=cache, **FULL, bias=REFUSED["bias"])

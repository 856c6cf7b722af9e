"""The paged key/value cache: equal to the contiguous cache in any steps, and checked where it is host data."""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
import torch
from support.cached_layer import CachedLayer
from support.comparisons import assert_equal, assert_same
from support.libraries import MODULES, converted, with_float64
from support.numbers import numbers

import mha_spec
import mha_spec_numpy.layer as numpy_layer
import mha_spec_tensorflow
from mha_spec import ArgumentTypeError, ArgumentValueError, PagedKVCache, paged_steps, reference
from mha_spec.layer import Layer
from mha_spec.layer_object import LayerSettings
from mha_spec.layer_steps import LayerSteps
from mha_spec_conformance.targets.conversion import to_library, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCH, HEADS, KV_HEADS, QK_DIM, V_DIM, EMBED, BLOCKS, SIZE, LENGTH = 2, 6, 3, 4, 5, 8, 11, 3, 7
CAPACITY = 12
LAYER = LayerSettings(
    embed=EMBED,
    heads=HEADS,
    kv_heads=KV_HEADS,
    qk_dim=QK_DIM,
    v_dim=V_DIM,
    k_embed=EMBED,
    v_embed=EMBED,
    out=9,
    qk_norm=True,
)
TABLE = numpy.array([[7, 2, 9, 4], [10, 0, 3, -1]], "int32")
"""Blocks in no order, the last entry of the second row of which names no block."""
RAGGED = [[3, 1], [3, 3], [0, 1]]
"""The number of tokens of each batch entry that are real, in three steps."""
SUBJECT = CachedLayer(LAYER, BATCH, LENGTH)
operands, new, decoded = SUBJECT.operands, SUBJECT.new, SUBJECT.decoded
STEPS = {"at once": [LENGTH], "chunks": [3, 1, 0, 2, 1], "token by token": [1] * LENGTH}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "rotary": {"rotary": {}, "causal": True},
    "all": {"window": (3, 0), "softcap": 1.7, "scale": 0.6, "sinks": numbers(HEADS, seed=8), "rotary": {}},
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Iterator[str]:
    with with_float64(MODULES[request.param]):
        yield request.param


def pages(module: str, table: Any = TABLE, dtype: str = "float64", lengths: Any = (0, 0)) -> PagedKVCache:
    """Return a paged cache of the library of a module, whose slots hold NaN."""
    arrays = {"key": numpy.full((BLOCKS, SIZE, KV_HEADS, QK_DIM), numpy.nan)}
    arrays["value"] = numpy.full((BLOCKS, SIZE, KV_HEADS, V_DIM), numpy.nan)
    return PagedKVCache(**converted(arrays, MODULES[module], dtype), lengths=lengths, block_table=table)


def dense(module: str, dtype: str = "float64") -> Any:
    like = converted({"like": numbers(1)}, MODULES[module], dtype)["like"]
    functions = importlib.import_module(module)
    return functions.empty_cache(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=like)


def expected(steps: list[int], **options: Any) -> list[Any]:
    return decoded("mha_spec.reference", dense("mha_spec.reference"), steps, "float64", **options)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_paged_cache_equals_a_contiguous_cache(module: str, steps: list[int], options: dict[str, Any]) -> None:
    if module == "mha_spec_jax":
        pytest.skip("JAX compiles every step for seconds; the next test has all options")
    wanted = [converted({"x": x}, MODULES[module], "float64")["x"] for x in expected(steps, **options)]
    assert_same(lambda dtype: decoded(module, pages(module, dtype=dtype), steps, dtype, **options)[0], wanted)


def test_lengths_and_table_may_be_arrays_of_the_library(module: str) -> None:
    library = MODULES[module]
    table, lengths = (to_library(array, library) for array in (TABLE, numpy.zeros(BATCH, "int32")))
    steps, options = [3, 3, 1], OPTIONS["all"] | {"counts": RAGGED}
    wanted = [converted({"x": x}, library, "float64")["x"] for x in expected(steps, **options)]

    def ours(dtype: str) -> list[Any]:
        outputs, cache = decoded(module, pages(module, table, dtype, lengths), steps, dtype, **options)
        assert to_numpy(cache.lengths).tolist() == numpy.sum(RAGGED, axis=0).tolist()
        assert cache.block_table is table
        return outputs

    assert_same(ours, wanted)


def test_xla_takes_lengths_and_a_table_as_tensors() -> None:
    """The last step has another number of tokens, so that its trace does not know the number."""
    steps, options = [3, 3, 1], OPTIONS["all"] | {"counts": RAGGED}
    wanted = [converted({"x": x}, "tensorflow", "float64")["x"] for x in expected(steps, **options)]
    attend = tf.function(mha_spec_tensorflow.multi_head_attention, jit_compile=True, reduce_retracing=True)

    def ours(dtype: str) -> list[Any]:
        cache = pages("mha_spec_tensorflow", tf.constant(TABLE), dtype, tf.zeros(BATCH, "int32"))
        return decoded("mha_spec_tensorflow", cache, steps, dtype, layer=attend, **options)[0]

    assert_same(ours, wanted)


@pytest.mark.parametrize(("blocks", "columns"), [(0, 2), (3, 0)])
def test_xla_takes_a_cache_without_slots(blocks: int, columns: int) -> None:
    start = pages("mha_spec_tensorflow")
    cache = PagedKVCache(
        start.key[:blocks], start.value[:blocks], tf.zeros(BATCH, "int32"), tf.zeros((BATCH, columns), "int32")
    )
    attend = tf.function(mha_spec_tensorflow.multi_head_attention, jit_compile=True)
    eager, compiled = (decoded("mha_spec_tensorflow", cache, [2], layer=layer)[0] for layer in (None, attend))
    assert_equal(compiled, eager)


def test_new_tokens_go_to_the_slots_that_the_table_names(module: str) -> None:
    start = pages(module, lengths=(2, 4))
    cache = importlib.import_module(module).append_cache(start, *new(module, 3), [3, 2])
    assert to_numpy(cache.lengths).tolist() == [5, 6]
    for before, after, tokens in zip(start[:2], cache[:2], map(to_numpy, new(module, 3)), strict=True):
        wanted = to_numpy(before).copy()
        for entry, (first, count) in enumerate([(2, 3), (4, 2)]):
            for token in range(count):
                place = first + token
                wanted[TABLE[entry, place // SIZE], place % SIZE] = tokens[entry, :, token]
        assert numpy.isnan(to_numpy(before)).all()
        numpy.testing.assert_array_equal(to_numpy(after), wanted)


def test_entries_may_share_the_blocks_of_a_prefix(module: str) -> None:
    table = numpy.array([[7, 2, 9, 4], [7, 0, 3, -1]], "int32")
    functions, tokens = importlib.import_module(module), new(module, 5)
    held = [to_numpy(array).copy() for array in pages(module)[:2]]
    for pool, part in zip(held, tokens, strict=True):
        pool[7] = to_numpy(part)[0, :, :SIZE].swapaxes(0, 1)
    arrays = converted(dict(zip(("key", "value"), held, strict=True)), MODULES[module], "float64")
    cache = functions.append_cache(PagedKVCache(**arrays, lengths=(3, 3), block_table=table), *new(module, 2, seed=6))
    params, x = operands(module, "float64")
    ours = functions.multi_head_attention(x[:, :2], None, None, params, cache=cache, causal=True)[0]
    contiguous = reference.empty_cache(BATCH, KV_HEADS, CAPACITY, QK_DIM, V_DIM, like=numbers(1))
    prefix = [numpy.stack([to_numpy(part)[0, :, :SIZE]] * BATCH) for part in tokens]
    contiguous = reference.append_cache(contiguous, *prefix)
    contiguous = reference.append_cache(contiguous, *map(to_numpy, new(module, 2, seed=6)))
    params, x = operands("mha_spec.reference", "float64")
    wanted = reference.multi_head_attention(x[:, :2], None, None, params, cache=contiguous, causal=True)[0]
    numpy.testing.assert_allclose(to_numpy(ours), wanted, rtol=1e-12, atol=1e-12)


def tokens_of(cache: PagedKVCache) -> list[Any]:
    """Return the keys and the values of each batch entry."""
    lengths, table = to_numpy(cache.lengths), to_numpy(cache.block_table)
    pools = [to_numpy(pool).reshape(-1, *pool.shape[2:]) for pool in cache[:2]]
    slots = [[row[j // SIZE] * SIZE + j % SIZE for j in range(n)] for row, n in zip(table, lengths, strict=True)]
    return [pool[places].tolist() for pool in pools for places in slots]


def test_an_append_does_not_change_the_old_cache(module: str) -> None:
    functions = importlib.import_module(module)
    start = functions.append_cache(pages(module), *new(module, 3))
    before = tokens_of(start)
    first, second = (functions.append_cache(start, *new(module, 2, seed=seed)) for seed in (7, 9))
    assert tokens_of(first) != tokens_of(second)
    after = [tokens_of(cache) for cache in (first, second)]
    functions.append_cache(first, *new(module, 4, seed=11))
    assert [tokens_of(cache) for cache in (first, second)] == after
    assert tokens_of(start) == before


@pytest.mark.parametrize("module", ["mha_spec_numpy", "mha_spec_torch"], indirect=True)
@pytest.mark.parametrize("of_library", [False, True])
def test_blocks_are_copied_only_where_an_append_would_change_another_cache(module: str, of_library: bool) -> None:
    functions, table = importlib.import_module(module), to_library(TABLE, MODULES[module]) if of_library else TABLE
    start = pages(module, table)
    first = functions.append_cache(start, *new(module, 2))
    assert numpy.isnan(to_numpy(start.key)).all(), "blocks of the caller were written to"
    second = functions.append_cache(first, *new(module, 3), [3, 1])
    assert second.key is first.key
    assert second.value is first.value
    branch = functions.append_cache(first, *new(module, 1, seed=7))
    assert branch.key is not first.key
    assert functions.append_cache(branch, *new(module, 1)).key is branch.key


def test_blocks_of_a_request_that_ended_are_copied_once() -> None:
    cache = pages("mha_spec_numpy").append(*new("mha_spec_numpy", 5))
    others = numpy.array([[1, 5, 6], [8, 7, 2]])  # 7 and 2 held the tokens of the first request.
    cache = cache._replace(block_table=others, lengths=[0, 0]).append(*new("mha_spec_numpy", 3))
    held = tokens_of(cache)
    copied = cache.append(*new("mha_spec_numpy", 1))
    assert copied.key is not cache.key
    later = copied.append(*new("mha_spec_numpy", 2)).append(*new("mha_spec_numpy", 3))
    assert later.key is copied.key
    assert tokens_of(cache) == held


def test_marks_are_removed_with_their_blocks() -> None:
    gc.collect()
    before = len(numpy_layer._BLOCKS._written)
    caches = [pages("mha_spec_numpy").append(*new("mha_spec_numpy", 1)) for _ in range(3)]
    assert len(numpy_layer._BLOCKS._written) == before + 3
    del caches
    gc.collect()
    assert len(numpy_layer._BLOCKS._written) == before


def test_the_layout_of_the_blocks_of_a_caller_does_not_matter() -> None:
    arrays = [numpy.full((SIZE, size, KV_HEADS, BLOCKS), numpy.nan).transpose(3, 0, 2, 1) for size in (QK_DIM, V_DIM)]
    for module, pools in (("mha_spec_numpy", arrays), ("mha_spec_torch", map(torch.from_numpy, arrays))):
        cache = PagedKVCache(*pools, lengths=[0, 0], block_table=TABLE)
        assert tokens_of(cache.append(*new(module, 4))) == tokens_of(pages(module).append(*new(module, 4)))


def test_empty_blocks_have_the_sizes_and_the_type_of_their_arguments(module: str) -> None:
    like = converted({"like": numbers(2)}, MODULES[module], "float32")["like"]
    cache = PagedKVCache.empty(TABLE, BLOCKS, SIZE, KV_HEADS, QK_DIM, V_DIM, like=like)
    assert (cache.key.shape, cache.value.shape) == ((BLOCKS, SIZE, KV_HEADS, QK_DIM), (BLOCKS, SIZE, KV_HEADS, V_DIM))
    assert type(cache.key) is type(like)
    assert cache.key.dtype == cache.value.dtype == like.dtype
    assert list(cache.lengths) == [0] * BATCH
    with pytest.raises(ArgumentValueError, match=r"`block_size` must be block_size>=1.*MHA-CACHE-9"):
        PagedKVCache.empty(TABLE, BLOCKS, 0, KV_HEADS, QK_DIM, like=like)
    with pytest.raises(ArgumentValueError, match=r"`kv_heads` must be kv_heads>=1.*MHA-CACHE-9"):
        PagedKVCache.empty(TABLE, BLOCKS, SIZE, 0, QK_DIM, like=like)
    with pytest.raises(ArgumentTypeError, match="`block_table` must be an array"):
        PagedKVCache.empty(TABLE.tolist(), BLOCKS, SIZE, KV_HEADS, QK_DIM, like=like)


def at(change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a layer's step that finds the slots of new tokens by another table."""
    return {
        "new_slots": lambda cache, stop, new: paged_steps.new_slots(
            cache._replace(block_table=change(cache.block_table)), stop, new
        )
    }


def reading(change: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return a layer's step that attends with other arguments of the packed call."""
    return {"varlen": lambda *operands, **options: reference.varlen_attention(*operands, **options | change(options))}


MISTAKES: dict[str, dict[str, Any]] = {
    "tokens go to the block of the first entry": at(lambda table: table[:1].repeat(BATCH, 0)),
    "tokens go to the next block": at(lambda table: (table + 1) % BLOCKS),
    "tokens ignore the table": at(lambda table: numpy.arange(table.size).reshape(table.shape) % BLOCKS),
    "tokens go to the next slot": {
        "new_slots": lambda cache, stop, new: (paged_steps.new_slots(cache, stop, new) + 1) % (BLOCKS * SIZE)
    },
    "tokens go to a block from its first slot on": {
        "new_slots": lambda cache, stop, new: paged_steps.new_slots(
            cache._replace(lengths=numpy.asarray(cache.lengths) // SIZE * SIZE), stop, new
        )
    },
    "keys ignore the table": reading(
        lambda _: {"block_table": numpy.arange(BATCH * 4).reshape(BATCH, -1).astype("int32")}
    ),
    "keys are those of the first entry": reading(lambda options: {"block_table": options["block_table"][[0, 0]]}),
    "keys of the whole block are seen": reading(
        lambda options: {"seqused_kv": -(-numpy.asarray(options["seqused_kv"]) // SIZE) * SIZE}
    ),
    "the window is ignored": reading(lambda _: {"window": None}),
    "queries are at the end of the keys": reading(lambda _: {"q_offset": "lower_right"}),
}


@pytest.mark.parametrize("steps", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gives_another_output(steps: dict[str, Any]) -> None:
    name, options = "mha_spec.reference", {**OPTIONS["all"], "counts": RAGGED}
    lengths, wanted = [3, 3, 1], expected([3, 3, 1], **options)
    layer = Layer(LayerSteps()).multi_head_attention
    right = decoded(name, pages(name), lengths, "float64", layer=layer, **options)[0]
    numpy.testing.assert_allclose(numpy.concat(right, 1), numpy.concat(wanted, 1), rtol=1e-12, atol=1e-12)
    layer = Layer(LayerSteps(**steps)).multi_head_attention
    outputs = decoded(name, pages(name), lengths, "float64", layer=layer, **options)[0]
    assert not numpy.allclose(numpy.concat(outputs, 1), numpy.concat(wanted, 1), rtol=1e-3, atol=1e-3)


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "beyond the table": ({"lengths": (10, 11)}, r"`cache`.*max_blocks \* block_size=12.*\[10, 11\].*MHA-CACHE-4"),
    "no block": ({"lengths": (0, 8)}, r"`cache.block_table`.*block_table\[1, 3\]<blocks=11.*received -1.*MHA-CACHE-9"),
    "too large a block": ({"table": numpy.full((2, 4), 11)}, r"`cache.block_table`.*received 11.*MHA-CACHE-9"),
    "a shared block": (
        {"table": numpy.array([[1, 2], [1, 3]]), "lengths": (2, 1)},
        "which another token has.*MHA-CACHE-11",
    ),
    "two new tokens": ({"table": numpy.array([[1, 2], [1, 3]])}, r"token 0 of batch entry 1.*slot 0 of block 1"),
    "a block twice": ({"table": numpy.array([[1, 1], [2, 3]]), "lengths": (2, 0)}, r"slot 0 of block 1.*MHA-CACHE-11"),
    "lengths": ({"lengths": (-1, 0)}, "`cache.lengths`"),
    "a row is missing": ({"table": TABLE[:1]}, r"`cache.block_table`.*\(batch, max_blocks\).*MHA-CACHE-9"),
    "rank": ({"table": TABLE[0]}, r"`cache.block_table`.*\(batch, max_blocks\).*MHA-CACHE-9"),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS)
def test_a_cache_that_does_not_fit_is_refused(module: str, changed: dict[str, Any], message: str) -> None:
    functions, cache = importlib.import_module(module), pages(module, **changed)
    with pytest.raises(ArgumentValueError, match=message):
        functions.append_cache(cache, *new(module, 2))
    params, x = operands(module, "float64")
    with pytest.raises(ArgumentValueError, match=message):
        functions.multi_head_attention(x[:, :2], x[:, :2], x[:, :2], params, cache=cache)


def test_the_type_of_a_table_is_checked(module: str) -> None:
    functions = importlib.import_module(module)
    for table in (TABLE.tolist(), TABLE.astype(float), None):
        with pytest.raises(ArgumentTypeError, match=r"`cache.block_table`.*integers.*MHA-CACHE-9"):
            functions.append_cache(pages(module, table), *new(module, 1))
    with pytest.raises(ArgumentTypeError, match=r"`cache.key` must have the dtype of `key`"):
        functions.append_cache(pages(module, dtype="float32"), *new(module, 1))
    with pytest.raises(ArgumentValueError, match=r"`cache.key` must have shape .*kv_heads.*received.*MHA-CACHE-9"):
        functions.append_cache(pages(module), *(x[:, :2] for x in new(module, 1)))


REFUSED: dict[str, Any] = {
    "mask": numpy.ones((1, 1, LENGTH, CAPACITY), bool),
    "bias": numpy.zeros((1, 1, LENGTH, CAPACITY)),
    "q_lengths": [1, 1],
    "q_segment_ids": numpy.zeros((BATCH, LENGTH), int),
    "kv_segment_ids": numpy.zeros((BATCH, CAPACITY), int),
    "dropout_rate": 0.5,
    "chunk": 3,
    "prefix_lengths": [1, 1],
    "kv_starts": [1, 1],
    "q_offset": "lower_right",
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_paged_attention_does_not_have_are_refused(module: str, name: str) -> None:
    functions, (params, x) = importlib.import_module(module), operands(module, "float64")
    value = REFUSED[name]
    value = to_library(value, MODULES[module]) if isinstance(value, numpy.ndarray) else value
    with pytest.raises(ArgumentValueError, match=rf"`{name}` must be None.*PagedKVCache.*MHA-CACHE-10"):
        functions.multi_head_attention(x, x, x, params, cache=pages(module), **{name: value})


def test_weights_are_refused(module: str) -> None:
    functions, (params, x) = importlib.import_module(module), operands(module, "float64")
    for function, values in (("multi_head_attention_and_weights", [x, x]), ("multi_head_attention_weights", [x])):
        with pytest.raises(ArgumentValueError, match=rf"`cache` must be a KVCache in {function}.*MHA-CACHE-10"):
            getattr(functions, function)(x, *values, params, cache=pages(module))


def test_tokens_without_a_slot_are_dropped_and_counted_where_they_are_not_read(module: str) -> None:
    library = MODULES[module]
    if library == "numpy":
        pytest.skip("arrays of NumPy are read")
    table = to_library(numpy.array([[7, 2], [10, 10**6]], "int32"), library)
    lengths = to_library(numpy.array([5, 2], "int32"), library)
    cache = importlib.import_module(module).append_cache(pages(module, table, lengths=lengths), *new(module, 3))
    assert to_numpy(cache.lengths).tolist() == [8, 5]
    key, tokens = to_numpy(cache.key), to_numpy(new(module, 3)[0])
    numpy.testing.assert_array_equal(key[2, 2], tokens[0, :, 0])
    numpy.testing.assert_array_equal(key[10, 2], tokens[1, :, 0])
    written = ~numpy.isnan(key).any((2, 3))
    assert numpy.argwhere(written).tolist() == [[2, 2], [10, 2]]


def test_the_class_shows_its_sizes() -> None:
    cache = pages("mha_spec_numpy")
    assert (cache.batch, cache.block_size, cache.capacity) == (BATCH, SIZE, CAPACITY)
    assert "block_table=(2, 4)" in repr(cache)
    key, value = new("mha_spec_numpy", 1)
    assert list(cache.append(key, value).lengths) == [1, 1]
    assert mha_spec.PagedKVCache is PagedKVCache

"""mha_spec_tensorflow's layer and cache where a trace does not know the sizes: each is compared when the graph runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_near
from support.numbers import numbers

import mha_spec_tensorflow
from mha_spec_tensorflow.layouts import APPENDED, ATTENTION, LAYER, PAGED_CACHE, Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZES = {
    "batch": 2, "heads": 6, "kv_heads": 3, "q_len": 5, "kv_len": 7, "length": 5, "qk_dim": 4, "v_dim": 13,
    "embed": 17, "k_embed": 19, "v_embed": 23, "out": 29, "capacity": 11,
    "blocks": 11, "block_size": 3, "max_blocks": 3,
}  # fmt: skip
KNOWN = ("heads", "kv_heads", "qk_dim", "v_dim")
"""The sizes that a trace must know."""
OPERANDS = ("query", "key", "value", "q_offset", "kv_lengths")
JOINT = ("params['q_joint_norm']", "params['k_joint_norm']")
"""The norms over all heads: a call has these or the norms over a head, which the tests pass."""
SEPARATE = {name: layout for name, layout in LAYER.items() if name not in JOINT}
CROSS = {name: layout for name, layout in SEPARATE.items() if name in OPERANDS or name.startswith("params")}
INTEGERS = ("q_offset", "kv_lengths", "lengths", "cache.lengths", "cache.block_table")


def array(name: str, shape: list[int]) -> tf.Tensor:
    """Make an argument of the layer or of append_cache, of any shape."""
    return tf.ones(shape, tf.int32) if name in INTEGERS else tf.constant(numbers(*shape))


def shapes(layouts: Mapping[str, Layout]) -> dict[str, list[int]]:
    """Return the right shape of each argument."""
    return {name: [SIZES[size] for size in layout.sizes] for name, layout in layouts.items()}


def tensors(layouts: Mapping[str, Layout], **changed: list[int]) -> dict[str, tf.Tensor]:
    """Make the arguments, some of them in other shapes."""
    return {name: array(name, shape) for name, shape in (shapes(layouts) | changed).items()}


def parameters(arguments: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name[8:-2]: tensor for name, tensor in arguments.items() if name.startswith("params")}


def called(arguments: dict[str, tf.Tensor]) -> Any:
    """Call the layer with a key of other tokens."""
    operands = {name: arguments[name] for name in OPERANDS}
    return mha_spec_tensorflow.multi_head_attention(**operands, params=parameters(arguments), causal=True, rotary={})


def appended(arguments: dict[str, tf.Tensor]) -> Any:
    """Return the buffers of a cache after an append."""
    fields = ("key", "value", "lengths")
    cache = mha_spec_tensorflow.KVCache(*(arguments[f"cache.{name}"] for name in fields))
    after = mha_spec_tensorflow.append_cache(cache, *(arguments[name] for name in fields))
    return [after.key, after.value]


def graph_of(call: Any, layouts: Mapping[str, Layout]) -> Any:
    """Trace a graph that knows only the sizes that it must know."""
    specs = {
        name: tf.TensorSpec([SIZES[size] if size in KNOWN else None for size in layout.sizes], array(name, [1]).dtype)
        for name, layout in layouts.items()
    }
    return tf.function(call, input_signature=[specs], autograph=False)


@pytest.fixture(scope="module")
def layer() -> Any:
    return graph_of(called, CROSS)


@pytest.fixture(scope="module")
def append() -> Any:
    return graph_of(appended, APPENDED)


def unknown_axes(layouts: Mapping[str, Layout]) -> list[tuple[str, int]]:
    """Return the axes whose size the graph does not know and other arrays share."""
    sizes = [size for layout in layouts.values() for size in layout.sizes]
    return [
        (name, axis)
        for name, layout in layouts.items()
        for axis, size in enumerate(layout.sizes)
        if size not in KNOWN and sizes.count(size) > 1
    ]


def test_shapes_that_fit_are_accepted(layer: Any, append: Any) -> None:
    assert_near(layer(tensors(CROSS)), called(tensors(CROSS)))
    assert_near(append(tensors(APPENDED)), appended(tensors(APPENDED)))


@pytest.mark.parametrize(("name", "axis"), unknown_axes(CROSS))
def test_each_axis_of_each_argument_of_the_layer_is_compared_when_it_runs(layer: Any, name: str, axis: int) -> None:
    for size in (1, shapes(CROSS)[name][axis] + 2):
        wrong = shapes(CROSS)[name]
        wrong[axis] = size
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"must have shape.*MHA-"):
            layer(tensors(CROSS, **{name: wrong}))


@pytest.mark.parametrize(("name", "axis"), unknown_axes(APPENDED))
def test_each_axis_of_each_argument_of_an_append_is_compared_when_it_runs(append: Any, name: str, axis: int) -> None:
    for size in (1, shapes(APPENDED)[name][axis] + 2):
        wrong = shapes(APPENDED)[name]
        wrong[axis] = size
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"must have shape.*MHA-"):
            append(tensors(APPENDED, **{name: wrong}))


def test_a_cache_of_unknown_sizes_has_the_output_of_one_of_known_sizes() -> None:
    """One graph decodes at every batch and capacity, and the key is as long as the query."""
    layouts = {
        name: SEPARATE[name] for name in SEPARATE if name in ("query", "key", "value") or "." in name or "[" in name
    }
    layouts |= {
        "key": Layout("batch q_len k_embed", "MHA-LAYER-2"),
        "value": Layout("batch q_len v_embed", "MHA-LAYER-2"),
    }

    def decoded(arguments: dict[str, tf.Tensor]) -> Any:
        cache = mha_spec_tensorflow.KVCache(*(arguments[f"cache.{name}"] for name in ("key", "value", "lengths")))
        operands = {name: arguments[name] for name in ("query", "key", "value")}
        output, after = mha_spec_tensorflow.multi_head_attention(
            **operands, params=parameters(arguments), cache=cache, causal=True, q_offset="lower_right", rotary={}
        )
        return [output, after.key, after.value]

    arguments = tensors(layouts)
    assert_near(graph_of(decoded, layouts)(arguments), decoded(arguments))


@pytest.mark.parametrize("dtype", [tf.int8, tf.int64])
def test_the_numbers_of_new_tokens_are_integers_of_any_type(dtype: tf.DType) -> None:
    def counted(arguments: dict[str, tf.Tensor]) -> Any:
        return appended(arguments | {"lengths": tf.cast(arguments["lengths"], dtype)})

    arguments = tensors(APPENDED) | {"lengths": tf.constant([2, 9])}
    assert_near(graph_of(counted, APPENDED)(arguments), appended(arguments))


def test_a_paged_cache_of_unknown_sizes_has_the_output_of_one_of_known_sizes() -> None:
    layouts: dict[str, Layout] = {name: layout for name, layout in SEPARATE.items() if "[" in name}
    embeddings = {"query": "embed", "key": "k_embed", "value": "v_embed"}
    layouts |= {name: Layout(f"batch q_len {size}", "MHA-LAYER-2") for name, size in embeddings.items()} | PAGED_CACHE

    def decoded(arguments: dict[str, tf.Tensor]) -> Any:
        cache = mha_spec_tensorflow.PagedKVCache(*(arguments[name] for name in PAGED_CACHE))
        operands = {name: arguments[name] for name in ("query", "key", "value")}
        options: dict[str, Any] = {"causal": True, "rotary": {}, "cache": cache}
        output, after = mha_spec_tensorflow.multi_head_attention(**operands, params=parameters(arguments), **options)
        return [output, after.key, after.value]

    arguments = tensors(layouts) | {"cache.block_table": tf.constant([[5, 1, 6], [4, 0, 2]])}
    graph = graph_of(decoded, layouts)
    assert_near(graph(arguments), decoded(arguments))
    for name, wrong in (("cache.block_table", [3, 3]), ("cache.value", [11, 2, 3, 13]), ("cache.lengths", [3])):
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"`{name}` must have shape.*MHA-CACHE-9"):
            graph(arguments | {name: array(name, wrong)})


@pytest.mark.parametrize("reading", ["upper_left", "lower_right"])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_a_named_offset_of_a_rotation(reading: str, with_lengths: bool) -> None:
    """The rotation has the positions that the name means, whether or not the trace knows the sizes (MHA-POS-2)."""
    layouts = {name: layout for name, layout in CROSS.items() if name not in ("q_offset", "kv_lengths")}
    lengths = {"kv_lengths": tf.constant([4, 9])} if with_lengths else {}
    kv_lengths = [4, 7] if with_lengths else [7, 7]
    offset = [0, 0] if reading == "upper_left" else [length - SIZES["q_len"] for length in kv_lengths]

    def called(arguments: dict[str, tf.Tensor], q_offset: Any = reading) -> Any:
        operands = {name: arguments[name] for name in ("query", "key", "value")}
        options: dict[str, Any] = {"causal": True, "rotary": {}, "q_offset": q_offset, **lengths}
        return mha_spec_tensorflow.multi_head_attention(**operands, params=parameters(arguments), **options)

    arguments = tensors(layouts)
    expected = called(arguments, offset)
    for call in (called, graph_of(called, layouts), tf.function(called, autograph=False)):
        assert_near(call(arguments), expected)


def test_an_append_of_no_token_in_a_graph_stores_nothing() -> None:
    arguments = tensors(APPENDED)
    empty = arguments | {name: arguments[name][:, :, :0] for name in ("key", "value")}
    empty["lengths"] = arguments["lengths"] * 0
    stored = graph_of(appended, APPENDED)(empty)
    assert_near(stored, [arguments["cache.key"], arguments["cache.value"]])


def of_unknown_lengths(call: Any, *arrays: tf.Tensor) -> Any:
    """Trace a call that does not know axis 2 of its arrays, the capacity and the number of new tokens."""
    specs = [tf.TensorSpec((2, 3, None, 4), array.dtype) for array in arrays]
    return tf.function(call, input_signature=specs, autograph=False)


@pytest.mark.parametrize("counts", [None, [1, 2]])
@pytest.mark.parametrize("paged", [False, True])
def test_room_for_new_tokens_is_compared_when_it_runs(counts: list[int] | None, paged: bool) -> None:
    """Lengths on the host are compared with an unknown capacity, and nothing is stored (MHA-CACHE-4)."""

    def call(buffer: tf.Tensor, new: tf.Tensor) -> Any:
        cache: Any = mha_spec_tensorflow.KVCache(buffer, buffer, [3, 5])
        if paged:
            pages = tf.transpose(buffer, (0, 2, 1, 3))
            cache = mha_spec_tensorflow.PagedKVCache(pages, pages, [3, 5], numpy.asarray([[1], [0]]))
        return list(cache.append(new, new, counts)[:2])

    buffer, new = tf.constant(numbers(2, 3, 7, 4)), tf.constant(numbers(2, 3, 2, 4))
    graph = of_unknown_lengths(call, buffer, new)
    assert_near(graph(buffer, new), call(buffer, new))
    wrong = [(buffer[:, :, :5], new), (buffer, tf.concat([new, new], 2))]
    for arrays in wrong[: 1 if counts else 2]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"`cache` must have room.*MHA-CACHE-4"):
            graph(*arrays)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`cache\.lengths` must be in.*received 5"):
        graph(buffer[:, :, :3], new[:, :, :0] if counts is None else new)


@pytest.mark.parametrize(("name", "value"), [("window", (6, 0)), ("chunk", 7)])
def test_the_span_of_a_window_cache_is_compared_when_it_runs(name: str, value: Any) -> None:
    layer, x = mha_spec_tensorflow.MultiHeadAttention(12, 3, dtype="float64"), tf.constant(numbers(2, 5, 12))

    def call(buffer: tf.Tensor) -> Any:
        cache = mha_spec_tensorflow.WindowKVCache(buffer, buffer, [11, 13])
        return layer(x, causal=True, cache=cache, **{name: value})[0]

    buffer = tf.constant(numbers(2, 3, 7, 4))
    graph = of_unknown_lengths(call, buffer)
    assert_near(graph(buffer), call(buffer))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"`{name}` must fit.*=. .5.*MHA-CACHE-14"):
        graph(buffer[:, :, :5])


@pytest.mark.parametrize("positions", [[2, 3, 5, 7, 11], [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]], ids=str)
def test_positions_on_the_host_are_compared_when_it_runs(positions: Any) -> None:
    layer = mha_spec_tensorflow.MultiHeadAttention(12, 3, rotary={}, dtype="float64")
    x = tf.constant(numbers(2, 5, 12))
    spec = tf.TensorSpec((None, None, 12), tf.float64)
    graph = tf.function(lambda x: layer(x, positions=positions), input_signature=[spec], autograph=False)
    assert_near(graph(x), layer(x, positions=positions))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`positions` must have shape.*MHA-LAYER-7"):
        graph(x[:, :3])


RANKS = [name for name, layout in ATTENTION.items() if name not in ("query", "key", "value")]


@pytest.mark.parametrize("name", RANKS)
def test_a_rank_that_a_trace_does_not_know_is_compared_when_it_runs(name: str) -> None:
    """The message is ours, whatever the operation that would fail next."""
    sizes = shapes(ATTENTION)
    arrays = {label: tf.constant(numbers(*sizes[label])) for label in ("query", "key", "value", "grad_output")}
    if "segment" in name:
        arrays |= {label: tf.ones(sizes[label], tf.int32) for label in ("q_segment_ids", "kv_segment_ids")}
    integers = name in INTEGERS or "segment" in name or name in ("q_lengths", "prefix_lengths", "kv_starts")
    dtype = tf.bool if "mask" in name else tf.int32 if integers else tf.float64
    right = tf.cast(numpy.ones(sizes[name]), dtype)
    causal: dict[str, Any] = {"causal": True, "q_offset": 0} if name == "prefix_lengths" else {}

    def called(tensor: tf.Tensor) -> Any:
        gradients = mha_spec_tensorflow.attention_vjp(**arrays | {name: tensor}, **causal)
        return [gradient for gradient in gradients if gradient is not None]

    call = tf.function(called, input_signature=[tf.TensorSpec(None, dtype)], autograph=False)
    assert_near(call(right), called(right))
    scalars = [] if name == "q_offset" else [right[0], tf.reshape(right, [-1])[0]]  # An offset may have no axis.
    for wrong in (right[..., None], right[None], *scalars):
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"`{name}` must (have shape|broadcast to).*MHA-"):
            call(wrong)

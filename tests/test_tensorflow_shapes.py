"""mha_spec_tensorflow compares shapes that a trace does not know when the graph runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_equal, assert_near
from support.numbers import numbers

import mha_spec_tensorflow
from mha_spec.arrays import dtype_name
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec_tensorflow.layouts import ATTENTION, HALVES

if TYPE_CHECKING:
    from collections.abc import Callable

Arrays = dict[str, Any]
SIZES = {"batch": 2, "heads": 6, "kv_heads": 3, "q_len": 5, "kv_len": 7, "qk_dim": 11, "v_dim": 13}
INTEGERS = ("q_offset", "q_lengths", "kv_lengths", "prefix_lengths", "kv_starts", "q_segment_ids", "kv_segment_ids")
MASKS = ("mask", "dropout_mask")
COTANGENTS = ("grad_output", "grad_lse")
AXES = [(name, axis) for name, layout in ATTENTION.items() for axis in range(len(layout.sizes))]
AXES_OF_HALVES = [(name, axis) for name, layout in HALVES.items() for axis in range(len(layout.sizes))]
STATIC = ("heads", "kv_heads", "qk_dim", "v_dim")


def array(name: str, shape: list[int]) -> tf.Tensor:
    """Create an argument of attention with any shape."""
    if name in INTEGERS:
        return tf.ones(shape, tf.int32)
    return tf.constant(numbers(*shape) > -1 if name in MASKS else numbers(*shape).astype("float32"))


def shapes(layouts: Any = ATTENTION) -> dict[str, list[int]]:
    """Return the right shape of each argument."""
    return {name: [SIZES[size] for size in layout.sizes] for name, layout in layouts.items()}


def differentiated(tensors: Arrays) -> Any:
    """Compute the gradients of attention with every array that it takes."""
    cotangents = {name: tensors[name] for name in COTANGENTS}
    rest = {name: tensor for name, tensor in tensors.items() if name not in COTANGENTS}
    gradients = mha_spec_tensorflow.attention_vjp(**cotangents, **rest, causal=True)
    return list(gradients)


def merged(tensors: Arrays) -> Any:
    """Call both functions of merging."""
    halves = {name: tensor for name, tensor in tensors.items() if name not in COTANGENTS}
    return [*mha_spec_tensorflow.merge_attention(**halves), *mha_spec_tensorflow.merge_attention_vjp(**tensors)]


def traced(call: Callable[..., Any], tensors: Arrays, known: Callable[[str, int], bool], **options: Any) -> Any:
    """Trace a call that knows only some axes of the tensors."""
    specs = {
        name: tf.TensorSpec(
            [size if known(name, axis) else None for axis, size in enumerate(tensor.shape)], tensor.dtype
        )
        for name, tensor in tensors.items()
    }
    return tf.function(call, input_signature=[specs], autograph=False, **options)


def heads_and_sizes(layouts: Any) -> Callable[[str, int], bool]:
    """Return a predicate that is True for the axes of the operands that attention must know."""
    return lambda name, axis: name in ("query", "key", "value") and layouts[name].sizes[axis] in STATIC


@pytest.fixture(scope="module")
def graph() -> Any:
    return traced(
        differentiated, {name: array(name, shape) for name, shape in shapes().items()}, heads_and_sizes(ATTENTION)
    )


@pytest.fixture(scope="module")
def graph_of_merging() -> Any:
    tensors = {name: array(name, shape) for name, shape in shapes(HALVES).items()}
    return traced(merged, tensors, lambda *_: False)


def test_shapes_that_fit_are_accepted(graph: Any, graph_of_merging: Any) -> None:
    tensors = {name: array(name, shape) for name, shape in shapes().items()}
    for result, expected in zip(graph(tensors), differentiated(tensors), strict=True):
        assert result.shape == expected.shape
        assert numpy.allclose(result, expected, atol=1e-4)
    halves = {name: array(name, shape) for name, shape in shapes(HALVES).items()}
    for result, expected in zip(graph_of_merging(halves), merged(halves), strict=True):
        assert_equal(result, expected)


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_each_axis_of_each_argument_is_compared_when_it_runs(graph: Any, name: str, axis: int) -> None:
    layout = ATTENTION[name]
    wrong = shapes()
    wrong[name][axis] += 2
    tensors = {label: array(label, shape) for label, shape in wrong.items()}
    if name in ("query", "key", "value") and layout.sizes[axis] in STATIC:
        pytest.skip("The trace knows this axis.")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`\w+` must (have shape|broadcast to).*MHA-"):
        graph(tensors)


@pytest.mark.parametrize("name", [name for name, layout in ATTENTION.items() if any(layout.broadcasts)])
@pytest.mark.parametrize("axis", range(4))
def test_an_axis_that_may_broadcast_may_be_1(graph: Any, name: str, axis: int) -> None:
    narrow = shapes()
    narrow[name][axis] = 1
    tensors = {label: array(label, shape) for label, shape in narrow.items()}
    for result, expected in zip(graph(tensors), differentiated(tensors), strict=True):
        assert result.shape == expected.shape
        assert numpy.allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, layout in ATTENTION.items() if not any(layout.broadcasts)])
def test_nothing_else_broadcasts(graph: Any, name: str) -> None:
    narrow = shapes()
    narrow[name][0] = 1
    tensors = {label: array(label, shape) for label, shape in narrow.items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have shape"):
        graph(tensors)


@pytest.mark.parametrize(("name", "axis"), AXES_OF_HALVES)
def test_the_halves_are_compared_when_they_are_merged(graph_of_merging: Any, name: str, axis: int) -> None:
    wrong = shapes(HALVES)
    wrong[name][axis] = 1
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"must have shape.*MHA-MERGE"):
        graph_of_merging({label: array(label, shape) for label, shape in wrong.items()})


def test_a_rank_that_is_not_known_is_compared_when_it_runs() -> None:
    operands = {name: array(name, shapes()[name]) for name in ("query", "key", "value", "mask")}

    @tf.function(input_signature=[tf.TensorSpec(None, tf.bool)])
    def call(mask: tf.Tensor) -> Any:
        return mha_spec_tensorflow.attention(**operands | {"mask": mask})

    assert_equal(call(operands["mask"]), mha_spec_tensorflow.attention(**operands))
    for wrong in (operands["mask"][0], operands["mask"][..., None]):
        with pytest.raises(tf.errors.InvalidArgumentError):
            call(wrong)


def test_xla_compiles_a_call_of_unknown_sizes() -> None:
    tensors = {name: array(name, shape) for name, shape in shapes().items()}
    compiled = traced(differentiated, tensors, heads_and_sizes(ATTENTION), jit_compile=True)
    for result, expected in zip(compiled(tensors), differentiated(tensors), strict=True):
        assert numpy.allclose(result, expected, atol=1e-4)


def test_a_size_that_is_known_from_an_argument_holds_for_all() -> None:
    tensors = {name: array(name, shapes()[name]) for name in ("query", "key", "value")}

    def call(arrays: Arrays) -> Any:
        return mha_spec_tensorflow.attention(**arrays, kv_lengths=[3, 7], q_lengths=numpy.asarray([5, 2]))

    function = traced(call, tensors, lambda name, axis: axis == 3 or (name, axis) in {("query", 1), ("value", 1)})
    assert function.get_concrete_function().structured_outputs.shape.as_list() == [2, 6, None, 13]
    assert_equal(function(tensors), call(tensors))


def unknown(call: Callable[..., Any], *tensors: tf.Tensor) -> Any:
    """Trace a call that does not know the batch and the lengths of its tensors."""
    specs = [tf.TensorSpec((None, tensor.shape[1], None, tensor.shape[3]), tensor.dtype) for tensor in tensors]
    return tf.function(call, input_signature=specs, autograph=False)


@pytest.mark.parametrize(
    ("name", "size", "clause"),
    [
        ("q_lengths", "q_len", "MHA-LEN-3"),
        ("kv_lengths", "kv_len", "MHA-LEN-3"),
        ("kv_starts", "kv_len", "MHA-LEN-5"),
        ("prefix_lengths", "kv_len", "MHA-LEN-5"),
    ],
)
def test_integers_on_the_host_are_compared_with_a_size_when_it_runs(name: str, size: str, clause: str) -> None:
    value: Any = [7, 2] if name == "kv_starts" else numpy.asarray([7, 2])
    options: dict[str, Any] = {name: value, "causal": True, "q_offset": 3}

    def call(query: tf.Tensor, key: tf.Tensor) -> Any:
        return mha_spec_tensorflow.attention_weights(query, key, **options)

    long, short = tf.constant(numbers(2, 3, 7, 4)), tf.constant(numbers(2, 3, 5, 4))
    graph = unknown(call, long, long)
    assert_equal(graph(long, long), call(long, long))
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=rf"`{name}` must be in.*{size}=. .5. .received 7.*{clause}"
    ):
        graph(*((short, long) if size == "q_len" else (long, short)))


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_kv", "seqused_kv"])
def test_bounds_on_the_host_are_compared_with_the_tokens_when_it_runs(name: str) -> None:
    pages = name == "seqused_kv"
    query = tf.constant(numbers(7, 2, 4))
    keys = [tf.constant(numbers(3, size, 2, 4) if pages else numbers(size, 2, 4)) for size in (5, 7)]
    options: dict[str, Any] = {"seqused_kv": [7], "block_table": numpy.asarray([[1]])} if pages else {}

    def call(query: tf.Tensor, key: tf.Tensor) -> Any:
        return mha_spec_tensorflow.varlen_attention(query, key, key, [0, 7], None if pages else [0, 7], **options)

    specs = [tf.TensorSpec((*[None] * (len(array.shape) - 2), 2, 4), tf.float64) for array in (query, keys[0])]
    graph = tf.function(call, input_signature=specs, autograph=False)
    assert_near(graph(query, keys[1]), call(query, keys[1]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"`{name}` must be in.*=. .5. .received 7.*MHA-VARLEN"):
        graph(*((query[:5], keys[1]) if name == "cu_seqlens_q" else (query, keys[0])))


def test_the_argument_that_does_not_fit_is_named_when_it_runs() -> None:
    """The sizes are those of the first argument, even if the trace knows another size of a later one."""
    query = tf.constant(numbers(2, 3, 7, 4))
    rows = tf.constant(numbers(2, 3, 5))
    calls: dict[str, Any] = {
        "grad_output": lambda x: mha_spec_tensorflow.attention_vjp(tf.constant(numbers(2, 3, 5, 4)), x, x, x)[0],
        "lse_a": lambda x: mha_spec_tensorflow.merge_attention(x, rows, x, rows),
        "kv_segment_ids": lambda x: mha_spec_tensorflow.attention(
            x, *[x + 1] * 2, q_segment_ids=numpy.zeros((2, 7), int), kv_segment_ids=numpy.zeros((2, 5), int)
        ),
    }
    for name, call in calls.items():
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"`{name}` must have shape.* 7.*received.* 5"):
            unknown(call, query)(query)


@pytest.mark.parametrize("masked", [True, False])
def test_a_tensor_that_is_query_and_key_has_one_length(masked: bool) -> None:
    query = tf.constant(numbers(2, 3, 5, 4))
    ids = {"q_segment_ids": numpy.zeros((2, 5), int), "kv_segment_ids": numpy.zeros((2, 7), int)}
    options: dict[str, Any] = {"mask": tf.ones((2, 1, 5, 7), tf.bool)} if masked else ids
    call = unknown(lambda x: mha_spec_tensorflow.attention(x, x, x, **options), query)
    with pytest.raises(ArgumentValueError, match=r"`(mask|kv_segment_ids)` must"):
        call.get_concrete_function()


@pytest.mark.parametrize("reading", ["upper_left", "lower_right"])
@pytest.mark.parametrize("lengths", [(), ("kv_lengths",), ("q_lengths",), ("q_lengths", "kv_lengths")])
@pytest.mark.parametrize("on_the_host", [True, False])
def test_readings_of_the_offset(reading: str, lengths: tuple[str, ...], on_the_host: bool) -> None:
    """Lengths beyond a buffer, which only tensors can hold, act as those of the buffer."""
    values = (
        {"q_lengths": [2, 9], "kv_lengths": [9, 4]} if not on_the_host else {"q_lengths": [2, 5], "kv_lengths": [7, 4]}
    )
    options = {name: values[name] if on_the_host else tf.constant(values[name]) for name in lengths}
    clamped = {"q_lengths": [2, 5], "kv_lengths": [7, 4]}
    q_len, kv_len = (
        clamped[name] if name in lengths else [size] * 2 for name, size in (("q_lengths", 5), ("kv_lengths", 7))
    )
    offset = (
        [0, 0] if reading == "upper_left" else [keys - queries for queries, keys in zip(q_len, kv_len, strict=True)]
    )
    tensors = {name: tf.cast(array(name, shapes()[name]), tf.float64) for name in ("query", "key", "value")}

    def call(arrays: Arrays) -> Any:
        return mha_spec_tensorflow.attention(**arrays, **options, causal=True, q_offset=reading)

    expected = mha_spec_tensorflow.attention(**tensors, **options, causal=True, q_offset=offset)
    assert_near(call(tensors), expected)
    assert_near(traced(call, tensors, heads_and_sizes(ATTENTION))(tensors), expected)


SIZES_IN_TENSORS: dict[str, Any] = {
    "batch": lambda x, size: mha_spec_tensorflow.empty_cache(size(x)[0], 3, 7, 4, like=x).append(x, x)[:2],
    "capacity": lambda x, size: mha_spec_tensorflow.empty_cache(2, 3, size(x)[2] + 2, 4, like=x).append(x, x)[:2],
    "alibi": lambda x, size: mha_spec_tensorflow.alibi_bias(3, size(x)[2], size(x)[2] + 2, q_offset="lower_right"),
    "aligned alibi": lambda x, size: mha_spec_tensorflow.alibi_bias(3, size(x)[2], size(x)[2]),
}


@pytest.mark.parametrize("name", SIZES_IN_TENSORS)
def test_a_size_may_be_a_scalar_tensor(name: str) -> None:
    call, x = SIZES_IN_TENSORS[name], tf.constant(numbers(2, 3, 5, 4))
    expected = call(x, lambda x: x.shape)
    assert_equal(call(x, tf.shape), expected)
    graph = unknown(lambda x: call(x, lambda x: tf.shape(x, tf.int64 if name == "alibi" else tf.int32)), x)
    assert_equal(graph(x), expected)


def test_a_size_in_a_tensor_is_compared_when_it_runs() -> None:
    x = tf.constant(numbers(2, 3, 5, 4))
    wrong = {
        r"`capacity` must be capacity>=0.* .-2.*MHA-CACHE-7": lambda x: (
            mha_spec_tensorflow.empty_cache(2, 3, tf.shape(x)[2] - 7, 4, like=x).key
        ),
        r"`q_offset` must be given.* .5 7.*MHA-POS-2": lambda x: mha_spec_tensorflow.alibi_bias(3, tf.shape(x)[2], 7),
    }
    for message, call in wrong.items():
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            unknown(call, x)(x)


def test_a_size_that_must_be_known_is_no_tensor() -> None:
    x = tf.constant(numbers(2, 3, 5, 4))
    calls = [
        lambda x: mha_spec_tensorflow.empty_cache(2, tf.shape(x)[2], 7, 4, like=x).key,
        lambda x: mha_spec_tensorflow.alibi_slopes(tf.shape(x)[2]),
        lambda x: mha_spec_tensorflow.alibi_bias(3, x, tf.shape(x)[2]),
    ]
    for call in calls:
        with pytest.raises(ArgumentTypeError, match=r"must be an integer, received.*Pass a Python integer, such as"):
            unknown(call, x).get_concrete_function()


def test_positions_of_a_rotation_are_compared_when_it_runs() -> None:
    x = tf.constant(numbers(2, 3, 5, 4))

    @tf.function(input_signature=[tf.TensorSpec((None, 3, None, 4), tf.float64), tf.TensorSpec((None,), tf.int32)])
    def call(x: tf.Tensor, positions: tf.Tensor) -> Any:
        return mha_spec_tensorflow.rotary_embedding(x, positions)

    assert_near(call(x, tf.range(5)), mha_spec_tensorflow.rotary_embedding(x, tf.range(5)))
    for wrong in (tf.range(7), tf.range(1)):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"`positions` must have shape.*MHA-ROTARY-6"):
            call(x, wrong)


def test_variables_are_tensors_and_symbols_of_keras_are_refused() -> None:
    import keras

    query = tf.constant(numbers(1, 2, 3, 4))
    expected = mha_spec_tensorflow.attention(query, query, query)
    for variable in (tf.Variable(query), keras.Variable(query, dtype="float64")):
        assert_equal(mha_spec_tensorflow.attention(variable, variable, variable), expected)
    symbol: Any = keras.Input((2, 3, 4))
    ragged: Any = tf.ragged.constant([[[[1.0]]]])
    for wrong in (symbol, tf.sparse.from_dense(query), ragged, numpy.asarray(query), None):
        for place in range(3):
            operands = [wrong if index == place else query for index in range(3)]
            with pytest.raises(ArgumentTypeError):
                mha_spec_tensorflow.attention(*operands)


@pytest.mark.parametrize(
    "dtypes", [("uint64", "int64"), ("int64", "uint64"), ("uint32", "int32"), ("uint64", "uint64")]
)
@pytest.mark.parametrize("as_tensors", [True, False])
def test_segment_ids_are_equal_by_value(dtypes: tuple[str, str], as_tensors: bool) -> None:
    """Some ids of different types are equal only in their last bits, or only as floats of 64 bits."""
    top, exact = (2**64, 2**53) if "64" in dtypes[0] else (2**32, 2**24)
    values = {"uint": [[top - 1, exact + 1, 3]], "int": [[-1, exact, 3]]}
    q_ids, kv_ids = (numpy.asarray(values[dtype.rstrip("0123456789")], dtype) for dtype in dtypes)
    seen = [[int(q) == int(k) for k in kv_ids[0]] for q in q_ids[0]]
    query = tf.ones((1, 1, 3, 4))
    q_segment_ids, kv_segment_ids = (tf.constant(ids) if as_tensors else ids for ids in (q_ids, kv_ids))

    def call(query: tf.Tensor) -> tf.Tensor:
        return mha_spec_tensorflow.attention_weights(
            query, query, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids
        )

    for ask in (call, tf.function(call, autograph=False)):
        assert (numpy.asarray(ask(query)[0, 0]) > 0).tolist() == seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("fill", [-1e30, -1e9, -1e4, 1e4, 1e9])
def test_a_sink_far_from_the_scores_keeps_its_lse(dtype: str, fill: float) -> None:
    query, sinks = tf.zeros((1, 2, 3, 4), dtype), tf.constant([2.5, 0.5])
    bias = tf.fill((1, 1, 3, 5), tf.constant(fill, tf.float32))
    with tf.GradientTape() as tape:
        tape.watch(sinks)
        output, lse = mha_spec_tensorflow.attention(
            query, query[:, :, :1], query[:, :, :1], bias=bias[..., :1], sinks=sinks, return_lse=True
        )
        total = tf.reduce_sum(lse)
    low = fill < 0
    assert dtype_name(output) == dtype
    assert (lse.numpy() == (numpy.asarray([2.5, 0.5])[:, None] if low else numpy.float32(fill))).all()
    gradient: Any = tape.gradient(total, sinks)
    assert gradient.numpy().tolist() == [3.0 * low] * 2


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_weight_of_a_row_of_nan_is_nan(dtype: str) -> None:
    query = numpy.ones((1, 1, 3, 2))
    query[0, 0, 1] = numpy.nan
    weights = mha_spec_tensorflow.attention_weights(tf.cast(query, dtype), tf.ones((1, 1, 3, 2), dtype), causal=True)
    assert tf.math.is_nan(weights[0, 0, 1]).numpy().all()
    assert weights[0, 0, 0].numpy().tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "options",
    [{"kv_lengths": [0]}, {"q_lengths": [0]}, {"causal": True, "q_offset": -5}, {"window": (0, None), "q_offset": 5}],
    ids=["kv_lengths", "q_lengths", "causal", "window"],
)
@pytest.mark.parametrize("kv_len", [0, 1])
def test_one_key_that_no_row_sees(options: dict[str, Any], kv_len: int) -> None:
    query, key = tf.ones((1, 2, 5, 4)), tf.ones((1, 2, kv_len, 4))

    def call(query: tf.Tensor, key: tf.Tensor) -> Any:
        output, lse = mha_spec_tensorflow.attention(
            query, key, key, bias=tf.zeros((1, 1, 1, 1)), **options, return_lse=True
        )
        gradients = mha_spec_tensorflow.attention_vjp(query, query, key, key, bias=tf.zeros((1, 1, 1, 1)), **options)
        return output, mha_spec_tensorflow.attention_weights(query, key, **options), *gradients[:4], lse

    for ask in (call, tf.function(call, autograph=False), tf.function(call, autograph=False, jit_compile=True)):
        *zeros, lse = ask(query, key)
        assert not any(numpy.asarray(tensor).any() for tensor in zeros)
        assert numpy.isneginf(lse).all()


def test_a_seed_beyond_64_bits_is_refused() -> None:
    query = tf.ones((1, 2, 3, 4))
    with pytest.raises(ArgumentValueError, match="dropout_key"):
        mha_spec_tensorflow.attention(query, query, query, dropout_rate=0.5, dropout_key=10**400)

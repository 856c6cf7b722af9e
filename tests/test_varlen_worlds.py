"""Packed and paged attention in programs that JAX and TensorFlow compile: a program takes any lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_near
from support.libraries import with_float64
from support.numbers import numbers
from support.varlen import HEADS, KV_HEADS, QK_DIM, V_DIM, cotangents, packed, paged, separate

import mha_spec_jax
import mha_spec_numpy
import mha_spec_tensorflow
from mha_spec.errors import ArgumentTypeError
from mha_spec.varlen_checks import varlen_arguments
from mha_spec_conformance.targets.conversion import to_numpy
from mha_spec_jax import packed_softmax
from mha_spec_tensorflow.packed import PackedSequences

if TYPE_CHECKING:
    from collections.abc import Iterator

Call = dict[str, Any]
OPTIONS: Call = {"causal": True, "window": (6, None), "q_offset": "lower_right", "softcap": 2.1}
LENGTHS = [
    {"cu_seqlens_q": [0, 3, 3, 8, 9, 11], "cu_seqlens_kv": [0, 5, 9, 9, 20, 23]},
    {"cu_seqlens_q": [0, 1, 1, 1, 15, 15], "cu_seqlens_kv": [0, 1, 2, 28, 29, 29]},
    {"cu_seqlens_q": [0, 0, 0, 0, 0, 0], "cu_seqlens_kv": [0, 9, 9, 9, 9, 9]},
]
"""Lengths for the same numbers of tokens and of sequences."""
EQUAL = {"cu_seqlens_q": [0, 3, 6, 9, 11, 13], "cu_seqlens_kv": [0, 5, 10, 15, 22, 29]}
"""Lengths of which consecutive ones are equal."""


def filled(**changed: Any) -> Call:
    """Return a packed call without NaN, for lengths that use other tokens."""
    operands = numbers(15, HEADS, QK_DIM), numbers(29, KV_HEADS, QK_DIM), numbers(29, KV_HEADS, V_DIM)
    return packed(**dict(zip(("query", "key", "value"), operands, strict=True))) | changed


def bounds(lengths: dict[str, list[int]]) -> Call:
    return {name: numpy.array(ends, "int32") for name, ends in lengths.items()}


def arrays_of(call: Call, convert: Any) -> Call:
    """Convert the arrays of a call."""
    return {name: convert(x) if isinstance(x, numpy.ndarray) else x for name, x in call.items()}


@pytest.fixture
def double() -> Iterator[None]:
    """Enable float64 in JAX."""
    with with_float64("jax"):
        yield


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("layout", "shapes"),
    [(packed, (4, 8, 1, False)), (paged, (2, 4, KV_HEADS, False)), (packed, (2, 4, KV_HEADS, True))],
    ids=["one_head", "all_heads", "spread"],
)
def test_jax_blocks_and_tiles_join(layout: Any, shapes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small call is cut into many blocks and tiles, of a head or of all heads, whose product may be a single one."""
    monkeypatch.setattr(mha_spec_jax.varlen, "shapes_of", lambda _: shapes)
    call = layout() | OPTIONS | {"sinks": numbers(HEADS, seed=8), "alibi_slopes": abs(numbers(HEADS, seed=9))}
    call |= cotangents(call)
    arrays = arrays_of(call, jnp.asarray)
    cotangent = {name: arrays.pop(name) for name in ("grad_output", "grad_lse")}
    results = mha_spec_jax.varlen_attention(return_lse=True, **arrays)
    results += mha_spec_jax.varlen_attention_vjp(**cotangent, **arrays)
    assert_near([*map(to_numpy, results)], list(separate(call)))


@pytest.mark.usefixtures("double")
def test_jax_compiles_once_for_all_lengths() -> None:
    traces = []

    @jax.jit
    def program(arrays: Call) -> Any:
        traces.append(arrays)
        return mha_spec_jax.varlen_attention(**arrays, **OPTIONS, return_lse=True)

    compiled: Any = packed_softmax.attention
    before = compiled._cache_size()
    for lengths in LENGTHS:
        call = filled(**bounds(lengths)) | OPTIONS
        arrays = {name: x for name, x in arrays_of(call, jnp.asarray).items() if name not in OPTIONS}
        wanted = list(separate(call))
        assert_near([*map(to_numpy, program(arrays))], wanted)
        assert_near([*map(to_numpy, mha_spec_jax.varlen_attention(**arrays, **OPTIONS, return_lse=True))], wanted)
        host = arrays | lengths
        assert_near([*map(to_numpy, mha_spec_jax.varlen_attention(**host, **OPTIONS, return_lse=True))], wanted)
    assert len(traces) == 1
    assert compiled._cache_size() == before + 1


@pytest.mark.usefixtures("double")
def test_jax_derives_the_gradients_and_maps_a_call() -> None:
    call = paged() | OPTIONS | {"sinks": numbers(HEADS, seed=8)}
    call |= cotangents(call)
    arrays = arrays_of(call, jnp.asarray)
    names = ("query", "key", "value", "sinks")
    cotangent = tuple(arrays.pop(name) for name in ("grad_output", "grad_lse"))
    others = {name: x for name, x in arrays.items() if name not in names}

    def attend(*operands: Any) -> Any:
        return mha_spec_jax.varlen_attention(**dict(zip(names, operands, strict=True)), **others, return_lse=True)

    def with_gradients(*operands: Any) -> Any:
        results, pull = jax.vjp(attend, *operands)
        return *results, *pull(cotangent)

    operands, wanted = [arrays[name] for name in names], list(separate(call))
    assert_near([*map(to_numpy, with_gradients(*operands))], wanted)
    twice = [jnp.stack([operand, operand]) for operand in operands]
    assert_near([to_numpy(x)[1] for x in jax.vmap(attend)(*twice)], wanted[:2])


def test_jax_refuses_other_derivatives() -> None:
    arrays = arrays_of(filled(), lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None))

    def attend(query: Any) -> Any:
        return jnp.sum(mha_spec_jax.varlen_attention(**arrays | {"query": query})[0])

    for forward in (attend, jax.jit(attend)):
        with pytest.raises(ArgumentTypeError, match=r"^varlen_attention .* no forward-mode derivative") as caught:
            jax.jvp(forward, (arrays["query"],), (arrays["query"],))
        assert "jax.jacrev(jax.jacrev" not in str(caught.value)
    with pytest.raises(ArgumentTypeError, match=r"varlen_attention.*no second derivatives"):
        jax.grad(lambda query: jax.grad(attend)(query).sum())(arrays["query"])


@pytest.mark.usefixtures("double")
def test_jax_exports_a_call_of_symbolic_sizes() -> None:
    call = filled(**bounds(LENGTHS[0])) | OPTIONS
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")
    shapes = [f"t, {HEADS}, {QK_DIM}", f"s, {KV_HEADS}, {QK_DIM}", f"s, {KV_HEADS}, {V_DIM}", "n + 1", "n + 1"]
    scope = jax.export.SymbolicScope()
    arguments = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), "float64" if "," in shape else "int32")
        for shape in shapes
    ]
    exported = jax.export.export(jax.jit(lambda *x: mha_spec_jax.varlen_attention(*x, **OPTIONS)))(*arguments)
    program = jax.jit(jax.export.deserialize(exported.serialize()).call)
    arrays = arrays_of(call, jnp.asarray)
    result = program(*(arrays[name] for name in names))
    assert_near(to_numpy(result), separate(call)[0])


def signature(call: Call) -> Call:
    """Describe the tensors of a call, without the numbers of tokens, sequences and blocks."""
    sizes = {"sinks": 0, "grad_lse": 0, "block_table": 2, "key": call["key"].ndim - 2, "value": call["key"].ndim - 2}
    specs = {}
    for name, x in call.items():
        if isinstance(x, numpy.ndarray):
            unknown = sizes.get(name, 1)
            specs[name] = tf.TensorSpec([None] * unknown + [*x.shape[unknown:]], x.dtype)
    specs |= {"grad_lse": tf.TensorSpec([HEADS, None], tf.float64)} if "grad_lse" in specs else {}
    return specs


@pytest.mark.parametrize("layout", [packed, paged])
def test_tensorflow_traces_once_for_all_sizes(layout: Any) -> None:
    call = layout() | {"sinks": numbers(HEADS, seed=8)}
    call |= cotangents(call)
    names, operands = ("grad_output", "grad_lse"), ("query", "key", "value", "sinks")

    def compute(arrays: Call) -> Any:
        cotangent = [arrays[name] for name in names]
        arrays = {name: x for name, x in arrays.items() if name not in names} | OPTIONS
        arrays.setdefault("cu_seqlens_kv", None)
        with tf.GradientTape() as tape:
            tape.watch([arrays[name] for name in operands])
            results = mha_spec_tensorflow.varlen_attention(**arrays, return_lse=True)
        gradients = tape.gradient(results, [arrays[name] for name in operands], output_gradients=cotangent)
        return *results, *gradients, mha_spec_tensorflow.varlen_attention_vjp(*cotangent[:1], **arrays)

    program: Any = tf.function(compute, input_signature=[signature(call)])
    calls = [call]
    if layout is packed:
        for lengths in LENGTHS[1:]:
            other = filled(**bounds(lengths), sinks=call["sinks"])
            calls.append(other | cotangents(other))
    else:
        calls.append({name: x if name not in ("key", "value") else x[:7] for name, x in call.items()})
    for other in calls:
        tensors = {name: tf.constant(x) for name, x in other.items() if isinstance(x, numpy.ndarray)}
        *results, again = program(tensors)
        assert_near([*map(to_numpy, results)], list(separate(other | OPTIONS)))
        without_lse = {name: x for name, x in other.items() if name != "grad_lse"}
        assert_near([*map(to_numpy, again)], list(separate(without_lse | OPTIONS))[2:])
    assert program.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("world", ["eager", "graph"])
@pytest.mark.parametrize("layout", [packed, paged])
def test_tensorflow_has_gradients_of_the_output_alone(layout: Any, world: str) -> None:
    call = layout() | {"sinks": numbers(HEADS, seed=8)}
    call |= {"grad_output": cotangents(call)["grad_output"]}
    operands = ("query", "key", "value", "sinks")

    def compute(arrays: Call) -> Any:
        arrays = {"cu_seqlens_kv": None} | arrays | OPTIONS
        cotangent, sources = arrays.pop("grad_output"), [arrays[name] for name in operands]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            output = mha_spec_tensorflow.varlen_attention(**arrays)
        return output, *tape.gradient(output, sources, output_gradients=cotangent)

    program: Any = compute if world == "eager" else tf.function(compute, input_signature=[signature(call)])
    results = program({name: tf.constant(x) for name, x in call.items() if isinstance(x, numpy.ndarray)})
    output, _, *gradients = separate(call | OPTIONS)
    assert_near([*map(to_numpy, results)], [output, *gradients])


@pytest.mark.parametrize(
    ("layout", "name", "shape", "fragment"),
    [
        (filled, "seqused_kv", (3,), r"`seqused_kv` must have shape \(sequences\)=\] \[5\].* \[3\] \[\[MHA-VARLEN-4"),
        (filled, "q_offset", (3,), r"`q_offset` must have shape \(sequences\)=\] \[5\].* \[3\] \[\[MHA-VARLEN-5"),
        (filled, "cu_seqlens_q", (0,), r"`cu_seqlens_q` must have shape \(sequences\+1\)=\] \[1\].* \[0\]"),
        (paged, "block_table", (2, 3), r"`block_table` must have shape \(sequences, max_blocks\)=\] \[5 3\].* \[2 3\]"),
    ],
)
def test_tensorflow_compares_unknown_numbers_of_sequences(layout: Any, name: str, shape: Any, fragment: str) -> None:
    call = layout() | {name: numpy.ones(shape, "int32")}
    program: Any = tf.function(
        lambda arrays: mha_spec_tensorflow.varlen_attention(**{"cu_seqlens_kv": None} | arrays),
        input_signature=[signature(call)],
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=fragment):
        program({name: tf.constant(x) for name, x in call.items() if x is not None})


def test_tensorflow_has_forward_mode_in_a_graph() -> None:
    call = filled(**bounds(LENGTHS[0])) | OPTIONS
    tensors = arrays_of(call, tf.constant)
    tangent = tf.cos(7 * tensors["query"])

    def push(arrays: Call) -> Any:
        with tf.autodiff.ForwardAccumulator(tensors["query"], tangent) as accumulator:
            results = mha_spec_tensorflow.varlen_attention(**tensors | arrays, return_lse=True)
        return accumulator.jvp(results)

    wanted = [*map(to_numpy, push({}))]
    assert_near([*map(to_numpy, tf.function(push)(bounds(LENGTHS[0])))], wanted)
    assert_near([*map(to_numpy, tf.function(lambda: push(LENGTHS[0]))())], wanted)


@pytest.mark.parametrize("lengths", [LENGTHS[0], EQUAL], ids=["different", "equal"])
def test_xla_needs_lengths_on_the_host(lengths: dict[str, list[int]]) -> None:
    call = filled(**bounds(lengths)) | OPTIONS
    tensors = arrays_of(call, tf.constant)
    program = tf.function(mha_spec_tensorflow.varlen_attention, jit_compile=True)
    with pytest.raises(ArgumentTypeError, match="`cu_seqlens_q` must be host data where XLA compiles"):
        program(**tensors)

    @tf.function(jit_compile=True)
    def compiled(operands: Call) -> Any:
        return mha_spec_tensorflow.varlen_attention(**operands, **lengths, **OPTIONS, return_lse=True)

    results = compiled({name: tensors[name] for name in ("query", "key", "value")})
    assert_near([*map(to_numpy, results)], list(separate(call)))


LONG, MANY = 2**20, 2**11 + 1
"""The keys of a sequence, and a number of sequences that have more keys together than int32 holds."""


def shared(**changed: Any) -> Call:
    """Return a call of many long sequences in a single block, of which the last alone has queries, and few keys."""
    operands = numbers(2, 1, 3), numbers(1, LONG, 1, 3), numbers(1, LONG, 1, 2)
    lengths = [*[LONG] * (MANY - 1), 5]
    call = dict(zip(("query", "key", "value"), operands, strict=True))
    call |= {"cu_seqlens_q": [*[0] * MANY, 2], "cu_seqlens_kv": numpy.cumsum([0, *lengths])}
    return call | {"block_table": numpy.zeros((MANY, 1), "int32")} | changed


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("arrays", [(), ("seqused_kv",), ("cu_seqlens_kv",)])
def test_jax_takes_more_keys_in_shared_blocks_than_int32_holds(arrays: tuple[str, ...]) -> None:
    call = shared() | ({"seqused_kv": numpy.minimum(numpy.arange(MANY), 4)} if arrays == ("seqused_kv",) else {})
    moved = {name: jnp.asarray(call[name]) for name in ("query", "key", "value", *arrays)}
    result = mha_spec_jax.varlen_attention(**call | moved)
    assert_near(to_numpy(result), mha_spec_numpy.varlen_attention(**call))


def test_tensorflow_takes_more_keys_in_shared_blocks_than_int32_holds() -> None:
    def lengths(bounds: Any) -> Any:
        tensors = {name: tf.constant(x) for name, x in shared().items() if name in ("query", "key", "value")}
        options = {"block_table": tf.constant(shared()["block_table"])}
        operands = *tensors.values(), shared()["cu_seqlens_q"], bounds
        return PackedSequences(varlen_arguments("varlen_attention", options, *operands)).kv_lengths

    bounds = shared()["cu_seqlens_kv"]
    for result in (lengths(bounds), lengths(tf.constant(bounds)), tf.function(lengths)(tf.constant(bounds))):
        assert numpy.asarray(result).tolist() == [*[LONG] * (MANY - 1), 5]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("library", ["jax", "tensorflow", "tf.function"])
def test_numbers_that_are_not_read_are_clamped(library: str) -> None:
    wild = {"cu_seqlens_q": [-4, 3, 2, 8, 99, 1], "cu_seqlens_kv": [0, 5, 9, -9, 2**30, 3]}
    clamped = bounds({"cu_seqlens_q": [0, 3, 3, 8, 15, 15], "cu_seqlens_kv": [0, 5, 9, 9, 29, 29]})
    call = filled(seqused_kv=numpy.array([9, -3, 0, 2**31 - 1, 1]), **bounds(wild))
    convert = jnp.asarray if library == "jax" else tf.constant
    attend: Any = (mha_spec_jax if library == "jax" else mha_spec_tensorflow).varlen_attention
    attend = tf.function(attend) if library == "tf.function" else attend
    wanted = separate(call | clamped | {"seqused_kv": numpy.array([5, 0, 0, 20, 0])})
    assert_near([*map(to_numpy, attend(**arrays_of(call, convert), return_lse=True))], list(wanted))
    table = [[6, 99, -1], [5, 0, 0], [0, 0, 0], [-6, 0, 0], [2, 0, 0]]
    pools = {"key": numbers(8, 4, KV_HEADS, QK_DIM), "value": numbers(8, 4, KV_HEADS, V_DIM)}
    call = filled(
        **pools, cu_seqlens_kv=None, block_table=numpy.array(table), seqused_kv=numpy.array([5, 1, -7, 99, 2])
    )
    clamped = {"block_table": numpy.clip(table, 0, 7), "seqused_kv": numpy.array([5, 1, 0, 12, 2])}
    assert_near([*map(to_numpy, attend(**arrays_of(call, convert), return_lse=True))], list(separate(call | clamped)))

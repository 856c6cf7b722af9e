"""mha_spec_tensorflow in the worlds of TensorFlow: each judged by the goldens, and by which path a call really took."""

from __future__ import annotations

import math
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import keras
import numpy
import pytest
import tensorflow as tf

import mha_spec
import mha_spec_tensorflow
from mha_spec.arguments import OPTIONS
from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec_conformance.accuracy import allowances
from mha_spec_conformance.cases import load
from mha_spec_conformance.compare import judge
from mha_spec_conformance.convert import to_library, to_numpy
from mha_spec_conformance.precision import precision
from mha_spec_tensorflow import forward, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mha_spec_conformance.cases import Case

attention: Callable[..., Any] = mha_spec_tensorflow.attention
gradient_of: Callable[..., Any] = tf.GradientTape.gradient
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
GENERATOR_SEED = 20261123
ENOUGH = 50


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    return tuple(case for case in load().cases if case.expect == "values")


def chosen(function: str, at_least: int = ENOUGH) -> list[Case]:
    """Some cases of a function, evenly spread; every option of the function is among them."""
    found = [case for case in cases() if case.function == function]
    some = found[:: max(1, len(found) // at_least)]
    assert len(some) >= min(at_least, len(found))
    asked = {name for case in found for name in (*case.options, *case.input_names)}
    given = {name for case in some for name in (*case.options, *case.input_names)}
    return [
        *some,
        *(next(case for case in found if name in (*case.options, *case.input_names)) for name in sorted(asked - given)),
    ]


def alike(function: str) -> list[Case]:
    """Cases of a function that share what is traced: of few shapes, and with every option."""
    some = chosen(function, 12)
    shapes = {case.signature for case in some}
    more = [case for case in cases() if case.function == function and case.signature in shapes and case not in some]
    assert len(some) + len(more) >= ENOUGH
    return [*some, *more[: max(0, ENOUGH - len(some))]]


def tensors(case: Case, dtype: str) -> dict[str, Any]:
    """The arguments of a case, with its options."""
    options = {name: tuple(value) if name == "window" else value for name, value in case.options.items()}
    return {name: to_library(array, "tensorflow") for name, array in case.inputs(dtype).items()} | options


def parted(arguments: dict[str, Any]) -> tuple[dict[str, tf.Tensor], dict[str, Any]]:
    """The tensors of a case, and its other options."""
    arrays = {name: value for name, value in arguments.items() if tf.is_tensor(value)}
    return arrays, {name: value for name, value in arguments.items() if name not in arrays}


def judged(case: Case, dtype: str, outputs: dict[str, tf.Tensor]) -> str | None:
    """What is wrong with the outputs of a case, if anything is."""
    found = {name: to_numpy(value) for name, value in outputs.items()}
    allowed = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    wanted = {name: expected for name, expected in case.expected.items() if name in found or name != "lse"}
    judgement = judge(case, wanted, found, allowed, precision(dtype))
    return None if judgement.passed else f"{case.id} {dtype}: {judgement.reason}"


def failures(some: Sequence[Case], ask: Callable[[dict[str, Any]], dict[str, tf.Tensor]], *dtypes: str) -> list[str]:
    """What is wrong with the answers to some cases."""
    return [
        wrong
        for case in some
        for dtype in dtypes
        if dtype in case.dtypes and (wrong := judged(case, dtype, ask(tensors(case, dtype)))) is not None
    ]


def answered(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Output and lse of a case of attention."""
    output, lse = attention(**arguments, return_lse=True)
    return {"output": output, "lse": lse}


def differentiated(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
    """The gradients that a tape gives of the forward."""
    grad_output, grad_lse = arguments.pop("grad_output"), arguments.pop("grad_lse", None)
    given = {name: arguments[name] for name in DIFFERENTIABLE if name in arguments}
    with tf.GradientTape() as tape:
        tape.watch(given)
        output, lse = attention(**arguments, return_lse=True)
    count = 1 if grad_lse is None else 2
    results, cotangents = [output, lse][:count], [grad_output, grad_lse][:count]
    found = gradient_of(tape, results, given, output_gradients=cotangents, unconnected_gradients="zero")
    return {f"grad_{name}": gradient for name, gradient in found.items()}


def traced(
    ask: Callable[[dict[str, Any]], dict[str, tf.Tensor]], **options: Any
) -> Callable[[dict[str, Any]], dict[str, tf.Tensor]]:
    """Ask within a tf.function to which every tensor is an argument."""
    functions: dict[str, Callable[..., dict[str, tf.Tensor]]] = {}

    def asked(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
        arrays, others = parted(arguments)
        made = functions.setdefault(repr(others), tf.function(lambda given: ask(given | others), **options))
        return made(arrays)

    return asked


def unknown() -> Callable[[dict[str, Any]], dict[str, tf.Tensor]]:
    """Output and lse, of a batch and of lengths that are not known when the call is traced."""
    functions: dict[str, Callable[..., dict[str, tf.Tensor]]] = {}

    def spec(name: str, tensor: tf.Tensor) -> tf.TensorSpec:
        known = {1, 3} if name in {"query", "key", "value"} else {1} if tensor.shape.rank == 4 else set()
        sizes = [
            size if (size == 1 and tensor.shape.rank == 4) or axis in known else None
            for axis, size in enumerate(tensor.shape)
        ]
        return tf.TensorSpec(tensor.shape if name == "sinks" else sizes, tensor.dtype)

    def asked(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
        arrays, others = parted(arguments)
        specs = {name: spec(name, tensor) for name, tensor in arrays.items()}
        made = tf.function(lambda given: answered(given | others), input_signature=[specs])
        return functions.setdefault(repr((others, specs)), made)(arrays)

    return asked


def mapped(
    arguments: dict[str, Any], mapping: Callable[..., tuple[tf.Tensor, tf.Tensor]], **options: Any
) -> dict[str, tf.Tensor]:
    """Output and lse of the second of two calls over which something maps."""
    arrays, others = parted(arguments)
    doubled = {name: tf.stack([tf.reverse(one, [0]), one]) for name, one in arrays.items()}
    output, lse = mapping(lambda given: attention(**given, **others, return_lse=True), doubled, **options)
    return {"output": output[1], "lse": lse[1]}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks."""
    for name, value in {"SCORES": 64, "LOWEST": 2, "HIGHEST": 4, "SHORTEST_RUN": 2, "BODIES": 2}.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "COST_OF_BLOCK", -(2**40))


@pytest.mark.usefixtures("cut")
def test_cut_into_blocks() -> None:
    assert not failures(chosen("attention", 80), answered, "float32")


@pytest.mark.usefixtures("cut")
def test_gradients_cut_into_blocks() -> None:
    assert not failures(chosen("attention_vjp", 50), differentiated, "float32")


def test_a_tape_gives_the_gradients() -> None:
    some = [case for case in cases() if case.function == "attention_vjp"]
    assert not failures(some, differentiated, "float32")
    assert not failures(some[::4], differentiated, "float64", "float16", "bfloat16")


def test_lengths_on_the_host_say_the_same() -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
        integers = ("q_offset", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids")
        host = {name: arguments[name].numpy() for name in integers if tf.is_tensor(arguments.get(name))}
        return answered(arguments | host)

    some = [
        case
        for case in cases()
        if case.function == "attention" and {"kv_lengths", "segments", "offset"} & set(case.features)
    ]
    assert not failures(some[::4], ask, "float32")


def test_traced() -> None:
    assert not failures(alike("attention"), traced(answered), "float16")


@pytest.mark.usefixtures("cut")
def test_traced_in_loops() -> None:
    assert not failures(chosen("attention", 12), traced(answered), "float32")


def test_gradients_traced() -> None:
    assert not failures(alike("attention_vjp"), traced(differentiated), "bfloat16")


@pytest.mark.usefixtures("cut")
def test_gradients_traced_in_loops() -> None:
    assert not failures(chosen("attention_vjp", 8), traced(differentiated), "float32")


def test_sizes_that_are_not_known() -> None:
    assert not failures(alike("attention"), unknown(), "float32")


def test_compiled_by_xla() -> None:
    assert not failures(alike("attention"), traced(answered, jit_compile=True), "float32")


@pytest.mark.usefixtures("cut")
def test_gradients_compiled_by_xla_in_loops() -> None:
    assert not failures(chosen("attention_vjp", 4), traced(differentiated, jit_compile=True), "float32")


def test_vectorized() -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
        return mapped(arguments, tf.vectorized_map, fallback_to_while_loop=False)

    assert not failures(alike("attention"), traced(ask), "float32")


def test_mapped() -> None:
    def ask(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
        signature = (arguments["query"].dtype, tf.float32)
        return mapped(arguments, tf.map_fn, fn_output_signature=signature)

    assert not failures(alike("attention"), traced(ask), "bfloat16")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_the_softmax_exact(policy: str) -> None:
    dtype = policy.removeprefix("mixed_")

    def ask(arguments: dict[str, Any]) -> dict[str, tf.Tensor]:
        operands = [tf.cast(arguments.pop(name), tf.float32) for name in ("query", "key", "value")]
        layer = keras.layers.Lambda(lambda given: attention(*given, **arguments, return_lse=True), dtype=policy)
        output, lse = layer(operands)
        return {"output": output, "lse": lse}

    assert not failures(chosen("attention"), ask, dtype)


def inputs() -> list[tf.Tensor]:
    """Query, key, value, bias and sinks."""
    random = numpy.random.default_rng(GENERATOR_SEED)
    shapes = (2, 4, 7, 5), (2, 2, 7, 5), (2, 2, 7, 3), (1, 4, 1, 7), (4,)
    return [tf.constant(random.normal(size=shape)) for shape in shapes]


def ours(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor, sinks: tf.Tensor) -> Any:
    return attention(query, key, value, bias=bias, sinks=sinks, causal=True, softcap=3.0, return_lse=True)


def plain(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor, bias: tf.Tensor, sinks: tf.Tensor) -> Any:
    """The same in plain operations."""
    key, value = tf.repeat(key, 2, 1), tf.repeat(value, 2, 1)
    scores = 3 * tf.tanh(tf.matmul(query, key, transpose_b=True) / 5**0.5 / 3) + bias
    scores = tf.where(numpy.tril(numpy.ones((7, 7), bool)), scores, -math.inf)
    scores = tf.concat([scores, tf.broadcast_to(sinks[None, :, None, None], (2, 4, 7, 1))], -1)
    lse = tf.reduce_logsumexp(scores, -1)
    return tf.matmul(tf.exp(scores - lse[..., None])[..., :-1], value), lse


def second(call: Callable[..., Any], operands: list[tf.Tensor]) -> list[tf.Tensor]:
    """Second derivatives of something that is not linear in either result."""
    with tf.GradientTape() as outer:
        outer.watch(operands)
        with tf.GradientTape() as inner:
            inner.watch(operands)
            output, lse = call(*operands)
            number = tf.reduce_sum(tf.sin(output)) + tf.reduce_sum(tf.cos(lse))
        found = gradient_of(inner, number, operands)
        number = tf.add_n([tf.reduce_sum(tf.sin(3 * one)) for one in found])
    return gradient_of(outer, number, operands)


def pushed(call: Callable[..., Any]) -> Any:
    """Directional derivatives in forward mode."""
    operands = inputs()
    with tf.autodiff.ForwardAccumulator(operands, [tf.cos(7 * one) for one in operands]) as accumulator:
        results = call(*operands)
    return accumulator.jvp(results)


def assert_close(found: Sequence[tf.Tensor], expected: Sequence[tf.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        numpy.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-9, atol=1e-11)


def test_second_derivatives() -> None:
    expected = second(plain, inputs())
    assert_close(second(ours, inputs()), expected)
    assert_close(tf.function(lambda *given: second(ours, list(given)))(*inputs()), expected)


def test_second_derivatives_in_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "HIGHEST", 4)
    monkeypatch.setattr(plan, "LOWEST", 4)
    monkeypatch.setattr(plan, "SCORES", 16)
    expected = second(plain, inputs())
    assert_close(second(ours, inputs()), expected)
    assert_close(tf.function(lambda *given: second(ours, list(given)))(*inputs()), expected)


def test_forward_mode() -> None:
    expected = pushed(plain)
    assert_close(pushed(ours), expected)
    assert_close(pushed(tf.function(ours)), expected)
    assert_close(tf.function(lambda: pushed(ours))(), expected)


def test_a_persistent_tape_can_be_asked_twice() -> None:
    operands = inputs()
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(operands)
        output, _ = ours(*operands)
    assert_close(gradient_of(tape, output, operands), gradient_of(tape, output, operands))


def test_a_variable_has_a_gradient() -> None:
    query, key, value, *_ = inputs()
    variable = tf.Variable(query)
    with tf.GradientTape() as tape:
        output = attention(variable, key, value)
    assert gradient_of(tape, output, variable).shape == query.shape


def test_merging_has_gradients_where_halves_are_empty() -> None:
    output_a, output_b = (tf.constant(numpy.random.default_rng(one).normal(size=(1, 1, 3, 2))) for one in (1, 2))
    lse_a, lse_b = (tf.constant([[row]]) for row in ([0.5, -math.inf, -math.inf], [0.25, 1.5, -math.inf]))
    halves = [tf.cast(one, tf.float64) for one in (output_a, lse_a, output_b, lse_b)]
    with tf.GradientTape() as tape:
        tape.watch(halves)
        output, lse = mha_spec_tensorflow.merge_attention(*halves)
        number = tf.reduce_sum(output) + tf.reduce_sum(lse[..., :2])
    found = gradient_of(tape, number, halves)
    assert all(bool(tf.reduce_all(tf.math.is_finite(one))) for one in found)
    assert bool(tf.reduce_all(found[0][..., 1:, :] == 0))


def sized(q_len: int = 32, kv_len: int = 32) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    random = numpy.random.default_rng(GENERATOR_SEED)
    shapes = (2, 4, q_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 8)
    query, key, value = (tf.constant(random.normal(size=shape), tf.float32) for shape in shapes)
    return query, key, value


def graph_of(call: Callable[..., Any], *specs: tf.TensorSpec) -> tuple[set[str], int]:
    """The operations of a traced call and of all functions in it, and the size of its largest tensor."""
    definition = tf.function(call).get_concrete_function(*specs).graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(node for one in definition.library.function for node in one.node_def)]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    return {node.op for node in nodes}, max(math.prod(axis.size for axis in shape.dim) for shape in shapes)


LOOPS = {"While", "StatelessWhile"}


def specs(length: int | None) -> list[tf.TensorSpec]:
    return [tf.TensorSpec((1, 1, length, 8))] * 3


def test_blocks_of_one_shape_are_a_loop() -> None:
    assert LOOPS & graph_of(attention, *specs(2 * plan.HIGHEST))[0]
    assert not LOOPS & graph_of(attention, *specs(plan.HIGHEST))[0]
    assert not LOOPS & graph_of(attention, *specs(None))[0]
    assert not LOOPS & graph_of(mha_spec_tensorflow.attention_weights, *specs(2 * plan.HIGHEST)[:2])[0]


def test_memory_grows_with_the_length() -> None:
    def trained(*operands: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(operands)
            output = attention(*operands, causal=True)
        return gradient_of(tape, output, operands)

    length = 8192
    for call in (attention, trained):
        largest = graph_of(call, *specs(length))[1]
        assert plan.HIGHEST * length == largest < length**2 // 8


def test_a_tape_keeps_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax, made = tf.nn.softmax, []

    def watch(logits: tf.Tensor) -> tf.Tensor:
        weights = softmax(logits)
        made.append(weakref.ref(weights))
        return weights

    monkeypatch.setattr(tf.nn, "softmax", watch)
    operands = sized()
    with tf.GradientTape() as tape:
        tape.watch(operands)
        output = attention(*operands)
    assert made
    assert all(one() is None for one in made)
    assert gradient_of(tape, output, operands)[0].shape == operands[0].shape


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a function of `forward`."""
    real, seen = getattr(forward, name), []

    def watch(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(forward, name, watch)
    return seen


def test_what_can_be_read_leaves_out_what_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch, "_attend")
    query, key, value = (tf.zeros((1, 2, 2048, 8)) for _ in range(3))
    ids = tf.range(2048)[None] // 256
    attention(query, key, value, q_segment_ids=ids, kv_segment_ids=ids)
    assert [(block.queries, block.keys) for _, _, block in seen] == [(256, 256)] * 8
    seen.clear()
    attention(query, key, value, kv_lengths=tf.constant([512]))
    assert {block.keys for _, _, block in seen} == {512}


def test_what_is_hidden_is_worked_again_only_when_it_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    again = watched(monkeypatch, "finite")
    query, key, value = sized()
    mask = numpy.ones((1, 1, 32, 32), dtype=bool)
    mask[..., 0, 3] = False
    attention(query, key, value, mask=tf.constant(mask))
    assert not again
    broken = numpy.array(value)
    broken[0, 0, 3] = math.nan
    output = attention(query, key, tf.constant(broken), mask=tf.constant(mask)).numpy()
    assert again
    assert numpy.isfinite(output[0, :2, 0]).all()
    assert numpy.isnan(output[0, :2, 1:]).all()


def test_random_dropout_keeps_at_its_rate() -> None:
    """Two-sided, at a false-alarm probability below 1e-9: 6.2 standard deviations of a binomial."""
    pairs = 4 * 512 * 512
    query, key = tf.zeros((1, 4, 512, 8)), tf.zeros((1, 4, 512, 8))
    value = tf.broadcast_to(tf.eye(512), (1, 4, 512, 512))
    for rate in (0.1, 0.5, 0.9):
        output = attention(query, key, value, dropout_rate=rate, dropout_key=GENERATOR_SEED).numpy()
        kept = numpy.count_nonzero(output)
        assert abs(kept - pairs * (1 - rate)) <= 6.2 * math.sqrt(pairs * rate * (1 - rate))
        numpy.testing.assert_allclose(output[output != 0], 1 / 512 / (1 - rate), rtol=1e-6)


def test_random_dropout_is_that_of_its_seed() -> None:
    def draw(seed: Any) -> numpy.ndarray:
        return attention(*operands, dropout_rate=0.5, dropout_key=seed).numpy()

    operands = sized()
    assert (draw(1) == draw(1)).all()
    assert (draw(1) == draw(tf.constant(1))).all()
    assert (draw(1) != draw(2)).any()
    tf.random.set_seed(GENERATOR_SEED)
    first = draw(None), draw(None)
    assert (first[0] != first[1]).any()
    tf.random.set_seed(GENERATOR_SEED)
    assert (draw(None) == first[0]).all()
    with pytest.raises(ArgumentTypeError, match=r"dropout_key=0\.5"):
        draw(0.5)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("trace", [False, True])
def test_random_dropout_has_the_gradients_of_its_mask(trace: bool) -> None:
    query, key, value = (tf.constant(one.numpy(), tf.float64) for one in sized(7, 5))

    def call(value: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(value)
            output = attention(query, key, value, dropout_rate=0.3, dropout_key=5)
        return output, gradient_of(tape, output, value, tf.cos(output))

    output, gradient = (tf.function(call) if trace else call)(value)
    numpy.testing.assert_allclose(tf.reduce_sum(gradient * value), tf.reduce_sum(tf.cos(output) * output), rtol=1e-12)


def test_the_public_function_is_this_one() -> None:
    query, key, value = sized()
    found = tf.function(lambda query: mha_spec.attention(query, key, value, kv_lengths=tf.constant([3, 32])))(query)
    expected = attention(query, key, value, kv_lengths=[3, 32])
    numpy.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_options_that_are_none_are_not_given() -> None:
    operands = sized()
    without = {name: None for name in OPTIONS if name not in {"causal", "dropout_rate"}}
    assert (attention(*operands, **without).numpy() == attention(*operands).numpy()).all()


def test_errors_are_ours() -> None:
    query, key, value = sized(q_len=3)
    with pytest.raises(MhaSpecError, match="q_offset"):
        attention(query, key, value, causal=True)


@pytest.mark.parametrize(("axis", "name"), [(1, "heads"), (3, "size")])
def test_what_must_be_known_is_named(axis: int, name: str) -> None:
    sizes = [None if index == axis else size for index, size in enumerate((2, 4, 7, 8))]
    with pytest.raises(ArgumentValueError, match=f"`query` must have a known {name}"):
        tf.function(attention).get_concrete_function(*[tf.TensorSpec(sizes)] * 3)


def test_a_diagonal_rests_on_lengths_that_turn_out_to_be_equal() -> None:
    call = tf.function(lambda query, key: attention(query, key, key, causal=True), input_signature=specs(None)[:2])
    assert call(tf.zeros((1, 1, 5, 8)), tf.zeros((1, 1, 5, 8))).shape == (1, 1, 5, 8)
    with pytest.raises(tf.errors.InvalidArgumentError, match="diagonal is ambiguous"):
        call(tf.zeros((1, 1, 3, 8)), tf.zeros((1, 1, 5, 8)))
    with pytest.raises(ArgumentValueError, match="one is not known"):
        tf.function(lambda query, key: attention(query, key, key, causal=True)).get_concrete_function(
            specs(None)[0], specs(5)[0]
        )

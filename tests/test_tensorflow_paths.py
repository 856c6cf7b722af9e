"""Calls of mha_spec_tensorflow take the right path, hold little memory, and refuse bad arguments."""

from __future__ import annotations

import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import tensorflow as tf
from support.comparisons import assert_near
from support.tensorflow_world import operands
from tensorflow.python.eager.context import context

import mha_spec
import mha_spec_tensorflow
from mha_spec.arguments import OPTIONS
from mha_spec.errors import ArgumentValueError, MhaSpecError
from mha_spec_tensorflow import forward, packed, plan, threads

if TYPE_CHECKING:
    from collections.abc import Callable

attention: Callable[..., Any] = mha_spec_tensorflow.attention
varlen_attention: Callable[..., Any] = mha_spec_tensorflow.varlen_attention
gradient_of: Callable[..., Any] = tf.GradientTape.gradient


def graph_of(call: Callable[..., Any], *specs: tf.TensorSpec) -> tuple[set[str], int]:
    """Return the operations of a traced call and of all functions in it, and the size of its largest tensor."""
    definition = tf.function(call).get_concrete_function(*specs).graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    return {node.op for node in nodes}, max(math.prod(axis.size for axis in shape.dim) for shape in shapes)


LOOPS = {"While", "StatelessWhile"}


def specs(length: int | None) -> list[tf.TensorSpec]:
    return [tf.TensorSpec((1, 1, length, 8))] * 3


def test_blocks_of_one_shape_are_a_loop() -> None:
    assert LOOPS & graph_of(attention, *specs(2 * plan.HIGHEST))[0]
    assert not LOOPS & graph_of(attention, *specs(plan.HIGHEST))[0]
    assert LOOPS & graph_of(attention, *specs(None))[0]
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
    arrays = operands()
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        output = attention(*arrays)
    assert made
    assert all(reference() is None for reference in made)
    assert gradient_of(tape, output, arrays)[0].shape == arrays[0].shape


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Record the arguments of each call of a function of `forward`."""
    real, seen = getattr(forward, name), []

    def watch(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(forward, name, watch)
    return seen


def test_hidden_keys_are_left_out_where_the_constraints_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch, "_attend")
    query, key, value = (tf.zeros((1, 2, 2048, 8)) for _ in range(3))
    ids = tf.range(2048)[None] // 256
    attention(query, key, value, q_segment_ids=ids, kv_segment_ids=ids)
    assert [(block.queries, block.keys) for _, _, block in seen] == [(256, 256)] * 8
    seen.clear()
    attention(query, key, value, kv_lengths=tf.constant([512]))
    assert {block.keys for _, _, block in seen} == {512}


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> list[tf.Tensor]:
    """Return operands whose causal queries are cut into two blocks."""
    monkeypatch.setattr(plan, "COST_OF_BLOCK", 2**10)
    return [array[:1] for array in operands(q_len=2 * plan.LOWEST, kv_len=2 * plan.LOWEST)]


def test_few_blocks_are_computed_in_threads(two_blocks: list[tf.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    real, places = forward.scores, []

    def watch(*arguments: Any) -> Any:
        places.append((threading.current_thread(), context().device_name))
        return real(*arguments)

    monkeypatch.setattr(forward, "scores", watch)
    with tf.device("/CPU:0"):
        output = attention(*two_blocks, causal=True)
        scope = context().device_name
    assert len({thread for thread, _ in places}) == 2
    assert {name for _, name in places} == {scope}
    places.clear()
    monkeypatch.setattr(tf.config.threading, "get_inter_op_parallelism_threads", lambda: 1)
    assert (attention(*two_blocks, causal=True).numpy() == output.numpy()).all()
    assert [thread for thread, _ in places] == [threading.main_thread()] * 2


def test_an_error_in_a_thread_reaches_the_caller(two_blocks: list[tf.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    real = forward.scores

    def fail(problem: Any, x: Any, block: Any) -> Any:
        if block.query == 0:
            raise MemoryError
        return real(problem, x, block)

    monkeypatch.setattr(forward, "scores", fail)
    with pytest.raises(MemoryError):
        attention(*two_blocks, causal=True)


def test_blocks_of_a_graph_wait_for_each_other_unless_they_fit_into_memory_together(
    two_blocks: list[tf.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits() -> bool:
        call = tf.function(lambda *arrays: attention(*arrays, causal=True)).get_concrete_function(*two_blocks)
        return any(name.startswith("^") for node in call.graph.as_graph_def().node for name in node.input)

    assert not waits()
    monkeypatch.setattr(plan, "SCORES", plan.LOWEST**2 * two_blocks[0].shape[1])
    assert waits()


def test_the_product_is_computed_again_only_if_it_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    again = watched(monkeypatch, "finite")
    query, key, value = operands()
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


def test_the_public_function_calls_this_backend() -> None:
    query, key, value = operands(dtype="float64")
    call = tf.function(lambda query: mha_spec.attention(query, key, value, kv_lengths=tf.constant([3, 32])))
    assert_near(call(query), attention(query, key, value, kv_lengths=[3, 32]))


def test_an_option_of_none_is_the_default() -> None:
    arrays = operands()
    without = {name: None for name in OPTIONS if name not in {"causal", "dropout_rate"}}
    assert (attention(*arrays, **without).numpy() == attention(*arrays).numpy()).all()


def test_a_missing_offset_is_refused() -> None:
    query, key, value = operands(q_len=3)
    with pytest.raises(MhaSpecError, match="q_offset"):
        attention(query, key, value, causal=True)


@pytest.mark.parametrize(("axis", "name"), [(1, "heads"), (3, "qk_dim")])
def test_a_size_that_must_be_known_is_named(axis: int, name: str) -> None:
    sizes = [None if index == axis else size for index, size in enumerate((2, 4, 7, 8))]
    with pytest.raises(ArgumentValueError, match=f"`query` must have a known {name}"):
        tf.function(attention).get_concrete_function(*[tf.TensorSpec(sizes)] * 3)


def test_lengths_of_a_diagonal_are_compared_when_it_runs() -> None:
    call = tf.function(lambda query, key: attention(query, key, key, causal=True), input_signature=specs(None)[:2])
    assert call(tf.zeros((1, 1, 5, 8)), tf.zeros((1, 1, 5, 8))).shape == (1, 1, 5, 8)
    with pytest.raises(tf.errors.InvalidArgumentError, match="diagonal is ambiguous"):
        call(tf.zeros((1, 1, 3, 8)), tf.zeros((1, 1, 5, 8)))
    partly_known = tf.function(lambda query, key: attention(query, key, key, causal=True))
    partly_known = partly_known.get_concrete_function(specs(None)[0], specs(5)[0])
    assert partly_known(tf.zeros((1, 1, 5, 8)), tf.zeros((1, 1, 5, 8))).shape == (1, 1, 5, 8)
    with pytest.raises(tf.errors.InvalidArgumentError, match="diagonal is ambiguous"):
        partly_known(tf.zeros((1, 1, 3, 8)), tf.zeros((1, 1, 5, 8)))


def test_the_caller_works_alone_when_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is closed when the main thread has ended, while another thread may still call."""
    closed = ThreadPoolExecutor(1)
    closed.shutdown()
    monkeypatch.setattr(threads, "_pool", lambda _: closed)
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    assert threads.results_of([lambda number=number: number for number in range(5)]) == list(range(5))


def test_a_thread_takes_the_next_call_and_those_inside_a_call_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    both_run, places = threading.Barrier(2, timeout=60), []

    def call(number: int) -> list[int]:
        if number < 2:
            both_run.wait()
        places.append(threading.current_thread())
        return threads.results_of([lambda part=part: 10 * number + part for part in range(3)])

    calls = [lambda number=number: call(number) for number in range(7)]
    assert threads.results_of(calls) == [[10 * number + part for part in range(3)] for number in range(7)]
    assert len(set(places)) == 2


def test_the_threads_are_kept_for_calls_of_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 4)
    threads._pool.cache_clear()
    for count in (2, 3, 7, 2):
        assert threads.results_of([lambda number=number: number for number in range(count)]) == list(range(count))
    assert threads._pool.cache_info().misses == 1


@pytest.mark.parametrize("causal", [False, True])
def test_large_packed_sequences_are_computed_in_threads(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, ends = operands(q_len=211, kv_len=211)[0][0], [0, 64, 131, 211]
    tokens = tf.transpose(tokens, (1, 0, 2))
    used: set[threading.Thread] = set()
    real = forward.attend

    def watch(*arguments: Any, **options: Any) -> Any:
        used.add(threading.current_thread())
        return real(*arguments, **options)

    monkeypatch.setattr(forward, "attend", watch)
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    expected = packed_results(tokens, ends, causal=causal)
    assert used == {threading.main_thread()}, "these sequences are too small for threads"
    monkeypatch.setattr(packed, "COST_OF_BLOCK", 1)
    for result, other in zip(packed_results(tokens, ends, causal=causal), expected, strict=True):
        numpy.testing.assert_array_equal(result, other, strict=True)
    assert len(used) == 2


def test_packed_sequences_of_equal_lengths_are_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tf.transpose(operands(q_len=31, kv_len=31)[0][0], (1, 0, 2))
    ends, real = [0, 3, 6, 9, 14, 19, 22], forward.attend
    batches: list[tuple[int, int]] = []

    def watch(problem: Any, x: Any, **options: Any) -> Any:
        batches.append((x.query.shape[0], x.query.shape[2]))
        return real(problem, x, **options)

    def asked(**options: Any) -> list[tuple[int, int]]:
        batches.clear()
        varlen_attention(tokens, tokens, tokens, ends, ends, **options)
        return batches

    monkeypatch.setattr(forward, "attend", watch)
    assert asked(causal=True) == [(3, 3), (2, 5), (1, 3)]
    assert asked(causal=True, q_offset=[0, 0, 7, 2, 2, 2]) == [(2, 3), (1, 3), (2, 5), (1, 3)]
    assert asked(seqused_kv=[3, 2, 2, 5, 5, 3]) == [(1, 3)] * 3 + [(2, 5), (1, 3)]


def packed_results(tokens: tf.Tensor, ends: list[int], *, causal: bool) -> list[numpy.ndarray]:
    """Return the output of packed sequences and the gradients of a tape."""
    variables = [tf.Variable(tokens), tf.Variable(2 * tokens), tf.Variable(3 * tokens)]
    with tf.GradientTape() as tape:
        output = varlen_attention(*variables, ends, ends, causal=causal)
        loss = tf.reduce_sum(output * tf.stop_gradient(output))
    return [array.numpy() for array in (output, *gradient_of(tape, loss, variables))]

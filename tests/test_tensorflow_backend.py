"""The goldens on mha_spec_tensorflow: eager, in graphs, by XLA, mapped, and in mixed precision."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import pytest
import tensorflow as tf
from support.goldens import DIFFERENTIABLE, PER_ENTRY, alike, cases, compiled, failures, split_arguments, spread
from support.tensorflow_world import cut_into_blocks

import mha_spec_tensorflow

if TYPE_CHECKING:
    from collections.abc import Callable

attention: Callable[..., Any] = mha_spec_tensorflow.attention
gradient_of: Callable[..., Any] = tf.GradientTape.gradient


def answered(**arguments: Any) -> dict[str, tf.Tensor]:
    """Compute output and lse of a case of attention."""
    output, lse = attention(**arguments, return_lse=True)
    return {"output": output, "lse": lse}


def differentiated(
    *, grad_output: tf.Tensor, grad_lse: tf.Tensor | None = None, **arguments: Any
) -> dict[str, tf.Tensor]:
    """Compute the gradients of attention with a tape."""
    operands = {name: arguments[name] for name in DIFFERENTIABLE if name in arguments}
    with tf.GradientTape() as tape:
        tape.watch(operands)
        output, lse = attention(**arguments, return_lse=True)
    count = 1 if grad_lse is None else 2
    results, cotangents = [output, lse][:count], [grad_output, grad_lse][:count]
    gradients = gradient_of(tape, results, operands, output_gradients=cotangents, unconnected_gradients="zero")
    return {f"grad_{name}": gradient for name, gradient in gradients.items()}


traced = partial(compiled, tf.function)
"""Make a tf.function whose arguments are all tensors of the call."""
by_xla = partial(compiled, partial(tf.function, jit_compile=True))


def unknown() -> Callable[..., dict[str, tf.Tensor]]:
    """Make a function for output and lse whose batch and lengths are unknown when it is traced."""
    functions: dict[str, Callable[..., dict[str, tf.Tensor]]] = {}

    def spec(name: str, tensor: tf.Tensor) -> tf.TensorSpec:
        known = {1, 3} if name in {"query", "key", "value"} else {1} if tensor.shape.rank == 4 else set()
        sizes = [
            size if (size == 1 and tensor.shape.rank == 4) or axis in known else None
            for axis, size in enumerate(tensor.shape)
        ]
        return tf.TensorSpec(tensor.shape if name == "sinks" else sizes, tensor.dtype)

    def asked(**arguments: Any) -> dict[str, tf.Tensor]:
        arrays, others = split_arguments(arguments)
        specs = {name: spec(name, tensor) for name, tensor in arrays.items()}
        function = tf.function(lambda arrays: answered(**arrays, **others), input_signature=[specs])
        return functions.setdefault(repr((others, specs)), function)(arrays)

    return asked


def mapped(mapping: Callable[..., tuple[tf.Tensor, tf.Tensor]], **arguments: Any) -> dict[str, tf.Tensor]:
    """Map attention over two calls, and return output and lse of the second."""
    arrays, others = split_arguments(arguments)
    doubled = {name: tf.stack([tf.reverse(array, [0]), array]) for name, array in arrays.items()}
    output, lse = mapping(lambda arrays: attention(**arrays, **others, return_lse=True), doubled)
    return {"output": output[1], "lse": lse[1]}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every call, however small, into blocks."""
    cut_into_blocks(monkeypatch)


@pytest.mark.usefixtures("cut")
def test_cut_into_blocks() -> None:
    assert not failures("tensorflow", spread("attention"), answered, "float32")


@pytest.mark.usefixtures("cut")
def test_gradients_cut_into_blocks() -> None:
    assert not failures("tensorflow", spread("attention_vjp"), differentiated, "float32")


def test_a_tape_gives_the_gradients() -> None:
    some = cases("attention_vjp")
    assert not failures("tensorflow", some, differentiated, "float32")
    assert not failures("tensorflow", some[::4], differentiated, "float64", "float16", "bfloat16")


def test_lengths_on_the_host() -> None:
    some = [case for case in cases("attention") if {"kv_lengths", "segments", "offset"} & set(case.features)]
    assert not failures("tensorflow", some[::4], answered, "float32", host=PER_ENTRY)


def test_traced() -> None:
    assert not failures("tensorflow", alike("attention"), traced(answered), "float16")


@pytest.mark.usefixtures("cut")
def test_traced_in_loops() -> None:
    assert not failures("tensorflow", alike("attention", 12), traced(answered), "float32")


def test_gradients_traced() -> None:
    assert not failures("tensorflow", alike("attention_vjp"), traced(differentiated), "bfloat16")


@pytest.mark.usefixtures("cut")
def test_gradients_traced_in_loops() -> None:
    assert not failures("tensorflow", alike("attention_vjp", 8), traced(differentiated), "float32")


def test_unknown_sizes() -> None:
    assert not failures("tensorflow", alike("attention"), unknown(), "float32")


def test_compiled_by_xla() -> None:
    assert not failures("tensorflow", alike("attention"), by_xla(answered), "float32")


@pytest.mark.usefixtures("cut")
def test_gradients_compiled_by_xla_in_loops() -> None:
    assert not failures("tensorflow", alike("attention_vjp", 4), by_xla(differentiated), "float32")


def test_vectorized() -> None:
    mapping = partial(tf.vectorized_map, fallback_to_while_loop=False)
    assert not failures("tensorflow", alike("attention"), traced(partial(mapped, mapping)), "float32")


def test_mapped() -> None:
    mapping = partial(tf.map_fn, fn_output_signature=(tf.bfloat16, tf.float32))
    assert not failures("tensorflow", alike("attention"), traced(partial(mapped, mapping)), "bfloat16")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_the_softmax_exact(policy: str) -> None:
    def ask(**arguments: Any) -> dict[str, tf.Tensor]:
        operands = [tf.cast(arguments.pop(name), tf.float32) for name in ("query", "key", "value")]
        layer = keras.layers.Lambda(lambda operands: attention(*operands, **arguments, return_lse=True), dtype=policy)
        output, lse = layer(operands)
        return {"output": output, "lse": lse}

    assert not failures("tensorflow", spread("attention"), ask, policy.removeprefix("mixed_"))

"""Attention as a function with a gradient in closed form, computed in the blocks of `plan`.

| call | path |
| --- | --- |
| eager | a loop in Python, a few large blocks in threads; tensors on the CPU are read, hidden keys are left out |
| traced, sizes known | a `tf.while_loop` for each shape of blocks |
| traced, batch, q_len or kv_len unknown | the same; tensors hold the number and the sizes of the blocks |
| a block hides pairs, its output is not finite | the product with the values is computed again from finite values |
| attention_weights | a single block; gradients by differentiating its operations |

The backward pass takes the path of its forward pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from tensorflow.python.eager.forwardprop_util import pack_tangents
from tensorflow.python.eager.record import could_possibly_record, record_operation, stop_recording

from . import forward
from .backward import gradients
from .problem import Operands, problem_of, sizes_of, softmax_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

__all__ = ["attention", "differentiable", "vjp", "weights"]


def attention(a: Arguments, seed: Array | None, *, needs_lse: bool) -> tuple[Array, Array | None]:
    """Compute the output in the query's dtype and, if needed, lse in the softmax's (MHA-DTYPE-1, MHA-LSE-2)."""
    problem = problem_of(a, seed)

    def attend(x: Operands) -> tuple[Array, ...]:
        return tuple(forward.attend(problem, x, needs_lse=needs_lse).values())

    results = differentiable(attend, partial(gradients, problem), _operands(a))
    return tf.cast(results[0], a.query.dtype), tf.squeeze(results[1], -1) if needs_lse else None


def differentiable(
    attend: Callable[[Operands], tuple[Array, ...]], differentiate: Callable[..., Operands], x: Operands
) -> tuple[Array, ...]:
    """Return `attend(x)`, a forward pass that is not recorded, with gradients in closed form.

    The gradients, `differentiate(x, *cotangents)`, depend on the operands only, and can be differentiated again.
    """
    if tf.executing_eagerly() and not could_possibly_record():
        return attend(x)
    present = {name: operand for name, operand in x._asdict().items() if operand is not None}

    def call(*arrays: Array) -> tuple:
        operands = x._replace(**dict(zip(present, arrays, strict=True)))
        results = attend(Operands(*(None if operand is None else tf.stop_gradient(operand) for operand in operands)))

        def pull(*cotangents: Array) -> list[Array]:
            for cotangent, result in zip(cotangents, results, strict=True):
                cotangent.set_shape(result.shape)  # The rank of a caller's gradient may be unknown.
            return [array for array in differentiate(operands, *cotangents) if array is not None]

        return results, pull

    return _with_gradient(call, list(present.values()))


def _with_gradient(call: Callable[..., tuple], arrays: list[Array]) -> tuple[Array, ...]:
    """Return the results of `call`, which returns them and a function for their gradients.

    In a graph, `tf.custom_gradient` gives forward mode the operations of `call`, and not the gradients. Here they are
    recorded with the results, so that forward mode differentiates them as it does in eager mode.
    """
    if tf.executing_eagerly() or not pack_tangents(arrays).indices:
        return tf.custom_gradient(call)(*arrays)
    pulls = []

    def kept(*arrays: Array) -> tuple:
        results, pull = call(*arrays)
        pulls.append(pull)
        return results, pull

    with stop_recording():
        results = tf.custom_gradient(kept)(*arrays)
    record_operation("attention", list(results), arrays, pulls[0])
    return results


def vjp(a: Arguments, grad_output: Array, grad_lse: Array | None) -> Operands:
    """Compute the gradients of `attention` as a tape does, each in its operand's dtype and shape (MHA-DTYPE-2)."""
    x, dtype = _operands(a), softmax_dtype(a.query)
    grad_output = tf.cast(grad_output, dtype)
    grad_lse = None if grad_lse is None else tf.expand_dims(tf.cast(grad_lse, dtype), -1)
    grads = gradients(problem_of(a), x, grad_output, grad_lse)
    if a.bias is not None:
        grads = grads._replace(bias=_summed(grads.bias, a.bias))
    operands = (a.query, a.key, a.value, a.bias, a.sinks)
    return Operands(*(_like(gradient, operand) for gradient, operand in zip(grads, operands, strict=True)))


def weights(a: Arguments) -> Array:
    """Compute the normalised weights over all keys, before dropout, in the query's dtype (MHA-WEIGHTS-1)."""
    return tf.cast(forward.weigh(problem_of(a), _operands(a)), a.query.dtype)


def _summed(gradient: Array, bias: Array) -> Array:
    """Sum the gradient of a broadcast bias over the axes whose size is 1 at run time (MHA-DTYPE-2)."""
    if bias.shape.is_fully_defined():
        return gradient
    reduced: Any = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(bias), s1=tf.shape(gradient))
    return tf.reduce_sum(gradient, reduced[0])


def _like(gradient: Array | None, operand: Array | None) -> Array | None:
    if gradient is None or operand is None:
        return None
    gradient = tf.cast(tf.reshape(gradient, tf.shape(operand)), operand.dtype)
    gradient.set_shape(operand.shape)
    return gradient


def _operands(a: Arguments) -> Operands:
    """Convert the operands to the softmax's type."""
    dtype = softmax_dtype(a.query)
    query, key, value, bias, sinks = (
        None if operand is None else tf.cast(operand, dtype)
        for operand in (a.query, a.key, a.value, _broadcast_bias(a), a.sinks)
    )
    sinks = None if sinks is None else tf.reshape(sinks, (1, -1, 1, 1))
    return Operands(query, key, key if value is None else value, bias, sinks)


def _broadcast_bias(a: Arguments) -> Array | None:
    """Broadcast the bias along the axes of unknown size, so that the gradient of an axis of size 1 is a sum."""
    if a.bias is None or a.bias.shape.is_fully_defined():
        return a.bias
    full = (*sizes_of(a.query)[:3], sizes_of(a.key)[2])
    sizes = zip(a.bias.shape.as_list(), full, strict=True)
    return tf.broadcast_to(a.bias, [full_size if size is None else size for size, full_size in sizes])

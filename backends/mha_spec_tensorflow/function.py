"""Attention as one function with gradients of its own, in the blocks of `plan`.

| call | path |
| --- | --- |
| run at once (eager mode) | a loop in Python; tensors on the CPU are read, and what they hide is left out |
| traced, sizes known | blocks of one shape in a `tf.while_loop`, of other shapes beside it |
| traced, batch, q_len or kv_len not known | the same, how many blocks and how large they are in tensors |
| a block that hides pairs, its output not finite | its product with the values again, of what is finite |
| attention_weights | one block, and the gradients of its operations |

The backward takes the path of its forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf
from tensorflow.python.eager.forwardprop_util import pack_tangents
from tensorflow.python.eager.record import could_possibly_record

from . import forward
from .backward import gradients
from .problem import Operands, problem_of, sizes_of, softmax_dtype

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

    from .problem import Problem

__all__ = ["attention", "vjp", "weights"]


def attention(a: Arguments, seed: Array | None, *, needs_lse: bool) -> tuple[Array, Array | None]:
    """Output in the query's dtype, and lse in the softmax's where it is asked (MHA-DTYPE-1, MHA-LSE-2)."""
    found = _differentiable(problem_of(a, seed), _operands(a), needs_lse=needs_lse)
    return tf.cast(found[0], a.query.dtype), tf.squeeze(found[1], -1) if needs_lse else None


def _differentiable(problem: Problem, x: Operands, *, needs_lse: bool) -> tuple[Array, ...]:
    """The forward pass, of which nothing is recorded, and the closed form of its gradients.

    Those are a function of the operands alone, and can be differentiated again.
    """
    if tf.executing_eagerly() and not could_possibly_record():
        return tuple(forward.attend(problem, x, needs_lse=needs_lse).values())
    names = [name for name, one in x._asdict().items() if one is not None]

    @tf.custom_gradient
    def call(*given: Array) -> tuple:
        operands = x._replace(**dict(zip(names, given, strict=True)))
        found = forward.attend(problem, _unrecorded(operands), needs_lse=needs_lse)

        def pull(*cotangents: Array) -> list[Array]:
            for cotangent, result in zip(cotangents, found.values(), strict=True):
                cotangent.set_shape(result.shape)  # a caller's gradient may be of unknown rank
            pulled = gradients(problem, operands, *cotangents)
            return [one for one in pulled if one is not None]

        return tuple(found.values()), pull

    return call(*(one for one in x if one is not None))


def _unrecorded(x: Operands) -> Operands:
    """The operands, such that no tape keeps what is made of them.

    In a graph, forward mode takes what the forward pass is made of beside the gradients that are given here.
    """
    if not tf.executing_eagerly() and pack_tangents([one for one in x if one is not None]).indices:
        return x
    return Operands(*(None if one is None else tf.stop_gradient(one) for one in x))


def vjp(a: Arguments, grad_output: Array, grad_lse: Array | None) -> Operands:
    """The gradients that a tape gives of `attention`, each in its operand's dtype and shape (MHA-DTYPE-2)."""
    x, dtype = _operands(a), softmax_dtype(a.query)
    grad_output = tf.cast(grad_output, dtype)
    grad_lse = None if grad_lse is None else tf.expand_dims(tf.cast(grad_lse, dtype), -1)
    found = gradients(problem_of(a), x, grad_output, grad_lse)
    if a.bias is not None:
        found = found._replace(bias=_summed(found.bias, a.bias))
    given = (a.query, a.key, a.value, a.bias, a.sinks)
    return Operands(*(_like(one, operand) for one, operand in zip(found, given, strict=True)))


def weights(a: Arguments) -> Array:
    """The normalised weights over all keys, before dropout, in the query's dtype (MHA-WEIGHTS-1)."""
    return tf.cast(forward.weigh(problem_of(a), _operands(a)), a.query.dtype)


def _summed(gradient: Array, bias: Array) -> Array:
    """The gradient of a bias that was spread, summed over the axes that are 1 when it runs (MHA-DTYPE-2)."""
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
    """The operands in the softmax's type."""
    dtype = softmax_dtype(a.query)
    query, key, value, bias, sinks = (
        None if one is None else tf.cast(one, dtype) for one in (a.query, a.key, a.value, _spread_bias(a), a.sinks)
    )
    sinks = None if sinks is None else tf.reshape(sinks, (1, -1, 1, 1))
    return Operands(query, key, key if value is None else value, bias, sinks)


def _spread_bias(a: Arguments) -> Array | None:
    """The bias, spread over the axes whose size is not known: over one that is 1 when it runs its gradient is a sum."""
    if a.bias is None or a.bias.shape.is_fully_defined():
        return a.bias
    full = (*sizes_of(a.query)[:3], sizes_of(a.key)[2])
    known = zip(a.bias.shape.as_list(), full, strict=True)
    return tf.broadcast_to(a.bias, [whole if size is None else size for size, whole in known])

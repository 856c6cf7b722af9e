"""The forward pass computes the softmax of each block of queries over its whole range of keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import tensorflow as tf

from .block import Block, kept, rows_by, scores, softmax
from .loops import Spec, Tensors, over_entries, over_queries, whole
from .problem import finite, sizes_of, sum_is_finite

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .block import Scores
    from .plan import Run
    from .problem import Operands, Problem, Size

__all__ = ["attend", "weigh"]


def attend(problem: Problem, x: Operands, *, needs_lse: bool) -> Tensors:
    """Compute the output (batch, heads, q_len, v_dim) and, if it is needed, the lse (batch, heads, q_len, 1)."""
    x, rows, dtype = problem.scaled(x), sizes_of(x.query)[:3], x.query.dtype
    like = {"output": Spec((*rows, x.value.shape[3]), dtype)}
    if needs_lse:
        like["lse"] = Spec((*rows, 1), dtype)

    def body(carry: Tensors, block: Block) -> tuple[Tensors, Tensors]:
        return carry, _attend(problem, x, block, needs_lse=needs_lse)

    def work(carry: Tensors, run: Run, entry: Size) -> tuple[Tensors, Tensors]:
        return over_queries(run, entry, body, carry, like)

    runs = problem.runs(x)
    return over_entries(runs, work, {}, like)[1] if runs else body({}, whole(x))[1]


def _attend(problem: Problem, x: Operands, block: Block, *, needs_lse: bool) -> Tensors:
    block_scores = scores(problem, x, block)
    weights, share, _, lse = softmax(x, block_scores, needs_lse=needs_lse)
    keep = kept(problem, x, block)
    output = _product(weights if keep is None else weights * keep, block.of_keys(x.value), block_scores)
    if x.sinks is not None:
        output *= share
    return {"output": output, "lse": lse} if needs_lse else {"output": output}


def _product(weights: Array, value: Array, block_scores: Scores) -> Array:
    """Compute sum_j weights_ij value_jc over visible pairs only.

    A value that is not finite makes the sum of the product not finite, even where its weight is 0. Only then is the
    product computed again, from the finite values, with NaN where a visible pair has another value
    (MHA-POISON-1, MHA-POISON-2, MHA-NAN-2).
    """
    plain = block_scores.zero_unless_seeing(rows_by(weights, value))
    if block_scores.visible is None:
        return plain
    visible = block_scores.visible

    def again() -> Array:
        pairs = tf.cast(tf.broadcast_to(visible, tf.shape(weights)), weights.dtype)
        not_finite = rows_by(pairs, tf.cast(~tf.math.is_finite(value), weights.dtype)) > 0
        product = tf.where(not_finite, tf.constant(math.nan, weights.dtype), rows_by(weights, finite(value)))
        return block_scores.zero_unless_seeing(product)

    return tf.cond(sum_is_finite(plain), lambda: plain, again)


def weigh(problem: Problem, x: Operands) -> Array:
    """Compute the normalised weights of the whole call, before dropout (MHA-WEIGHTS-1).

    A logit of -inf has the weight 0; in a row with NaN every weight is NaN, at hidden pairs too (MHA-NAN-1).
    """
    all_scores = scores(problem, problem.scaled(x), whole(x))
    weights, share, _, _ = softmax(x, all_scores, needs_lse=False)
    # The softmax of oneDNN, which TensorFlow calls on some processors, leaves 0 beside the NaN of a row.
    weights += 0 * tf.reduce_sum(weights, axis=-1, keepdims=True)
    weights = all_scores.zero_unless_seeing(weights)
    return weights if share is None or x.sinks is None else weights * share

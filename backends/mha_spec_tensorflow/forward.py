"""The forward pass: the softmax of each block of queries over its whole stretch of keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import tensorflow as tf

from .block import Block, kept, rows_by, scores, softmax
from .loops import Spec, Tensors, over_entries, over_queries, whole
from .problem import finite, sizes_of

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .block import Scores
    from .plan import Run
    from .problem import Operands, Problem, Size

__all__ = ["attend", "weigh"]


def attend(problem: Problem, x: Operands, *, needs_lse: bool) -> Tensors:
    """Output (batch, heads, q_len, v_dim), and lse (batch, heads, q_len, 1) where it is asked."""
    rows, dtype = sizes_of(x.query)[:3], x.query.dtype
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
    found = scores(problem, x, block)
    weights, share, _, lse = softmax(x, found, needs_lse=needs_lse)
    keep = kept(problem, x, block)
    output = _product(weights if keep is None else weights * keep, block.of_keys(x.value), found)
    if x.sinks is not None:
        output *= share
    return {"output": output, "lse": lse} if needs_lse else {"output": output}


def _product(weights: Array, value: Array, found: Scores) -> Array:
    """sum_j weights_ij value_jc over visible pairs alone.

    A value that is not finite and meets a weight of 0 shows in the sum of all; only then is the product taken again,
    of what is finite, with NaN where a visible pair has something else (MHA-POISON-1, MHA-POISON-2, MHA-NAN-2).
    """
    plain = found.shown(rows_by(weights, value))
    if found.visible is None:
        return plain
    visible = found.visible

    def again() -> Array:
        pairs = tf.cast(tf.broadcast_to(visible, tf.shape(weights)), weights.dtype)
        broken = rows_by(pairs, tf.cast(~tf.math.is_finite(value), weights.dtype)) > 0
        return found.shown(tf.where(broken, tf.constant(math.nan, weights.dtype), rows_by(weights, finite(value))))

    return tf.cond(tf.math.is_finite(tf.reduce_sum(plain)), lambda: plain, again)


def weigh(problem: Problem, x: Operands) -> Array:
    """The normalised weights of the whole call, before dropout (MHA-WEIGHTS-1).

    A logit of -inf gives a weight of 0, but NaN in a row with NaN, at its hidden pairs too (MHA-NAN-1).
    """
    found = scores(problem, x, whole(x))
    weights, share, _, _ = softmax(x, found, needs_lse=False)
    weights = found.shown(weights)
    return weights if share is None or x.sinks is None else weights * share

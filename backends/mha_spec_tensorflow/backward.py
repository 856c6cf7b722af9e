"""Compute the gradients in closed form, block by block, in memory of O(length), from operands and cotangents only.

No result of the forward pass is kept, so that these operations can be differentiated again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from .block import Block, covers, kept, rows_by, scores, softmax, stacked
from .loops import Spec, over_entries, over_queries, whole
from .problem import Operands, finite, finite_or_hiding, sizes_of, sum_is_finite

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .block import Scores
    from .loops import Tensors
    from .plan import Run
    from .problem import Problem, Size

__all__ = ["gradients"]


def gradients(problem: Problem, x: Operands, grad_output: Array, grad_lse: Array | None = None) -> Operands:
    """Compute the gradients of the operands, in their shapes and the softmax's type (MHA-VJP-1 to MHA-VJP-6).

    Where pairs may be hidden, values that are not finite count as 0: their effect through a visible pair is unspecified
    (MHA-POISON-1, MHA-POISON-2).
    """
    if problem.excludes:
        query, key, value, grad_output = (finite(array) for array in (x.query, x.key, x.value, grad_output))
        grad_lse = None if grad_lse is None else finite(grad_lse)
        x = Operands(query, key, value, finite_or_hiding(x.bias), finite_or_hiding(x.sinks))
    grads = _Backward(problem, problem.scaled(x), grad_output, grad_lse).all_blocks()
    if x.sinks is not None:
        grads["sinks"] = tf.reduce_sum(grads["sinks"], axis=(0, 2), keepdims=True)
    return Operands(problem.scale * grads["query"], grads["key"], grads["value"], grads.get("bias"), grads.get("sinks"))


class _Backward:
    """The backward pass of a call.

    A gradient with a row for each query is the concatenation over the blocks; every other gradient is their sum.
    """

    def __init__(self, problem: Problem, x: Operands, grad_output: Array, grad_lse: Array | None) -> None:
        self.problem, self.x, self.grad_output, self.grad_lse = problem, x, grad_output, grad_lse
        self.kv_len = sizes_of(x.key)[2]

    def all_blocks(self) -> Tensors:
        """Compute the gradients by name; that of the sinks has a number for each row."""
        x, bias, runs = self.x, self.x.bias, self.problem.runs(self.x)
        if not runs:
            block = whole(x)
            sums, rows = self._block(self._zeros(block.entries), block)
            return sums | rows
        specs = {
            name: Spec(tuple(sizes_of(operand)), operand.dtype)
            for name, operand in x._asdict().items()
            if operand is not None
        }
        if x.sinks is not None:
            specs["sinks"] = Spec((*sizes_of(x.query)[:3], 1), x.query.dtype)
        with_rows = {"query", "sinks", "bias"} if self._bias_has_rows else {"query", "sinks"}
        rows = {name: spec for name, spec in specs.items() if name in with_rows}

        def work(carry: Tensors, run: Run, entry: Size) -> tuple[Tensors, Tensors]:
            sums, grads = over_queries(run, entry, self._block, self._zeros(run.entries), rows)
            grads |= sums
            return {name: total + grads.pop(name) for name, total in carry.items()}, grads

        shared = {"bias": tf.zeros_like(bias)} if bias is not None and bias.shape[0] == 1 else {}
        like = {name: spec for name, spec in specs.items() if name not in shared}
        shared, grads = over_entries(runs, work, shared, like)
        return shared | grads

    @property
    def _bias_has_rows(self) -> bool:
        """Return True if the bias has a row for each query."""
        return self.x.bias is not None and self.x.bias.shape[2] != 1

    def _zeros(self, entries: Size) -> Tensors:
        """Return the sums before any block is added."""
        x = self.x
        sums = {"key": x.key, "value": x.value}
        if x.bias is not None and not self._bias_has_rows:
            sums["bias"] = x.bias
        return {
            name: tf.zeros((1 if operand.shape[0] == 1 else entries, *sizes_of(operand)[1:]), operand.dtype)
            for name, operand in sums.items()
        }

    def _block(self, sums: Tensors, block: Block) -> tuple[Tensors, Tensors]:
        """Add the gradients of a block to the sums; return the new sums, and the gradients of its rows."""
        x, problem = self.x, self.problem
        block_scores = scores(problem, x, block, slope=problem.softcap is not None)
        soft, keep = softmax(x, block_scores, needs_lse=False), kept(problem, x, block)
        # The product of a small share with grad_output may be subnormal, which TensorFlow replaces by 0.
        weights = soft.weights if soft.share is None else soft.weights * soft.share
        grad_output = block.of_rows(self.grad_output)
        grad_logits, row_dot = self._grad_logits(block, block_scores.visible, weights, keep, grad_output)
        dropped = weights if keep is None else weights * keep
        query, key = self._grad_operands(block, block_scores, grad_logits)
        value = self._sum_over_rows(dropped, grad_output)
        parts = {"key": self._for_all_keys(block, key, 2), "value": self._for_all_keys(block, value, 2)}
        rows = {"query": query}
        if soft.sink_share is not None:
            # A sink of -inf has the gradient 0, even if D is NaN (MHA-VJP-6).
            rows["sinks"] = tf.math.multiply_no_nan(-row_dot, soft.sink_share)
        if x.bias is not None:
            (rows if self._bias_has_rows else parts)["bias"] = self._grad_bias(block, x.bias, grad_logits)
        return {name: total + parts[name] for name, total in sums.items()}, rows

    def _grad_logits(
        self, block: Block, visible: Array | None, weights: Array, keep: Array | None, grad_output: Array
    ) -> tuple[Array, Array]:
        """Compute dS = P (dP - D), and D (MHA-VJP-1); a hidden dP that overflows makes D not finite."""
        grad_weights = rows_by(grad_output, block.of_keys(self.x.value), transpose=True)
        grad_weights = grad_weights if keep is None else grad_weights * keep
        row_dot = tf.reduce_sum(weights * grad_weights, axis=-1, keepdims=True)

        if visible is not None:

            def again() -> tuple[Array, Array]:
                visible_only = tf.where(visible, grad_weights, tf.zeros((), weights.dtype))
                return visible_only, tf.reduce_sum(weights * visible_only, axis=-1, keepdims=True)

            grad_weights, row_dot = tf.cond(sum_is_finite(row_dot), lambda: (grad_weights, row_dot), again)
        if self.grad_lse is not None:
            row_dot -= block.of_rows(self.grad_lse)
        return weights * (grad_weights - row_dot), row_dot

    def _grad_operands(self, block: Block, block_scores: Scores, grad_logits: Array) -> tuple[Array, Array]:
        """Compute the gradients of the scaled query and of the key, through the slope of the cap (MHA-VJP-2)."""
        grad_scores = grad_logits
        if block_scores.slope is not None:
            grad_scores *= block_scores.slope
            if block_scores.visible is not None:
                grad_scores = tf.where(block_scores.visible, grad_scores, tf.zeros((), grad_scores.dtype))
        grad_query = rows_by(grad_scores, block.of_keys(self.x.key))
        return grad_query, self._sum_over_rows(grad_scores, block.of_rows(self.x.query))

    def _sum_over_rows(self, pairs: Array, rows: Array) -> Array:
        """Sum over the rows of every head that reads a key/value head (MHA-VJP-4)."""
        pairs, rows = (stacked(array, self.x.key.shape[1]) for array in (pairs, rows))
        return tf.matmul(pairs, rows, transpose_a=True)

    def _grad_bias(self, block: Block, bias: Array, grad_logits: Array) -> Array:
        """Sum dS over the axes on which the size of the bias is 1 (MHA-VJP-5)."""
        axes = [axis for axis, size in enumerate(bias.shape) if size == 1]
        part = tf.reduce_sum(grad_logits, axis=axes, keepdims=True) if axes else grad_logits
        return part if bias.shape[3] == 1 else self._for_all_keys(block, part, 3)

    def _for_all_keys(self, block: Block, part: Array, axis: int) -> Array:
        """Pad the gradient of a block's keys with 0 for all other keys."""
        if covers(block.key, block.keys, self.x.key.shape[2]):
            return part
        after = self.kv_len - block.keys
        paddings = [[0, 0]] * len(part.shape)
        if isinstance(block.key, int):
            paddings[axis] = [block.key, after - block.key]
            return tf.pad(part, paddings)
        paddings[axis] = [0, after]
        return tf.roll(tf.pad(part, paddings), block.key, axis)

"""The gradients in closed form, block by block in memory of O(length), from the operands and cotangents alone.

Nothing is kept of the forward pass, so that these operations can be differentiated in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from .block import Block, covers, kept, rows_by, scores, softmax, stacked
from .loops import Spec, over_entries, over_queries, whole
from .problem import Operands, finite, sizes_of

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .block import Scores, Softmax
    from .loops import Tensors
    from .plan import Run
    from .problem import Problem, Size

__all__ = ["gradients"]


def gradients(problem: Problem, x: Operands, grad_output: Array, grad_lse: Array | None = None) -> Operands:
    """The gradients of the operands, in their shapes and the softmax's type (MHA-VJP-1 to MHA-VJP-6).

    Where something that is not finite may be hidden it is 0 here: what it reaches through a visible pair is unspecified
    (MHA-POISON-1, MHA-POISON-2).
    """
    if problem.excludes:
        query, key, value, grad_output = (finite(one) for one in (x.query, x.key, x.value, grad_output))
        grad_lse = None if grad_lse is None else finite(grad_lse)
        x = x._replace(query=query, key=key, value=value)
    found = _Backward(problem, x, grad_output, grad_lse).all_blocks()
    if x.sinks is not None:
        found["sinks"] = tf.reduce_sum(found["sinks"], axis=(0, 2), keepdims=True)
    return Operands(found["query"], found["key"], found["value"], found.get("bias"), found.get("sinks"))


class _Backward:
    """What the blocks have in common.

    A gradient that has rows is made of what each block gives, one to which all blocks add is their sum.
    """

    def __init__(self, problem: Problem, x: Operands, grad_output: Array, grad_lse: Array | None) -> None:
        self.problem, self.x, self.grad_output, self.grad_lse = problem, x, grad_output, grad_lse
        self.kv_len = sizes_of(x.key)[2]

    def all_blocks(self) -> Tensors:
        """The gradients by name; that of the sinks row by row."""
        x, bias, runs = self.x, self.x.bias, self.problem.runs(self.x)
        if not runs:
            block = whole(x)
            sums, rows = self._block(self._nothing(block.entries), block)
            return sums | rows
        specs = {name: Spec(tuple(sizes_of(one)), one.dtype) for name, one in x._asdict().items() if one is not None}
        if x.sinks is not None:
            specs["sinks"] = Spec((*sizes_of(x.query)[:3], 1), x.query.dtype)
        apart = {"query", "sinks", "bias"} if self._apart else {"query", "sinks"}
        rows = {name: one for name, one in specs.items() if name in apart}

        def work(carry: Tensors, run: Run, entry: Size) -> tuple[Tensors, Tensors]:
            sums, found = over_queries(run, entry, self._block, self._nothing(run.entries), rows)
            found |= sums
            return {name: one + found.pop(name) for name, one in carry.items()}, found

        shared = {"bias": tf.zeros_like(bias)} if bias is not None and bias.shape[0] == 1 else {}
        like = {name: one for name, one in specs.items() if name not in shared}
        shared, found = over_entries(runs, work, shared, like)
        return shared | found

    @property
    def _apart(self) -> bool:
        """Whether each row of queries has a bias of its own."""
        return self.x.bias is not None and self.x.bias.shape[2] != 1

    def _nothing(self, entries: Size) -> Tensors:
        """Sums to which no block has been added."""
        x = self.x
        sums = {"key": x.key, "value": x.value}
        if x.bias is not None and not self._apart:
            sums["bias"] = x.bias
        sizes = {name: sizes_of(one) for name, one in sums.items()}
        return {
            name: tf.zeros((1 if one.shape[0] == 1 else entries, *sizes[name][1:]), one.dtype)
            for name, one in sums.items()
        }

    def _block(self, sums: Tensors, block: Block) -> tuple[Tensors, Tensors]:
        """Add what a block gives to the sums; give what belongs to its rows."""
        x, problem = self.x, self.problem
        found = scores(problem, x, block, slope=problem.softcap is not None)
        soft, keep = softmax(x, found, needs_lse=False), kept(problem, x, block)
        grad_output = block.of_rows(self.grad_output)
        grad_output = grad_output if soft.share is None else grad_output * soft.share
        grad_logits, row_dot = self._of_logits(block, found, soft, keep, grad_output)
        dropped = soft.weights if keep is None else soft.weights * keep
        query, key = self._of_scores(block, found, grad_logits)
        value = self._by_rows(dropped, grad_output)
        parts = {"key": self._placed(block, key, 2), "value": self._placed(block, value, 2)}
        rows = {"query": query} if soft.of_sink is None else {"query": query, "sinks": -soft.of_sink * row_dot}
        if x.bias is not None:
            (rows if self._apart else parts)["bias"] = self._of_bias(block, x.bias, grad_logits)
        return {name: one + parts[name] for name, one in sums.items()}, rows

    def _of_logits(
        self, block: Block, found: Scores, soft: Softmax, keep: Array | None, grad_output: Array
    ) -> tuple[Array, Array]:
        """dS = P (dP - D), and D (MHA-VJP-1); what is hidden and too large for its type shows in D."""
        weights, visible = soft.weights, found.visible
        grad_weights = rows_by(grad_output, block.of_keys(self.x.value), transpose=True)
        grad_weights = grad_weights if keep is None else grad_weights * keep
        row_dot = tf.reduce_sum(weights * grad_weights, axis=-1, keepdims=True)

        if visible is not None:

            def again() -> tuple[Array, Array]:
                shown = tf.where(visible, grad_weights, tf.zeros((), weights.dtype))
                return shown, tf.reduce_sum(weights * shown, axis=-1, keepdims=True)

            calm = tf.math.is_finite(tf.reduce_sum(row_dot))
            grad_weights, row_dot = tf.cond(calm, lambda: (grad_weights, row_dot), again)
        if self.grad_lse is not None:
            row_dot -= block.of_rows(self.grad_lse)
        return weights * (grad_weights - (row_dot if soft.share is None else soft.share * row_dot)), row_dot

    def _of_scores(self, block: Block, found: Scores, grad_logits: Array) -> tuple[Array, Array]:
        """dQ and dK, through the slope of the cap (MHA-VJP-2)."""
        scale, grad_scores = self.problem.scale, grad_logits
        if found.slope is not None:
            grad_scores *= found.slope
            if found.visible is not None:
                grad_scores = tf.where(found.visible, grad_scores, tf.zeros((), grad_scores.dtype))
        of_query = scale * rows_by(grad_scores, block.of_keys(self.x.key))
        return of_query, self._by_rows(grad_scores, block.of_rows(self.x.query) * scale)

    def _by_rows(self, pairs: Array, rows: Array) -> Array:
        """The sum over the rows of every head that reads a key/value head (MHA-VJP-4)."""
        pairs, rows = (stacked(one, self.x.key.shape[1]) for one in (pairs, rows))
        return tf.matmul(pairs, rows, transpose_a=True)

    def _of_bias(self, block: Block, bias: Array, grad_logits: Array) -> Array:
        """dS, summed over the axes on which the bias has 1 (MHA-VJP-5)."""
        axes = [axis for axis, size in enumerate(bias.shape) if size == 1]
        part = tf.reduce_sum(grad_logits, axis=axes, keepdims=True) if axes else grad_logits
        return part if bias.shape[3] == 1 else self._placed(block, part, 3)

    def _placed(self, block: Block, part: Array, axis: int) -> Array:
        """What the keys of a block give, with 0 for all other keys."""
        if covers(block.key, block.keys, self.x.key.shape[2]):
            return part
        after = self.kv_len - block.keys
        paddings = [[0, 0]] * len(part.shape)
        if isinstance(block.key, int):
            paddings[axis] = [block.key, after - block.key]
            return tf.pad(part, paddings)
        paddings[axis] = [0, after]
        return tf.roll(tf.pad(part, paddings), block.key, axis)

"""Compute blocks: in Python in eager mode, in loops of the graph where a call is traced.

Blocks are computed in sequence, which bounds the memory, unless the plan says that they fit into memory together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import tensorflow as tf

from .block import Block
from .problem import sizes_of
from .threads import results_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arrays import Array

    from .plan import Group, Run
    from .problem import Operands, Size

__all__ = ["Spec", "Tensors", "over_entries", "over_queries", "whole"]

Tensors: TypeAlias = "dict[str, Array]"
"""Tensors by name."""


class Spec(NamedTuple):
    """The sizes and the dtype of a tensor that is computed later."""

    sizes: tuple[Size, ...]
    dtype: tf.DType

    @property
    def shape(self) -> tf.TensorShape:
        """The shape, as far as it is known."""
        return tf.TensorShape([size if isinstance(size, int) else None for size in self.sizes])

    def sized(self, axis: int, size: Size) -> Spec:
        """Return a spec with another size of an axis, unless that size is 1 and broadcasts."""
        before = self.sizes[axis]
        broadcasts = isinstance(before, int) and before == 1
        return self if broadcasts else Spec((*self.sizes[:axis], size, *self.sizes[axis + 1 :]), self.dtype)


def whole(x: Operands) -> Block:
    """Return the call as a single block."""
    batch, _, q_len, _ = sizes_of(x.query)
    return Block(0, batch, 0, q_len, 0, sizes_of(x.key)[2])


def over_entries(
    runs: tuple[Run, ...],
    work: Callable[[Tensors, Run, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    like: dict[str, Spec],
) -> tuple[Tensors, Tensors]:
    """Compute chunks of batch entries: `work(carry, run, entry)` returns the carry and the arrays of a chunk.

    Returns:
        The last carry, and the arrays of all chunks, concatenated to those that `like` describes.
    """
    joined: list[Tensors] = []
    for run in runs:

        def step(carry: Tensors, index: Size, run: Run = run) -> tuple[Tensors, Tensors]:
            return work(carry, run, _start_of_step(run.first, index, run.entries))

        specs = {name: spec.sized(0, run.entries) for name, spec in like.items()}
        with tf.control_dependencies([*joined[-1].values()] if joined else []):
            carry, arrays = _repeated(run.count, step, carry, specs, 0)
        joined.append(arrays)
    arrays = _concatenated(joined, 0)
    for name, array in arrays.items():
        array.set_shape(like[name].shape)
    return carry, arrays


def over_queries(
    run: Run,
    entry: Size,
    body: Callable[[Tensors, Block], tuple[Tensors, Tensors]],
    carry: Tensors,
    like: dict[str, Spec],
) -> tuple[Tensors, Tensors]:
    """Compute blocks of queries; the arrays of a block have its queries on axis 2."""
    if run.at_once and not carry and tf.executing_eagerly():
        return carry, _concatenated(_at_once(run, entry, body), 2)
    joined: list[Tensors] = []
    for group in run.groups:

        def step(carry: Tensors, index: Size, group: Group = group) -> tuple[Tensors, Tensors]:
            query = _start_of_step(group.first, index, group.rows)
            return body(carry, Block(entry, run.entries, query, group.rows, group.key(index), group.keys))

        specs = {name: spec.sized(0, run.entries).sized(2, group.rows) for name, spec in like.items()}
        with tf.control_dependencies([*joined[-1].values()] if joined and not run.at_once else []):
            carry, arrays = _repeated(group.count, step, carry, specs, 2)
        joined.append(arrays)
    return carry, _concatenated(joined, 2)


def _at_once(run: Run, entry: Size, body: Callable[[Tensors, Block], tuple[Tensors, Tensors]]) -> list[Tensors]:
    """Compute the blocks of an eager call in threads."""
    blocks = [
        Block(
            entry, run.entries, _start_of_step(group.first, index, group.rows), group.rows, group.key(index), group.keys
        )
        for group in run.groups
        for index in range(group.count)
    ]
    return results_of([lambda block=block: body({}, block)[1] for block in blocks])


def _start_of_step(first: Size, index: Size, size: Size) -> Size:
    return first if isinstance(index, int) and index == 0 else first + index * size


def _repeated(
    count: Size,
    step: Callable[[Tensors, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    specs: dict[str, Spec],
    axis: int,
) -> tuple[Tensors, Tensors]:
    """Take a step several times, and concatenate its arrays; `specs` describe the arrays of a step."""
    if isinstance(count, int) and count == 1:
        return step(carry, 0)
    if tf.executing_eagerly():
        joined: list[Tensors] = []
        for index in range(count):
            carry, arrays = step(carry, index)
            joined.append(arrays)
        return carry, _concatenated(joined, axis)
    return _looped(count, step, carry, specs, axis)


def _looped(
    count: Size,
    step: Callable[[Tensors, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    specs: dict[str, Spec],
    axis: int,
) -> tuple[Tensors, Tensors]:
    stacks = {name: tf.TensorArray(spec.dtype, count, element_shape=spec.shape) for name, spec in specs.items()}

    def body(index: Array, carry: Tensors, stacks: dict[str, tf.TensorArray]) -> tuple:
        new_carry, arrays = step(carry, index)
        for name, array in new_carry.items():
            array.set_shape(carry[name].shape)
        return index + 1, new_carry, {name: stack.write(index, arrays[name]) for name, stack in stacks.items()}

    start = (tf.constant(0), carry, stacks)
    _, carry, stacks = tf.while_loop(
        lambda index, *_: index < count, body, start, parallel_iterations=1, maximum_iterations=count
    )
    return carry, {name: _unstacked(_stack(stacks[name], spec), axis) for name, spec in specs.items()}


def _stack(stack: tf.TensorArray, spec: Spec) -> Array:
    """Stack the arrays of all steps; TensorFlow needs their shape where there may be no step."""
    if spec.shape.is_fully_defined():
        return stack.stack()
    stacked = tf.raw_ops.TensorListStack(input_handle=stack.flow, element_shape=spec.sizes, element_dtype=spec.dtype)
    stacked.set_shape((None, *spec.shape))
    return stacked


def _unstacked(array: Array, axis: int) -> Array:
    """Reshape (steps, ..., size, ...) to (..., steps * size, ...), where `size` was `axis` of a step's array."""
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(array.shape))]
    moved = tf.transpose(array, order) if axis else array
    sizes = sizes_of(moved)
    return tf.reshape(moved, (*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]))


def _concatenated(joined: list[Tensors], axis: int) -> Tensors:
    if len(joined) == 1:
        return joined[0]
    return {name: tf.concat([arrays[name] for arrays in joined], axis) for name in joined[0]}

"""Blocks worked one after another: in Python in eager mode, in loops of the graph where a call is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import tensorflow as tf

from .block import Block
from .problem import sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arrays import Array

    from .plan import Group, Run
    from .problem import Operands, Size

__all__ = ["Spec", "Tensors", "over_entries", "over_queries", "whole"]

Tensors: TypeAlias = "dict[str, Array]"
"""Some tensors by name."""


class Spec(NamedTuple):
    """What is said of a tensor before it is there."""

    sizes: tuple[Size, ...]
    dtype: tf.DType

    @property
    def shape(self) -> tf.TensorShape:
        """As much of the shape as is known."""
        return tf.TensorShape([size if isinstance(size, int) else None for size in self.sizes])

    def sized(self, axis: int, size: Size) -> Spec:
        """Another size of one axis, unless it is 1 there and broadcasts."""
        before = self.sizes[axis]
        broadcasts = isinstance(before, int) and before == 1
        return self if broadcasts else Spec((*self.sizes[:axis], size, *self.sizes[axis + 1 :]), self.dtype)


def whole(x: Operands) -> Block:
    """The call as one block."""
    batch, _, q_len, _ = sizes_of(x.query)
    return Block(0, batch, 0, q_len, 0, sizes_of(x.key)[2])


def over_entries(
    runs: tuple[Run, ...],
    work: Callable[[Tensors, Run, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    like: dict[str, Spec],
) -> tuple[Tensors, Tensors]:
    """Work chunk after chunk of batch entries: `work(carry, run, entry)` gives the carry and the arrays of one.

    Returns:
        The last carry, and the arrays of all chunks, joined as `like` says.
    """
    joined: list[Tensors] = []
    for run in runs:

        def step(carry: Tensors, index: Size, run: Run = run) -> tuple[Tensors, Tensors]:
            return work(carry, run, _place(run.first, index, run.entries))

        specs = {name: one.sized(0, run.entries) for name, one in like.items()}
        with tf.control_dependencies([*joined[-1].values()] if joined else []):
            carry, arrays = _repeated(run.count, step, carry, specs, 0)
        joined.append(arrays)
    found = _together(joined, 0)
    for name, one in found.items():
        one.set_shape(like[name].shape)
    return carry, found


def over_queries(
    run: Run,
    entry: Size,
    body: Callable[[Tensors, Block], tuple[Tensors, Tensors]],
    carry: Tensors,
    like: dict[str, Spec],
) -> tuple[Tensors, Tensors]:
    """Work block after block of queries; the arrays of a block have its queries on axis 2."""
    joined: list[Tensors] = []
    for group in run.groups:

        def step(carry: Tensors, index: Size, group: Group = group) -> tuple[Tensors, Tensors]:
            query = _place(group.first, index, group.rows)
            return body(carry, Block(entry, run.entries, query, group.rows, group.key(index), group.keys))

        specs = {name: one.sized(0, run.entries).sized(2, group.rows) for name, one in like.items()}
        with tf.control_dependencies([*joined[-1].values()] if joined else []):
            carry, arrays = _repeated(group.count, step, carry, specs, 2)
        joined.append(arrays)
    return carry, _together(joined, 2)


def _place(first: Size, index: Size, size: Size) -> Size:
    return first if isinstance(index, int) and index == 0 else first + index * size


def _repeated(
    count: Size,
    step: Callable[[Tensors, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    specs: dict[str, Spec],
    axis: int,
) -> tuple[Tensors, Tensors]:
    """Take a step several times, and join the arrays that each gives; `specs` describe those of one step."""
    if isinstance(count, int) and count == 1:
        return step(carry, 0)
    if tf.executing_eagerly():
        joined: list[Tensors] = []
        for index in range(count):
            carry, arrays = step(carry, index)
            joined.append(arrays)
        return carry, _together(joined, axis)
    return _looped(count, step, carry, specs, axis)


def _looped(
    count: Size,
    step: Callable[[Tensors, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    specs: dict[str, Spec],
    axis: int,
) -> tuple[Tensors, Tensors]:
    stacks = {name: tf.TensorArray(one.dtype, count, element_shape=one.shape) for name, one in specs.items()}

    def body(index: Array, carry: Tensors, stacks: dict[str, tf.TensorArray]) -> tuple:
        after, arrays = step(carry, index)
        for name, one in after.items():
            one.set_shape(carry[name].shape)
        return index + 1, after, {name: stack.write(index, arrays[name]) for name, stack in stacks.items()}

    start = (tf.constant(0), carry, stacks)
    _, carry, stacks = tf.while_loop(
        lambda index, *_: index < count, body, start, parallel_iterations=1, maximum_iterations=count
    )
    return carry, {name: _unstacked(_stack(stacks[name], one), axis) for name, one in specs.items()}


def _stack(stack: tf.TensorArray, spec: Spec) -> Array:
    """The arrays of all steps; where there are none, their shape must be told."""
    if spec.shape.is_fully_defined():
        return stack.stack()
    stacked = tf.raw_ops.TensorListStack(input_handle=stack.flow, element_shape=spec.sizes, element_dtype=spec.dtype)
    stacked.set_shape((None, *spec.shape))
    return stacked


def _unstacked(array: Array, axis: int) -> Array:
    """(steps, ..., size, ...) to (..., steps * size, ...), where `size` was `axis` of a step's array."""
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(array.shape))]
    moved = tf.transpose(array, order) if axis else array
    sizes = sizes_of(moved)
    return tf.reshape(moved, (*sizes[:axis], sizes[axis] * sizes[axis + 1], *sizes[axis + 2 :]))


def _together(joined: list[Tensors], axis: int) -> Tensors:
    if len(joined) == 1:
        return joined[0]
    return {name: tf.concat([one[name] for one in joined], axis) for name in joined[0]}

"""Blocks worked one after another: in Python in eager mode, in loops of the graph where a call is traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import tensorflow as tf

from .block import Block
from .problem import sizes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arrays import Array

    from .plan import Group, Run
    from .problem import Operands, Problem, Size

__all__ = ["Specs", "Tensors", "over_entries", "over_queries", "whole"]

Tensors: TypeAlias = "dict[str, Array]"
"""Some tensors by name."""
Specs: TypeAlias = "dict[str, tf.TensorSpec]"


def whole(x: Operands) -> Block:
    """The call as one block."""
    batch, _, _, q_len, _ = sizes_of(x.query)
    return Block(0, batch, 0, q_len, 0, sizes_of(x.key)[2])


def over_entries(
    problem: Problem,
    x: Operands,
    work: Callable[[Tensors, Run, Size, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    like: Specs,
) -> tuple[Tensors, Tensors]:
    """Work chunk after chunk of batch entries: `work(carry, run, entry, entries)` gives the carry and its arrays.

    Returns:
        The last carry, and the arrays of all chunks, joined as `like` says.
    """
    joined: list[Tensors] = []
    for run in problem.plan or ():
        entries = run.entries if x.query.shape[0] is not None else tf.shape(x.query)[0]

        def step(carry: Tensors, index: Size, run: Run = run, entries: Size = entries) -> tuple[Tensors, Tensors]:
            return work(carry, run, run.first + index * run.entries, entries)

        specs = {name: _with(one, 0, entries) for name, one in like.items()}
        with tf.control_dependencies([*joined[-1].values()] if joined else []):
            carry, arrays = _repeated(run.count, step, carry, specs, 0)
        joined.append(arrays)
    return carry, _together(joined, 0)


def over_queries(
    run: Run,
    entry: Size,
    entries: Size,
    body: Callable[[Tensors, Block], tuple[Tensors, Tensors]],
    carry: Tensors,
    like: Specs,
) -> tuple[Tensors, Tensors]:
    """Work block after block of queries; the arrays of a block have its queries on axis 3."""
    joined: list[Tensors] = []
    for group in run.groups:

        def step(carry: Tensors, index: Size, group: Group = group) -> tuple[Tensors, Tensors]:
            key = group.starts[index] if isinstance(index, int) else tf.gather(group.starts, index)
            return body(carry, Block(entry, entries, group.first + index * group.rows, group.rows, key, group.keys))

        specs = {name: _with(_with(one, 0, entries), 3, group.rows) for name, one in like.items()}
        with tf.control_dependencies([*joined[-1].values()] if joined else []):
            carry, arrays = _repeated(len(group.starts), step, carry, specs, 3)
        joined.append(arrays)
    return carry, _together(joined, 3)


def _repeated(
    count: int,
    step: Callable[[Tensors, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    specs: Specs,
    axis: int,
) -> tuple[Tensors, Tensors]:
    """Take a step several times, and join the arrays that each gives; `specs` describe those of one step."""
    if count == 1:
        return step(carry, 0)
    if tf.executing_eagerly():
        joined: list[Tensors] = []
        for index in range(count):
            carry, arrays = step(carry, index)
            joined.append(arrays)
        return carry, _together(joined, axis)
    return _looped(count, step, carry, specs, axis)


def _looped(
    count: int,
    step: Callable[[Tensors, Size], tuple[Tensors, Tensors]],
    carry: Tensors,
    specs: Specs,
    axis: int,
) -> tuple[Tensors, Tensors]:
    stacks = {name: tf.TensorArray(one.dtype, count, element_shape=one.shape) for name, one in specs.items()}

    def body(index: Array, carry: Tensors, stacks: dict[str, tf.TensorArray]) -> tuple:
        carry, arrays = step(carry, index)
        return index + 1, carry, {name: stack.write(index, arrays[name]) for name, stack in stacks.items()}

    start = (tf.constant(0), carry, stacks)
    _, carry, stacks = tf.while_loop(
        lambda index, *_: index < count, body, start, parallel_iterations=1, maximum_iterations=count
    )
    return carry, {name: _unstacked(stack.stack(), axis) for name, stack in stacks.items()}


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


def _with(spec: tf.TensorSpec, axis: int, size: Size) -> tf.TensorSpec:
    """Another size of one axis, unless it is 1 there and broadcasts."""
    sizes = spec.shape.as_list()
    sizes[axis] = 1 if sizes[axis] == 1 else size if isinstance(size, int) else None
    return tf.TensorSpec(sizes, spec.dtype)

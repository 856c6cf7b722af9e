"""Sizes that are not known when a call is traced: of batch, q_len and kv_len; every other must be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import tensorflow as tf

from mha_spec.errors import ArgumentValueError

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

__all__ = ["Size", "settled", "sizes_of"]

Size: TypeAlias = "int | Array"
"""A size that is known, or a scalar tensor that holds it."""

AXES = ("batch", "heads", "length", "size")
SOMETIMES_UNKNOWN = ("batch", "length")


def sizes_of(array: Array) -> list[Size]:
    """The size of each axis: a number where it is known, else a scalar tensor."""
    known = array.shape.as_list()
    if None not in known:
        return known
    found = tf.shape(array)
    return [found[axis] if size is None else size for axis, size in enumerate(known)]


def settled(a: Arguments) -> Arguments:
    """Give each of query, key and value the sizes that the others are known to have, and variables as tensors.

    Raises:
        ArgumentValueError: A rank, a number of heads or a size of vectors is not known.
    """
    tensors = {name: getattr(a, name) for name in a.__slots__}
    read: dict[str, Any] = {name: _read(one) for name, one in tensors.items() if isinstance(one, tf.Variable)}
    a = replace(a, **read) if read else a
    given = [one for one in (a.query, a.key, a.value) if tf.is_tensor(one)]
    if all(one.shape.is_fully_defined() for one in given):
        return a
    for label in ("query", "key", "value"):
        _refuse_unknown_axes(label, getattr(a, label))
    batch = next((one.shape[0] for one in given if one.shape[0] is not None), None)
    kv_len = next((one.shape[2] for one in given[1:] if one.shape[2] is not None), None)
    key, value = (None if one is None else _known(one, batch, kv_len) for one in (a.key, a.value))
    query = _aligned(a, _known(a.query, batch, a.query.shape[2]))
    return replace(a, query=query, key=key, value=value, bias=_full(a.bias, query, key))


def _read(variable: tf.Variable) -> Array:
    return tf.convert_to_tensor(variable)


def _refuse_unknown_axes(label: str, tensor: Array) -> None:
    if not tf.is_tensor(tensor) or tensor.shape.rank not in (None, 4):
        return
    sizes = [None] * 4 if tensor.shape.rank is None else tensor.shape.as_list()
    for axis, size in zip(AXES, sizes, strict=True):
        if size is None and (axis not in SOMETIMES_UNKNOWN or tensor.shape.rank is None):
            name = "rank" if tensor.shape.rank is None else axis
            received = f"received shape={tensor.shape}. Say it with tf.ensure_shape"
            raise ArgumentValueError(f"`{label}` must have a known {name} when it is traced, {received}. [MHA-SHAPE-1]")


def _known(tensor: Array, batch: int | None, length: int | None) -> Array:
    """The tensor with what is known of two of its sizes, which is looked at again when it is there."""
    if tensor.shape.rank != 4:
        return tensor
    shape = tensor.shape.merge_with([batch if tensor.shape[0] is None else None, None, None, None])
    if tensor.shape[2] is None and length is not None:
        shape = shape.merge_with([None, None, length, None])
    return tensor if shape.as_list() == tensor.shape.as_list() else tf.ensure_shape(tensor, shape)


def _full(bias: Array | None, query: Array, key: Array) -> Array | None:
    """The bias, spread where a size that is not known may turn out to be 1: over such an axis its gradient is a sum."""
    if bias is None or not tf.is_tensor(bias) or bias.shape.rank != 4 or bias.shape.is_fully_defined():
        return bias
    batch, heads, q_len, _ = sizes_of(query)
    found = zip(sizes_of(bias), (batch, heads, q_len, sizes_of(key)[2]), strict=True)
    return tf.broadcast_to(bias, [full if tf.is_tensor(size) and tf.is_tensor(full) else size for size, full in found])


def _aligned(a: Arguments, query: Array) -> Array:
    """The query, where the diagonal rests on equal lengths only if they turn out to be equal (MHA-POS-2)."""
    q_len, kv_len = query.shape[2], a.key.shape[2]
    if not a.positional or a.q_offset is not None or a.kv_lengths is not None or None not in (q_len, kv_len):
        return query
    message = "`q_offset` must be given where q_len and kv_len differ: the diagonal is ambiguous. [MHA-POS-2]"
    if (q_len is None) != (kv_len is None):
        raise ArgumentValueError(f"{message} Of q_len={q_len} and kv_len={kv_len} one is not known.")
    with tf.control_dependencies([tf.debugging.assert_equal(tf.shape(query)[2], tf.shape(a.key)[2], message)]):
        return tf.identity(query)

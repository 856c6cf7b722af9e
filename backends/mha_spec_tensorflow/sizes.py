"""Sizes in scalar tensors, as `tf.shape` gives them, and the caches that are made with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import tensorflow as tf

from mha_spec.array_checks import check_library
from mha_spec.cache import KVCache
from mha_spec.layer_checks import check_like, empty_shapes

from .unknown import assertion, equality_of_lengths

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .unknown import Size

__all__ = ["empty_cache", "equal_lengths", "example", "size_of"]


def size_of(label: str, value: Any, clause: str) -> Any:
    """Return a size in a scalar tensor as a number if it is known, else as a tensor that is at least 0.

    Anything else is returned unchanged, right or wrong.
    """
    if not tf.is_tensor(value) or value.shape.rank != 0 or not value.dtype.is_integer:
        return value
    known = tf.get_static_value(value)
    if known is not None:
        return int(known)
    check = assertion(value >= 0, f"`{label}` must be {label}>=0, received {label}=", value, clause)
    with tf.control_dependencies([check]):
        return tf.identity(tf.cast(value, tf.int32))


def example(size: Any) -> Any:
    """Return a number that the shared checks accept in the place of a tensor that `size_of` returned."""
    return 0 if is_open(size) else size


def is_open(size: Any) -> bool:
    """Return True for a tensor that `size_of` returned."""
    return isinstance(size, tf.Tensor) and size.shape.rank == 0 and size.dtype == tf.int32


def equal_lengths(q_len: Size, kv_len: Size) -> tuple[Size, Size]:
    """Return the lengths, of which a tensor is compared with the other when the graph runs (MHA-POS-2)."""
    pair = q_len, kv_len
    if not any(map(is_open, pair)) or not all(is_open(size) or isinstance(size, int) for size in pair):
        return pair
    lengths = tf.stack(pair)
    with tf.control_dependencies([equality_of_lengths(lengths)]):
        length = tf.identity(lengths[0])
    return length, length


@tf.autograph.experimental.do_not_convert
def empty_cache(
    batch: Size, kv_heads: int, capacity: Size, qk_dim: int, v_dim: int | None = None, *, like: Array
) -> KVCache:
    """Make a cache without tokens; see `mha_spec.reference.empty_cache`.

    In a graph, `batch` and `capacity` may be scalar tensors, such as entries of `tf.shape(x)`. The lengths are in a
    tensor if their number is.
    """
    batch, capacity = (
        size_of(label, size, "MHA-CACHE-7") for label, size in (("batch", batch), ("capacity", capacity))
    )
    shapes = empty_shapes(example(batch), kv_heads, example(capacity), qk_dim, v_dim)
    check_library("tensorflow", like, "like")
    check_like(like)
    key, value = (tf.zeros((batch, shape[1], capacity, shape[3]), like.dtype) for shape in shapes)
    lengths = tf.zeros([batch], tf.int32) if is_open(batch) else numpy.zeros(batch, dtype=numpy.int32)
    return KVCache(key, value, lengths)

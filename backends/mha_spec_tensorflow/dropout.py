"""Read the seed of random dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.scalars import is_integer, plain, short_repr

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments
    from mha_spec.arrays import Array

__all__ = ["seed_of"]


def seed_of(a: Arguments) -> Array | None:
    """Return the seed of a call that draws a dropout mask, else None (MHA-DROP-4)."""
    if a.dropout_rate == 0 or a.dropout_mask is not None:
        return None
    key = plain(a.dropout_key)
    if key is None:
        return tf.random.uniform((), maxval=2**62, dtype=tf.int64)
    if not _is_seed(key):
        received = f"received dropout_key={short_repr(key)} of type {type(key).__name__}"
        fix = "None takes a seed from TensorFlow's global generator."
        raise ArgumentTypeError(
            f"`dropout_key` must be an int or a scalar integer tensor, {received}. {fix} [MHA-DROP-4]"
        )
    if not tf.is_tensor(key) and not -(2**63) <= key < 2**63:
        raise ArgumentValueError(
            f"`dropout_key` must be in -2**63<=dropout_key<2**63, received {short_repr(key)}. [MHA-DROP-4]"
        )
    return tf.cast(key, tf.int64)


def _is_seed(key: Array) -> bool:
    return is_integer(key) or (bool(tf.is_tensor(key)) and key.dtype.is_integer and key.shape.rank == 0)

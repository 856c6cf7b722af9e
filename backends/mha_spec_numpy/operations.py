"""The few operations that NumPy can do in place, and libraries whose arrays never change cannot."""

from __future__ import annotations

import math
from functools import lru_cache
from threading import local
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, namespace_of

if TYPE_CHECKING:
    from mha_spec.arrays import Array

__all__ = ["Room", "added", "anchor_of", "dense", "exp", "hide", "normalised", "outer", "product", "row_sum", "shown"]


class Room(local):
    """Memory for the blocks of a strip, and then for those of the next: fresh memory costs as much time as a product.

    Each thread has its own. It is NumPy's alone; arrays of other libraries never change.
    """

    def __init__(self) -> None:
        self._pieces: list[numpy.ndarray] = []
        self._taken = 0

    def clear(self) -> None:
        """All that was taken may be written over."""
        self._taken = 0

    def take(self, rows: int, columns: int, dtype: numpy.dtype) -> numpy.ndarray:
        """A matrix with any numbers in it."""
        index, size = self._taken, rows * columns
        if index == len(self._pieces) or self._pieces[index].size < size:
            self._pieces[index : index + 1] = [numpy.empty(size, dtype)]
        self._taken += 1
        return self._pieces[index][:size].reshape(rows, columns)


def dense(array: Array, dtype: str) -> Array:
    """Convert to `dtype`, laid out in order: equal numbers then take the same path whatever their strides."""
    xp: Any = namespace_of(array)
    converted = xp.astype(array, getattr(xp, dtype), copy=False)
    return numpy.ascontiguousarray(converted) if isinstance(converted, numpy.ndarray) else converted


def exp(array: Array) -> Array:
    """exp of an array that nobody else needs any more."""
    xp: Any = namespace_of(array)
    return numpy.exp(array, out=array) if isinstance(array, numpy.ndarray) else xp.exp(array)


def anchor_of(maximum: Array) -> Array:
    """What is subtracted before exp: the maximum of a row, or 0 where it sees nothing, since -inf - -inf is NaN."""
    xp: Any = namespace_of(maximum)
    return xp.where(maximum == -math.inf, 0.0, maximum)


def outer(left: Array, right: Array, room: Room | None) -> Array:
    """Every row of one matrix times every row of another, in memory of `room`."""
    transposed = namespace_of(right).matrix_transpose(right)
    if room is None or not isinstance(left, numpy.ndarray):
        return left @ transposed
    return numpy.matmul(left, transposed, out=room.take(left.shape[0], right.shape[0], left.dtype))


def shown(array: Array, visible: Array | None) -> Array:
    """An array that nobody else needs, with 0 at the pairs that are not visible (MHA-POISON-1, MHA-POISON-2)."""
    if visible is None:
        return array
    if isinstance(array, numpy.ndarray):
        numpy.copyto(array, 0.0, where=~visible)
        return array
    return namespace_of(array).where(visible, array, 0.0)


def normalised(sums: Array, total: Array) -> Array:
    """Sums that nobody else needs, over the sum of their row's exponentials; 0 where that is 0."""
    if isinstance(sums, numpy.ndarray):
        return numpy.divide(sums, numpy.where(total == 0, 1.0, total), out=sums)
    return steps.normalise(sums, total)


def hide(logits: Array, visible: Array) -> Array:
    """-inf where a pair is not visible, whatever was there, in logits that nobody else needs (MHA-POISON-2)."""
    if isinstance(logits, numpy.ndarray):
        numpy.copyto(logits, -math.inf, where=~visible)
        return logits
    return steps.hide(logits, visible)


def row_sum(array: Array) -> Array:
    """The sum of each row, (rows, 1); a product with ones takes a quarter of the time of `sum`."""
    if isinstance(array, numpy.ndarray):
        return array @ _ones(array.shape[1], array.dtype)
    xp: Any = namespace_of(array)
    return array @ xp.ones((array.shape[1], 1), dtype=array.dtype, device=device_of(array))


@lru_cache(maxsize=16)
def _ones(length: int, dtype: numpy.dtype) -> numpy.ndarray:
    return numpy.ones((length, 1), dtype)


def added(array: Array, where: tuple[int | slice, ...], block: Array) -> Array:
    """Add a block to a part of an array that nobody else holds, and give the array back."""
    if hasattr(array, "at"):
        return array.at[where].add(block)
    array[where] += block
    return array


def product(weights: Array, values: Array, visible: Array | None) -> Array:
    """sum_j weights_ij values_jc over visible pairs alone, where invisible ones have weight 0.

    A plain product would carry a value that is not finite through a weight of 0 (MHA-POISON-1, MHA-POISON-2).
    """
    if visible is None or _finite(values):
        return weights @ values
    return steps.sum_over_visible(weights, values, visible)


def _finite(rows: Array) -> bool:
    """Whether a matrix is known to hold finite numbers alone; what lies on a device is not read."""
    return isinstance(rows, numpy.ndarray) and bool(numpy.isfinite(rows.sum(axis=0)).all())

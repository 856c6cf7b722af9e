"""The few operations that NumPy can do in place, and libraries whose arrays never change cannot."""

from __future__ import annotations

import math
from functools import lru_cache
from threading import local
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, namespace_of

from .tiling import fold, unfold

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .tiling import Tile

__all__ = [
    "Room",
    "added",
    "dense",
    "exp",
    "is_finite",
    "normalised",
    "outer",
    "row_maximum",
    "row_sum",
    "shown",
]

_LEAST = {numpy.dtype(name): numpy.finfo(name).smallest_normal for name in ("float32", "float64")}


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

    def take(self, shape: tuple[int, ...], dtype: numpy.dtype) -> numpy.ndarray:
        """An array with any numbers in it."""
        index, size = self._taken, math.prod(shape)
        if index == len(self._pieces) or self._pieces[index].size < size:
            self._pieces[index : index + 1] = [numpy.empty(size, dtype)]
        self._taken += 1
        return self._pieces[index][:size].reshape(shape)


def dense(array: Array, dtype: str) -> Array:
    """Convert to `dtype`, laid out in order: equal numbers then take the same path whatever their strides."""
    if isinstance(array, numpy.ndarray):
        return numpy.ascontiguousarray(array, dtype)
    xp: Any = namespace_of(array)
    return xp.astype(array, getattr(xp, dtype), copy=False)


def exp(array: Array) -> Array:
    """exp of an array that nobody else needs any more."""
    xp: Any = namespace_of(array)
    return numpy.exp(array, out=array) if isinstance(array, numpy.ndarray) else xp.exp(array)


def outer(left: Array, right: Array, room: Room | None) -> Array:
    """Every row of each matrix times every row of another, in memory of `room`."""
    if room is None or not isinstance(left, numpy.ndarray):
        return left @ namespace_of(right).matrix_transpose(right)
    return numpy.matmul(left, right.swapaxes(-1, -2), out=room.take((*left.shape[:-1], right.shape[-2]), left.dtype))


def shown(matrices: Array, visible: Array | None, tile: Tile, hidden: float = 0.0) -> Array:
    """Matrices that nobody else needs, with `hidden` at the pairs that are not visible (MHA-POISON-1, MHA-POISON-2)."""
    if visible is None:
        return matrices
    unfolded = unfold(matrices, tile)
    if isinstance(matrices, numpy.ndarray):
        numpy.copyto(unfolded, hidden, where=~visible)
        return matrices
    return fold(namespace_of(matrices).where(visible, unfolded, hidden), tile)


def normalised(sums: Array, total: Array) -> Array:
    """Sums that nobody else needs, over the sum of their row's exponentials; 0 where that is 0, as they are."""
    if isinstance(sums, numpy.ndarray):
        return numpy.divide(sums, numpy.maximum(total, _LEAST[total.dtype]), out=sums)
    return steps.normalise(sums, total)


def row_maximum(array: Array) -> Array:
    """The largest number of each row, (..., rows, 1)."""
    if isinstance(array, numpy.ndarray):
        return numpy.maximum.reduce(array, axis=-1, keepdims=True)
    return namespace_of(array).max(array, axis=-1, keepdims=True)


def row_sum(array: Array) -> Array:
    """The sum of each row, (..., rows, 1); a product with ones takes a quarter of the time of `sum`."""
    if isinstance(array, numpy.ndarray):
        return array @ _ones(array.shape[-1], array.dtype)
    xp: Any = namespace_of(array)
    return array @ xp.ones((array.shape[-1], 1), dtype=array.dtype, device=device_of(array))


@lru_cache(maxsize=16)
def _ones(length: int, dtype: numpy.dtype) -> numpy.ndarray:
    return numpy.ones((length, 1), dtype)


def added(array: Array, where: tuple[Any, ...], block: Array) -> Array:
    """Add a block to a part of an array that nobody else holds, and give the array back."""
    if hasattr(array, "at"):
        return array.at[where].add(block)
    array[where] += block
    return array


def is_finite(matrices: Array) -> bool:
    """Whether matrices are known to hold finite numbers alone; what lies on a device is not read."""
    if not isinstance(matrices, numpy.ndarray):
        return False
    return bool(numpy.isfinite(_ones(matrices.shape[-2], matrices.dtype).T @ matrices).all())

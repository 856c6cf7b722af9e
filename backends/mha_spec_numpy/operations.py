"""Operations that are in place on NumPy, and return new arrays in libraries with immutable arrays."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.arrays import device_of, namespace_of

from .pages import Pages
from .tiling import fold, unfold

if TYPE_CHECKING:
    from mha_spec.arrays import Array

    from .tiling import Tile
    from .visibility import VisiblePairs

__all__ = [
    "Scratch",
    "added",
    "dense",
    "exp",
    "hide",
    "is_finite",
    "normalised",
    "outer",
    "row_maximum",
    "row_sum",
    "without_hidden",
]

_SMALLEST_NORMAL = {numpy.dtype(name): numpy.finfo(name).smallest_normal for name in ("float32", "float64")}


class Scratch:
    """Memory that a thread reuses for the blocks of all its tiles.

    The first write to new memory costs as much time as a matrix product, because the system clears its pages. Only
    NumPy's arrays are written into it.
    """

    def __init__(self) -> None:
        self._pieces: list[numpy.ndarray] = []
        self._taken = 0

    def clear(self) -> None:
        """Allow every array that was taken to be overwritten."""
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: numpy.dtype) -> numpy.ndarray:
        """Return an uninitialised array."""
        index, size = self._taken, math.prod(shape)
        if index == len(self._pieces) or self._pieces[index].size < size:
            self._pieces[index : index + 1] = [numpy.empty(size, dtype)]
        self._taken += 1
        return self._pieces[index][:size].reshape(shape)


def dense(array: Array, dtype: str) -> Array:
    """Convert to `dtype` and contiguous memory, so that equal numbers give the same bits whatever their strides."""
    if isinstance(array, numpy.ndarray):
        return numpy.ascontiguousarray(array, dtype)
    xp: Any = namespace_of(array)
    return xp.astype(array, getattr(xp, dtype), copy=False)


def exp(array: Array) -> Array:
    """Overwrite an array with its exponentials."""
    return numpy.exp(array, out=array) if isinstance(array, numpy.ndarray) else namespace_of(array).exp(array)


def outer(left: Array, right: Array, scratch: Scratch) -> Array:
    """Multiply every row of each matrix with every row of another, into `scratch` on NumPy."""
    if not isinstance(left, numpy.ndarray):
        return left @ namespace_of(right).matrix_transpose(right)
    product = scratch.take((*left.shape[:-1], right.shape[-2]), left.dtype)
    if not isinstance(right, Pages):
        return numpy.matmul(left, right.swapaxes(-1, -2), out=product)
    for entry, keys, part in right.parts():
        numpy.matmul(left[entry], part.swapaxes(-1, -2), out=product[entry, ..., keys])
    return product


def hide(logits: Array, visible: VisiblePairs | None, tile: Tile) -> Array:
    """Overwrite invisible pairs with -inf, whatever they hold (MHA-POISON-1, MHA-POISON-2)."""
    if visible is None:
        return logits
    unfolded = unfold(logits, tile)
    if isinstance(logits, numpy.ndarray):
        numpy.fmin(unfolded, visible.ceiling, out=unfolded)
        return logits
    return fold(namespace_of(logits).where(visible.pairs, unfolded, -math.inf), tile)


def without_hidden(matrices: Array, visible: VisiblePairs | None, tile: Tile) -> Array:
    """Overwrite invisible pairs with 0, whatever they hold (MHA-POISON-1, MHA-POISON-2)."""
    if visible is None:
        return matrices
    unfolded = unfold(matrices, tile)
    if isinstance(matrices, numpy.ndarray):
        numpy.copyto(unfolded, 0.0, where=~visible.pairs)
        return matrices
    return fold(namespace_of(matrices).where(visible.pairs, unfolded, 0.0), tile)


def normalised(sums: Array, total: Array) -> Array:
    """Overwrite sums with their quotient by the sum of their row's exponentials; it is 0 in an empty row."""
    if isinstance(sums, numpy.ndarray):
        return numpy.divide(sums, numpy.maximum(total, _SMALLEST_NORMAL[total.dtype]), out=sums)
    return steps.normalise(sums, total)


def row_maximum(array: Array) -> Array:
    """Return the largest number of each row, (..., rows, 1)."""
    if isinstance(array, numpy.ndarray):
        return numpy.maximum.reduce(array, axis=-1, keepdims=True)
    return namespace_of(array).max(array, axis=-1, keepdims=True)


def row_sum(array: Array) -> Array:
    """Return the sum of each row, (..., rows, 1); a product with ones takes a quarter of the time of `sum`."""
    if isinstance(array, numpy.ndarray):
        return array @ _ones(array.shape[-1], array.dtype)
    xp: Any = namespace_of(array)
    return array @ xp.ones((array.shape[-1], 1), dtype=array.dtype, device=device_of(array))


@lru_cache(maxsize=16)
def _ones(length: int, dtype: numpy.dtype) -> numpy.ndarray:
    return numpy.ones((length, 1), dtype)


def added(array: Array, where: tuple[Any, ...], block: Array) -> Array:
    """Add a block to a part of an array, in place if possible, and return the array."""
    if hasattr(array, "at"):
        return array.at[where].add(block)
    array[where] += block
    return array


def is_finite(matrices: Array) -> bool:
    """Return True if all numbers are known to be finite; arrays on a device are not read."""
    if not isinstance(matrices, numpy.ndarray):
        return False
    # `vdot` would copy matrices that are not contiguous.
    total = numpy.vdot(matrices, matrices) if matrices.flags.c_contiguous else row_sum(matrices).sum()
    return math.isfinite(total) or bool(numpy.isfinite(matrices).all())

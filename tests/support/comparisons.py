"""Comparisons of results: their library, dtype, shape and device first, then their values.

Two float64 evaluations of one function agree far better than a float32 evaluation does with either, so what float32
loses of ours is the yardstick: another meaning of anything would show many times over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import Array, device_of, dtype_name, library_of
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["assert_equal", "assert_near", "assert_same", "described", "leaves", "off"]


def leaves(tree: Any) -> Iterator[Array]:
    """The arrays of nested mappings and sequences, those of a mapping by name."""
    if isinstance(tree, Mapping):
        for name in sorted(tree):
            yield from leaves(tree[name])
    elif isinstance(tree, (list, tuple)):
        for one in tree:
            yield from leaves(one)
    else:
        yield tree


def described(array: Array, dtype: str | None = None) -> tuple[object, ...]:
    """All that an array is beside its values, or would be in another dtype."""
    return library_of(array), dtype or dtype_name(array), tuple(array.shape), str(device_of(array))


def off(one: Array, other: Array) -> float:
    """How far two arrays lie apart at most; infinities of one sign do not."""
    one, other = to_numpy(one), to_numpy(other)
    apart = numpy.subtract(one, other, where=one != other, out=numpy.zeros_like(one))
    return float(abs(apart).max(initial=0.0))


def assert_same(ours: Callable[[str], Any], theirs: Any) -> None:
    """In float64 ours is nearer to theirs than to ours in float32, which is off by roundings alone."""
    found, rounded, expected = (list(leaves(one)) for one in (ours("float64"), ours("float32"), theirs))
    for one, lost, other in zip(found, rounded, expected, strict=True):
        assert described(one) == described(other, "float64")
        assert described(lost) == described(one, "float32")
        assert dtype_name(other) == "float64"
        error, loss = off(one, other), off(one, lost)
        assert error < loss or error == loss == 0


def assert_near(found: Any, expected: Any) -> None:
    """Two results of ours in float64 are nearer to each other than float32 could tell."""
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert described(one) == described(other, "float64") == described(other)
        largest = abs(to_numpy(other)).max(initial=0.0, where=numpy.isfinite(to_numpy(other)))
        assert off(one, other) <= numpy.finfo(numpy.float32).eps * largest


def assert_equal(found: Any, expected: Any) -> None:
    """Two results are the same to the bit, but for the sign of zero."""
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        assert described(one) == described(other)
        assert numpy.array_equal(to_numpy(one), to_numpy(other))

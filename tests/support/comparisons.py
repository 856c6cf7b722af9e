"""Comparisons of results: their library, dtype, shape and device first, then their values.

Two float64 evaluations of a function agree far better than a float32 evaluation agrees with either. The error of our
float32 evaluation is therefore the tolerance: a difference in meaning is many times larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import Array, device_of, dtype_name, library_of
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["assert_equal", "assert_near", "assert_same", "described", "differences", "largest_difference", "leaves"]


def leaves(tree: Any) -> Iterator[Array]:
    """Return the arrays of nested mappings and sequences; mappings are read in the order of their names."""
    if isinstance(tree, Mapping):
        for name in sorted(tree):
            yield from leaves(tree[name])
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from leaves(branch)
    else:
        yield tree


def described(array: Array, dtype: str | None = None) -> tuple[object, ...]:
    """Return library, dtype, shape and device of an array; `dtype` replaces its dtype."""
    return library_of(array), dtype or dtype_name(array), tuple(array.shape), str(device_of(array))


def largest_difference(array: Array, other: Array) -> float:
    """Return the largest distance of two elements; equal infinities have the distance 0."""
    array, other = to_numpy(array), to_numpy(other)
    differences = numpy.subtract(array, other, where=array != other, out=numpy.zeros_like(array))
    return float(abs(differences).max(initial=0.0))


def assert_same(ours: Callable[[str], Any], theirs: Any) -> None:
    """Require that in float64 our result is nearer to theirs than to ours in float32, which differs by roundings."""
    results, rounded, expected = (list(leaves(tree)) for tree in (ours("float64"), ours("float32"), theirs))
    for result, narrow, other in zip(results, rounded, expected, strict=True):
        assert described(result) == described(other, "float64")
        assert described(narrow) == described(result, "float32")
        assert dtype_name(other) == "float64"
        error, loss = largest_difference(result, other), largest_difference(result, narrow)
        assert error < loss or error == loss == 0


def assert_near(results: Any, expected: Any) -> None:
    """Require that two results in float64 differ by less than the resolution of float32."""
    for result, other in zip(leaves(results), leaves(expected), strict=True):
        assert described(result) == described(other, "float64") == described(other)
        largest = abs(to_numpy(other)).max(initial=0.0, where=numpy.isfinite(to_numpy(other)))
        assert largest_difference(result, other) <= numpy.finfo(numpy.float32).eps * largest


def differences(names: Iterable[str], results: Iterable[Any], expected: Iterable[Any]) -> list[str]:
    """Name the results that `assert_near` refuses."""
    different: list[str] = []
    for name, result, other in zip(names, results, expected, strict=True):
        try:
            assert_near(result, other)
        except AssertionError:
            different.append(name)
    return different


def assert_equal(results: Any, expected: Any) -> None:
    """Require that two results are equal to the bit, except for the sign of zero."""
    for result, other in zip(leaves(results), leaves(expected), strict=True):
        assert described(result) == described(other)
        assert numpy.array_equal(to_numpy(result), to_numpy(other))

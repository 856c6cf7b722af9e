"""Plan a call by its shapes, dtypes and options: check its arguments, and cut it into tiles."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.arguments import Arguments
from mha_spec.arrays import dtype_name, namespace_of, softmax_dtype_name
from mha_spec.checks import check, refuse_unknown
from mha_spec.scalars import PLAIN_TYPES

from .parallel import is_tiny
from .tiling import tiles
from .visibility import Visibility

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.arrays import Array

    from .tiling import Tile

__all__ = ["Plan", "plan_of"]

PLANS = 64
"""The number of plans that are kept for later calls."""
PLAIN_OPTIONS = frozenset({"causal", "q_offset", "scale", "softcap"})
"""The options with which calls share plans: they are seldom arrays, and do not differ in every call."""
LARGEST = 2**16
"""Calls with larger queries take so long that a plan saves nothing, and may have many tiles, which a plan keeps."""

_ELEMENT = bytes(numpy.dtype(numpy.longdouble).itemsize)


class Plan:
    """The checked arguments of a call, and the conclusions that do not need the contents of query, key and value."""

    def __init__(self, a: Arguments) -> None:
        self.a = a
        self.dtype = softmax_dtype_name(dtype_name(a.query))
        """The softmax's type (MHA-SOFTMAX-2)."""
        self.rounds = self.dtype != dtype_name(a.query)
        """True if the output has another type than the softmax (MHA-DTYPE-1)."""
        self.xp: Any = namespace_of(a.query)
        """The array namespace of the call."""
        self.scale = steps.scale_of(a.scale, a.query.shape[3])
        self.visibility = Visibility(a)

    @cached_property
    def is_tiny(self) -> bool:
        """True if every product is so small that the BLAS computes it in a single thread."""
        return is_tiny(self.a)

    @cached_property
    def tiles(self) -> list[Tile]:
        """The tiles of the forward pass."""
        return tiles(self.a, self.visibility.rows)


def plan_of(function: str, query: Array, key: Array, value: Array, options: Mapping[str, Any]) -> Plan:
    """Check and plan a call; small NumPy calls with equal shapes, dtypes and plain options share a plan.

    The checks and the plan of a small call take as long as its computation.
    """
    if (
        type(query) is type(key) is type(value) is numpy.ndarray
        and query.dtype == key.dtype == value.dtype
        and query.dtype.kind == "f"
        and query.size <= LARGEST
        and options.keys() <= PLAIN_OPTIONS
        and PLAIN_TYPES.issuperset(map(type, options.values()))
    ):
        return _shared_plan(function, query.dtype, query.shape, key.shape, value.shape, **options)
    refuse_unknown(options, function)
    return Plan(check(Arguments(query, key, value, function=function, **options)))


@lru_cache(maxsize=PLANS, typed=True)
def _shared_plan(function: str, dtype: numpy.dtype, *shapes: tuple[int, ...], **options: Any) -> Plan:
    """Plan a call of arrays whose elements share their memory, so that no plan keeps a user's arrays.

    The cache compares the types of the options, too, because True == 1 == 1.0.
    """
    query, key, value = (numpy.ndarray(shape, dtype, _ELEMENT, strides=(0,) * len(shape)) for shape in shapes)
    return Plan(check(Arguments(query, key, value, function=function, **options)))

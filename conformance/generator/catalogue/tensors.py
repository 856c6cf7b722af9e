"""Query, key and value of the cases: exact in bfloat16 and float16; each flavour shows other mistakes."""

from __future__ import annotations

import math
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy
from portable import generate

if TYPE_CHECKING:
    from collections.abc import Callable

    from .sizes import Sizes

__all__ = ["FLAVOURS", "bell", "generators", "leaning", "seed_of", "tensors"]

FLAVOURS = {
    "generic": "random data",
    "random": "other random data",
    "coded": "nearly flat weights over values that tell batch, head, key and component",
    "steep": "steep logits, of deviation ten and more",
    "levels": "rows, heads and batch entries whose logits lie hundreds apart",
    "low": "all logits near -22000, so that a finite fill in place of -inf shows",
    "lowest": "all logits near -60000",
    "high": "all logits near 10000",
    "flat": "a query of zeros: flat weights",
    "rising": "logits that rise along the keys, so that an online softmax rescales at every block",
    "falling": "logits that fall along the keys",
    "far": "a few outliers eight times as large as the rest",
}
"""The flavours of data, in words for titles."""


CENTRES = {"coded": 8, "levels": 4, "low": 4, "lowest": 4, "high": 4}
"""The means of the values of a flavour; gradients depend only on their differences."""


_GENERATED = {
    "generic": ("", (2.0**-3, 2.0**-4, 2.0**-3)),
    "random": ("again", (2.0**-3, 2.0**-4, 2.0**-3)),
    "steep": ("", (2.0**-1, 2.0**-3, 2.0**-3)),
}
"""The salt of the seeds and the units of query, key and value."""


def seed_of(*parts: object) -> int:
    """Return a seed that depends only on the parts."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def bell(shape: tuple[int, ...], unit: float, *names: object) -> numpy.ndarray:
    """Return roughly normal multiples of `unit`, with a deviation of 13 units."""
    return generate(shape, seed_of(*shape, *names), "bell", unit)


@cache
def tensors(sizes: Sizes, flavour: str) -> tuple[numpy.ndarray, ...]:
    """Return query, key and value of one flavour; the arrays are shared between cases."""
    return _MAKERS[flavour](sizes)


@cache
def leaning(sizes: Sizes, flavour: str) -> tuple[numpy.ndarray, ...]:
    """Return a cotangent, query, key and value whose gradients do not cancel in the sum over rows.

    The cotangent is a pattern over the components plus smaller data of each row; ordinary queries have a mean of 1.5.
    """
    query, key, value = tensors(sizes, flavour)
    value = value - CENTRES.get(flavour, 0)
    pattern = bell((sizes.v_dim,), 2.0**-3, "grad_output pattern", flavour)
    grad_output = bell(sizes.output, 2.0**-5, "grad_output", flavour) + pattern
    return grad_output, query + 1.5 if flavour in ("generic", "random", "coded") else query, key, value


def generators(sizes: Sizes, flavour: str) -> tuple[dict[str, Any], ...] | None:
    """Return the generators of query, key and value, or None if the flavour also changes generated data."""
    if flavour not in _GENERATED:
        return None
    shapes = {"query": sizes.query, "key": sizes.key, "value": sizes.value}
    salt, units = _GENERATED[flavour]
    return tuple(
        {"seed": seed_of(*shape, name, salt), "kind": "bell", "unit": unit}
        for (name, shape), unit in zip(shapes.items(), units, strict=True)
    )


def _generic(sizes: Sizes, flavour: str = "generic") -> tuple[numpy.ndarray, ...]:
    salt, units = _GENERATED[flavour]
    shapes = {"query": sizes.query, "key": sizes.key, "value": sizes.value}
    return tuple(bell(shape, unit, name, salt) for (name, shape), unit in zip(shapes.items(), units, strict=True))


def _coded(sizes: Sizes) -> tuple[numpy.ndarray, ...]:
    """Return positive values, so that their mean over many keys stays large."""
    query, key, _ = _generic(sizes)
    query = query / 4
    batch, head, position, component = numpy.indices(sizes.value)
    return query, key, ((31 * batch + 17 * head + 5 * position + 3 * component) % 127 + 1) / 8


def _flat(sizes: Sizes) -> tuple[numpy.ndarray, ...]:
    query, key, value = _generic(sizes)
    return numpy.zeros_like(query), key, value


def _far(sizes: Sizes) -> tuple[numpy.ndarray, ...]:
    return (
        generate(sizes.query, seed_of(*sizes.query, "far query"), "contrast", 2.0**-4),
        generate(sizes.key, seed_of(*sizes.key, "far key"), "contrast", 2.0**-4),
        generate(sizes.value, seed_of(*sizes.value, "far value"), "contrast", 2.0**-4),
    )


def _with_component(
    sizes: Sizes, query_component: numpy.ndarray | float, key_component: numpy.ndarray | float
) -> tuple[numpy.ndarray, ...]:
    """Replace the first component of generic data, to shift the logits; the values have a mean other than 0."""
    query, key, value = (array.copy() for array in _generic(sizes))
    query[..., 0], key[..., 0] = query_component, key_component
    return query, key, value + CENTRES["low"]


def _shifted(logit: float) -> Callable[[Sizes], tuple[numpy.ndarray, ...]]:
    """Place all logits near `logit` at the default scale, by a component that all queries and keys share."""

    def make(sizes: Sizes) -> tuple[numpy.ndarray, ...]:
        common = 240.0
        return _with_component(sizes, common, 16.0 * round(logit * math.sqrt(sizes.qk_dim) / common / 16))

    return make


def _levels(sizes: Sizes) -> tuple[numpy.ndarray, ...]:
    batch, head, row = numpy.indices(sizes.query[:3])
    level = (7 * batch + 5 * head + 3 * row) % 13 - 6
    return _with_component(sizes, 16.0 * level, 2.0 ** round(math.log2(2.4 * math.sqrt(sizes.qk_dim))))


def _slope(sign: int) -> Callable[[Sizes], tuple[numpy.ndarray, ...]]:
    """Make logits rise or fall by 16 every two keys."""

    def make(sizes: Sizes) -> tuple[numpy.ndarray, ...]:
        query_component = 2.0 ** round(math.log2(8 * math.sqrt(sizes.qk_dim)))
        return _with_component(sizes, query_component, sign * (numpy.arange(sizes.kv_len) // 2 % 128))

    return make


_MAKERS: dict[str, Callable[[Sizes], tuple[numpy.ndarray, ...]]] = {
    "generic": _generic,
    "random": lambda sizes: _generic(sizes, "random"),
    "coded": _coded,
    "steep": lambda sizes: _generic(sizes, "steep"),
    "levels": _levels,
    "low": _shifted(-22000.0),
    "lowest": _shifted(-60000.0),
    "high": _shifted(10000.0),
    "flat": _flat,
    "rising": _slope(1),
    "falling": _slope(-1),
    "far": _far,
}

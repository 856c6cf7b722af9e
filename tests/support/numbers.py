"""Numbers that depend only on their shape and a seed."""

from __future__ import annotations

from typing import Any

import numpy

__all__ = ["numbers", "pattern"]


def numbers(*shape: int, seed: int = 3, dtype: Any = numpy.float64) -> numpy.ndarray:
    """Draw standard normal numbers."""
    return numpy.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def pattern(*shape: int) -> numpy.ndarray:
    """Draw a mask; the first element of each row is True."""
    seen = numpy.random.default_rng(2).random(shape) < 0.6
    seen[..., 0] = True
    return seen

"""Numbers for the oracle of the goldens, and how its answers are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from oracle import Answer

__all__ = ["kinds_of", "multiples"]


def kinds_of(answer: Answer) -> list[Any]:
    """The kind of every place, 0 where it is finite."""
    return numpy.zeros(answer.values.shape, int).tolist() if answer.kinds is None else answer.kinds.tolist()


def multiples(*shape: int, seed: int = 0, step: float = 0.125) -> numpy.ndarray:
    """Multiples of `step`, at most 32 of them in magnitude."""
    return numpy.random.default_rng(seed).integers(-32, 33, shape) * step

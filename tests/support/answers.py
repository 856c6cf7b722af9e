"""Make numbers for the oracle of the goldens, and read its answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from oracle import Answer

__all__ = ["kinds_of", "multiples"]


def kinds_of(answer: Answer) -> list[Any]:
    """Return the kind of every element; without kinds, every element has kind 0."""
    return numpy.zeros(answer.values.shape, int).tolist() if answer.kinds is None else answer.kinds.tolist()


def multiples(*shape: int, seed: int = 0, step: float = 0.125) -> numpy.ndarray:
    """Draw multiples of `step`, from -32 to 32 times `step`."""
    return numpy.random.default_rng(seed).integers(-32, 33, shape) * step

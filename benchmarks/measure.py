"""Times of several functions in one process, taken in turns, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["medians"]

LEAST, MOST = 7, 201
"""Bounds of the turns."""


def medians(functions: Mapping[str, Callable[[], object]], seconds: float = 6.0) -> dict[str, float]:
    """The median time of each function in seconds, over as many turns as fit in `seconds`; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for turn in range(MOST + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
        if turn >= LEAST and time.perf_counter() > end:
            break
    return {name: statistics.median(taken) for name, taken in times.items()}

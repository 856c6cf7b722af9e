"""Times of several functions in one process, taken in turns, so that a slow moment of the machine meets all of them.

In its turn a function is called twice, and the second call is timed: memory that another gave back to the system, and
caches that it filled, are not what is measured.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["medians", "ratio", "report"]

LEAST, MOST = 7, 201
"""Bounds of the turns."""


def medians(functions: Mapping[str, Callable[[], object]], seconds: float = 6.0) -> dict[str, float]:
    """The median time of each function in seconds, over as many turns as fit in `seconds`; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for turn in range(MOST + 1):
        for name, function in functions.items():
            taken = _timed(function, time.perf_counter)
            if turn > 0:
                times[name].append(taken)
        if turn >= LEAST and time.perf_counter() > end:
            break
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
    middle: Callable[[Iterable[float]], float] = statistics.median,
) -> tuple[float, float, float]:
    """The median of the ratios of two functions' times in turn, and the median of each in ms; two turns warm up.

    With `min` as the `middle`, the least instead of the median.
    """
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < LEAST:
        pairs.append((_timed(ours, clock), _timed(theirs, clock)))
    pairs = pairs[2:]
    mine, other = (middle(times) * 1000 for times in zip(*pairs, strict=True))
    return middle(a / b for a, b in pairs), mine, other


def _timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    function()
    start = clock()
    function()
    return clock() - start


def report(name: str, limit: float | None, measured: tuple[float, float, float]) -> bool:
    """Print a row; whether it is within its limit."""
    found, mine, other = measured
    good = limit is None or found <= limit
    bound = "" if limit is None else f"  limit {limit:.2f} {'ok' if good else 'EXCEEDED'}"
    print(f"{name:50s} {mine:9.3f} ms against {other:9.3f} ms: {found:5.2f}{bound}", flush=True)
    return good

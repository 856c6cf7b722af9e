"""Measure the times of several functions in turns, so that a slow moment of the machine affects all of them.

In each turn a function is called twice, and only the second call is timed: the first call restores the memory and the
caches that another function took.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["medians", "ratio", "report"]

LEAST, MOST = 7, 201
"""Bounds of the number of turns."""


def medians(functions: Mapping[str, Callable[[], object]], seconds: float = 6.0) -> dict[str, float]:
    """Return the median time of each function in seconds over the turns that fit in `seconds`; the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for turn in range(MOST + 1):
        for name, function in functions.items():
            elapsed = _timed(function, time.perf_counter)
            if turn > 0:
                times[name].append(elapsed)
        if turn >= LEAST and time.perf_counter() > end:
            break
    return {name: statistics.median(elapsed) for name, elapsed in times.items()}


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
    middle: Callable[[Iterable[float]], float] = statistics.median,
) -> tuple[float, float, float]:
    """Return the median ratio of two functions' times, and the median time of each in ms; two turns warm up.

    `middle=min` gives minima instead of medians.
    """
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < LEAST:
        pairs.append((_timed(ours, clock), _timed(theirs, clock)))
    pairs = pairs[2:]
    our_time, their_time = (middle(times) * 1000 for times in zip(*pairs, strict=True))
    return middle(our / their for our, their in pairs), our_time, their_time


def _timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    function()
    start = clock()
    function()
    return clock() - start


def report(name: str, limit: float | None, measured: tuple[float, float, float]) -> bool:
    """Print a row; return True if it is within its limit."""
    quotient, our_time, their_time = measured
    good = limit is None or quotient <= limit
    bound = "" if limit is None else f"  limit {limit:.2f} {'ok' if good else 'EXCEEDED'}"
    print(f"{name:50s} {our_time:9.3f} ms against {their_time:9.3f} ms: {quotient:5.2f}{bound}", flush=True)
    return good

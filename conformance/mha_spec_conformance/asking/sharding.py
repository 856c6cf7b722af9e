"""Split a run into shards of similar cost, which several machines ask at the same time.

The split depends on the suite and the claims of the target alone, so that every machine makes the same split.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from .selection import Ask

__all__ = ["elements", "shard"]

COST_OF_SIGNATURE, COST_OF_ASK = 2**18, 2**15
"""The costs of a compilation and of a call, in elements of the arrays of a call."""


def shard(asked: Iterable[Ask], number: int, count: int) -> list[Ask]:
    """Return the asks of a shard, in their order; `number` is from 1 to `count`.

    Cases of the same signature stay together, because a framework compiles once for all of them. The most expensive
    group comes first, and each goes to the shard that has the lowest cost so far.
    """
    asked = list(asked)
    groups: dict[Hashable, list[Ask]] = {}
    for ask in asked:
        groups.setdefault(ask.case.signature, []).append(ask)
    costs = [0.0] * count
    chosen: set[Hashable] = set()
    for signature, group in sorted(groups.items(), key=lambda item: -_cost(item[1])):
        lowest = costs.index(min(costs))
        costs[lowest] += _cost(group)
        if lowest == number - 1:
            chosen.add(signature)
    return [ask for ask in asked if ask.case.signature in chosen]


def _cost(group: list[Ask]) -> float:
    return COST_OF_SIGNATURE + len(group) * (COST_OF_ASK + elements(group[0]))


def elements(ask: Ask) -> int:
    """Count the elements of the inputs and of the scores of a case."""
    shapes = ask.case.input_shapes
    query, key = shapes.get("query"), shapes.get("key")
    scores = math.prod(query[:-1]) * key[-2] if query and key and len(query) == len(key) == 4 else 0
    return sum(math.prod(shape) for shape in shapes.values()) + scores

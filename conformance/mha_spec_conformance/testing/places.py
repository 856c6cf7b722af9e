"""Say where the wrong rows lie: in which batch entries, heads, rows and components of all that was compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.judging.places import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .results import Compared

__all__ = ["described", "where"]

MOST_NUMBERS = 8
"""The number of indices that are listed."""

FEWEST_OF_PERIOD = 3
"""The number of bad indices from which a period is named."""

AXES = ("batch entry", "head", "row")


def where(comparison: Compared, row: str = "row") -> str:
    """Describe the wrong places of a result; `row` names what its third axis counts."""
    wrong, places = comparison.wrong, comparison.places
    parts: list[str] = []
    left = numpy.ones(len(places), bool)
    for axis, noun in enumerate((*AXES[:2], row)):
        values = places[:, axis]
        bad, seen = set(values[wrong].tolist()), set(values[left].tolist())
        parts.append(described(sorted(bad), sorted(seen), noun))
        left &= numpy.isin(values, list(bad))
    if comparison.shares.ndim > 1:
        size = comparison.shares.shape[1]
        bad_components = numpy.flatnonzero((comparison.shares > 1).any(axis=0)).tolist()
        parts.append(described(bad_components, range(size), "component"))
    return ", ".join(parts)


def described(bad: Sequence[int], compared: Sequence[int], noun: str) -> str:
    """Describe which of the compared indices are bad; both are sorted."""
    bad, compared = list(bad), list(compared)
    nouns = plural(noun)
    if bad == compared:
        return f"{noun} {bad[0]}" if len(bad) == 1 else f"all compared {nouns}"
    if len(bad) == 1:
        return f"{noun} {bad[0]}"
    start, stop = compared.index(bad[0]), compared.index(bad[-1]) + 1
    if compared[start:stop] == bad:
        return _range(bad, nouns, first=start == 0, last=stop == len(compared))
    if (period := _period(bad, compared)) is not None:
        return f"{nouns} {period[1]} modulo {period[0]}"
    more = f" and {len(bad) - MOST_NUMBERS} more" if len(bad) > MOST_NUMBERS else ""
    return f"{nouns} {', '.join(map(str, bad[:MOST_NUMBERS]))}{more}"


def _range(bad: list[int], nouns: str, *, first: bool, last: bool) -> str:
    if last:
        return f"{nouns} from {bad[0]} on"
    return f"{nouns} up to {bad[-1]}" if first else f"{nouns} {bad[0]} to {bad[-1]}"


def _period(bad: list[int], compared: list[int]) -> tuple[int, int] | None:
    """Return a period and a remainder that exactly the bad indices have; two indices are listed instead."""
    if len(bad) < FEWEST_OF_PERIOD:
        return None
    for period in (2, 4, 8, 16, 32, 64, 128, 256):
        remainder = bad[0] % period
        if bad == [index for index in compared if index % period == remainder]:
            return period, remainder
    return None

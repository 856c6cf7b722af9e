"""Say where the wrong rows lie: in which batch entries, heads, rows and components of all that was compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.judging.indices import described_indices

if TYPE_CHECKING:
    from .results import Compared

__all__ = ["where"]

AXES = ("batch entry", "head", "row")


def where(comparison: Compared, row: str = "row") -> str:
    """Describe the wrong places of a result; `row` names what its third axis counts."""
    wrong, places = comparison.wrong, comparison.places
    parts: list[str] = []
    left = numpy.ones(len(places), bool)
    for axis, noun in enumerate((*AXES[:2], row)):
        values = places[:, axis]
        bad, seen = set(values[wrong].tolist()), set(values[left].tolist())
        parts.append(described_indices(sorted(bad), sorted(seen), noun))
        left &= numpy.isin(values, list(bad))
    if comparison.shares.ndim > 1:
        size = comparison.shares.shape[1]
        bad_components = numpy.flatnonzero((comparison.shares > 1).any(axis=0)).tolist()
        parts.append(described_indices(bad_components, range(size), "component"))
    return ", ".join(parts)

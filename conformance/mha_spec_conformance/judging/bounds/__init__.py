"""The accuracy rule: the largest error that a correct implementation can make in each element of a result."""

from __future__ import annotations

from .roundoff import Precision, precision, unit_roundoff
from .rule import RULE_VERSION, SPECIFICATION, Bounds, allowances, bounds, deviations
from .shared import SharedBounds

__all__ = [
    "RULE_VERSION",
    "SPECIFICATION",
    "Bounds",
    "Precision",
    "SharedBounds",
    "allowances",
    "bounds",
    "deviations",
    "precision",
    "unit_roundoff",
]

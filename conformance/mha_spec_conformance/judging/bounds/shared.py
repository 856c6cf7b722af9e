"""Share the bounds of a case among its runs in several dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .evaluation import AttentionBounds
from .rule import bounds

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Case

    from .rule import Bounds

__all__ = ["SharedBounds"]

MOST = 2
"""The number of cases whose bounds are kept. Two workers answer in turns, each about a case in all its dtypes."""


class SharedBounds:
    """Evaluates each case once for all its dtypes, if they are asked in succession.

    The inputs of a case are exact in each of its dtypes, so that their numbers in float64 are the same.
    """

    def __init__(self) -> None:
        """Begin without bounds."""
        self._kept: list[tuple[Case, AttentionBounds[Any]]] = []

    def of(self, case: Case, dtype: str) -> Bounds:
        """Return the bounds of the rows that the goldens hold; the next call may change those of attention."""
        kept = next((kept for other, kept in self._kept if other is case), None)
        if kept is not None:
            kept.use({name: case.dtype_of(name, dtype) for name in case.input_names})
            return kept
        new = bounds(case.function, case.inputs(dtype), case.options, rows=case.sampled_rows)
        if isinstance(new, AttentionBounds) and len(case.dtypes) > 1:
            self._kept = [*self._kept, (case, new)][-MOST:]
        return new

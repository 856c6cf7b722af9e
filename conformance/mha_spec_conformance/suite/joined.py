"""Two compositions of steps whose results are joined: the form of a mistake that begins at a later tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from .functions import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.steps import Steps

    Results = Mapping[str, numpy.ndarray]

__all__ = ["Joined"]

AXIS = 2
"""The axis of rows or keys in every result of attention and of merging."""


@dataclass(frozen=True)
class Joined:
    """The results of `first`, and from index `start` on along the axis of rows or keys those of `second`.

    Only the results named in `outputs` are joined; the others are those of `first`.
    """

    first: Steps
    second: Steps
    start: int
    outputs: tuple[str, ...]

    def join(self, first: Results, second: Results) -> dict[str, numpy.ndarray]:
        """Join results, or their allowances, by name."""
        return {name: self._join(name, array, second[name]) for name, array in first.items()}

    def function(self, name: str, over: Callable[[Steps, str], Callable[..., Any]]) -> Callable[..., Any]:
        """Return a function of the specification; `over` returns it for a single composition of steps."""
        functions = [over(steps, name) for steps in (self.first, self.second)]

        def call(*operands: Any, **keywords: Any) -> Any:
            names = FUNCTIONS[name].returned(keywords)
            answers = [function(*operands, **keywords) for function in functions]
            if len(names) == 1:
                return self._join(names[0], *answers)
            return tuple(self._join(*result) for result in zip(names, *answers, strict=True))

        return call

    def _join(self, name: str, first: Any, second: Any) -> Any:
        if name not in self.outputs or first is None:
            return first
        before, after = (slice(None),) * AXIS + (slice(self.start),), (slice(None),) * AXIS + (slice(self.start, None),)
        return numpy.concatenate([first[before], second[after]], axis=AXIS)

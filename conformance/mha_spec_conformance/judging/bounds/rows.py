"""Bounds of the rows of attention that a golden holds: a call with fewer queries, at a proportional cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy

from mha_spec.arguments import Arguments
from mha_spec.reference import Reference

from .evaluation import in_float64

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.steps import Steps

    from .roundoff import Precision

    Arrays = Mapping[str, numpy.ndarray]
    Options = Mapping[str, Any]

__all__ = ["RowBounds"]

KEPT_OPTIONS = ("scale", "softcap", "dropout_rate")
"""The options that do not decide visibility."""

KEPT_ARRAYS = ("key", "value", "sinks")
"""The arrays without an axis of queries."""

PER_QUERY = ("query", "bias", "dropout_mask")
"""The arrays whose third axis is that of the queries, or 1."""


class Whole(Protocol):
    """The bounds of a whole call."""

    values: dict[str, numpy.ndarray]

    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        ...

    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        ...


class RowBounds:
    """Bounds of the queries in which some rows lie, in every head; in the other rows, they are NaN.

    No error of a row depends on other rows. The visibility of the whole call becomes the mask of the smaller call.
    """

    @numpy.errstate(all="ignore")
    def __init__(
        self,
        whole: Callable[[Arrays, Options, Steps], Whole],
        rows: numpy.ndarray,
        arrays: Arrays,
        options: Options,
        steps: Steps,
    ) -> None:
        """Evaluate the rows, which are flat indices over (batch, heads, q_len), with the steps of the specification."""
        self._q_len = arrays["query"].shape[2]
        self._queries = numpy.unique(rows % self._q_len)
        function = "attention" if "value" in arrays else "attention_weights"
        arguments: dict[str, Any] = {"value": None, **in_float64(arrays), **options, "function": function}
        visible = Reference(steps).visible(steps.check(Arguments(**arguments)))
        fewer = {name: arrays[name] for name in KEPT_ARRAYS if name in arrays}
        fewer |= {name: self._of_queries(arrays[name]) for name in PER_QUERY if name in arrays}
        kept = {name: options[name] for name in KEPT_OPTIONS if name in options}
        self._bounds = whole({**fewer, "mask": self._of_queries(visible)}, kept, steps)
        self.values = self._spread(self._bounds.values)

    def _of_queries(self, array: numpy.ndarray) -> numpy.ndarray:
        return array if array.shape[2] == 1 else array[:, :, self._queries]

    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        return self._spread(self._bounds.allowances(precision))

    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        return self._spread(self._bounds.deviations(precision))

    def _spread(self, outputs: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
        whole: dict[str, numpy.ndarray] = {}
        for name, bound in outputs.items():
            whole[name] = numpy.full((*bound.shape[:2], self._q_len, *bound.shape[3:]), numpy.nan)
            whole[name][:, :, self._queries] = bound
        return whole

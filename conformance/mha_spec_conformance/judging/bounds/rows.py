"""Bounds of the rows of attention that a golden holds: a call with fewer heads and queries, at a proportional cost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arguments import Arguments
from mha_spec.reference import Reference

from .evaluation import AttentionBounds, Evaluation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.steps import Steps

    from .roundoff import Precision

    Arrays = Mapping[str, numpy.ndarray]
    Options = Mapping[str, Any]

__all__ = ["RowBounds"]

KEPT_OPTIONS = ("scale", "softcap", "dropout_rate")
"""The options that do not decide visibility."""

OPERANDS = ("key", "value")
"""The arrays whose heads are those of keys and values."""

PER_QUERY = ("query", "bias", "dropout_mask")
"""The arrays whose third axis is that of the queries, or 1."""


class RowBounds(AttentionBounds[Evaluation]):
    """Bounds of the heads and queries in which some rows lie; in all other rows, they are NaN.

    No error of a row depends on other rows. Each pair of a batch entry and a head becomes a head of the smaller call,
    and the visibility of the whole call becomes its mask.
    """

    @numpy.errstate(all="ignore")
    def __init__(
        self,
        whole: Callable[[Arrays, Options, Steps], AttentionBounds[Evaluation]],
        rows: numpy.ndarray,
        arrays: Arrays,
        options: Options,
        steps: Steps,
    ) -> None:
        """Evaluate the rows, which are flat indices over (batch, heads, q_len), with the steps of the specification."""
        self._shape = arrays["query"].shape[:3]
        entries, heads, queries = numpy.unravel_index(rows, self._shape)
        self._entries, self._heads = numpy.unique([entries, heads], axis=1)
        self._queries = numpy.unique(queries)
        fewer = {name: self._of_heads(arrays[name]) for name in OPERANDS if name in arrays}
        fewer |= {name: self._of_queries(arrays[name]) for name in PER_QUERY if name in arrays}
        if "sinks" in arrays:
            fewer["sinks"] = arrays["sinks"][self._heads]
        fewer["mask"] = self._of_queries(_visible(arrays, options, steps))
        kept = {name: options[name] for name in KEPT_OPTIONS if name in options}
        self._bounds = whole(fewer, kept, replace(steps, repeat_heads=_have_own_keys))
        self.evaluation = self._bounds.evaluation
        self.values = self._spread(self._bounds.values)

    def _of_heads(self, array: numpy.ndarray) -> numpy.ndarray:
        """Return the key/value head that each head reads, as (1, heads, kv_len, size)."""
        group = self._shape[1] // array.shape[1]
        return array[self._entries, self._heads // group][None]

    def _of_queries(self, array: numpy.ndarray) -> numpy.ndarray:
        """Return the queries of each head, as (1, heads, queries or 1, size)."""
        heads = numpy.broadcast_to(array, (*self._shape[:2], *array.shape[2:]))[self._entries, self._heads][None]
        return heads if array.shape[2] == 1 else heads[:, :, self._queries]

    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element."""
        return self._spread(self._bounds.allowances(precision))

    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element."""
        return self._spread(self._bounds.deviations(precision))

    def _spread(self, outputs: dict[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
        whole: dict[str, numpy.ndarray] = {}
        for name, bound in outputs.items():
            whole[name] = numpy.full((*self._shape, *bound.shape[3:]), numpy.nan)
            whole[name][self._entries[:, None], self._heads[:, None], self._queries] = bound[0]
        return whole


def _have_own_keys(array: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Return the keys or values as they are, because each head of the smaller call has keys and values."""
    return array


def _visible(arrays: Arrays, options: Options, steps: Steps) -> numpy.ndarray:
    """Return the visibility of the whole call, broadcastable to (batch, heads, q_len, kv_len)."""
    function = "attention" if "value" in arrays else "attention_weights"
    arguments: dict[str, Any] = {"value": None, **arrays, **options, "function": function}
    return Reference(steps).visible(steps.check(Arguments(**arguments)))

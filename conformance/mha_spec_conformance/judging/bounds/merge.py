"""Error bounds of merging two halves of one softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.reference import Reference

from .evaluation import as_float64
from .roundoff import ERROR_OF_EXP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.steps import Steps

    from .roundoff import Precision

__all__ = ["MergeBounds"]


class MergeBounds:
    """Bounds of `merge_attention`: output and lse, exact where a half is empty (MHA-MERGE-2, MHA-MERGE-3).

    They hold for exponentials of each half, for a sigmoid of the difference, and for interpolation between the halves.
    """

    @numpy.errstate(all="ignore")
    def __init__(self, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any], steps: Steps) -> None:
        """Evaluate the case."""
        given = {name: as_float64(array) for name, array in arrays.items()}
        self._output, self._lse = output, lse = Reference(steps).merge_attention(**given, **options)
        self.values = {"output": output, "lse": lse}
        lse_a, lse_b = given["lse_a"], given["lse_b"]
        self._both = (lse_a != -numpy.inf) & (lse_b != -numpy.inf)
        self._lses = [numpy.where(self._both, half, 0.0) for half in (lse_a, lse_b)]
        self._outputs = [numpy.where(self._both[..., None], given[name], 0.0) for name in ("output_a", "output_b")]
        self._shares = [numpy.exp(half - numpy.where(self._both, lse, 0.0)) for half in self._lses]
        self._distance = abs(self._lses[0] - self._lses[1])

    @numpy.errstate(all="ignore")
    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """The largest error of each element."""
        p, exp = precision, ERROR_OF_EXP * precision.u_a
        sizes = [abs(share)[..., None] * abs(output) for share, output in zip(self._shares, self._outputs, strict=True)]
        smaller = numpy.minimum(*self._shares)
        error = smaller * (p.u_a * self._distance + exp) + 4 * p.u_a + (p.u_a + p.u_l) * abs(self._lse)
        relative = error + p.u_a * self._distance + 2 * exp
        output = (relative + 4 * p.u_a)[..., None] * (sizes[0] + sizes[1])
        output = output + 4 * p.u_a * abs(self._outputs[0] - self._outputs[1]) + p.u_o * abs(self._output) + p.w
        lse = error + 2 * p.u_a * (abs(self._lses[0]) + abs(self._lses[1]))
        return self._where_both(output, lse)

    @numpy.errstate(all="ignore")
    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """One standard deviation of the error of each element."""
        p, exp = precision, ERROR_OF_EXP * precision.u_a
        sizes = [share[..., None] ** 2 * output**2 for share, output in zip(self._shares, self._outputs, strict=True)]
        smaller = numpy.minimum(*self._shares) ** 2
        rounded = p.u_a**2 * (self._lses[0] ** 2 + self._lses[1] ** 2 + self._lse**2) / 3
        lse = (
            smaller * (p.u_a**2 * self._distance**2 / 3 + exp**2) + 4 * p.u_a**2 + rounded + p.u_l**2 * self._lse**2 / 3
        )
        relative = lse + p.u_a**2 * self._distance**2 / 3 + 2 * exp**2
        output = (relative + 4 * p.u_a**2)[..., None] * (sizes[0] + sizes[1])
        difference = self._outputs[0] - self._outputs[1]
        output = output + 4 * p.u_a**2 * difference**2 / 3 + p.u_o**2 / 3 * self._output**2 + p.w**2
        return self._where_both(numpy.sqrt(output), numpy.sqrt(lse))

    def _where_both(self, output: numpy.ndarray, lse: numpy.ndarray) -> dict[str, numpy.ndarray]:
        return {"output": numpy.where(self._both[..., None], output, 0.0), "lse": numpy.where(self._both, lse, 0.0)}

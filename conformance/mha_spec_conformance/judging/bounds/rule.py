"""The accuracy rule: the allowed error of each element of a result, computed from the case itself.

No tolerance is chosen by hand. An allowance bounds the rounding errors of an implementation that keeps products, sums
and softmax in the accumulator's type and rounds weights and results to the dtype of the inputs. It is computed from the
stored inputs in float64; `nox -s accuracy` validates it against correct implementations.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from mha_spec.steps import Steps
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec_conformance.suite.functions import FUNCTIONS

from .backward import BackwardBounds
from .forward import ForwardBounds, WeightBounds
from .layer import AlibiBounds, LayerBounds
from .merge import MergeBounds, MergeGradientBounds
from .rows import RowBounds
from .varlen import VarlenBounds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy

    from mha_spec.layer_steps import LayerSteps
    from mha_spec.varlen_reference import VarlenSteps

    from .roundoff import Precision

__all__ = ["RULE_VERSION", "SPECIFICATION", "Bounds", "allowances", "bounds", "deviations"]

RULE_VERSION = "2"
"""Version of the rule, printed in each report; a change of any allowance is a new version."""

SPECIFICATION = Steps()


class Bounds(Protocol):
    """One case evaluated in float64, from which its bounds in any precision are computed."""

    @property
    def values(self) -> dict[str, numpy.ndarray]:
        """The results in float64, by name of the output."""
        ...

    def allowances(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the largest error of each element (gate A: sums of linear depth); 0 where the result is exact."""
        ...

    def deviations(self, precision: Precision) -> dict[str, numpy.ndarray]:
        """Return the standard deviation of the error of each element (gate B: independent roundings)."""
        ...


_BOUNDS: dict[str, Callable[[Mapping[str, numpy.ndarray], Mapping[str, Any], Any], Bounds]] = {
    "attention": ForwardBounds,
    "attention_weights": WeightBounds,
    "attention_vjp": BackwardBounds,
    "merge_attention": MergeBounds,
    "merge_attention_vjp": MergeGradientBounds,
    **{name: partial(LayerBounds, name) for name, function in FUNCTIONS.items() if function.of_layer},
    "rotary_embedding": partial(LayerBounds, "rotary_embedding"),
    **{name: partial(VarlenBounds, name) for name in VARLEN_FUNCTIONS},
    **{name: partial(AlibiBounds, name) for name in ("alibi_slopes", "alibi_bias")},
}

BY_ROW = {"attention": ForwardBounds, "attention_weights": WeightBounds}
"""The functions whose rows have errors that depend on no other row."""


def bounds(
    function: str,
    arrays: Mapping[str, numpy.ndarray],
    options: Mapping[str, Any],
    steps: Steps | LayerSteps | VarlenSteps = SPECIFICATION,
    rows: numpy.ndarray | None = None,
) -> Bounds:
    """Evaluate a case in float64; the bounds in every precision share this work.

    Args:
        function: The name of a function of the specification.
        arrays: The stored array inputs of the case, by name.
        options: The other options of the case.
        steps: The steps of the specification, or of the mistake whose results are bounded.
        rows: The rows of the outputs that matter, as flat indices over (batch, heads, q_len), or None for all rows. The
            bounds of other rows may be NaN; only those of `attention` and `attention_weights` are.
    """
    if rows is not None and function in BY_ROW and steps is SPECIFICATION:
        return RowBounds(BY_ROW[function], rows, arrays, options, SPECIFICATION)
    return _BOUNDS[function](arrays, options, steps)


def allowances(
    function: str,
    arrays: Mapping[str, numpy.ndarray],
    options: Mapping[str, Any],
    precision: Precision,
    steps: Steps | LayerSteps | VarlenSteps = SPECIFICATION,
) -> dict[str, numpy.ndarray]:
    """Return the allowance of each element of each output of a case; see `bounds`."""
    return bounds(function, arrays, options, steps).allowances(precision)


def deviations(
    function: str,
    arrays: Mapping[str, numpy.ndarray],
    options: Mapping[str, Any],
    precision: Precision,
    steps: Steps | LayerSteps | VarlenSteps = SPECIFICATION,
) -> dict[str, numpy.ndarray]:
    """Return the standard deviation of the error of each element of each output of a case; see `bounds`."""
    return bounds(function, arrays, options, steps).deviations(precision)

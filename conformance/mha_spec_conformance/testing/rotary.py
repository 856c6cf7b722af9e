"""The assertion about rotary embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.layer import Layer
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.judging.compare import ANY, EXACT, FINITE

from .fault import describe_as
from .likeness import Likeness, rotary_likeness
from .packing import DENSE, Dense
from .problem import read_array, read_result, read_tensor
from .results import Compared, Values, places_over, shares_of
from .sampling import Sampler, checked_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.arrays import Array
    from mha_spec_conformance.judging.bounds import Precision

__all__ = ["assert_rotary"]

ELEMENTS = 2**21
"""The number of elements that are compared in a large problem."""


def assert_rotary(
    output: Array,
    x: Array,
    positions: Array | Sequence[float],
    *,
    layout: str = "bhsd",
    profile: str = "standard",
    rows: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> float:
    """Require that `output` is the rotary embedding of `x`, within the allowances.

    Args:
        output: (batch, heads, length, size), of the dtype of x.
        x: (batch, heads, length, size).
        positions: (length,) or (batch, length), or with sections (len(sections), batch, length).
        layout: "bhsd", or "bshd" for the axes (batch, length, heads, size) of output and x.
        profile: The profile of precision; see docs/targets.md.
        rows: The tokens to compare; None compares all, or in a large problem tokens at edges of tiles and at random.
        seed: Another seed draws other tokens.
        **options: The options of `mha_spec.rotary_embedding`.

    Returns:
        The largest share of its allowance that an element uses.

    Raises:
        AssertionError: An element is wrong; the message says where, by how much, and what it looks like.
        ArgumentValueError, ArgumentTypeError: An argument is wrong, or the output has a wrong shape or dtype.
    """
    tensor = read_tensor("x", x, layout)
    where = numpy.asarray(read_array(positions))
    Layer().rotary_embedding(tensor[:, :, :0], where[..., :0], **options)
    Layer().steps.check_positions(tensor, where, options.get("sections"))
    result = read_result("output", output, tensor, tensor.shape, Dense(DENSE[layout]))
    chosen = checked_rows(rows, tensor.shape[2])
    if chosen is None:
        tokens = ELEMENTS // max(tensor.shape[0] * tensor.shape[1] * tensor.shape[3], 1)
        chosen = Sampler(tensor.shape[2], tokens, seed).rows(1, 0)
    run = precision(tensor.dtype.name, profile)
    arrays = {"x": tensor[:, :, chosen], "positions": where[..., chosen]}
    comparison = _compared(result[:, :, chosen], chosen, arrays, options, run)
    if comparison.wrong.any():
        raise AssertionError(describe_as([comparison], _like(comparison, arrays, options, run)))
    return float(comparison.shares.max(initial=0.0))


def _like(comparison: Compared, arrays: dict[str, numpy.ndarray], options: dict[str, Any], run: Precision) -> Likeness:
    """Explain a wrong rotation; without an explanation, the clause is that of the rotation."""
    like = rotary_likeness(comparison, arrays, options, run)
    return like if like.clauses else replace(like, clauses=("MHA-ROTARY-1",))


def _compared(
    got: numpy.ndarray, rows: numpy.ndarray, arrays: dict[str, numpy.ndarray], options: dict[str, Any], run: Precision
) -> Compared:
    """Compare tokens: components that do not turn are unchanged; where x is not finite, nothing is compared."""
    evaluated = bounds("rotary_embedding", arrays, options)
    expected, allowed = evaluated.values["output"], evaluated.allowances(run)["output"]
    turned = numpy.arange(expected.shape[-1]) < (options.get("rotary_dim") or expected.shape[-1])
    unspecified = ~numpy.isfinite(expected) | ~numpy.isfinite(allowed)
    kinds = numpy.where(unspecified, ANY, numpy.where(turned, FINITE, EXACT)).astype(numpy.uint8)
    places = places_over(expected.shape[:3])
    places[:, 2] = rows[places[:, 2]]
    expected, kinds, allowed, got = (array.reshape(len(places), -1) for array in (expected, kinds, allowed, got))
    values = Values(expected, kinds, allowed)
    return Compared("output", places, values, got, shares_of("output", got, values, run))

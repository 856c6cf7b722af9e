"""What a case is before its answer is known: the question, in exact numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy

ALL_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Input:
    """One array of a case.

    `values` are float64, bool or integers. `dtype` says what a run makes of them: "case" is the dtype of the run and
    needs values that bfloat16 and float16 hold exactly (for full-mantissa cases: that the case's own dtypes hold);
    "softmax" is float64 in a float64 run, else float32; any other name is that dtype in every run. With `generator`
    the index holds the seed and kind in place of the values.
    """

    values: numpy.ndarray
    dtype: str = "case"
    generator: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Description:
    """One case without its expected values; of its outputs those in `outputs` are compared, all where none is named."""

    id: str
    title: str
    function: str
    clauses: tuple[str, ...]
    features: tuple[str, ...]
    inputs: Mapping[str, Input]
    options: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ALL_DTYPES
    level: str = "MUST"
    lse: bool = True
    sampled_rows: int | None = None
    outputs: tuple[str, ...] = ()
    error: Mapping[str, str] | None = None

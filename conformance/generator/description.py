"""A case without its expected values: the question, in exact numbers."""

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

    `values` are float64, bool or integers. `dtype` names the dtype that a run converts them to: "case" is the dtype of
    the run, so that the values must be exact in every dtype of the case; "softmax" is float64 in a float64 run, else
    float32; any other name is this dtype in every run. With a `generator`, the index stores the seed and kind instead
    of the values.
    """

    values: numpy.ndarray
    dtype: str = "case"
    generator: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Description:
    """One case without its expected values; only the outputs named in `outputs` are compared, or all if it is empty.

    With `edges`, the sampled rows lie at the same few places of all heads, most of them where tiles of kernels end.
    """

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
    edges: bool = False
    outputs: tuple[str, ...] = ()
    error: Mapping[str, str] | None = None

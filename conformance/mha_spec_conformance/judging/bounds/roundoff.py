"""The precision that the rule assumes: a unit roundoff for each place where an implementation rounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import ml_dtypes

from mha_spec.arrays import softmax_dtype_name
from mha_spec.errors import ArgumentValueError
from mha_spec_conformance.targets.claims import PROFILES

if TYPE_CHECKING:
    from mha_spec_conformance.targets.claims import Shards

__all__ = ["Precision", "precision", "underflow", "unit_roundoff"]

ERROR_OF_EXP = 8
"""Allowed relative error of exp and tanh, in unit roundoffs of the accumulator: 4 ulp."""

ERROR_OF_FAST_EXP = 2.0**-13
"""Allowed relative error of exp and tanh with 16-bit inputs, where kernels use exponentials of float16's accuracy."""

ERROR_OF_APPROXIMATE_TANH = 2.0**-11
"""Allowed relative error of tanh in the profile fused: that of tanh.approx.f32 of GPUs."""

SUBNORMAL_ROUNDING = 2.0**-25
"""Absolute rounding error of subnormal float16 numbers, which no library flushes to 0."""

FLUSHED_NORMALS = 16
"""In other dtypes, results below this multiple of the smallest normal number may be 0: XLA's exp is 0 below 4e-37."""


@dataclass(frozen=True)
class Precision:
    """The unit roundoffs of a run, its errors of exp and tanh, its underflow, and the largest finite number."""

    dtype: str
    u_in: float
    """Inputs."""
    u_a: float
    """Accumulator: products, sums, scores and softmax."""
    u_p: float
    """Stored weights and stored gradients of the logits."""
    u_dp: float
    """Stored gradients of the weights."""
    u_o: float
    """Results."""
    u_l: float
    """Stored log-sum-exp."""
    e_x: float
    """Relative error of exp."""
    e_t: float
    """Relative error of tanh."""
    w: float
    """Absolute error of an underflow."""
    f: float
    """Smallest normal number of the accumulator: smaller inputs and products may be flushed to 0."""
    largest: float
    """Largest finite number of the dtype."""
    shards: Shards | None = None
    """The shards of the keys whose partial results are merged; None if a call has no ranks."""


@lru_cache
def unit_roundoff(dtype: str) -> float:
    """Return half the distance from 1 to the next number of the dtype."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


@lru_cache
def underflow(dtype: str) -> float:
    """Return the absolute error of a result below the normal numbers of the dtype."""
    return SUBNORMAL_ROUNDING if dtype == "float16" else FLUSHED_NORMALS * float(ml_dtypes.finfo(dtype).smallest_normal)


@lru_cache
def precision(dtype: str, profile: str = "standard", shards: Shards | None = None) -> Precision:
    """Return the precision of a run in `dtype`; only float64 has a float64 accumulator (MHA-SOFTMAX-2).

    Ranks that share the keys of a call round in each merge of their partial results too (MHA-SHARD-3).
    """
    if profile not in PROFILES:
        raise ArgumentValueError(f"`profile` must be one of {', '.join(PROFILES)}, received profile={profile!r}.")
    u_in, u_a = unit_roundoff(dtype), unit_roundoff(softmax_dtype_name(dtype))
    stored = u_a if profile == "strict" else u_in
    error_of_exp = ERROR_OF_FAST_EXP if u_in > u_a else ERROR_OF_EXP * u_a
    approximates = profile == "fused" and softmax_dtype_name(dtype) == "float32"
    return Precision(
        dtype=dtype,
        u_in=u_in,
        u_a=u_a,
        u_p=stored,
        u_dp=stored,
        u_o=u_in,
        u_l=u_a,
        e_x=error_of_exp,
        e_t=ERROR_OF_APPROXIMATE_TANH if approximates else error_of_exp,
        w=underflow(dtype),
        f=float(ml_dtypes.finfo(softmax_dtype_name(dtype)).smallest_normal),
        largest=float(ml_dtypes.finfo(dtype).max),
        shards=shards,
    )

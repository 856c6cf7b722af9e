"""What an implementation is supposed to work in: one unit roundoff for each place where it rounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes

from mha_spec.arrays import softmax_dtype_name
from mha_spec.errors import ArgumentValueError
from mha_spec_conformance.targets.claims import PROFILES

__all__ = ["Precision", "precision", "underflow", "unit_roundoff"]

ERROR_OF_EXP = 8
"""What exp and tanh may be wrong by, in unit roundoffs of the accumulator: 4 ulp."""

ERROR_OF_FAST_EXP = 2.0**-13
"""The same where the inputs have 16 bits: exponentials that are good to half a unit of float16 are honest there."""

SUBNORMAL_ROUNDING = 2.0**-25
"""Rounding among the subnormal numbers of float16, which no library flushes."""

FLUSHED_NORMALS = 16
"""In the other types all below so many smallest normal numbers may be flushed to 0: XLA's exp does it at 4e-37."""


@dataclass(frozen=True)
class Precision:
    """The unit roundoffs of one run, its errors of exp and tanh, one underflow, and the largest finite number."""

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
    """Absolute error of one underflow."""
    f: float
    """Smallest normal number of the accumulator: what is smaller may be flushed to 0, in inputs and in products."""
    largest: float
    """Largest finite number of the dtype."""


@lru_cache
def unit_roundoff(dtype: str) -> float:
    """Half the distance from 1 to the next number of the dtype."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


@lru_cache
def underflow(dtype: str) -> float:
    """The absolute error of a result that is too small for the normal numbers of the dtype."""
    return SUBNORMAL_ROUNDING if dtype == "float16" else FLUSHED_NORMALS * float(ml_dtypes.finfo(dtype).smallest_normal)


@lru_cache
def precision(dtype: str, profile: str = "standard") -> Precision:
    """The precision of a run in `dtype`; the accumulator is float64 for float64, else float32 (MHA-SOFTMAX-2)."""
    if profile not in PROFILES:
        raise ArgumentValueError(f"`profile` must be one of {', '.join(PROFILES)}, received profile={profile!r}.")
    u_in, u_a = unit_roundoff(dtype), unit_roundoff(softmax_dtype_name(dtype))
    stored = u_a if profile == "strict" else u_in
    error_of_exp = ERROR_OF_FAST_EXP if u_in > u_a else ERROR_OF_EXP * u_a
    return Precision(
        dtype=dtype,
        u_in=u_in,
        u_a=u_a,
        u_p=stored,
        u_dp=stored,
        u_o=u_in,
        u_l=u_a,
        e_x=error_of_exp,
        e_t=error_of_exp,
        w=underflow(dtype),
        f=float(ml_dtypes.finfo(softmax_dtype_name(dtype)).smallest_normal),
        largest=float(ml_dtypes.finfo(dtype).max),
    )

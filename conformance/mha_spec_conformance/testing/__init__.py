"""Assertions for the tests of a kernel: its sizes, its device, and the accuracy rule instead of a tolerance.

    from mha_spec_conformance.testing import assert_attention

    assert_attention(output, query, key, value, lse=lse, causal=True, layout="bshd")

The arrays may be of any library. The expected values and the allowance of each element are computed in float64 from the
arguments themselves. Large problems are compared at rows sampled at the edges of tiles and at random.
"""

from __future__ import annotations

from .assertions import allowance, assert_attention, assert_attention_vjp
from .rotary import assert_rotary

__all__ = ["allowance", "assert_attention", "assert_attention_vjp", "assert_rotary"]

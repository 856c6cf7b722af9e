"""The accuracy rule of packed calls and rotations: honest implementations are within it, planted mistakes are not."""

from __future__ import annotations

import numpy
import packed
import pytest
import rotations
from shares import Shares, try_each

from mha_spec.arrays import FLOATING

NARROW = FLOATING[1:]


@pytest.mark.parametrize("dtype", NARROW)
def test_honest_packed_calls_are_within_the_allowance(dtype: str) -> None:
    shares = Shares("a packed call")
    for number in range(7):
        p = packed.draw_packed(numpy.random.default_rng([number, *dtype.encode()]), dtype)
        for call in (p.forward, p):
            shares.judge(call, packed.honest(number, p))
    assert shares.refused == []
    assert len(shares.used) == 4
    assert all(0 < share <= 1 for share in shares.used.values())


@pytest.mark.parametrize("dtype", NARROW)
def test_honest_rotations_are_within_the_allowance(dtype: str) -> None:
    shares = Shares("a rotation")
    try_each(shares, dtype, range(17), rotations.draw_rotation, rotations.HONEST)
    assert shares.refused == []
    assert len(shares.used) == len(rotations.HONEST)
    assert all(0 < share <= 1 for share in shares.used.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["plain", "biased", "shared"])
def test_mistakes_of_packed_calls_exceed_the_allowance(kind: str, dtype: str) -> None:
    p, shares = packed.planted_problem(3, dtype, kind), Shares("a packed call")
    shares.plant(p, packed.planted(dtype)[kind])
    assert min(shares.least.values()) > 1
    assert shares.overlooked == []
    shares.plant(p, {"none": packed.Packing(packed.padded, packed.Variant("plain").answer)})
    assert shares.overlooked == [f"none is within the allowance of a packed call in {dtype}"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mistakes_of_rotations_exceed_the_allowance(dtype: str) -> None:
    p, shares = rotations.planted_problem(3, dtype), Shares("a rotation")
    shares.plant(p, rotations.PLANTED)
    assert min(shares.least.values()) > 1
    shares.plant(p, {"none": rotations.by_jax})
    assert shares.overlooked == [f"none is within the allowance of a rotation in {dtype}"]

"""The formulas of the accuracy rule, written again: row by row, over the keys that each row sees."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy
import pytest

from mha_spec.arrays import FLOATING
from mha_spec_conformance.judging.bounds import Precision, allowances, precision

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 5, 11, 7, 13
GROUP = HEADS // KV_HEADS
CAP, RATE = 3.0, 0.25

HALF_THE_DIGITS = 2.0**-26
"""Relative error of sum w (v - o)^2 by three products, which keeps half the digits of float64."""

Index = tuple[int, ...]


def question() -> dict[str, numpy.ndarray]:
    """Return a call with every option; query 2 of batch entry 0 sees no key, and no row sees key 4."""
    rng = numpy.random.default_rng(11)
    x: dict[str, numpy.ndarray] = {
        "query": rng.standard_normal((BATCH, HEADS, Q_LEN, QK_DIM)),
        "key": rng.standard_normal((BATCH, KV_HEADS, KV_LEN, QK_DIM)),
        "value": rng.standard_normal((BATCH, KV_HEADS, KV_LEN, V_DIM)),
        "bias": rng.standard_normal((1, HEADS, Q_LEN, 1)),
        "sinks": rng.standard_normal(HEADS),
        "grad_output": rng.standard_normal((BATCH, HEADS, Q_LEN, V_DIM)),
        "grad_lse": rng.standard_normal((BATCH, HEADS, Q_LEN)),
    }
    arrays = {name: array.astype(numpy.float32) for name, array in x.items()}
    arrays["mask"] = rng.random((BATCH, 1, Q_LEN, KV_LEN)) < 0.7
    arrays["mask"][0, :, 2] = False
    arrays["mask"][..., 4] = False
    arrays["dropout_mask"] = rng.random((BATCH, HEADS, Q_LEN, KV_LEN)) < 0.8
    return arrays


@dataclass
class Row:
    """One row that sees the keys `keys`, with every quantity of the formulas."""

    index: Index
    keys: list[int]
    x: Mapping[str, numpy.ndarray]
    p: Precision

    def __post_init__(self) -> None:
        b, h, i = self.index
        x, p, keys, kv = self.x, self.p, self.keys, h // GROUP
        self.q, self.k, self.v = x["query"][b, h, i], x["key"][b, kv, keys], x["value"][b, kv, keys]
        self.z = x["sinks"][h]
        self.kept = x["dropout_mask"][b, h, i, keys] / (1 - RATE)
        self.raw = self.k @ self.q / math.sqrt(QK_DIM)
        self.reach = abs(self.k) @ abs(self.q) / math.sqrt(QK_DIM)
        self.y = CAP * numpy.tanh(self.raw / CAP)
        self.s = self.y + x["bias"][0, h, i, 0]
        self.m = max([*self.s, self.z])
        self.total = sum(numpy.exp(self.s - self.m)) + math.exp(self.z - self.m)
        self.lse = self.m + math.log(self.total)
        self.weights, self.sink = numpy.exp(self.s - self.m) / self.total, math.exp(self.z - self.m) / self.total
        self.output = (self.weights * self.kept) @ self.v
        flushed = sum(abs(self.q)) + numpy.sum(abs(self.k), axis=1) + 2 * QK_DIM + 2
        flushed = p.f * (1 + 1 / math.sqrt(QK_DIM)) * flushed
        before = p.u_a * ((QK_DIM + 3) * self.reach + 2 * abs(self.raw)) + flushed
        slope = 1 - numpy.tanh(numpy.maximum(0, abs(self.raw) - before) / CAP) ** 2
        self.e_cap = slope * before + (p.e_t + 2 * p.u_a) * abs(self.y) + 8 * p.u_a * CAP
        self.sigma = self.e_cap + p.u_a * (2 * abs(self.s) + abs(self.m)) + p.e_x
        self.sigma_z = p.u_a * (2 * abs(self.z) + abs(self.m) + abs(self.lse)) + p.u_l * abs(self.lse) + 2 * p.e_x
        self.mean = self.weights @ self.sigma + self.sink * self.sigma_z
        self.guard = math.exp(2 * max([0, *self.sigma]))

    def lse_error(self) -> float:
        p = self.p
        stored = (p.u_a + p.u_l) * abs(self.lse)
        if not self.keys:
            return stored
        return self.guard * self.mean + p.u_a * (KV_LEN + 1 + 5) + stored + p.u_a * abs(self.m)

    def output_error(self, c: int) -> float:
        if not self.keys:
            return 0.0
        p, n, o = self.p, KV_LEN + 1, self.output[c]
        terms = self.kept * self.v[:, c]
        spread = (self.weights * self.sigma) @ (terms - o) ** 2 + self.sink * self.sigma_z * o**2
        error = self.guard * math.sqrt(self.mean * spread)
        error += (p.u_p + p.u_a * n + 2 * p.u_a) * (self.weights @ abs(terms)) + p.u_a * (n + 4) * abs(o)
        flushed = sum(self.weights * self.kept + self.kept * (abs(self.v[:, c]) + 2)) + 2
        return error + p.u_o * abs(o) + p.w * (sum(abs(terms)) / self.total + 1) + p.f * flushed

    def weight_error(self) -> numpy.ndarray:
        p, n = self.p, KV_LEN + 1
        relative = numpy.expm1(self.guard * (self.sigma + self.mean) + p.u_a * (n + 6))
        return self.weights * relative + p.u_o * self.weights + p.w

    def backward(self) -> None:
        b, h, i = self.index
        p = self.p
        self.g, self.dO = self.x["grad_lse"][b, h, i], self.x["grad_output"][b, h, i]
        self.dP = self.kept * (self.v @ self.dO)
        self.D = self.dO @ self.output - self.g
        self.dS = self.weights * (self.dP - self.D)
        tau = self.y / CAP
        self.slope = 1 - tau**2
        self.dX = self.dS * self.slope
        self.rho = numpy.expm1(self.sigma + self.lse_error() + p.u_a * (abs(self.s) + abs(self.lse)) + p.e_x)
        self.rho_z = math.expm1(self.sigma_z + self.lse_error() + p.u_a * (abs(self.z) + abs(self.lse)) + p.e_x)
        eta = self.kept * p.u_a * V_DIM * (abs(self.v) @ abs(self.dO)) + (p.u_dp + 2 * p.u_a) * abs(self.dP)
        eta = eta + p.f * (self.kept * (sum(abs(self.dO)) + numpy.sum(abs(self.v), axis=1) + 2 * V_DIM) + 1)
        first = sum(abs(self.dO[c]) * self.output_error(c) for c in range(V_DIM))
        first += p.u_a * V_DIM * (abs(self.dO) @ abs(self.output))
        first += p.f * (sum(abs(self.dO) + abs(self.output)) + 2 * V_DIM)
        second = self.weights @ ((self.rho + p.u_p + p.u_a * KV_LEN) * abs(self.dP) + eta)
        second += p.f * (sum(self.weights + abs(self.dP)) + 2 * KV_LEN)
        self.dD = (max(first, second) if self.keys else 0.0) + p.u_a * (abs(self.D + self.g) + abs(self.g))
        gap = abs(self.dP - self.D)
        self.F = self.weights * ((self.rho + 2 * p.u_a) * gap + eta) + p.u_p * abs(self.dS) + 4 * p.w * (1 + gap)
        error = self.e_cap / CAP
        self.dL = 2 * abs(tau) * error + error**2 + 3 * p.u_a
        self.C = self.F * (self.slope + self.dL) + abs(self.dS) * self.dL + p.w


PRECISIONS = [precision(dtype) for dtype in FLOATING]
PRECISIONS.append(replace(precision("float32"), f=2.0**-12))
NAMES = [*FLOATING, "float32 that flushes much"]
"""The last precision flushes so many numbers that the terms of flushed numbers matter."""


def rows(p: Precision) -> Iterator[Row]:
    """Yield every row of the call in float64."""
    arrays = question()
    x = {name: array.astype(numpy.float64) for name, array in arrays.items()}
    for b, h, i in numpy.ndindex(BATCH, HEADS, Q_LEN):
        yield Row((b, h, i), [j for j in range(KV_LEN) if arrays["mask"][b, 0, i, j]], x, p)


def compare(allowed: numpy.ndarray, expected: Mapping[Index, float]) -> None:
    for index in numpy.ndindex(*allowed.shape):
        assert math.isclose(allowed[index], expected.get(index, 0.0), rel_tol=HALF_THE_DIGITS), index


@pytest.mark.parametrize("p", PRECISIONS, ids=NAMES)
def test_forward(p: Precision) -> None:
    arrays = question()
    forward = {name: x for name, x in arrays.items() if not name.startswith("grad_")}
    allowed = allowances("attention", forward, {"softcap": CAP, "dropout_rate": RATE}, p)
    compare(allowed["lse"], {row.index: row.lse_error() for row in rows(p)})
    compare(allowed["output"], {(*row.index, c): row.output_error(c) for row in rows(p) for c in range(V_DIM)})


@pytest.mark.parametrize("p", PRECISIONS, ids=NAMES)
def test_weights(p: Precision) -> None:
    arrays = question()
    forward = {name: arrays[name] for name in ("query", "key", "mask", "bias", "sinks")}
    allowed = allowances("attention_weights", forward, {"softcap": CAP}, p)["weights"]
    pairs = ((row, zip(row.keys, row.weight_error(), strict=True)) for row in rows(p))
    compare(allowed, {(*row.index, j): error for row, errors in pairs for j, error in errors})


@pytest.mark.parametrize("p", PRECISIONS, ids=NAMES)
def test_gradients_of_query_key_and_value(p: Precision) -> None:
    arrays = question()
    allowed = allowances("attention_vjp", arrays, {"softcap": CAP, "dropout_rate": RATE}, p)
    scale, n_q, partial = 1 / math.sqrt(QK_DIM), Q_LEN * GROUP, GROUP - 1
    query, key, value = {}, defaultdict(float), defaultdict(float)
    sums, lost = defaultdict(float), defaultdict(float)
    for row in rows(p):
        row.backward()
        b, h, i = row.index
        spread = row.C + p.u_a * (KV_LEN + 1) * abs(row.dX)
        for c in range(QK_DIM if row.keys else 0):
            shared = row.dD * abs((row.weights * row.slope) @ row.k[:, c])
            rounded = (p.u_o + 2 * p.u_a) * abs(scale * row.dX @ row.k[:, c])
            flushed = p.f * (1 + scale) * (sum(abs(row.dX) + abs(row.k[:, c])) + 2 * KV_LEN + 1)
            query[b, h, i, c] = scale * (spread @ abs(row.k[:, c]) + shared) + rounded + p.w + flushed
        by_key = row.C + row.weights * row.dD * (row.slope + row.dL)
        by_key = by_key + (p.u_a * (n_q + 1) + p.u_o * partial) * abs(row.dX)
        dropped = row.weights * row.kept
        kept = dropped * (row.rho + p.u_p + 2 * p.u_a + p.u_a * n_q + p.u_o * partial)
        for place, j in enumerate(row.keys):
            for c in range(QK_DIM):
                key[b, h // GROUP, j, c] += scale * by_key[place] * abs(row.q[c])
                key[b, h // GROUP, j, c] += p.f * (1 + scale) * (abs(row.dX[place]) + abs(row.q[c]))
                sums["key", b, h // GROUP, j, c] += scale * row.dX[place] * row.q[c]
            for c in range(V_DIM):
                value[b, h // GROUP, j, c] += kept[place] * abs(row.dO[c])
                value[b, h // GROUP, j, c] += p.f * (dropped[place] + row.kept[place] * (abs(row.dO[c]) + 2))
                sums["value", b, h // GROUP, j, c] += dropped[place] * row.dO[c]
                lost[b, h // GROUP, j, c] += row.kept[place] * abs(row.dO[c])
    compare(allowed["grad_query"], query)
    flushed = GROUP * p.w + p.f * (1 + scale) * (2 * n_q + GROUP)
    whole = {index: (p.u_o + 2 * p.u_a) * abs(sums["key", *index]) + flushed for index in key}
    compare(allowed["grad_key"], {index: key[index] + whole[index] for index in key})
    whole = {index: p.u_o * abs(sums["value", *index]) + p.w * (GROUP + lost[index]) + p.f * GROUP for index in value}
    compare(allowed["grad_value"], {index: value[index] + whole[index] for index in value})


@pytest.mark.parametrize("p", PRECISIONS, ids=NAMES)
def test_gradients_of_bias_and_sinks(p: Precision) -> None:
    arrays = question()
    allowed = allowances("attention_vjp", arrays, {"softcap": CAP, "dropout_rate": RATE}, p)
    u_o, w = max(2.0**-24, p.u_a), max(2.0**-122, p.w)
    flushed = p.f * BATCH * KV_LEN
    bias, bias_sums = defaultdict(float), defaultdict(float)
    sinks, sink_sums = defaultdict(float), defaultdict(float)
    for row in rows(p):
        row.backward()
        _, h, i = row.index
        if row.keys:
            depth = p.u_a * BATCH * KV_LEN
            bias[0, h, i, 0] += sum(row.F + row.weights * row.dD + depth * abs(row.dS))
            bias_sums[0, h, i, 0] += sum(row.dS)
        relative = row.rho_z + p.u_a + p.u_a * BATCH * Q_LEN
        sinks[h,] += row.sink * (relative * abs(row.D) + row.dD) + 4 * p.w * (1 + abs(row.D))
        sink_sums[h,] -= row.sink * row.D
    compare(allowed["grad_bias"], {index: bias[index] + u_o * abs(bias_sums[index]) + w + flushed for index in bias})
    compare(allowed["grad_sinks"], {index: sinks[index] + u_o * abs(sink_sums[index]) + w for index in sinks})


@dataclass
class Merged:
    """One row of two halves, with the quantities that merging and its gradients share."""

    row: Mapping[str, numpy.ndarray]
    p: Precision
    u_l: float

    def __post_init__(self) -> None:
        p, self.lse_a, self.lse_b = self.p, float(self.row["lse_a"]), float(self.row["lse_b"])
        self.d, self.e = abs(self.lse_a - self.lse_b), 8 * p.u_a
        self.lse = float(numpy.logaddexp(self.lse_a, self.lse_b))
        self.a, self.b = math.exp(self.lse_a - self.lse), math.exp(self.lse_b - self.lse)
        self.first = min(self.a, self.b) * (p.u_a * self.d + self.e) + 4 * p.u_a + (p.u_a + self.u_l) * abs(self.lse)
        self.r = self.first + p.u_a * self.d + 2 * self.e + 4 * p.u_a

    def lse_error(self) -> float:
        return self.first + 2 * self.p.u_a * (abs(self.lse_a) + abs(self.lse_b))

    def output_error(self, c: int) -> float:
        p, o_a, o_b = self.p, self.row["output_a"][c], self.row["output_b"][c]
        error = self.r * (self.a * abs(o_a) + self.b * abs(o_b)) + 4 * p.u_a * abs(o_a - o_b)
        return error + p.u_o * abs(self.a * o_a + self.b * o_b) + p.w + p.f * (abs(o_a) + abs(o_b))

    def grad_output_error(self, share: float, c: int) -> float:
        p, size = self.p, abs(self.row["grad_output"][c])
        return ((self.r + p.u_a + p.u_o) * share + 4 * p.u_a) * size + p.w + p.f * size

    def through_shares_error(self, half: str) -> float:
        p, x, depth = self.p, self.row, len(self.row["grad_output"])
        t = abs(self.a * self.b * float(x["grad_output"] @ (x["output_a"] - x["output_b"])))
        share, from_halves, from_joint = getattr(self, half), 0.0, 0.0
        for c, gradient in enumerate(abs(x["grad_output"])):
            o_a, o_b, o_x = (abs(x[name][c]) for name in ("output_a", "output_b", f"output_{half}"))
            from_halves += self.a * self.b * p.u_a * (depth + 4) * gradient * (o_a + o_b)
            summed = p.u_a * (depth + 4) * (o_x + self.a * o_a + self.b * o_b)
            from_joint += share * gradient * (self.output_error(c) + summed)
        return max(from_halves + (2 * self.r + 4 * p.u_a) * t, from_joint + (self.r + 4 * p.u_a) * t)

    def grad_lse_error(self, half: str) -> float:
        p, x, share = self.p, self.row, getattr(self, half)
        g, depth = float(x["grad_lse"]), len(x["grad_output"])
        moved = float(x["grad_output"] @ (x["output_a"] - x["output_b"]))
        gradient = share * g + {"a": 1, "b": -1}[half] * self.a * self.b * moved
        sizes = abs(x["output_a"]) + abs(x["output_b"])
        flushed = sum((1 + abs(x["grad_output"])) * sizes + abs(x["grad_output"])) + 2 * depth + abs(g)
        error = self.through_shares_error(half) + (self.r + 4 * p.u_a) * share * abs(g)
        return error + 4 * p.u_a * (abs(moved) + abs(g)) + self.u_l * abs(gradient) + p.w + p.f * flushed


def halves(dtype_of_lse: str) -> dict[str, numpy.ndarray]:
    """Return two halves and their cotangents."""
    rng = numpy.random.default_rng(13)
    outputs = {name: rng.standard_normal((2, 3, 5, 7)) for name in ("output_a", "output_b", "grad_output")}
    lses = {name: 3 * rng.standard_normal((2, 3, 5)) for name in ("lse_a", "lse_b", "grad_lse")}
    narrow = {name: array.astype(numpy.float32) for name, array in outputs.items()}
    return narrow | {name: array.astype(numpy.float32).astype(dtype_of_lse) for name, array in lses.items()}


def merged_rows(arrays: Mapping[str, numpy.ndarray], p: Precision, u_l: float) -> Iterator[tuple[Index, Merged]]:
    """Yield every row in float64."""
    wide = {name: array.astype(numpy.float64) for name, array in arrays.items()}
    for index in numpy.ndindex(2, 3, 5):
        yield index, Merged({name: array[index] for name, array in wide.items()}, p, u_l)


TYPES_OF_LSE = [(dtype, "float64" if dtype == "float64" else "float32") for dtype in FLOATING]
TYPES_OF_LSE += [("float64", "float32"), ("bfloat16", "float16")]
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11}


@pytest.mark.parametrize(("dtype", "dtype_of_lse"), TYPES_OF_LSE)
@pytest.mark.parametrize("flushed", [None, 2.0**-12])
def test_merge(dtype: str, dtype_of_lse: str, flushed: float | None) -> None:
    p, arrays = precision(dtype), halves(dtype_of_lse)
    p = p if flushed is None else replace(p, f=flushed)
    u_l = max(p.u_a, UNITS[dtype_of_lse])
    operands = {name: array for name, array in arrays.items() if not name.startswith("grad_")}
    allowed = allowances("merge_attention", operands, {}, p)
    merged = list(merged_rows(arrays, p, u_l))
    compare(allowed["lse"], {index: row.lse_error() for index, row in merged})
    compare(allowed["output"], {(*index, c): row.output_error(c) for index, row in merged for c in range(7)})


@pytest.mark.parametrize(("dtype", "dtype_of_lse"), TYPES_OF_LSE)
@pytest.mark.parametrize("flushed", [None, 2.0**-12])
def test_gradients_of_merge(dtype: str, dtype_of_lse: str, flushed: float | None) -> None:
    p, arrays = precision(dtype), halves(dtype_of_lse)
    p = p if flushed is None else replace(p, f=flushed)
    u_l = max(p.u_a, UNITS[dtype_of_lse])
    allowed = allowances("merge_attention_vjp", arrays, {}, p)
    merged = list(merged_rows(arrays, p, u_l))
    for half in "ab":
        shares = [(index, row, getattr(row, half)) for index, row in merged]
        errors = {(*index, c): row.grad_output_error(share, c) for index, row, share in shares for c in range(7)}
        compare(allowed[f"grad_output_{half}"], errors)
        compare(allowed[f"grad_lse_{half}"], {index: row.grad_lse_error(half) for index, row in merged})


@pytest.mark.parametrize("dtype", FLOATING)
def test_gradients_are_rounded_cotangents_if_the_other_half_is_empty(dtype: str) -> None:
    p, arrays = precision(dtype), halves("float64" if dtype == "float64" else "float32")
    arrays["lse_a"] = numpy.full_like(arrays["lse_a"], -math.inf)
    allowed = allowances("merge_attention_vjp", arrays, {}, p)
    assert not allowed["grad_output_a"].any()
    assert not allowed["grad_lse_a"].any()
    size, g = (abs(arrays[name].astype(numpy.float64)) for name in ("grad_output", "grad_lse"))
    wanted = (5 * p.u_a + p.u_o) * size + p.w + p.f * size
    numpy.testing.assert_allclose(allowed["grad_output_b"], wanted, rtol=HALF_THE_DIGITS)
    wanted = (8 * p.u_a + p.u_l) * g + p.w + p.f * (size.sum(axis=-1) + 14 + g)
    numpy.testing.assert_allclose(allowed["grad_lse_b"], wanted, rtol=HALF_THE_DIGITS)

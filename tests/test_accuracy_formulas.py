"""The formulas of the accuracy rule, written a second time: one row at a time, over the keys that it sees."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
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
"""sum w (v - o)^2 by three products keeps half the digits of float64, whatever the data."""

Index = tuple[int, ...]


def question() -> dict[str, numpy.ndarray]:
    """Every option at once; query 2 of batch entry 0 sees no key, key 4 is seen by no row."""
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
    """One query row that sees the keys `keys`, with every quantity of the formulas."""

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
        before = p.u_a * ((QK_DIM + 3) * self.reach + 2 * abs(self.raw))
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
        return error + p.u_o * abs(o) + p.w * (sum(abs(terms)) / self.total + 1)

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
        first = sum(abs(self.dO[c]) * self.output_error(c) for c in range(V_DIM))
        first += p.u_a * V_DIM * (abs(self.dO) @ abs(self.output))
        second = self.weights @ ((self.rho + p.u_p + p.u_a * KV_LEN) * abs(self.dP) + eta)
        self.dD = (max(first, second) if self.keys else 0.0) + p.u_a * (abs(self.D + self.g) + abs(self.g))
        gap = abs(self.dP - self.D)
        self.F = self.weights * ((self.rho + 2 * p.u_a) * gap + eta) + p.u_p * abs(self.dS) + 4 * p.w * (1 + gap)
        error = self.e_cap / CAP
        self.dL = 2 * abs(tau) * error + error**2 + 3 * p.u_a
        self.C = self.F * (self.slope + self.dL) + abs(self.dS) * self.dL + p.w


def rows(p: Precision) -> Iterator[Row]:
    """Every row of the question in float64."""
    arrays = question()
    x = {name: array.astype(numpy.float64) for name, array in arrays.items()}
    for b, h, i in numpy.ndindex(BATCH, HEADS, Q_LEN):
        yield Row((b, h, i), [j for j in range(KV_LEN) if arrays["mask"][b, 0, i, j]], x, p)


def compare(allowed: numpy.ndarray, expected: Mapping[Index, float]) -> None:
    for index in numpy.ndindex(*allowed.shape):
        assert math.isclose(allowed[index], expected.get(index, 0.0), rel_tol=HALF_THE_DIGITS), index


@pytest.mark.parametrize("dtype", FLOATING)
def test_forward(dtype: str) -> None:
    p, arrays = precision(dtype), question()
    forward = {name: x for name, x in arrays.items() if not name.startswith("grad_")}
    allowed = allowances("attention", forward, {"softcap": CAP, "dropout_rate": RATE}, p)
    compare(allowed["lse"], {row.index: row.lse_error() for row in rows(p)})
    compare(allowed["output"], {(*row.index, c): row.output_error(c) for row in rows(p) for c in range(V_DIM)})


@pytest.mark.parametrize("dtype", FLOATING)
def test_weights(dtype: str) -> None:
    p, arrays = precision(dtype), question()
    given = {name: arrays[name] for name in ("query", "key", "mask", "bias", "sinks")}
    allowed = allowances("attention_weights", given, {"softcap": CAP}, p)["weights"]
    pairs = ((row, zip(row.keys, row.weight_error(), strict=True)) for row in rows(p))
    compare(allowed, {(*row.index, j): error for row, errors in pairs for j, error in errors})


@pytest.mark.parametrize("dtype", FLOATING)
def test_gradients_of_query_key_and_value(dtype: str) -> None:
    p, arrays = precision(dtype), question()
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
            query[b, h, i, c] = scale * (spread @ abs(row.k[:, c]) + shared) + rounded + p.w
        own = row.C + row.weights * row.dD * (row.slope + row.dL)
        own = own + (p.u_a * (n_q + 1) + p.u_o * partial) * abs(row.dX)
        dropped = row.weights * row.kept
        kept = dropped * (row.rho + p.u_p + 2 * p.u_a + p.u_a * n_q + p.u_o * partial)
        for place, j in enumerate(row.keys):
            for c in range(QK_DIM):
                key[b, h // GROUP, j, c] += scale * own[place] * abs(row.q[c])
                sums["key", b, h // GROUP, j, c] += scale * row.dX[place] * row.q[c]
            for c in range(V_DIM):
                value[b, h // GROUP, j, c] += kept[place] * abs(row.dO[c])
                sums["value", b, h // GROUP, j, c] += dropped[place] * row.dO[c]
                lost[b, h // GROUP, j, c] += row.kept[place] * abs(row.dO[c])
    compare(allowed["grad_query"], query)
    whole = {index: (p.u_o + 2 * p.u_a) * abs(sums["key", *index]) + GROUP * p.w for index in key}
    compare(allowed["grad_key"], {index: key[index] + whole[index] for index in key})
    whole = {index: p.u_o * abs(sums["value", *index]) + p.w * (GROUP + lost[index]) for index in value}
    compare(allowed["grad_value"], {index: value[index] + whole[index] for index in value})


@pytest.mark.parametrize("dtype", FLOATING)
def test_gradients_of_bias_and_sinks(dtype: str) -> None:
    p, arrays = precision(dtype), question()
    allowed = allowances("attention_vjp", arrays, {"softcap": CAP, "dropout_rate": RATE}, p)
    u_o, w = max(2.0**-24, p.u_a), max(2.0**-122, p.w)
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
    compare(allowed["grad_bias"], {index: bias[index] + u_o * abs(bias_sums[index]) + w for index in bias})
    compare(allowed["grad_sinks"], {index: sinks[index] + u_o * abs(sink_sums[index]) + w for index in sinks})


@pytest.mark.parametrize("dtype", FLOATING)
def test_merge(dtype: str) -> None:
    p, rng = precision(dtype), numpy.random.default_rng(13)
    outputs = {f"output_{half}": rng.standard_normal((2, 3, 5, 7)).astype(numpy.float32) for half in "ab"}
    lses = {f"lse_{half}": 3 * rng.standard_normal((2, 3, 5)).astype(numpy.float32) for half in "ab"}
    allowed = allowances("merge_attention", {**outputs, **lses}, {}, p)
    wide = {name: array.astype(numpy.float64) for name, array in (outputs | lses).items()}
    expected_lse, expected = {}, {}
    for index in numpy.ndindex(2, 3, 5):
        a, b = wide["lse_a"][index], wide["lse_b"][index]
        t, exp, lse = abs(a - b), 8 * p.u_a, numpy.logaddexp(a, b)
        share_a, share_b = math.exp(a - lse), math.exp(b - lse)
        first = min(share_a, share_b) * (p.u_a * t + exp) + 4 * p.u_a + (p.u_a + p.u_l) * abs(lse)
        expected_lse[index] = first + 2 * p.u_a * (abs(a) + abs(b))
        relative = first + p.u_a * t + 2 * exp
        for c in range(7):
            o_a, o_b = wide["output_a"][(*index, c)], wide["output_b"][(*index, c)]
            error = (relative + 4 * p.u_a) * (share_a * abs(o_a) + share_b * abs(o_b)) + 4 * p.u_a * abs(o_a - o_b)
            expected[(*index, c)] = error + p.u_o * abs(share_a * o_a + share_b * o_b) + p.w
    compare(allowed["lse"], expected_lse)
    compare(allowed["output"], expected)

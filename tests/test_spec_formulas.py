"""The formulas of MHA-ACC-1, -2 and MHA-SHARD-3, transcribed term by term from SPEC.md, against those of the suite.

The letters are those of SPEC.md. Axes are b, h, i, j and c; quantities of a row keep a j of size 1.
"""

# ruff: noqa: E741, N806 - the letters are those of SPEC.md

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
from numpy import exp, expm1, sqrt, tanh

from mha_spec import reference
from mha_spec.sharding import shard_order
from mha_spec_conformance.judging.bounds import allowances, deviations, precision
from mha_spec_conformance.targets.claims import Shards

BATCH, HEADS, GROUP, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 5, 7, 11, 13
KV_HEADS = HEADS // GROUP
DTYPES = ("float64", "float32", "bfloat16", "float16", "float32 that flushes much")
"""The last precision flushes so many numbers that the terms of flushed numbers matter."""


def precision_of(dtype, profile="standard"):
    """Return the precision of a dtype, or one that flushes everything below 2^-12."""
    p = precision(dtype.partition(" ")[0], profile)
    return replace(p, f=2.0**-12) if " " in dtype else p


def sum_j(x):
    return numpy.sum(x, axis=-1, keepdims=True)


def over_keys(x, y):
    """Compute sum_j x[i,j] y[j,c]."""
    return numpy.einsum("bhij,bhjc->bhic", x, y)


def over_rows(x, y):
    """Compute sum_i x[i,j] y[i,c], summed over the group."""
    by_head = numpy.einsum("bhij,bhic->bhjc", x, y)
    return by_head.reshape(BATCH, KV_HEADS, GROUP, *by_head.shape[2:]).sum(axis=2)


def pairs(x, y):
    """Compute sum_c x[i,c] y[j,c]."""
    return numpy.einsum("bhic,bhjc->bhij", x, y)


def both_sums(x, y):
    """Compute sum_c |x[i,c]| + |y[j,c]|."""
    return abs(x).sum(axis=-1)[..., :, None] + abs(y).sum(axis=-1)[..., None, :]


@pytest.fixture(scope="module", params=["plain", "everything", "wide bias"])
def call(request):
    """Return a call of attention_vjp with different sizes, some empty rows, and bias and sinks in float64."""
    random = numpy.random.default_rng(7)
    normal = random.standard_normal
    arrays = {
        "query": normal((BATCH, HEADS, Q_LEN, QK_DIM)),
        "key": normal((BATCH, KV_HEADS, KV_LEN, QK_DIM)),
        "value": normal((BATCH, KV_HEADS, KV_LEN, V_DIM)),
        "grad_output": normal((BATCH, HEADS, Q_LEN, V_DIM)),
    }
    options = {"scale": 0.9}
    if request.param != "plain":
        mask = random.random((BATCH, 1, Q_LEN, KV_LEN)) < 0.7
        mask[0, :, 2] = False
        bias_shape = (1, HEADS, 1, KV_LEN) if request.param == "everything" else (BATCH, HEADS, Q_LEN, 1)
        arrays |= {"mask": mask, "bias": normal(bias_shape), "grad_lse": normal((BATCH, HEADS, Q_LEN))}
    if request.param == "everything":
        arrays["sinks"] = normal(HEADS)
        arrays["dropout_mask"] = random.random((BATCH, HEADS, Q_LEN, KV_LEN)) < 0.8
        options |= {"softcap": 1.5, "dropout_rate": 0.2}
    return SimpleNamespace(arrays=arrays, options=options)


@pytest.fixture(scope="module")
def case(call):
    """Compute the quantities of the case, with the names of SPEC.md."""
    a, c = call.arrays, SimpleNamespace(softcap=call.options.get("softcap"), scale=call.options["scale"])
    c.Q, c.dO = a["query"], a["grad_output"]
    c.K, c.V = (numpy.repeat(a[name], GROUP, axis=1) for name in ("key", "value"))
    c.bias = a.get("bias", numpy.zeros((1, 1, 1, 1)))
    c.seen = numpy.broadcast_to(a.get("mask", True), (BATCH, HEADS, Q_LEN, KV_LEN))
    c.row = c.seen.any(axis=-1, keepdims=True)
    c.read = over_rows(c.seen * 1.0, numpy.ones_like(c.dO[..., :1])) > 0
    c.sinks = "sinks" in a
    c.z = a["sinks"].reshape(1, -1, 1, 1) if c.sinks else 0.0
    c.X = c.seen * c.scale * pairs(c.Q, c.K)
    c.t = tanh(c.X / c.softcap) if c.softcap else numpy.zeros_like(c.X)
    c.Y = c.softcap * c.t if c.softcap else c.X
    c.S = c.seen * (c.Y + c.bias)
    c.m = numpy.max(numpy.where(c.seen, c.S, -numpy.inf), axis=-1, keepdims=True)
    c.m = numpy.maximum(c.m, c.z) if c.sinks else numpy.where(c.row, c.m, 0)
    e = c.seen * exp(c.S - c.m)
    c.l = sum_j(e) + (exp(c.z - c.m) if c.sinks else 0)
    c.l = numpy.where(c.l == 0, 1, c.l)
    c.lse = c.m + numpy.log(c.l)
    c.P = e / c.l
    c.P_z = exp(c.z - c.lse) if c.sinks else 0.0
    c.dropout = "dropout_mask" in a
    c.k = c.seen * (a["dropout_mask"] / (1 - call.options["dropout_rate"]) if c.dropout else 1.0)
    c.O = over_keys(c.k * c.P, c.V)
    c.g = a["grad_lse"][..., None] if "grad_lse" in a else numpy.zeros_like(c.m)
    c.dP = c.k * pairs(c.dO, c.V)
    c.D = sum_j(c.P * c.dP) - c.g
    c.dS = c.P * (c.dP - c.D)
    c.s = c.seen * (1 - c.t**2)
    c.dX = c.dS * c.s
    c.E_merges, c.U_merges = (0.0, 0.0), (0.0, 0.0)
    c.n, c.n1, c.N, c.M = KV_LEN, KV_LEN + c.sinks, GROUP * Q_LEN, BATCH * Q_LEN
    c.N_b = c.P.size / c.bias.size
    axes = tuple(axis for axis in range(4) if c.bias.shape[axis] == 1)
    c.over_bias = lambda x: numpy.sum(x, axis=axes, keepdims=True)
    c.spread = lambda w, w_z: (
        numpy.sum(w[..., None] * (c.k[..., None] * c.V[:, :, None] - c.O[..., None, :]) ** 2, axis=3) + w_z * c.O**2
    )
    names = ("grad_query", "grad_key", "grad_value", "grad_bias", "grad_sinks")
    inputs = {name: array for name, array in a.items() if name != "grad_output"}
    c.gradients = dict(zip(names, reference.attention_vjp(c.dO, **inputs, **call.options), strict=True))
    return c


def largest(c, p, wider):
    """Compute E of every result, MHA-ACC-1, and the slope of the soft cap."""
    x = largest_of_scores(c, p, wider)
    return largest_of_results(c, p, x) | largest_of_gradients(c, p, x), x.slope


def largest_of_scores(c, p, wider):
    """Compute the errors of the scores and of the sink's logit."""
    u_a, u_l, e_exp, e_tanh, f = p.u_a, p.u_l, p.e_x, p.e_t, p.f
    A = c.seen * abs(c.scale) * pairs(abs(c.Q), abs(c.K))
    F_X = c.seen * f * (1 + abs(c.scale)) * (both_sums(c.Q, c.K) + 2 * QK_DIM + 2)
    E_Y, slope = u_a * (QK_DIM + 3) * A + F_X, 1.0
    if c.softcap:
        E_X = u_a * ((QK_DIM + 3) * A + 2 * abs(c.X)) + F_X
        slope = 1 - tanh(numpy.maximum(0, abs(c.X) - E_X) / c.softcap) ** 2
        E_Y = c.seen * (slope * E_X + (e_tanh + 2 * u_a) * abs(c.Y) + 8 * u_a * c.softcap)
    sigma = c.seen * (E_Y + u_a * ((3 if wider else 2) * abs(c.S) + abs(c.m)) + e_exp)
    sigma_z = u_a * (2 * abs(c.z) + abs(c.m) + abs(c.lse)) + u_l * abs(c.lse) + 2 * e_exp if c.sinks else 0.0
    return SimpleNamespace(E_Y=E_Y, slope=slope, sigma=sigma, sigma_z=sigma_z)


def largest_of_results(c, p, x):
    """Compute E of output, lse and weights; those of output and lse are kept in `x` for the gradients."""
    u_a, u_p, u_o, u_l, w, f = p.u_a, p.u_p, p.u_o, p.u_l, p.w, p.f
    sigma, sigma_z, r = x.sigma, x.sigma_z, 2 * u_a * c.dropout
    B = sum_j(c.P * sigma) + c.P_z * sigma_z
    G = exp(2 * numpy.max(sigma * (c.P > 0), axis=-1, keepdims=True))
    P, Pt, O, V, k = c.P, c.P * c.k, c.O, c.V, c.k
    E_output = G * sqrt(B * c.spread(P * sigma, c.P_z * sigma_z))
    E_output = E_output + (u_p + u_a * c.n1 + r) * over_keys(Pt, abs(V)) + (u_a * (c.n1 + 4) + u_o) * abs(O)
    E_output = E_output + w * (over_keys(k, abs(V)) / c.l + 1)
    E_output = E_output + f * (sum_j(Pt + 2 * k) + over_keys(k, abs(V)) + 2)
    x.E_output = c.row * (E_output + c.E_merges[0])
    E_lse = G * B + u_a * (c.n1 + 5) + (u_a + u_l) * abs(c.lse) + u_a * abs(c.m) + c.E_merges[1]
    x.E_lse = numpy.where(c.row, E_lse, (u_a + u_l) * abs(c.z) * c.sinks)
    E_weights = c.seen * (P * expm1(G * (sigma + B) + u_a * (c.n1 + 6)) + u_o * P + w)
    return {"output": x.E_output, "lse": x.E_lse[..., 0], "weights": E_weights}


def largest_of_gradients(c, p, x):
    """Compute E of every gradient."""
    u_a, u_p, u_dP, u_o, w, e_exp = p.u_a, p.u_p, p.u_dp, p.u_o, p.w, p.e_x
    u_b, w_b, r, f = u_a, w, 2 * u_a * c.dropout, p.f
    P, Pt, O, V, k = c.P, c.P * c.k, c.O, c.V, c.k
    E_Y, E_lse, E = x.E_Y, x.E_lse, {}
    rho = c.seen * expm1(x.sigma + E_lse + u_a * (abs(c.S) + abs(c.lse)) + e_exp)
    eta = k * u_a * V_DIM * pairs(abs(c.dO), abs(V)) + (u_dP + r) * abs(c.dP)
    eta = c.seen * (eta + f * (k * (both_sums(c.dO, V) + 2 * V_DIM) + 1))
    E_D = numpy.maximum(
        sum_j(abs(c.dO) * (x.E_output + u_a * V_DIM * abs(O))) + f * (sum_j(abs(c.dO) + abs(O)) + 2 * V_DIM),
        sum_j(P * ((rho + u_p + u_a * c.n) * abs(c.dP) + eta)) + f * (sum_j(P + abs(c.dP)) + 2 * c.n),
    )
    E_D = c.row * E_D + u_a * (abs(c.D + c.g) + abs(c.g))
    difference = abs(c.dP - c.D)
    F = c.seen * (P * ((rho + 2 * u_a) * difference + eta) + u_p * abs(c.dS) + 4 * w * (1 + difference))
    E_s = c.seen * (2 * abs(c.t) * E_Y / c.softcap + (E_Y / c.softcap) ** 2 + 3 * u_a) if c.softcap else 0.0
    C = c.seen * (F * (c.s + E_s) + abs(c.dS) * E_s + w)

    dQ, dK, dV = (abs(c.gradients[f"grad_{name}"]) for name in ("query", "key", "value"))
    E_dQ = over_keys(C + u_a * (c.n + 1) * abs(c.dX), abs(c.K)) + E_D * abs(over_keys(P * c.s, c.K))
    flushed = f * (1 + abs(c.scale)) * (sum_j(abs(c.dX)) + over_keys(c.seen * 1.0, abs(c.K)) + 2 * c.n + 1)
    E["grad_query"] = c.row * (abs(c.scale) * E_dQ + (u_o + 2 * u_a) * dQ + w + flushed)
    partial = u_a * (c.N + 1) + u_o * (GROUP - 1)
    E_dK = over_rows(C + P * E_D * (c.s + E_s) + partial * abs(c.dX), abs(c.Q))
    ones = numpy.ones_like(c.dO[..., :1])
    flushed = over_rows(abs(c.dX), ones) + over_rows(c.seen * 1.0, abs(c.Q)) + 2 * c.N + GROUP
    flushed = f * (1 + abs(c.scale)) * flushed
    E["grad_key"] = c.read * (abs(c.scale) * E_dK + (u_o + 2 * u_a) * dK + w * GROUP + flushed)
    E_dV = over_rows(Pt * (rho + u_p + r + u_a * c.N + u_o * (GROUP - 1)), abs(c.dO))
    flushed = f * (over_rows(Pt + 2 * k, ones) + over_rows(k, abs(c.dO)) + GROUP)
    E["grad_value"] = c.read * (E_dV + u_o * dV + w * (GROUP + over_rows(k, abs(c.dO))) + flushed)
    if c.gradients["grad_bias"] is not None:
        terms = c.over_bias(F + P * E_D) + u_a * c.N_b * c.over_bias(abs(c.dS))
        terms = terms + u_b * abs(c.gradients["grad_bias"]) + w_b + f * c.N_b
        E["grad_bias"] = numpy.where(c.over_bias(c.seen * 1.0) > 0, terms, 0)
    if c.sinks:
        rho_z = expm1(x.sigma_z + E_lse + u_a * (abs(c.z) + abs(c.lse)) + e_exp)
        terms = c.P_z * (rho_z + u_a * (1 + c.M)) * abs(c.D) + c.P_z * E_D + 4 * w * (1 + abs(c.D))
        E["grad_sinks"] = terms.sum(axis=(0, 2, 3)) + u_b * abs(c.gradients["grad_sinks"]) + w_b
    return E


def variance(c, p, slope):
    """Compute U of every result, MHA-ACC-2."""
    x = variance_of_scores(c, p, slope)
    return variance_of_results(c, p, x) | variance_of_gradients(c, p, x)


def variance_of_scores(c, p, slope):
    """Compute the variances of the scores and of the sink's logit."""
    u_a, u_l, e_exp, e_tanh = p.u_a, p.u_l, p.e_x, p.e_t
    A2 = c.seen * c.scale**2 * pairs(c.Q**2, c.K**2)
    U_Y = u_a**2 * (QK_DIM * (c.X**2 / 3 + A2 / 2) / 3 + A2)
    if c.softcap:
        U_Y = slope**2 * (U_Y + 2 * u_a**2 * c.X**2 / 3) + (e_tanh**2 + 2 * u_a**2) * c.Y**2 / 3
        U_Y = U_Y + (4 * u_a * c.softcap) ** 2 / 3
    U_s = c.seen * (U_Y + u_a**2 * (4 * c.S**2 + c.m**2) / 3 + e_exp**2)
    U_z = (u_a**2 * (4 * c.z**2 + c.m**2 + c.lse**2) + u_l**2 * c.lse**2) / 3 + 2 * e_exp**2 if c.sinks else 0.0
    return SimpleNamespace(U_Y=U_Y, U_s=U_s, U_z=U_z)


def variance_of_results(c, p, x):
    """Compute U of output, lse and weights; those of output and lse are kept in `x` for the gradients."""
    u_a, u_p, u_o, u_l, w, e_exp = p.u_a, p.u_p, p.u_o, p.u_l, p.w, p.e_x
    P, Pt, O, V, k, U_s, U_z = c.P, c.P * c.k, c.O, c.V, c.k, x.U_s, x.U_z
    U_l = sum_j(P**2 * U_s) + c.P_z**2 * U_z + e_exp**2 + u_a**2 * (c.n1 / 9 + 4)
    squares = over_keys(Pt**2, V**2)
    U_output = c.spread(P**2 * U_s, c.P_z**2 * U_z) + u_p**2 / 3 * numpy.maximum(squares, c.spread(P**2, 0))
    U_output = U_output + u_a**2 * c.n1 / 3 * (O**2 / 3 + squares / 2)
    U_output = U_output + (u_a**2 * (c.n1 / 9 + 4) + u_o**2 / 3) * O**2
    x.U_output = c.row * (U_output + w**2 * (over_keys(k, abs(V)) / c.l + 1) ** 2 + c.U_merges[0])
    stored = (u_a**2 + u_l**2) * c.lse**2 / 3
    x.U_lse = numpy.where(c.row, U_l + stored + u_a**2 * c.m**2 / 3 + c.U_merges[1], stored)
    U_weights = c.seen * (P**2 * (U_s + U_l + u_o**2 / 3) + w**2)
    return {"output": x.U_output, "lse": x.U_lse[..., 0], "weights": U_weights}


def variance_of_gradients(c, p, x):
    """Compute U of every gradient."""
    u_a, u_p, u_dP, u_o, w, e_exp = p.u_a, p.u_p, p.u_dp, p.u_o, p.w, p.e_x
    u_b, w_b = u_a, w
    P, Pt, O, V, k = c.P, c.P * c.k, c.O, c.V, c.k
    U_Y, U_s, U_z, U_lse, U = x.U_Y, x.U_s, x.U_z, x.U_lse, {}
    U_rho = c.seen * (U_s + U_lse + u_a**2 * (c.S**2 + c.lse**2) / 3 + e_exp**2)
    B2, O2 = k**2 * pairs(c.dO**2, V**2), sum_j(c.dO**2 * O**2)
    U_dP = u_a**2 * (V_DIM * (c.dP**2 / 3 + B2 / 2) / 3 + B2) + u_dP**2 * c.dP**2 / 3
    dot = c.D + c.g
    U_D = numpy.maximum(
        sum_j(c.dO**2 * x.U_output) + u_a**2 * (V_DIM * (dot**2 / 3 + O2 / 2) / 3 + O2),
        sum_j(P**2 * ((U_rho + u_p**2 / 3 + u_a**2 * c.n / 6) * c.dP**2 + U_dP)) + u_a**2 * c.n / 9 * dot**2,
    )
    U_D = c.row * U_D + u_a**2 * (dot**2 + c.g**2) / 3
    difference = c.dP - c.D
    U_F = P**2 * ((U_rho + u_a**2) * difference**2 + U_dP) + u_p**2 * c.dS**2 / 3
    U_F = c.seen * (U_F + (4 * w * (1 + abs(difference))) ** 2)
    U_C = c.seen * (U_F + w**2)
    if c.softcap:
        U_C = c.seen * (c.s**2 * U_F + c.dS**2 * (4 * c.t**2 * U_Y / c.softcap**2 + 3 * u_a**2) + w**2)
    R = u_a**2 * c.N + u_o**2 * (GROUP - 1)
    T = u_o**2 * (1 + (GROUP - 1) / 3) / 3 + u_a**2 * c.N / 9

    dQ, dK, dV = (c.gradients[f"grad_{name}"] for name in ("query", "key", "value"))
    U_dQ = over_keys(U_C + u_a**2 * c.n * c.dX**2 / 6, c.K**2) + U_D * over_keys(P * c.s, c.K) ** 2
    U["grad_query"] = c.row * (c.scale**2 * U_dQ + (u_o**2 / 3 + u_a**2 * c.n / 9) * dQ**2 + w**2)
    U_dK = over_rows(U_C + (P * c.s) ** 2 * U_D + R * c.dX**2 / 6, c.Q**2)
    U["grad_key"] = c.read * (c.scale**2 * U_dK + T * dK**2 + (w * GROUP) ** 2)
    U_dV = over_rows(Pt**2 * (U_rho + u_p**2 / 3 + R / 6), c.dO**2)
    U["grad_value"] = c.read * (U_dV + T * dV**2 + w**2 * (GROUP + over_rows(k, abs(c.dO))) ** 2)
    if c.gradients["grad_bias"] is not None:
        shared = P * U_D * sum_j(P) if c.bias.shape[-1] == 1 else P**2 * U_D
        terms = c.over_bias(U_F + shared + u_a**2 * c.N_b * c.dS**2 / 6)
        terms = terms + (u_b**2 / 3 + u_a**2 * c.N_b / 9) * c.gradients["grad_bias"] ** 2 + w_b**2
        U["grad_bias"] = numpy.where(c.over_bias(c.seen * 1.0) > 0, terms, 0)
    if c.sinks:
        relative = U_z + U_lse + u_a**2 * (1 + c.lse**2 / 3 + c.M / 6) + e_exp**2
        terms = (4 * w * (1 + abs(c.D))) ** 2 + c.P_z**2 * (relative * c.D**2 + U_D)
        terms = terms.sum(axis=(0, 2, 3)) + (u_b**2 / 3 + u_a**2 * c.M / 9) * c.gradients["grad_sinks"] ** 2
        U["grad_sinks"] = terms + w_b**2
    return U


def asked(call, function):
    """Return the arrays and options of the call that a function accepts."""
    without = {"attention": {"grad_output", "grad_lse"}, "attention_vjp": set()}
    without["attention_weights"] = without["attention"] | {"value", "dropout_mask"}
    arrays = {name: array for name, array in call.arrays.items() if name not in without[function]}
    dropped = {"dropout_rate"} if function == "attention_weights" else set()
    return arrays, {name: option for name, option in call.options.items() if name not in dropped}


@pytest.mark.parametrize("profile", ["standard", "strict"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["attention", "attention_weights", "attention_vjp"])
def test_the_suite_computes_the_formulas(call, case, function, dtype, profile):
    p = precision_of(dtype, profile)
    arrays, options = asked(call, function)
    E, slope = largest(case, p, wider="bias" in arrays and p.u_a > precision("float64").u_a)
    U = variance(case, p, slope)
    computed, spread = allowances(function, arrays, options, p), deviations(function, arrays, options, p)
    assert computed.keys() == spread.keys() <= E.keys()
    for name in computed:
        numpy.testing.assert_allclose(computed[name], E[name], rtol=1e-9, err_msg=name)
        numpy.testing.assert_allclose(spread[name] ** 2, U[name], rtol=1e-9, err_msg=name)


def halves_of(random):
    """Return two halves with some empty rows, and their cotangents."""
    lse_a, lse_b, grad_lse = random.standard_normal((3, BATCH, HEADS, Q_LEN)) * 3
    lse_a[0, 0], lse_b[0, :2] = -numpy.inf, -numpy.inf
    output_a, output_b, grad_output = random.standard_normal((3, BATCH, HEADS, Q_LEN, V_DIM))
    halves = {"output_a": output_a, "lse_a": lse_a, "output_b": output_b, "lse_b": lse_b}
    return SimpleNamespace(halves=halves, grad_output=grad_output, grad_lse=grad_lse)


def merged(c, p):
    """Compute the quantities that all formulas of merging share; rs, M and outputs are 0 if a half is empty."""
    m, halves = SimpleNamespace(), c.halves
    u_a, u_l, u_o, w, e = p.u_a, p.u_l, p.u_o, p.w, 8 * p.u_a
    m.lse_a, m.lse_b = halves["lse_a"][..., None], halves["lse_b"][..., None]
    m.live = {"a": m.lse_a > -numpy.inf, "b": m.lse_b > -numpy.inf}
    m.both = both = m.live["a"] & m.live["b"]
    output, lse = reference.merge_attention(**halves)
    lse = lse[..., None]
    m.lse_a, m.lse_b, lse = (numpy.where(both, x, 0) for x in (m.lse_a, m.lse_b, lse))
    m.a_a, m.a_b, m.d = exp(m.lse_a - lse), exp(m.lse_b - lse), abs(m.lse_a - m.lse_b)
    m.a_a, m.a_b = (numpy.where(both, x, m.live[half]) for half, x in (("a", m.a_a), ("b", m.a_b)))
    m.o_a, m.o_b = (numpy.where(both, halves[name], 0) for name in ("output_a", "output_b"))
    m.E_0 = numpy.minimum(m.a_a, m.a_b) * (u_a * m.d + e) + 4 * u_a + (u_a + u_l) * abs(lse)
    m.rs = both * (m.E_0 + u_a * m.d + 2 * e + 4 * u_a)
    m.M = m.a_a * abs(m.o_a) + m.a_b * abs(m.o_b)
    E_output = m.rs * m.M + 4 * u_a * abs(m.o_a - m.o_b) + u_o * abs(output) + w
    m.E_output = both * (E_output + p.f * (abs(m.o_a) + abs(m.o_b)))
    m.U_lse = numpy.minimum(m.a_a, m.a_b) ** 2 * (u_a**2 * m.d**2 / 3 + e**2) + 4 * u_a**2
    m.U_lse = both * (m.U_lse + u_a**2 * (m.lse_a**2 + m.lse_b**2 + lse**2) / 3 + u_l**2 * lse**2 / 3)
    m.R_s = both * (m.U_lse + u_a**2 * m.d**2 / 3 + 2 * e**2 + 4 * u_a**2)
    m.U_output = m.R_s * (m.a_a**2 * m.o_a**2 + m.a_b**2 * m.o_b**2)
    m.U_output = both * (m.U_output + 4 * u_a**2 * (m.o_a - m.o_b) ** 2 / 3 + u_o**2 * output**2 / 3 + w**2)
    return m


def sums_of_merges(call, p, shards):
    """Sum E and U over the merges of each row; the largest sums over the ranks whose keys may come first."""
    a = {name: x for name, x in call.arrays.items() if not name.startswith("grad_")}
    sinks, seen = a.pop("sinks", numpy.full(HEADS, -numpy.inf)), a.pop("mask", True)
    count = shards.ranks * (2 if shards.layout == "zigzag" else 1)
    order = shard_order(shards.layout, shards.ranks, -(-KV_LEN // count) * count)
    parts = []
    for keys in numpy.split(order, count):
        mask = numpy.isin(numpy.arange(KV_LEN), keys) & seen
        mask = mask if mask.ndim > 1 else mask[None, None, None]
        parts.append(reference.attention(**a, mask=mask, return_lse=True, **call.options))
    totals = []
    for first in range(shards.ranks):
        output, lse = numpy.zeros_like(parts[0][0]), numpy.broadcast_to(sinks[:, None], parts[0][1].shape)
        E, U, of_rank = [0.0, 0.0], [0.0, 0.0], count // shards.ranks
        for rank in (*range(first, -1, -1), *range(shards.ranks - 1, first, -1)):
            for part in parts[rank * of_rank : (rank + 1) * of_rank]:
                halves = dict(zip(("output_a", "lse_a", "output_b", "lse_b"), (output, lse, *part), strict=True))
                m = merged(SimpleNamespace(halves=halves), p)
                E_lse = m.both * (m.E_0 + 2 * p.u_a * (abs(m.lse_a) + abs(m.lse_b)))
                E, U = [E[0] + m.E_output, E[1] + E_lse], [U[0] + m.U_output, U[1] + m.U_lse]
                output, lse = reference.merge_attention(**halves)
        totals.append((*E, *U))
    return [numpy.max(sums, axis=0) for sums in zip(*totals, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [Shards(3, "striped"), Shards(2, "contiguous"), Shards(3, "zigzag")])
def test_the_suite_computes_the_formulas_of_ranks(call, case, shards, dtype):
    """Partial results have the softmax's type, and the errors of output and lse reach the gradients (MHA-SHARD-4)."""
    p = precision_of(dtype)
    parts = replace(p, u_o=p.u_a, w=2.0**-1018 if dtype == "float64" else 2.0**-122)
    *E_merges, U_output, U_lse = sums_of_merges(call, parts, shards)
    c = SimpleNamespace(**(vars(case) | {"E_merges": E_merges, "U_merges": (U_output, U_lse)}))
    E, slope = largest(c, p, wider="bias" in call.arrays and p.u_a > precision("float64").u_a)
    U, of_ranks = variance(c, p, slope), replace(p, shards=shards)
    for function in ("attention", "attention_vjp"):
        arrays, options = asked(call, function)
        computed, spread = (f(function, arrays, options, of_ranks) for f in (allowances, deviations))
        for name in computed:
            numpy.testing.assert_allclose(computed[name], E[name], rtol=1e-9, err_msg=name)
            numpy.testing.assert_allclose(spread[name] ** 2, U[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_suite_computes_the_formulas_of_merging(dtype):
    p, c = precision_of(dtype), halves_of(numpy.random.default_rng(7))
    m = merged(c, p)
    E_lse = m.both * (m.E_0 + 2 * p.u_a * (abs(m.lse_a) + abs(m.lse_b)))
    E, U = {"output": m.E_output, "lse": E_lse[..., 0]}, {"output": m.U_output, "lse": m.U_lse[..., 0]}
    computed, spread = allowances("merge_attention", c.halves, {}, p), deviations("merge_attention", c.halves, {}, p)
    for name in ("output", "lse"):
        numpy.testing.assert_allclose(computed[name], E[name], rtol=1e-9, err_msg=name)
        numpy.testing.assert_allclose(spread[name] ** 2, U[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_suite_computes_the_formulas_of_the_gradients_of_merging(dtype):
    p, c = precision_of(dtype), halves_of(numpy.random.default_rng(11))
    m, u_a, v_dim = merged(c, p), p.u_a, V_DIM
    dO, g = c.grad_output, c.grad_lse[..., None]
    gradients = reference.merge_attention_vjp(dO, **c.halves, grad_lse=c.grad_lse)
    arrays = {"grad_output": dO, **c.halves, "grad_lse": c.grad_lse}
    computed, spread = (f("merge_attention_vjp", arrays, {}, p) for f in (allowances, deviations))
    T = sum_j(dO * (m.o_a - m.o_b))
    T2 = sum_j(dO**2 * (m.o_a**2 + m.o_b**2))
    U_T = u_a**2 * (v_dim * (T**2 / 3 + T2 / 2) / 3 + T2)
    shares, t = m.a_a * m.a_b, m.a_a * m.a_b * T
    flushed = sum_j((1 + abs(dO)) * (abs(m.o_a) + abs(m.o_b)) + abs(dO)) + 2 * v_dim + abs(g)
    for half, a_x, o_x, dlse in (("a", m.a_a, m.o_a, gradients[1]), ("b", m.a_b, m.o_b, gradients[3])):
        E_t = numpy.maximum(
            shares * u_a * (v_dim + 4) * sum_j(abs(dO) * (abs(m.o_a) + abs(m.o_b))) + (2 * m.rs + 4 * u_a) * abs(t),
            a_x * sum_j(abs(dO) * (m.E_output + u_a * (v_dim + 4) * (abs(o_x) + m.M))) + (m.rs + 4 * u_a) * abs(t),
        )
        E_t = m.both * E_t
        E_doutput = ((m.rs + u_a + p.u_o) * a_x + 4 * u_a) * abs(dO) + p.w + p.f * abs(dO)
        E_dlse = E_t + (m.rs + 4 * u_a) * a_x * abs(g) + 4 * u_a * (abs(T) + abs(g))
        E_dlse = E_dlse + p.u_l * abs(dlse[..., None]) + p.w + p.f * flushed
        U_t = numpy.maximum(
            shares**2 * (4 * m.R_s * T**2 + U_T),
            a_x**2 * (sum_j(dO**2 * m.U_output) + U_T) + shares**2 * m.R_s * T**2,
        )
        U_doutput = (a_x**2 * (m.R_s + (u_a**2 + p.u_o**2) / 3) + 16 * u_a**2 / 3) * dO**2 + p.w**2
        U_dlse = m.both * U_t + a_x**2 * m.R_s * g**2 + 16 * u_a**2 * (T**2 + g**2) / 3
        U_dlse = U_dlse + p.u_l**2 * dlse[..., None] ** 2 / 3 + p.w**2
        E = {f"grad_output_{half}": E_doutput, f"grad_lse_{half}": E_dlse[..., 0]}
        U = {f"grad_output_{half}": U_doutput, f"grad_lse_{half}": U_dlse[..., 0]}
        for name, error in E.items():
            live = m.live[half] if error.ndim == 4 else m.live[half][..., 0]
            numpy.testing.assert_allclose(computed[name], live * error, rtol=1e-9, err_msg=name)
            numpy.testing.assert_allclose(spread[name] ** 2, live * U[name], rtol=1e-9, err_msg=name)

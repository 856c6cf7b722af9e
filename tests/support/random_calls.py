"""Random calls of attention, and the checks of their results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import dtype_name
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.suite.functions import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BATCH",
    "HEADS",
    "KV_HEADS",
    "KV_LEN",
    "OUTPUTS",
    "Q_LEN",
    "ask",
    "assert_allowed",
    "assert_same_bits",
    "converted",
    "random_arrays",
    "random_call",
]

BATCH, KV_HEADS, GROUP, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 3, 2, 37, 41, 5, 7
HEADS = KV_HEADS * GROUP
OUTPUTS = {name: FUNCTIONS[name].outputs for name in ("attention", "attention_weights", "attention_vjp")}
FORWARD_ONLY = ("value", "grad_output", "grad_lse", "dropout_mask", "dropout_rate")
NUMERIC = ("query", "key", "value", "bias", "sinks", "grad_output", "grad_lse")


def random_arrays(
    seed: int, *, batch: int = BATCH, q_len: int = Q_LEN, kv_len: int = KV_LEN
) -> dict[str, numpy.ndarray]:
    random = numpy.random.default_rng(seed)
    shapes = {
        "query": (batch, HEADS, q_len, QK_DIM),
        "key": (batch, KV_HEADS, kv_len, QK_DIM),
        "value": (batch, KV_HEADS, kv_len, V_DIM),
        "grad_output": (batch, HEADS, q_len, V_DIM),
        "grad_lse": (batch, HEADS, q_len),
    }
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def random_call(seed: int, **sizes: int) -> dict[str, Any]:
    """Return arrays with a random choice of options; each option occurs in two calls of five."""
    random, call = numpy.random.default_rng(seed), dict(random_arrays(seed, **sizes))
    batch, _, q_len, _ = call["query"].shape
    kv_len = call["key"].shape[2]

    def often() -> bool:
        return bool(random.random() < 0.4)

    def pairs() -> tuple[int, ...]:
        return tuple(size if random.random() < 0.6 else 1 for size in (batch, HEADS, q_len, kv_len))

    if often():
        call["mask"] = random.random(pairs()) < 0.7
    if often():
        call["bias"] = random.standard_normal(pairs())
        call["bias"][random.random(call["bias"].shape) < 0.2] = -numpy.inf
    if often():
        call["causal"] = True
    if often():
        call["window"] = tuple(int(side) if often() else None for side in random.integers(0, 20, 2))
    if often():
        call["kv_lengths"] = random.integers(0, kv_len + 1, batch)
    if often():
        call["q_lengths"] = random.integers(0, q_len + 1, batch)
    if often():
        call["q_segment_ids"] = numpy.sort(random.integers(0, 3, (batch, q_len)))
        call["kv_segment_ids"] = numpy.sort(random.integers(0, 3, (batch, kv_len)))
    if often() or call.keys() & {"causal", "window"}:
        call["q_offset"] = random.integers(-9, 17, batch)
    if often():
        call["scale"] = float(random.choice([0.0, -0.5, 0.3]))
    if often():
        call["softcap"] = 1.5
    if often():
        call["sinks"] = random.standard_normal(HEADS)
        call["sinks"][0] = -numpy.inf
    if often():
        call |= {"dropout_mask": random.random(pairs()) < 0.7, "dropout_rate": float(random.choice([0.0, 0.4]))}
    if often():
        call["kv_starts"] = random.integers(0, kv_len // 2 + 1, batch)
    if often():
        call["chunk"] = int(random.integers(1, 30))
        call.setdefault("q_offset", random.integers(-9, 17, batch))
    window: Any = call.get("window", (0, None))
    if often() and "causal" in call and window[1] != 0:
        call["prefix_lengths"] = random.integers(0, kv_len + 1, batch)
    return call


def converted(call: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {name: value.astype(dtype) if name in NUMERIC else value for name, value in call.items()}


def arguments_of(function: str, call: Mapping[str, Any]) -> dict[str, Any]:
    without = {"attention": ("grad_output", "grad_lse"), "attention_weights": FORWARD_ONLY}.get(function, ())
    return {name: value for name, value in call.items() if name not in without}


def ask(module: Any, function: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """Call a function, and return its outputs by name."""
    options = {"return_lse": True} if function == "attention" else {}
    answer = getattr(module, function)(**arguments_of(function, call), **options)
    answers = answer if isinstance(answer, tuple) else (answer,)
    return {name: value for name, value in zip(OUTPUTS[function], answers, strict=True) if value is not None}


def assert_allowed(function: str, call: Mapping[str, Any], got: Mapping[str, numpy.ndarray]) -> None:
    """Compare every output with the reference in float64, within the allowance of the case."""
    asked = arguments_of(function, call)
    arrays = {name: value for name, value in asked.items() if isinstance(value, numpy.ndarray)}
    options = {name: value for name, value in asked.items() if name not in arrays}
    case, dtype = bounds(function, arrays, options), dtype_name(call["query"])
    allowed = case.allowances(precision(dtype))
    for name, value in got.items():
        wanted = case.values[name]
        assert value.shape == wanted.shape, name
        exact = numpy.isinf(wanted)
        assert numpy.array_equal(value[exact], wanted[exact]), name
        assert (abs(value[~exact].astype("float64") - wanted[~exact]) <= allowed[name][~exact]).all(), name


def assert_same_bits(got: Mapping[str, numpy.ndarray], wanted: Mapping[str, numpy.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.dtype == wanted[name].dtype, name
        assert numpy.array_equal(value, wanted[name], equal_nan=True), name

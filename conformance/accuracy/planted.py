"""Planted mistakes, small errors of real kernels, that the accuracy rule must refuse in float32 and float16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
from problems import Problem, stored
from variants import Variant

from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.judging.compare import judge
from mha_spec_conformance.suite.cases import Expected

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MISTAKES", "deviation"]

SHAPE = (1, 2, 64, 1024, 64)
"""(batch, heads, q_len, kv_len, qk_dim = v_dim)."""

CONTRAST = 4.0
"""Deviation of the logits, as in trained models; nearly uniform weights would hide the mistakes."""


def half(dtype: str) -> Any:
    """Return the 16-bit dtype that is used with a dtype."""
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else numpy.float16


def problem(dtype: str, seed: int) -> Problem:
    """Draw one forward call over 1024 keys."""
    rng = numpy.random.default_rng(seed)
    batch, heads, q_len, kv_len, size = SHAPE
    x = {
        "query": CONTRAST * rng.standard_normal((batch, heads, q_len, size)),
        "key": rng.standard_normal((batch, heads, kv_len, size)),
        "value": rng.standard_normal((batch, heads, kv_len, size)),
    }
    arrays = {name: array.astype(stored(dtype)) for name, array in x.items()}
    return Problem(dtype, "contrast", arrays, {}, numpy.ones((batch, heads, q_len, kv_len), dtype=bool))


def honest(p: Problem) -> dict[str, numpy.ndarray]:
    """Compute without a mistake, for comparison."""
    return Variant("honest", tile=64).forward(p)


def scale_too_large(p: Problem) -> dict[str, numpy.ndarray]:
    """Use a scale that is 1 % too large."""
    return honest(Problem(p.dtype, p.regime, p.arrays, {"scale": 1.01 * p.scale}, p.visible))


def key_dropped(p: Problem) -> dict[str, numpy.ndarray]:
    """Do not read the last of 1024 keys."""
    visible = p.visible.copy()
    visible[..., -1] = False
    return honest(Problem(p.dtype, p.regime, p.arrays, p.options, visible))


def half_scores(p: Problem) -> dict[str, numpy.ndarray]:
    """Round the scores to 16 bits before the softmax."""
    return _blocks(p, scores=half(p.dtype))


def half_row_sum(p: Problem) -> dict[str, numpy.ndarray]:
    """Keep the sum of exponentials in 16 bits between blocks of 16 keys."""
    return _blocks(p, total=half(p.dtype))


def half_accumulator(p: Problem) -> dict[str, numpy.ndarray]:
    """Keep the weighted sum of values in 16 bits between blocks of 16 keys."""
    return _blocks(p, output=half(p.dtype))


def _blocks(p: Problem, *, scores: Any = None, total: Any = None, output: Any = None) -> dict[str, numpy.ndarray]:
    """Compute an online softmax whose scores, row sum or accumulator are rounded to a dtype."""
    query, key, value = (p.working(name) for name in ("query", "key", "value"))
    logits = _rounded(p.work(p.scale) * (query @ key.swapaxes(-1, -2)), scores)
    maximum = numpy.full((*logits.shape[:3], 1), -numpy.inf, p.work)
    summed, accumulated = numpy.zeros_like(maximum), numpy.zeros_like(query)
    for start in range(0, logits.shape[-1], 16):
        block = logits[..., start : start + 16]
        largest = numpy.maximum(maximum, block.max(axis=-1, keepdims=True))
        shrink, exponentials = numpy.exp(maximum - largest), numpy.exp(block - largest)
        summed = _rounded(summed * shrink + exponentials.sum(axis=-1, keepdims=True), total)
        stored = _rounded(exponentials, p.arrays["query"].dtype)
        accumulated = _rounded(accumulated * shrink + stored @ value[..., start : start + 16, :], output)
        maximum = largest
    result = (accumulated / summed).astype(p.arrays["query"].dtype)
    return {"output": result, "lse": (maximum + numpy.log(summed))[..., 0]}


def _rounded(x: numpy.ndarray, dtype: Any) -> numpy.ndarray:
    return x if dtype is None else x.astype(dtype).astype(x.dtype)


MISTAKES: dict[str, Callable[[Problem], dict[str, numpy.ndarray]]] = {
    "scale +1 %": scale_too_large,
    "one key of 1024 dropped": key_dropped,
    "scores in 16 bits": half_scores,
    "row sum in 16 bits": half_row_sum,
    "accumulator in 16 bits": half_accumulator,
}


def deviation(dtype: str, mistake: Callable[[Problem], dict[str, numpy.ndarray]], seed: int) -> dict[str, float]:
    """Return the share of the allowance that each output of a mistake uses."""
    p = problem(dtype, seed)
    case = bounds("attention", p.arrays, p.options)
    allowances, outputs = case.allowances(precision(dtype)), mistake(p)
    expected = {name: Expected(array, None, None, array.shape) for name, array in case.values.items()}
    return {
        name: judge(p, {name: wanted}, outputs, allowances, precision(dtype)).allowance_used
        for name, wanted in expected.items()
    }

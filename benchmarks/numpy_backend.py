"""Compare mha_spec_numpy with the plain formula, with itself, and with this machine's float32 matrix product.

Run `OPENBLAS_THREAD_TIMEOUT=4 python benchmarks/numpy_backend.py` on an idle machine. It prints ratios of interleaved
medians, each with its limit, and never fails. The variable sends OpenBLAS' threads to sleep at once; by default they
spin for 100 ms after a product, and take a core from the next measurement.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy
from measure import medians

import mha_spec_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

MATRIX = 2048


def plain(
    query: numpy.ndarray, key: numpy.ndarray, value: numpy.ndarray, mask: numpy.ndarray | None = None
) -> numpy.ndarray:
    """Compute the formula at its best: scale and divide the small arrays, and hold a single array of scores."""
    scores = (query * numpy.float32(1 / math.sqrt(query.shape[-1]))) @ key.swapaxes(-1, -2)
    if mask is not None:
        scores = numpy.where(mask, scores, numpy.float32(-math.inf))
    scores -= scores.max(axis=-1, keepdims=True)
    numpy.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    output = scores @ value
    output /= total
    return output


def arrays(*shape: int) -> list[numpy.ndarray]:
    """Draw query, key, value and a cotangent of standard normal numbers."""
    random = numpy.random.default_rng(7)
    return [random.standard_normal(shape, dtype=numpy.float32) for _ in range(4)]


def line(name: str, figure: float, limit: str) -> None:
    """Print a figure and its limit."""
    print(f"  {name:<44} {figure:6.2f}   {limit}")


def square(*shape: int, faster: float) -> None:
    """Measure forward, causal forward and backward at equal lengths."""
    query, key, value, cotangent = arrays(*shape)
    matrix = numpy.ones((MATRIX, MATRIX), dtype=numpy.float32)
    functions: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(query, key, value),
        "forward": lambda: mha_spec_numpy.attention(query, key, value),
        "causal": lambda: mha_spec_numpy.attention(query, key, value, causal=True),
        "backward": lambda: mha_spec_numpy.attention_vjp(cotangent, query, key, value),
        "product": lambda: matrix @ matrix,
    }
    time = medians(functions, seconds=12.0)
    batch, heads, length, size = shape
    rate = 4 * batch * heads * length**2 * size / time["forward"]
    print(f"{shape}: " + ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in time.items()))
    line("times faster than the plain formula", time["plain"] / time["forward"], f">= {faster}")
    line("rate, as a share of a matrix product's", rate / (2 * MATRIX**3 / time["product"]), ">= 0.50 at length 4096")
    line("causal, times faster than full", time["forward"] / time["causal"], ">= 1.7 at length 4096")
    line("backward, in forwards", time["backward"] / time["forward"], "<= 2.6")


def window(*shape: int) -> None:
    """Measure a window of 257 keys against all keys."""
    query, key, value, _ = arrays(*shape)
    functions: dict[str, Callable[[], object]] = {
        "full": lambda: mha_spec_numpy.attention(query, key, value),
        "window": lambda: mha_spec_numpy.attention(query, key, value, window=(256, 0)),
    }
    time = medians(functions)
    print(f"{shape}: " + ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in time.items()))
    line("window (256, 0), times faster than full", time["full"] / time["window"], ">= 8")


if __name__ == "__main__":
    square(2, 8, 512, 64, faster=1.5)
    square(1, 4, 4096, 64, faster=1.8)
    window(1, 4, 8192, 64)

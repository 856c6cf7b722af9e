"""Honest implementations of attention in NumPy: different orders, tiles and forms of the same mathematics.

All keep scores, softmax and sums in float32 (float64 for float64) and round results to the dtype of the inputs.
Variants that `store` also round the weights and the gradients of weights and logits to this dtype, as kernels do that
pass them to matrix units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from problems import Problem

__all__ = ["FORMS", "KERNELS", "VARIANTS", "Variant"]


def natural(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Compute a @ b in the order of BLAS."""
    return a @ b


def reversed_order(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Compute a @ b from the last term to the first."""
    return a[..., ::-1] @ b[..., ::-1, :]


def chunked(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Compute a @ b in chunks of 32 terms, added in sequence."""
    total = numpy.zeros((*a.shape[:-1], b.shape[-1]), dtype=a.dtype)
    for start in range(0, a.shape[-1], 32):
        total = total + a[..., start : start + 32] @ b[..., start : start + 32, :]
    return total


def pairwise(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Compute a @ b as a tree over halves."""
    size = a.shape[-1]
    if size <= 8:
        return a @ b
    return pairwise(a[..., : size // 2], b[..., : size // 2, :]) + pairwise(a[..., size // 2 :], b[..., size // 2 :, :])


def sequential(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Compute a @ b term after term, with each product rounded: the deepest possible sum."""
    total = numpy.zeros((*a.shape[:-1], b.shape[-1]), dtype=a.dtype)
    for index in range(a.shape[-1]):
        total = total + a[..., index, None] * b[..., index, None, :]
    return total


def fused(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Compute a @ b in float32 term after term, with each product unrounded, as a fused multiply-add does."""
    total = numpy.zeros((*a.shape[:-1], b.shape[-1]), dtype=a.dtype)
    a, b = a.astype(numpy.float64), b.astype(numpy.float64)
    for index in range(a.shape[-1]):
        total = (total + a[..., index, None] * b[..., index, None, :]).astype(numpy.float32)
    return total


def truncated(a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
    """Compute a @ b in float32 in chunks of 16 terms, each added with a rounding towards zero, as in matrix units."""
    total = numpy.zeros((*a.shape[:-1], b.shape[-1]), dtype=a.dtype)
    a, b = a.astype(numpy.float64), b.astype(numpy.float64)
    for start in range(0, a.shape[-1], 16):
        exact = total + a[..., start : start + 16] @ b[..., start : start + 16, :]
        nearest = exact.astype(numpy.float32)
        total = numpy.where(abs(nearest) > abs(exact), numpy.nextafter(nearest, numpy.float32(0)), nearest)
    return total


def exp_of_difference(x: numpy.ndarray, anchor: numpy.ndarray) -> numpy.ndarray:
    """Compute exp(x - anchor)."""
    return numpy.exp(x - anchor)


def exponent_of_two(x: numpy.ndarray, anchor: numpy.ndarray) -> numpy.ndarray:
    """Compute (x - anchor) * log2(e) by a fused multiply-add, as kernels do that have exp2 in hardware."""
    factor = x.dtype.type(numpy.log2(numpy.e))
    return (x.astype(numpy.float64) * factor - anchor * factor).astype(x.dtype)


def exp2_of_difference(x: numpy.ndarray, anchor: numpy.ndarray) -> numpy.ndarray:
    """Compute exp(x - anchor) as a power of two."""
    return numpy.exp2(exponent_of_two(x, anchor))


SLACK = 8 * math.log(2)
"""Accumulators that are rescaled lazily grow by a factor of up to 2^8, as in FlashAttention 4."""

CUBIC = tuple(numpy.float32(coefficient) for coefficient in (0.07711909, 0.22756439, 0.69514614))
"""The coefficients of 2^f = 1 + 0.695 f + 0.228 f^2 + 0.077 f^3 for f in [0, 1)."""


def cubic_exp2_of_difference(x: numpy.ndarray, anchor: numpy.ndarray) -> numpy.ndarray:
    """Compute exp(x - anchor) with a relative error of 2^-13.4 by a cubic polynomial, as FlashAttention 4 does."""
    exponent = numpy.maximum(exponent_of_two(x, anchor), -126)
    whole = numpy.floor(exponent)
    fraction = exponent - whole
    power = ((CUBIC[0] * fraction + CUBIC[1]) * fraction + CUBIC[2]) * fraction + 1
    return numpy.where(exponent == -126, 0, numpy.ldexp(power, whole.astype(numpy.int32)))


def tanh_of_exp(x: numpy.ndarray) -> numpy.ndarray:
    """Compute tanh as (1 - e) / (1 + e) with e = exp(-2|x|)."""
    e = numpy.exp(-2 * abs(x))
    return numpy.copysign((1 - e) / (1 + e), x)


def tanh_of_sigmoid(x: numpy.ndarray) -> numpy.ndarray:
    """Compute tanh as 2 sigmoid(2x) - 1."""
    return 2 / (1 + numpy.exp(-2 * x)) - 1


@dataclass(frozen=True)
class Variant:
    """One way to compute attention."""

    name: str
    tile: int | None = None
    """Keys in one block of an online softmax; None holds whole rows."""
    product: Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray] = natural
    store: bool = True
    """Round weights, dP and dS to the dtype of the inputs."""
    tanh: Callable[[numpy.ndarray], numpy.ndarray] = numpy.tanh
    sink: str = "column"
    """column: one more logit; after: added to the finished sum; factor: output * sigmoid(lse - sink)."""
    normalise_first: bool = False
    """Divide weights by their sum before they are multiplied by the values."""
    scale_first: bool = False
    """Multiply the query by the scale instead of the scores."""
    dot: str = "output"
    """output: compute D from the stored output; weights: from the weights."""
    split_group: bool = False
    """Round gradients of key and value before they are summed over the group."""
    exponential: Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray] = exp_of_difference
    """Computes exp(logits - anchor)."""
    split: int | None = None
    """Keys that one worker reads; the normalised results of all workers are merged by their lse, as in decoding."""
    slack: float = 0.0
    """The accumulators are scaled anew only where the maximum rises by more than this."""
    last_first: bool = False
    """Read the last block first."""

    @property
    def profile(self) -> str:
        """The precision of the variant."""
        return "standard" if self.store else "strict"

    def answer(self, function: str, problem: Problem) -> dict[str, numpy.ndarray]:
        """Compute the results of one function."""
        functions = {"attention": self.forward, "attention_weights": self.weights, "attention_vjp": self.backward}
        return functions[function](problem)

    def forward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Compute output and lse."""
        with numpy.errstate(all="ignore"):
            maximum, total, output = self._accumulate(problem)
            if self.normalise_first:
                anchor = numpy.where(maximum == -numpy.inf, 0, maximum).astype(problem.work)
                exponentials = self.exponential(self._logits(problem)[0], anchor)
                weights, lse = self._finish(problem, maximum, total, exponentials)
                dropped = weights if problem.kept is None else weights * problem.kept
                output = self.product(self._stored(dropped, problem), problem.working("value"))
            else:
                output, lse = self._finish(problem, maximum, total, output)
        return {"output": output.astype(problem.result), "lse": lse[..., 0]}

    def weights(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Compute the weights from lse, as in a second pass."""
        with numpy.errstate(all="ignore"):
            logits = self._logits(problem)[0]
            _, lse = self._finish(problem, *self._accumulate(problem))
            weights = self._rebuilt(problem, logits, lse)
        return {"weights": weights.astype(problem.result)}

    def backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Compute the gradients in closed form from output and lse of the forward pass."""
        with numpy.errstate(all="ignore"):
            return self._backward(problem)

    def _rebuilt(self, problem: Problem, logits: numpy.ndarray, lse: numpy.ndarray) -> numpy.ndarray:
        return self.exponential(logits, numpy.where(lse == -numpy.inf, 0, lse).astype(problem.work))

    def _logits(self, problem: Problem) -> tuple[numpy.ndarray, numpy.ndarray | None]:
        """Return the logits, -inf for hidden pairs, and the tanh of the soft cap."""
        query, key = problem.working("query"), problem.working("key").swapaxes(-1, -2)
        scale = problem.work(problem.scale)
        scores = self.product(query * scale, key) if self.scale_first else scale * self.product(query, key)
        tanh = None
        if "softcap" in problem.options:
            cap = problem.work(problem.options["softcap"])
            tanh = self.tanh(scores / cap)
            scores = cap * tanh
        if "bias" in problem.arrays:
            scores = scores + problem.working("bias")
        return numpy.where(problem.visible, scores, -numpy.inf), tanh

    def _accumulate(self, problem: Problem) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Accumulate maximum, sum of exponentials and weighted values over the keys, split by split."""
        logits, value = self._logits(problem)[0], problem.working("value")
        length = logits.shape[-1]
        if self.split is None:
            return self._over(problem, logits, value, range(length))
        starts = range(0, max(length, 1), self.split)
        return _merged([self._over(problem, logits, value, range(length)[s : s + self.split]) for s in starts])

    def _over(
        self, problem: Problem, logits: numpy.ndarray, value: numpy.ndarray, keys: range
    ) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Accumulate over some of the keys, block by block."""
        maximum = numpy.full((*logits.shape[:3], 1), -numpy.inf, dtype=problem.work)
        if "sinks" in problem.arrays and self.sink == "column":
            maximum = numpy.maximum(maximum, problem.working("sinks").reshape(1, -1, 1, 1))
        total = numpy.zeros_like(maximum)
        output = numpy.zeros((*logits.shape[:3], value.shape[-1]), dtype=problem.work)
        for block in self._blocks(keys):
            largest = numpy.maximum(maximum, numpy.max(logits[..., block], axis=-1, keepdims=True, initial=-numpy.inf))
            largest = numpy.where(largest > maximum + problem.work(self.slack), largest, maximum)
            anchor = numpy.where(largest == -numpy.inf, 0, largest).astype(problem.work)
            shrink = numpy.exp(maximum - anchor)
            exponentials = self.exponential(logits[..., block], anchor)
            total = total * shrink + self.product(exponentials, numpy.ones((exponentials.shape[-1], 1), problem.work))
            dropped = exponentials if problem.kept is None else exponentials * problem.kept[..., block]
            output = output * shrink + self.product(self._stored(dropped, problem), value[..., block, :])
            maximum = largest
        return maximum, total, output

    def _blocks(self, keys: range) -> Iterator[slice]:
        size = self.tile or max(len(keys), 1)
        starts = keys[::size]
        for start in reversed(starts) if self.last_first else starts:
            yield slice(start, min(start + size, keys.stop))

    def _finish(
        self, problem: Problem, maximum: numpy.ndarray, total: numpy.ndarray, output: numpy.ndarray
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Divide by the sum, with the sink included."""
        anchor = numpy.where(maximum == -numpy.inf, 0, maximum).astype(problem.work)
        sinks = problem.working("sinks")
        if sinks is not None and self.sink != "factor":
            anchor = numpy.where(total == 0, sinks.reshape(1, -1, 1, 1), anchor)
            total = total + numpy.exp(sinks.reshape(1, -1, 1, 1) - anchor)
        output = output / numpy.where(total == 0, 1, total).astype(problem.work)
        lse = anchor + numpy.log(total)
        if sinks is not None and self.sink == "factor":
            difference = lse - sinks.reshape(1, -1, 1, 1)
            output = output / (1 + numpy.exp(-difference))
            lse = numpy.maximum(lse, sinks.reshape(1, -1, 1, 1)) + numpy.log1p(numpy.exp(-abs(difference)))
        return output, lse

    def _stored(self, x: numpy.ndarray, problem: Problem) -> numpy.ndarray:
        return x.astype(problem.arrays["query"].dtype).astype(problem.work) if self.store else x

    def _backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        logits, tanh = self._logits(problem)
        output, lse = self._finish(problem, *self._accumulate(problem))
        output = output.astype(problem.arrays["query"].dtype).astype(problem.work)
        gradient, value = problem.working("grad_output"), problem.working("value")
        weights = self._rebuilt(problem, logits, lse)
        grad_weights = self._stored(self.product(gradient, value.swapaxes(-1, -2)), problem)
        dropped = weights
        if problem.kept is not None:
            grad_weights, dropped = grad_weights * problem.kept, weights * problem.kept
        products = gradient * output if self.dot == "output" else self._stored(weights, problem) * grad_weights
        dot = self.product(products, numpy.ones((products.shape[-1], 1), problem.work))
        if "grad_lse" in problem.arrays:
            dot = dot - problem.working("grad_lse")[..., None]
        grad_logits = self._stored(weights * (grad_weights - dot), problem)
        grad_scores = grad_logits if tanh is None else self._stored(grad_logits * (1 - tanh**2), problem)
        gradients = self._tensors(problem, grad_scores, self._stored(dropped, problem))
        if "bias" in problem.arrays:
            gradients["grad_bias"] = _sum_to(grad_logits, problem.arrays["bias"])
        if "sinks" in problem.arrays:
            sink_weights = numpy.exp(problem.working("sinks").reshape(1, -1, 1, 1) - lse)
            gradients["grad_sinks"] = _sum_to(-sink_weights * dot, problem.arrays["sinks"].reshape(1, -1, 1, 1)).ravel()
        return gradients

    def _tensors(
        self, problem: Problem, grad_scores: numpy.ndarray, dropped: numpy.ndarray
    ) -> dict[str, numpy.ndarray]:
        scale = problem.work(problem.scale)
        by_key = grad_scores.swapaxes(-1, -2)
        gradients = {
            "grad_query": scale * self._summed(grad_scores, problem.working("key")),
            "grad_key": self._group(problem, scale * self._summed(by_key, problem.working("query"))),
            "grad_value": self._group(problem, self._summed(dropped.swapaxes(-1, -2), problem.working("grad_output"))),
        }
        return {name: array.astype(problem.result) for name, array in gradients.items()}

    def _summed(self, a: numpy.ndarray, b: numpy.ndarray) -> numpy.ndarray:
        """Compute a @ b, block by block."""
        total = numpy.zeros((*a.shape[:-1], b.shape[-1]), dtype=a.dtype)
        for block in self._blocks(range(a.shape[-1])):
            total = total + self.product(a[..., block], b[..., block, :])
        return total

    def _group(self, problem: Problem, x: numpy.ndarray) -> numpy.ndarray:
        if self.split_group and problem.group > 1:
            x = x.astype(problem.arrays["query"].dtype).astype(problem.work)
        batch, heads, length, size = x.shape
        parts = x.reshape(batch, heads // problem.group, problem.group, length, size)
        total = parts[:, :, 0]
        for index in range(1, problem.group):
            total = total + parts[:, :, index]
            if self.split_group:
                total = total.astype(problem.arrays["query"].dtype).astype(problem.work)
        return total


def _merged(
    parts: list[tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]],
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Merge the normalised outputs of splits by their lse; an empty split has lse = -inf and the weight 0."""
    lses = [maximum + numpy.log(total) for maximum, total, _ in parts]
    outputs = [output / numpy.where(total == 0, 1, total).astype(output.dtype) for _, total, output in parts]
    largest = numpy.max(lses, axis=0)
    anchor = numpy.where(largest == -numpy.inf, 0, largest).astype(largest.dtype)
    shares = [numpy.exp(lse - anchor) for lse in lses]
    merged = numpy.sum([share * output for share, output in zip(shares, outputs, strict=True)], axis=0)
    return largest, numpy.sum(shares, axis=0), merged


def _sum_to(x: numpy.ndarray, like: numpy.ndarray) -> numpy.ndarray:
    axes = tuple(axis for axis in range(4) if like.shape[axis] == 1)
    return numpy.sum(x, axis=axes, keepdims=True).astype(like.dtype)


VARIANTS = (
    Variant("plain", store=False),
    Variant("plain, weights stored", normalise_first=True, dot="weights"),
    Variant("blocks of 16", tile=16),
    Variant("blocks of 64", tile=64, store=False),
    Variant("blocks of 128", tile=128, scale_first=True),
    Variant("reversed keys", product=reversed_order, normalise_first=True, store=False, split_group=True),
    Variant("chunked sums", product=chunked, dot="weights"),
    Variant("pairwise sums", product=pairwise, split_group=True),
    Variant("sequential sums", product=sequential),
)

KERNELS = (
    Variant("blocks of 32", tile=32),
    Variant("blocks of 64, weights in float32", tile=64, store=False),
    Variant("blocks of 128, scaled query", tile=128, scale_first=True, dot="weights"),
    Variant("blocks of 64, last first, exp2", tile=64, last_first=True, exponential=exp2_of_difference),
    Variant("blocks of 32, rescaled lazily", tile=32, slack=SLACK, exponential=exp2_of_difference, store=False),
    Variant("blocks of 128, rescaled lazily", tile=128, slack=SLACK, exponential=exp2_of_difference),
    Variant("blocks of 128, cubic exp2", tile=128, slack=SLACK, exponential=cubic_exp2_of_difference),
    Variant("blocks of 64, fused multiply-add", tile=64, product=fused, split_group=True),
    Variant("blocks of 128, truncated sums", tile=128, product=truncated, exponential=exp2_of_difference),
    Variant("splits of 64", split=64, store=False),
    Variant("splits of 256, blocks of 32", split=256, tile=32, exponential=exp2_of_difference),
    Variant("splits of 512, blocks of 128", split=512, tile=128, slack=SLACK, last_first=True),
    Variant("splits of 333, truncated sums", split=333, tile=64, product=truncated, store=False),
)
"""Kernels that read the keys in blocks or splits; they are tried on 1,000 keys and more."""

FORMS = tuple(product((numpy.tanh, tanh_of_exp, tanh_of_sigmoid), ("column", "after", "factor")))
"""The forms of soft cap and sink; every variant is tried with each."""


def with_form(variant: Variant, form: int) -> Variant:
    """Return the variant with a form of soft cap and sink."""
    tanh, sink = FORMS[form % len(FORMS)]
    return replace(variant, tanh=tanh, sink=sink)

"""Cotangents of lse that nearly cancel those of the output at a single pair of each row, where the logits are large.

The gradient of a logit is P (dP - D + grad_lse). Automatic differentiation of a softmax and of a logarithm adds
P (dP - D) and P grad_lse. The two P have different errors, which remain where the sum is small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import Input

from .build import describe, inputs_of
from .sizes import ONE_QUERY
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from description import Description

    from .sizes import Sizes

LEVEL, BELOW = 8192.0, 7.0
"""The size of the logits, whose rounding is much larger than that of their differences; the last key lies below it."""

UNIT = 2.0**-8
"""The unit of the cotangents of lse, and so the size of the sum that remains."""


def descriptions() -> Iterator[Description]:
    """Yield the gradients of a call in which the last key has a small weight, and the only ordinary value."""
    sizes = ONE_QUERY
    inputs, _ = inputs_of(sizes, "generic", {}, 0, "attention_vjp")
    last = numpy.arange(sizes.kv_len) == sizes.kv_len - 1
    inputs["value"] = Input(inputs["value"].values * numpy.where(last, 1.0, 2.0**-8)[:, None], "case")
    bias = LEVEL - BELOW * last + bell(sizes.scores, 2.0**-4, "cancelling bias")
    inputs["grad_lse"] = Input(_cotangents(sizes, inputs, bias), "softmax")
    inputs["bias"] = Input(bias, "softmax")
    yield describe(
        "bias+grad_lse/cancelling",
        "Logits near 8192, and cotangents of lse that nearly cancel those of the output at the last key.",
        sizes,
        inputs,
        function="attention_vjp",
        clauses=("MHA-LSE-3", "MHA-ACC-1"),
        dtypes=("float64", "float32"),
    )


def _cotangents(sizes: Sizes, inputs: Mapping[str, Input], bias: numpy.ndarray) -> numpy.ndarray:
    """Return D - dP at the last key of each row, rounded to the unit."""
    grad_output, query, key, value = (inputs[name].values for name in ("grad_output", "query", "key", "value"))
    key, value = (numpy.repeat(array, sizes.heads // sizes.kv_heads, axis=1) for array in (key, value))
    logits = query @ key.swapaxes(2, 3) / numpy.sqrt(sizes.qk_dim) + bias
    weights = numpy.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    grad_weights = grad_output @ value.swapaxes(2, 3)
    row_dot = (weights * grad_weights).sum(-1)
    return numpy.round((row_dot - grad_weights[..., -1]) / UNIT) * UNIT

"""Mistakes in precision: less than the accuracy rule assumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.conventions import Convention

from .mistake import ATTENTION, Compared, Mistake, replacing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PRECISION", "to_bits"]


def to_bits(x: numpy.ndarray, bits: int) -> numpy.ndarray:
    """Round to this number of significant bits."""
    mantissa, exponent = numpy.frexp(x)
    return numpy.ldexp(numpy.round(mantissa * 2.0**bits), exponent - bits).astype(x.dtype)


def to_half(x: numpy.ndarray) -> numpy.ndarray:
    """Round to float16 and keep the type."""
    return x.astype(numpy.float16).astype(x.dtype)


def half_exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Round the logits and their exponentials to float16."""
    exponentials, maximum = steps.exponentials(to_half(logits))
    return to_half(exponentials), maximum


def half_sum(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Sum the products in float16, 16 keys at a time."""
    total = numpy.zeros((*weights.shape[:-1], values.shape[-1]), weights.dtype)
    for first in range(0, weights.shape[-1], 16):
        tile = slice(first, first + 16)
        total = to_half(total + steps.sum_over_visible(weights[..., tile], values[..., tile, :], visible[..., tile]))
    return total


def cap_with(tanh: Callable[[numpy.ndarray], numpy.ndarray]) -> steps.Steps:
    """Return steps whose soft cap and its slope use another tanh."""
    return replacing(
        soft_cap=lambda scores, softcap: scores if softcap is None else softcap * tanh(scores / softcap),
        cap_slope=lambda scores, softcap: 1.0 if softcap is None else 1.0 - tanh(scores / softcap) ** 2,
    )


def mistake(
    variant: str,
    title: str,
    made: steps.Steps,
    needs: tuple[str, ...] = (),
    functions: tuple[str, ...] = ATTENTION,
) -> Mistake:
    """Return a mistake that is a convention of lower precision."""
    return Mistake(
        f"precision-{variant.replace('_', '-')}",
        title,
        ("MHA-ACC-1",),
        made,
        needs,
        convention=Convention("precision", variant),
        compared=Compared.BY_SIZE_OF_ERRORS,
        native=True,
        functions=functions,
    )


PRECISION = (
    Mistake(
        "softmax-in-16-bits",
        "computes the softmax in 16 bits",
        ("MHA-SOFTMAX-2",),
        replacing(exponentials=half_exponentials),
        convention=Convention("precision", "half_scores"),
        compared=Compared.BY_SIZE_OF_ERRORS,
        native=True,
    ),
    Mistake(
        "division-approximate",
        "divides by the sum with a relative error of 2^-18, the same in every element",
        ("MHA-ACC-2",),
        replacing(
            normalise=lambda exponentials, total: (
                steps.normalise(exponentials, total) * exponentials.dtype.type(1 + 2.0**-18)
            )
        ),
        native=True,
    ),
    mistake(
        "tf32",
        "rounds the operands of each product to 11 significant bits",
        replacing(
            scores=lambda query, key, scale: steps.scores(to_bits(query, 11), to_bits(key, 11), scale),
            sum_over_visible=lambda weights, values, visible: steps.sum_over_visible(
                to_bits(weights, 11), to_bits(values, 11), visible
            ),
        ),
    ),
    mistake(
        "half_scores",
        "stores the scores in 16 bits",
        replacing(scores=lambda query, key, scale: to_half(steps.scores(query, key, scale))),
    ),
    mistake(
        "half_sums",
        "sums the weighted values in 16 bits",
        replacing(sum_over_visible=half_sum),
        functions=("attention",),
    ),
    mistake(
        "half_gradients",
        "stores the gradients of the weights in 16 bits",
        replacing(grad_weights=lambda grad_output, value: to_half(steps.grad_weights(grad_output, value))),
        functions=("attention_vjp",),
    ),
    mistake(
        "approximate_tanh",
        "computes tanh to 11 significant bits",
        cap_with(lambda x: to_bits(numpy.tanh(x), 11)),
        needs=("softcap",),
    ),
)

"""Mistakes in precision: less than the accuracy rule assumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def narrowing(dtype: str | type[Any]) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Return a function that rounds to a dtype and keeps the type."""
    return lambda x: x.astype(dtype).astype(x.dtype)


def narrow_scores(dtype: str) -> Callable[..., numpy.ndarray]:
    """Return a step that stores the scaled query and the scores in a dtype, as an attention of plain tensors does."""
    narrow = narrowing(dtype)
    return lambda query, key, scale: narrow(steps.scores(narrow(query * scale), key, 1.0))


def narrow_exponentials(dtype: str) -> Callable[..., tuple[numpy.ndarray, numpy.ndarray]]:
    """Return a step that stores the logits and their exponentials in a dtype."""
    narrow = narrowing(dtype)

    def exponentials(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        unrounded, maximum = steps.exponentials(narrow(logits))
        return narrow(unrounded), maximum

    return exponentials


def half_sum(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Sum the products in float16, 16 keys at a time."""
    narrow = narrowing("float16")
    total = numpy.zeros((*weights.shape[:-1], values.shape[-1]), weights.dtype)
    for first in range(0, weights.shape[-1], 16):
        tile = slice(first, first + 16)
        total = narrow(total + steps.sum_over_visible(weights[..., tile], values[..., tile, :], visible[..., tile]))
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
    *,
    name: str = "",
    clause: str = "MHA-ACC-1",
    needs: tuple[str, ...] = (),
    functions: tuple[str, ...] = ATTENTION,
    dtypes: tuple[str, ...] = (),
) -> Mistake:
    """Return a mistake that is a convention of lower precision."""
    return Mistake(
        name or f"precision-{variant.replace('_', '-')}",
        title,
        (clause,),
        made,
        needs,
        convention=Convention("precision", variant),
        compared=Compared.BY_SIZE_OF_ERRORS,
        native=True,
        functions=functions,
        dtypes=dtypes,
    )


def half_scores(dtype: str, words: str, suffix: str, dtypes: tuple[str, ...]) -> tuple[Mistake, ...]:
    """Return the mistakes that keep scores or the softmax in a dtype of 16 bits, in runs of these dtypes."""
    return (
        mistake(
            "half_scores",
            f"computes the softmax in {words}",
            replacing(exponentials=narrow_exponentials(dtype)),
            name=f"softmax-in-16-bits{suffix}",
            clause="MHA-SOFTMAX-2",
            dtypes=dtypes,
        ),
        mistake(
            "half_scores",
            f"stores the scores in {words}",
            replacing(scores=narrow_scores(dtype)),
            name=f"precision-half-scores{suffix}",
            dtypes=dtypes,
        ),
    )


PRECISION = (
    *half_scores("float16", "16 bits", "", ("float64", "float32", "float16")),
    *half_scores("bfloat16", "bfloat16", "-bfloat16", ("bfloat16",)),
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
        "half_sums",
        "sums the weighted values in 16 bits",
        replacing(sum_over_visible=half_sum),
        functions=("attention",),
    ),
    mistake(
        "half_gradients",
        "stores the gradients of the weights in 16 bits",
        replacing(grad_weights=lambda grad_output, value: narrowing("float16")(steps.grad_weights(grad_output, value))),
        functions=("attention_vjp",),
    ),
    mistake(
        "approximate_tanh",
        "computes tanh to 11 significant bits",
        cap_with(lambda x: to_bits(numpy.tanh(x), 11)),
        needs=("softcap",),
    ),
)

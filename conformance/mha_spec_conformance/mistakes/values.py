"""Mistakes after the softmax: dropout, values, hidden NaN, visible NaN, dtypes, memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.conventions import Convention

from .mistake import VJP, Compared, Mistake, changing, replacing
from .visibility import first_along

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments

__all__ = ["VALUES"]


def dropped_before_softmax(a: Arguments) -> Arguments:
    """Hide the dropped pairs, so that the softmax is over the kept pairs."""
    if a.dropout_mask is None:
        return a
    return replace(
        a,
        mask=a.dropout_mask if a.mask is None else a.mask & a.dropout_mask,
        dropout_mask=numpy.ones_like(a.dropout_mask),
    )


def renormalised(x: numpy.ndarray, dropout_mask: numpy.ndarray | None, rate: float) -> numpy.ndarray:
    """Normalise the weights again after dropout."""
    kept = steps.drop(x, dropout_mask, 0.0)
    return kept if dropout_mask is None else steps.normalise(kept, kept.sum(axis=-1, keepdims=True))


def plain_product(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Return weights @ values, where a weight of 0 times NaN is NaN."""
    return weights @ values


def plain_dot(
    weights: numpy.ndarray, grad_weights: numpy.ndarray, visible: numpy.ndarray, grad_lse: numpy.ndarray | None
) -> numpy.ndarray:
    """Compute D without leaving out hidden pairs."""
    dot = (weights * grad_weights).sum(axis=-1, keepdims=True)
    return dot if grad_lse is None else dot - grad_lse


def tile_product(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Return weights @ values without the values that no row sees."""
    seen = visible.swapaxes(-1, -2).any(axis=-1, keepdims=True)
    return weights @ numpy.where(seen, values, 0.0)


def leaking(product: Callable[..., numpy.ndarray], **others: Callable[..., object]) -> steps.Steps:
    """Compute every sum over pairs with `product`."""
    return replacing(
        sum_over_visible=product,
        grad_query=lambda grad_scores, key, visible, scale: scale * product(grad_scores, key, visible),
        grad_key=lambda grad_scores, query, visible, scale: (
            scale * product(grad_scores.swapaxes(-1, -2), query, visible.swapaxes(-1, -2))
        ),
        grad_value=lambda dropped, grad_output, visible: product(
            dropped.swapaxes(-1, -2), grad_output, visible.swapaxes(-1, -2)
        ),
        **others,
    )


def added_mask(logits: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Hide a pair by adding -inf, which keeps a NaN."""
    return logits + numpy.where(visible, 0.0, -math.inf).astype(logits.dtype)


def scrubbed(x: numpy.ndarray, dtype: str) -> numpy.ndarray:
    """Replace the elements of the output that are not finite by 0."""
    return steps.round_output(numpy.where(numpy.isfinite(x), x, 0.0).astype(x.dtype), dtype)


def where_weighted(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Skip the values whose weight is 0."""
    return steps.sum_over_visible(weights, values, visible & (weights != 0))


def of_finite_values(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Skip the values that are not finite."""
    return steps.sum_over_visible(weights, numpy.where(numpy.isfinite(values), values, 0.0), visible)


def whole_value(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Make every component NaN of a value that has a component that is not finite."""
    finite = numpy.isfinite(values).all(axis=-1, keepdims=True)
    return steps.sum_over_visible(weights, numpy.where(finite, values, math.nan), visible)


def hide_nan(logits: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Hide a pair with a NaN logit."""
    return steps.hide(logits, visible & ~numpy.isnan(logits))


def scaled_in_place(a: Arguments) -> Arguments:
    """Multiply the query by the scale in place."""
    a.query *= a.query.dtype.type(steps.scale_of(a.scale, a.query.shape[3]))
    return replace(a, scale=1.0)


def read_as_contiguous(a: Arguments) -> Arguments:
    """Read query, key and value from the start of their memory, whatever their strides."""
    return replace(
        a, query=_contiguous(a.query), key=_contiguous(a.key), value=None if a.value is None else _contiguous(a.value)
    )


def _contiguous(x: numpy.ndarray) -> numpy.ndarray:
    if x.flags.c_contiguous or x.base is None:
        return x
    return x.base.ravel()[: x.size].reshape(x.shape)


DROPOUT = (
    Mistake(
        "dropout-mask-inverted",
        "drops the weights that the dropout mask keeps, and keeps the others",
        ("MHA-DROP-1",),
        replacing(
            drop=lambda x, dropout_mask, rate: steps.drop(x, None if dropout_mask is None else ~dropout_mask, rate)
        ),
        needs=("dropout_mask",),
    ),
    Mistake(
        "dropout-scaled-by-rate",
        "multiplies kept weights by the rate instead of dividing by 1 - rate",
        ("MHA-DROP-1",),
        replacing(drop=lambda x, dropout_mask, rate: steps.drop(x, dropout_mask, 0.0) * rate),
        needs=("dropout_mask", "dropout_rate"),
        bugs=("NVIDIA/apex PR#816",),
    ),
    Mistake(
        "dropout-divided-by-rate",
        "divides kept weights by the rate instead of 1 - rate",
        ("MHA-DROP-1",),
        replacing(drop=lambda x, dropout_mask, rate: steps.drop(x, dropout_mask, 0.0) / (rate or 1)),
        needs=("dropout_mask", "dropout_rate"),
        bugs=("NVIDIA/apex PR#816",),
    ),
    Mistake(
        "dropout-renormalised",
        "normalises the kept weights again, so that they sum to 1",
        ("MHA-DROP-1",),
        replacing(drop=renormalised),
        needs=("dropout_mask",),
        functions=("attention",),
    ),
    Mistake(
        "dropout-before-softmax",
        "applies dropout before the softmax, so that weights and lse are those of the kept pairs",
        ("MHA-DROP-3",),
        changing(dropped_before_softmax),
        needs=("dropout_mask",),
    ),
    Mistake(
        "dropout-mask-of-the-first-batch-entry",
        "uses the dropout mask of the first batch entry for all",
        ("MHA-DROP-1",),
        first_along("dropout_mask", 0),
        needs=("dropout_mask",),
    ),
    Mistake(
        "dropout-mask-of-the-first-head",
        "uses the dropout mask of the first head for all",
        ("MHA-DROP-1",),
        first_along("dropout_mask", 1),
        needs=("dropout_mask",),
    ),
)

NONFINITE = (
    Mistake(
        "nan-reaches-its-tile",
        "multiplies a hidden value by 0 if another row sees it, so that a NaN in the value reaches both rows",
        ("MHA-POISON-2",),
        leaking(tile_product),
        convention=Convention("nonfinite", "reaches_tile"),
        compared=Compared.WHERE_NOT_FINITE,
        bugs=("vllm-project/vllm PR#30887", "vllm-project/vllm PR#936"),
    ),
    Mistake(
        "hidden-nan-leaks",
        "multiplies hidden values by 0, so that a NaN in a value that no row sees reaches the output",
        ("MHA-POISON-1",),
        leaking(plain_product, row_dot=plain_dot),
        convention=Convention("nonfinite", "leaks"),
        compared=Compared.WHERE_NOT_FINITE,
        bugs=("pytorch/pytorch#101967", "Dao-AILab/flash-attention#1745", "Dao-AILab/flash-attention#2374"),
    ),
    Mistake(
        "hidden-key-leaks",
        "hides a pair by adding -inf, so that a NaN in a hidden key remains",
        ("MHA-POISON-1",),
        replacing(hide=added_mask),
        convention=Convention("nonfinite", "leaks"),
        compared=Compared.WHERE_NOT_FINITE,
        bugs=("deepbeepmeep/Wan2GP PR#1628", "Dao-AILab/flash-attention#1395"),
    ),
    Mistake(
        "nan-scrubbed",
        "returns 0 instead of NaN",
        ("MHA-NAN-1", "MHA-NAN-2"),
        replacing(round_output=scrubbed),
        convention=Convention("nonfinite", "scrubbed"),
        compared=Compared.WHERE_NOT_FINITE,
        bugs=("pytorch/pytorch#141128",),
    ),
    Mistake(
        "nan-score-hidden",
        "hides the pairs with a NaN score",
        ("MHA-NAN-1",),
        replacing(hide=hide_nan),
    ),
    Mistake(
        "value-of-weight-0-skipped",
        "skips the visible values of weight 0, so that a NaN in them is lost",
        ("MHA-NAN-2",),
        replacing(sum_over_visible=where_weighted),
        functions=("attention",),
        native=True,
    ),
    Mistake(
        "nonfinite-value-skipped",
        "replaces a value that is not finite by 0",
        ("MHA-NAN-2",),
        replacing(sum_over_visible=of_finite_values),
        functions=("attention",),
    ),
    Mistake(
        "nan-component-spoils-value",
        "returns NaN in every component if any component of a value is NaN",
        ("MHA-NAN-2",),
        replacing(sum_over_visible=whole_value),
        functions=("attention",),
    ),
)

RESULTS = (
    *(
        Mistake(
            f"output-{dtype}",
            f"returns {dtype}, whatever the dtype of the query",
            ("MHA-DTYPE-1", "MHA-DTYPE-2"),
            replacing(round_output=lambda x, name, dtype=dtype: x.astype(dtype)),
            convention=Convention("output_dtype", dtype),
            bugs=("tinygrad/tinygrad PR#5100",) if dtype == "float32" else (),
            native=True,
        )
        for dtype in ("float32", "float64")
    ),
    Mistake(
        "input-scaled-in-place",
        "multiplies the query by the scale in the caller's array",
        ("MHA-PURE-1",),
        replacing(check=lambda a: scaled_in_place(steps.check(a))),
        native=True,
        bugs=("pytorch/pytorch#109072",),
    ),
    Mistake(
        "strides-ignored",
        "reads strided inputs as if they were contiguous",
        ("MHA-PURE-2",),
        changing(read_as_contiguous),
        bugs=("pytorch/pytorch#112577", "pytorch/pytorch PR#187506", "uxlfoundation/oneDNN PR#4618"),
    ),
    Mistake(
        "key-gradient-unset-without-queries",
        "leaves the gradients of key and value uninitialised if q_len is 0",
        ("MHA-SHAPE-2",),
        replacing(
            grad_key=lambda grad_scores, query, visible, scale: (
                steps.grad_key(grad_scores, query, visible, scale) + (math.nan if query.shape[2] == 0 else 0.0)
            )
        ),
        functions=VJP,
        bugs=("Dao-AILab/flash-attention PR#2421",),
    ),
)

VALUES = (*DROPOUT, *NONFINITE, *RESULTS)

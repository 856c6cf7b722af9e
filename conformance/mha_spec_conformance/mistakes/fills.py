"""Mistakes of hidden pairs: numbers that are added to their scores, and gradients of rows that see no key."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy

from mha_spec import steps
from mha_spec.reference import Reference

from .ignored import everywhere
from .mistake import VJP, Compared, Mistake, changing, replacing
from .softmax import keep_hidden_weights, plain_exponentials, unguarded, uniform_where_empty

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = ["FILLS_ADDED"]

COUNTING = Reference(
    replacing(all_of=lambda constraints: sum(numpy.where(constraint, 0, 1) for constraint in constraints))
)
"""The specification, which counts the constraints that hide a pair."""


def lowest(a: Arguments) -> float:
    """Return the lowest finite number of the query's dtype."""
    return float(ml_dtypes.finfo(a.query.dtype).min)


def as_bias(a: Arguments, added: numpy.ndarray, **without: object) -> Arguments:
    """Add numbers to the scores in the dtype of the query, in which they are stored."""
    bias = added if a.bias is None else added + a.bias
    return replace(a, bias=bias.astype(a.query.dtype) if a.query.dtype.itemsize == 2 else bias, **without)


def mask_added(a: Arguments) -> Arguments:
    """Add the lowest finite number where the mask hides."""
    return a if a.mask is None else as_bias(a, numpy.where(a.mask, 0.0, lowest(a)), mask=None)


def constraints_added(a: Arguments) -> Arguments:
    """Add the lowest finite number once for each constraint that hides a pair."""
    count = COUNTING.visible(a)
    names = ("mask", "window", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids")
    with numpy.errstate(over="ignore"):
        return as_bias(a, numpy.where(count == 0, 0.0, count * lowest(a)), **dict.fromkeys(names), causal=False)


def stored(scores: numpy.ndarray, bias: numpy.ndarray | None) -> numpy.ndarray:
    """Add the bias, and round the sum to the dtype of a bias of 16 bits."""
    if bias is None:
        return scores
    with numpy.errstate(over="ignore"):
        return (scores + bias).astype(bias.dtype).astype(scores.dtype) if bias.dtype.itemsize == 2 else scores + bias


def kept_narrow(bias: numpy.ndarray, query_dtype: str, softmax_dtype: str) -> numpy.ndarray:
    """Keep a bias of 16 bits in its dtype."""
    return bias if bias.dtype.itemsize == 2 else steps.convert_bias(bias, query_dtype, softmax_dtype)


def transposed_sum(pairs: numpy.ndarray, operand: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Compute sum_i pairs_ij operand_ic over all pairs."""
    return keep_hidden_weights(pairs.swapaxes(-1, -2), operand, visible.swapaxes(-1, -2))


def product_overflows(query: numpy.ndarray, key: numpy.ndarray, scale: float) -> numpy.ndarray:
    """Store the product before it is scaled in float16, which overflows; its rounding is left out."""
    product = steps.scores(query, key, 1.0)
    return scale * numpy.where(abs(product) > 65504, numpy.copysign(math.inf, product), product)


FILLS_ADDED = (
    Mistake(
        "mask-added-as-the-lowest-number",
        "adds the lowest finite number of the query's dtype where the mask hides, in the query's dtype",
        ("MHA-EMPTY-1", "MHA-MASK-1"),
        changing(mask_added, add_bias=stored, convert_bias=kept_narrow),
        needs=("mask",),
        functions=("attention",),
        bugs=("tensorflow/tensorflow#59657", "keras-team/keras#17571", "EleutherAI/gpt-neox PR#25"),
        native=True,
        compared=Compared.WITHOUT_EMPTY_LSE,
    ),
    Mistake(
        "constraints-added-as-the-lowest-number",
        "adds the lowest finite number once for each constraint that hides a pair, so that two give -inf and NaN",
        ("MHA-EMPTY-1", "MHA-MASK-3"),
        changing(
            constraints_added,
            add_bias=stored,
            convert_bias=kept_narrow,
            see_bias=everywhere,
            exponentials=plain_exponentials,
            normalise=lambda exponentials, total: exponentials / total,
        ),
        functions=("attention",),
        bugs=("huggingface/transformers PR#27114", "NVIDIA-NeMo/Automodel PR#2658", "pytorch/pytorch#109517"),
        native=True,
        compared=Compared.WITHOUT_EMPTY_LSE,
    ),
    Mistake(
        "empty-row-gradient",
        "computes the gradients of a row that sees no key as if it saw all keys alike",
        ("MHA-EMPTY-3",),
        unguarded(
            normalise=uniform_where_empty,
            grad_logits=lambda weights, grad_weights, row_dot, visible: weights * (grad_weights - row_dot),
            grad_scores=lambda grad_logits, cap_slope, visible: grad_logits * cap_slope,
            grad_query=lambda pairs, key, visible, scale: scale * keep_hidden_weights(pairs, key, visible),
            grad_key=lambda pairs, query, visible, scale: scale * transposed_sum(pairs, query, visible),
        ),
        functions=VJP,
        bugs=("Xilinx/brevitas PR#1591",),
    ),
    Mistake(
        "empty-row-value-gradient",
        "computes the gradient of value as if a row that sees no key saw all keys alike",
        ("MHA-EMPTY-3",),
        unguarded(normalise=uniform_where_empty),
        functions=VJP,
    ),
    Mistake(
        "empty-row-nan-in-all-gradients",
        "divides by the sum 0 of a row that sees no key in the backward pass, so that NaN reaches every gradient",
        ("MHA-EMPTY-3",),
        unguarded(
            exponentials=plain_exponentials,
            normalise=lambda exponentials, total: exponentials / total,
            grad_logits=lambda weights, grad_weights, row_dot, visible: numpy.where(
                visible | numpy.isnan(weights), weights * (grad_weights - row_dot), 0.0
            ),
            grad_scores=lambda grad_logits, cap_slope, visible: grad_logits * cap_slope,
            grad_query=lambda pairs, key, visible, scale: scale * keep_hidden_weights(pairs, key, visible),
            grad_key=lambda pairs, query, visible, scale: scale * transposed_sum(pairs, query, visible),
        ),
        functions=VJP,
        compared=Compared.WHERE_NOT_FINITE,
        bugs=("Dao-AILab/flash-attention#1947", "pytorch/pytorch#41508", "tile-ai/tilelang PR#2461"),
    ),
    Mistake(
        "unscaled-product-overflows",
        "stores the product of query and key in float16 before it is scaled, so that it overflows",
        ("MHA-SOFTMAX-2",),
        replacing(scores=product_overflows),
        bugs=("ultralytics/ultralytics#24990",),
        native=True,
        dtypes=("float16",),
    ),
)

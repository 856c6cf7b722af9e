"""Mistakes at edges: ends of ranges, named alignments, truncated types, rows over a single key, rows of NaN."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps

from .mistake import Mistake, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mha_spec.arguments import Arguments

__all__ = ["EDGES"]


def summed_in_int32(distance: numpy.ndarray, right: int) -> numpy.ndarray:
    """Test j <= p + right with the sum in int32, which wraps."""
    keys = numpy.arange(distance.shape[-1])
    with numpy.errstate(over="ignore"):
        last = (keys - distance).astype(numpy.int32) + numpy.int32(right)
    return keys <= last


def cut_to_int32(q_ids: numpy.ndarray, kv_ids: numpy.ndarray) -> numpy.ndarray:
    """Compare the low 32 bits of segment ids."""
    return q_ids.astype(numpy.int32) == kv_ids.astype(numpy.int32)


def reading_of(offset: Callable[[Arguments], object]) -> steps.Steps:
    """Replace the offset that "lower_right" means."""
    return replacing(offset_of=lambda a: offset(a) if a.q_offset == "lower_right" else steps.offset_of(a))


def exchanged(a: Arguments) -> numpy.ndarray | Sequence[int] | int:
    """Exchange the meanings of both named alignments."""
    if not isinstance(a.q_offset, str):
        return steps.offset_of(a)
    return steps.offset_of(replace(a, q_offset="lower_right" if a.q_offset == "upper_left" else "upper_left"))


def saturated(bias: numpy.ndarray, query_dtype: str, softmax_dtype: str) -> numpy.ndarray:
    """Convert the bias to the softmax's type; a finite number below its range becomes its least finite number."""
    least = float(numpy.finfo(softmax_dtype).min)
    kept = numpy.where(bias == -math.inf, bias, numpy.maximum(bias.astype(numpy.float64), least))
    return kept.astype(softmax_dtype)


def seen_where_alone(constraints: list[numpy.ndarray]) -> numpy.ndarray:
    """Show the only key of a call, whatever hides it."""
    visible = steps.all_of(constraints)
    return numpy.ones_like(visible) if visible.shape[-1] == 1 else visible


def hidden_weigh_nothing(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return exponentials that are 0 for hidden pairs, even in a row whose maximum is NaN."""
    exponentials, maximum = steps.exponentials(logits)
    return numpy.where(logits == -math.inf, 0.0, exponentials), maximum


def zeros_stay(exponentials: numpy.ndarray, total: numpy.ndarray) -> numpy.ndarray:
    """Return weights that are 0 where the exponential is 0, whatever the sum is."""
    return numpy.where(exponentials == 0, 0.0, steps.normalise(exponentials, total))


def scores_of_float16(query: numpy.ndarray, key: numpy.ndarray, scale: float) -> numpy.ndarray:
    """Compute scores from queries and keys that are flushed to 0 below the smallest number of float16."""
    smallest = float(numpy.finfo(numpy.float16).smallest_subnormal)
    query, key = (numpy.where(abs(operand) < smallest, 0.0, operand) for operand in (query, key))
    return steps.scores(query, key, scale)


EDGES = (
    Mistake(
        "window-right-summed-in-int32",
        "adds the right side of the window to the position in int32, which wraps",
        ("MHA-WINDOW-2", "MHA-POS-1"),
        replacing(see_window_right=summed_in_int32),
        needs=("window", "q_offset"),
    ),
    Mistake(
        "segment-ids-cut-to-int32",
        "compares only the low 32 bits of segment ids",
        ("MHA-SEG-1", "MHA-SEG-2"),
        replacing(see_segments=cut_to_int32),
        needs=("q_segment_ids",),
    ),
    Mistake(
        "lower-right-of-the-buffers",
        "reads lower_right as kv_len - q_len, whatever kv_lengths and q_lengths are",
        ("MHA-POS-2",),
        reading_of(lambda a: a.kv_len - a.q_len),
        needs=("q_offset",),
        bugs=("huggingface/transformers PR#30437",),
    ),
    Mistake(
        "lower-right-without-q-lengths",
        "reads lower_right as kv_lengths - q_len, whatever q_lengths are",
        ("MHA-POS-2",),
        reading_of(lambda a: numpy.asarray(a.kv_len if a.kv_lengths is None else a.kv_lengths) - a.q_len),
        needs=("q_offset", "q_lengths"),
    ),
    Mistake(
        "readings-exchanged",
        "exchanges the meanings of upper_left and lower_right",
        ("MHA-POS-2",),
        replacing(offset_of=exchanged),
        needs=("q_offset",),
    ),
    Mistake(
        "wide-bias-saturated",
        "keeps a bias below the range of the softmax's type finite, so that it does not hide the pair",
        ("MHA-BIAS-2", "MHA-BIAS-3", "MHA-POISON-1"),
        replacing(convert_bias=saturated),
        needs=("bias",),
        native=True,
    ),
    Mistake(
        "lone-key-always-seen",
        "shows a key to every row if there is a single key",
        ("MHA-EMPTY-1",),
        replacing(all_of=seen_where_alone),
    ),
    Mistake(
        "nan-rows-hide",
        "returns the weight 0 for hidden pairs of a row that sees a NaN",
        ("MHA-NAN-1",),
        replacing(exponentials=hidden_weigh_nothing, normalise=zeros_stay),
        functions=("attention_weights",),
    ),
    Mistake(
        "flushed-below-float16",
        "flushes queries and keys to 0 that are below the range of float16 and normal in the softmax's type",
        ("MHA-ACC-3",),
        replacing(scores=scores_of_float16),
    ),
)

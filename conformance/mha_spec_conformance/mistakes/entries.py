"""Mistakes of another entry: results and arguments of another batch entry, head or axis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec_conformance.suite.changed import Changed

from .mistake import ATTENTION, Compared, Mistake, changing, replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.arguments import Arguments

__all__ = ["ENTRIES"]

LSE = ("attention",)


def of_lse(change: Callable[[numpy.ndarray], numpy.ndarray]) -> steps.Steps:
    """Change lse, (batch, heads, q_len, 1)."""
    return replacing(log_sum_exp=lambda total, maximum: change(steps.log_sum_exp(total, maximum)))


def of_stored_lse(change: Callable[[numpy.ndarray, Mapping[str, Any]], numpy.ndarray]) -> Changed:
    """Change lse, (batch, heads, q_len), by the arguments of the call."""
    return Changed(steps.Steps(), lambda name, array, call: change(array, call) if name == "lse" else array)


def in_group_order(lse: numpy.ndarray, call: Mapping[str, Any]) -> numpy.ndarray:
    """Return lse in the order (group, kv_head)."""
    batch, heads, q_len = lse.shape
    kv_heads = call["key"].shape[1]
    return lse.reshape(batch, kv_heads, heads // max(kv_heads, 1), q_len).swapaxes(1, 2).reshape(lse.shape)


def in_group_order_of_one_query(lse: numpy.ndarray, call: Mapping[str, Any]) -> numpy.ndarray:
    """Return the lse of a single query in the order (group, kv_head)."""
    return in_group_order(lse, call) if lse.shape[2] == 1 else lse


def overwritten(lse: numpy.ndarray, call: Mapping[str, Any]) -> numpy.ndarray:
    """Return 0 for an entry e without keys, and +inf in the first heads of the entry e * kv_heads modulo the batch."""
    lse, kv_heads = lse.copy(), call["key"].shape[1]
    for entry in numpy.flatnonzero(numpy.asarray(call["kv_lengths"]) == 0):
        lse[entry] = 0.0
        lse[entry * kv_heads % len(lse), : lse.shape[1] // kv_heads] = math.inf
    return lse


def first_entry_alone(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Return 0 for every batch entry but the first."""
    first = (numpy.arange(weights.shape[0]) == 0).reshape(-1, 1, 1, 1)
    return numpy.where(first, steps.sum_over_visible(weights, values, visible), 0.0)


def first_entry_of_a_prefix(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Return 0 for every batch entry but the first if there are more keys than queries."""
    product = first_entry_alone if weights.shape[3] > weights.shape[2] else steps.sum_over_visible
    return product(weights, values, visible)


def shifted_values(a: Arguments) -> Arguments:
    """Read the value of the key/value head before, if values have another size than keys."""
    if a.value is None or a.value.shape[3] == a.key.shape[3] or a.kv_heads == a.heads:
        return a
    return replace(a, value=numpy.roll(a.value, 1, axis=1))


def batch_as_kv_heads(a: Arguments) -> Arguments:
    """Broadcast the batch axis of a mask for all heads against the key/value heads."""
    if a.mask is None or a.mask.shape[0] == 1 or a.mask.shape[1] != 1 or a.heads == a.kv_heads:
        return a
    if a.mask.shape[0] != a.kv_heads:
        raise ValueError("the batch of the mask is not the number of key/value heads")
    return replace(a, mask=numpy.repeat(a.mask[:, 0][None], a.heads // a.kv_heads, axis=1))


def square_mask(a: Arguments) -> Arguments:
    """Refuse causal attention of several queries over another number of keys."""
    if a.causal and a.q_len != 1 and a.q_len != a.kv_len:
        raise ValueError("the causal mask is square")
    return a


def unset_without_keys(weights: numpy.ndarray, values: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Return NaN, which stands for any number, if there are no keys."""
    return steps.sum_over_visible(weights, values, visible) + (math.nan if weights.shape[3] == 0 else 0.0)


ENTRIES = (
    Mistake(
        "lse-with-axes-exchanged",
        "returns lse with the axes (batch, q_len, heads)",
        ("MHA-LSE-1",),
        of_lse(lambda lse: lse.swapaxes(1, 2)),
        functions=LSE,
        bugs=("AMD-AGI/Primus-Turbo#326", "vllm-project/vllm-xpu-kernels PR#479"),
    ),
    Mistake(
        "lse-in-group-order",
        "returns lse in the order (group, kv_head) of the heads",
        ("MHA-LSE-1",),
        of_stored_lse(in_group_order),
        functions=LSE,
    ),
    Mistake(
        "lse-in-group-order-of-one-query",
        "returns the lse of a single query in the order (group, kv_head) of the heads",
        ("MHA-LSE-1",),
        of_stored_lse(in_group_order_of_one_query),
        functions=LSE,
        bugs=("vllm-project/flash-attention#87",),
    ),
    Mistake(
        "lse-of-the-entry-before",
        "returns the lse of the batch entry before",
        ("MHA-LSE-1",),
        of_lse(lambda lse: numpy.roll(lse, 1, axis=0)),
        functions=LSE,
    ),
    Mistake(
        "lse-of-the-first-entry",
        "returns the lse of the first batch entry for all",
        ("MHA-LSE-1",),
        of_lse(lambda lse: numpy.broadcast_to(lse[:1], lse.shape)),
        functions=LSE,
    ),
    Mistake(
        "lse-overwritten-by-an-empty-entry",
        "returns 0 as the lse of a batch entry without keys, and writes +inf over the lse of another entry",
        ("MHA-EMPTY-2",),
        of_stored_lse(overwritten),
        needs=("kv_lengths",),
        functions=LSE,
        bugs=("Dao-AILab/flash-attention#2573",),
    ),
    Mistake(
        "entries-past-the-first-zero",
        "returns 0 for every batch entry but the first",
        ("MHA-SHAPE-1",),
        replacing(sum_over_visible=first_entry_alone),
        functions=LSE,
        bugs=("pytorch/pytorch#139462",),
    ),
    Mistake(
        "entries-past-the-first-zero-behind-a-prefix",
        "returns 0 for every batch entry but the first, with causal and more keys than queries",
        ("MHA-CAUSAL-1",),
        replacing(sum_over_visible=first_entry_of_a_prefix),
        needs=("causal",),
        functions=LSE,
        bugs=("pytorch/pytorch#139462",),
    ),
    Mistake(
        "value-heads-shifted",
        "reads the value of the key/value head before if v_dim and qk_dim differ",
        ("MHA-HEAD-1", "MHA-SHAPE-1"),
        changing(shifted_values),
        functions=LSE,
        bugs=("TheTom/llama-cpp-turboquant#116",),
    ),
    Mistake(
        "mask-batch-on-kv-heads",
        "broadcasts the batch axis of a mask against the key/value heads",
        ("MHA-MASK-2",),
        changing(batch_as_kv_heads),
        needs=("mask",),
        functions=ATTENTION,
        bugs=("ml-explore/mlx-lm#1903",),
    ),
    Mistake(
        "window-offset-of-the-first-entry",
        "uses the offset of the first batch entry for the window of all",
        ("MHA-WINDOW-1", "MHA-POS-1"),
        replacing(
            see_window_left=lambda distance, left: steps.see_window_left(distance[:1], left),
            see_window_right=lambda distance, right: steps.see_window_right(distance[:1], right),
        ),
        needs=("window", "q_offset"),
    ),
    Mistake(
        "causal-mask-square",
        "raises an error for causal attention of several queries over another number of keys",
        ("MHA-CAUSAL-1",),
        changing(square_mask),
        needs=("causal",),
        bugs=("meta-llama/llama#899", "huggingface/candle#3743"),
    ),
    Mistake(
        "output-unset-without-keys",
        "leaves the output uninitialised if there are no keys",
        ("MHA-SHAPE-2",),
        replacing(sum_over_visible=unset_without_keys),
        functions=LSE,
        compared=Compared.ANYTHING_FOR_NAN,
    ),
)

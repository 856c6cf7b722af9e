"""Mistakes in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec import steps

from .mistake import VJP, Mistake, replacing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GRADIENTS"]


def by_group(choose: Callable[[numpy.ndarray], numpy.ndarray]) -> Callable[..., numpy.ndarray]:
    """Reduce the gradients of a group, (batch, kv_heads, group, kv_len, size), with `choose`."""

    def collect(x: numpy.ndarray, kv_heads: int) -> numpy.ndarray:
        batch, heads, length, size = x.shape
        return choose(x.reshape(batch, kv_heads, heads // kv_heads, length, size))

    return collect


def with_heads_and_length_exchanged(
    grad_scores: numpy.ndarray, key: numpy.ndarray, visible: numpy.ndarray, scale: float
) -> numpy.ndarray:
    """Compute dQ from a key saved as (batch, length, heads, size), unless its shape would raise an error."""
    heads, length = key.shape[1:3]
    if length and heads % length == 0:
        key = steps.repeat_heads(key[:, :: heads // length].swapaxes(1, 2), heads)
    return steps.grad_query(grad_scores, key, visible, scale)


def ones_for_grad_output(dropped: numpy.ndarray, grad_output: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """Compute dV as if grad_output were ones."""
    return steps.grad_value(dropped, numpy.ones_like(grad_output), visible)


def lse_subtracted(
    weights: numpy.ndarray, grad_weights: numpy.ndarray, visible: numpy.ndarray, grad_lse: numpy.ndarray | None
) -> numpy.ndarray:
    """Compute D with the opposite sign of grad_lse."""
    return steps.row_dot(weights, grad_weights, visible, None if grad_lse is None else -grad_lse)


def dot_of_the_first_row(*operands: numpy.ndarray) -> numpy.ndarray:
    """Use the D of the first row for every row."""
    dot = steps.row_dot(*operands)
    return numpy.broadcast_to(dot[:, :, :1], dot.shape)


def mistake(
    name: str,
    title: str,
    *clauses: str,
    needs: tuple[str, ...] = (),
    bugs: tuple[str, ...] = (),
    **replaced: Callable[..., object],
) -> Mistake:
    """Return a mistake that changes only the gradients."""
    return Mistake(name, title, clauses, replacing(**replaced), needs, VJP, bugs=bugs)


GRADIENTS = (
    mistake(
        "group-gradient-of-the-last-head",
        "returns the gradients of key and value from the last query head of the group",
        "MHA-VJP-4",
        sum_group=by_group(lambda x: x[:, :, -1]),
        bugs=("stanford-crfm/levanter PR#449",),
    ),
    mistake(
        "group-gradient-of-the-mean",
        "averages the gradients of key and value over the group instead of summing",
        "MHA-VJP-4",
        sum_group=by_group(lambda x: x.mean(axis=2)),
        bugs=("stanford-crfm/levanter PR#449",),
    ),
    mistake(
        "group-gradient-tiled",
        "sums the gradients of key and value over the query heads h % kv_heads",
        "MHA-VJP-4",
        sum_group=lambda x, kv_heads: numpy.stack(
            [x[:, head::kv_heads].sum(axis=1) for head in range(kv_heads)], axis=1
        ),
        bugs=("XunhaoLai/native-sparse-attention-triton#27",),
    ),
    mistake(
        "row-dot-missing",
        "leaves D out, so that dS = P dP",
        "MHA-VJP-1",
        row_dot=lambda weights, grad_weights, visible, grad_lse: (
            0 * steps.row_dot(weights, grad_weights, visible, grad_lse)
        ),
    ),
    mistake(
        "row-dot-of-the-first-row",
        "uses the D of the first row for all",
        "MHA-VJP-1",
        row_dot=dot_of_the_first_row,
        bugs=("SHI-Labs/NATTEN#347",),
    ),
    mistake(
        "grad-lse-inverted",
        "inverts the sign of grad_lse",
        "MHA-VJP-1",
        "MHA-LSE-3",
        row_dot=lse_subtracted,
        needs=("grad_lse",),
    ),
    mistake(
        "grad-output-ignored",
        "uses ones as grad_output, as in the gradient of a sum",
        "MHA-VJP-1",
        "MHA-VJP-3",
        grad_weights=lambda grad_output, value: steps.grad_weights(numpy.ones_like(grad_output), value),
        grad_value=ones_for_grad_output,
        bugs=("mindspore-lab/mindone PR#1438",),
    ),
    mistake(
        "softmax-not-differentiated",
        "leaves the weights out, so that dS = dP - D",
        "MHA-VJP-1",
        grad_logits=lambda weights, grad_weights, row_dot, visible: numpy.where(visible, grad_weights - row_dot, 0.0),
    ),
    mistake(
        "cap-slope-missing",
        "leaves out the slope of the soft cap",
        "MHA-VJP-2",
        grad_scores=lambda grad_logits, cap_slope, visible: steps.grad_scores(grad_logits, 1.0, visible),
        needs=("softcap",),
    ),
    mistake(
        "cap-slope-not-squared",
        "uses 1 - |tanh| as the slope of the soft cap instead of 1 - tanh^2",
        "MHA-VJP-2",
        cap_slope=lambda scores, softcap: 1.0 if softcap is None else 1.0 - abs(numpy.tanh(scores / softcap)),
        needs=("softcap",),
    ),
    mistake(
        "query-gradient-not-scaled",
        "leaves out the scale in the gradient of query",
        "MHA-VJP-2",
        grad_query=lambda grad_scores, key, visible, scale: steps.grad_query(grad_scores, key, visible, 1.0),
    ),
    mistake(
        "key-gradient-not-scaled",
        "leaves out the scale in the gradient of key",
        "MHA-VJP-2",
        grad_key=lambda grad_scores, query, visible, scale: steps.grad_key(grad_scores, query, visible, 1.0),
    ),
    mistake(
        "key-saved-transposed",
        "reads the saved key as (batch, length, heads, size) if the number of keys divides that of heads",
        "MHA-VJP-2",
        grad_query=with_heads_and_length_exchanged,
        bugs=("huggingface/diffusers#14338",),
    ),
    mistake(
        "bias-gradient-zero",
        "returns 0 as the gradient of the bias",
        "MHA-VJP-5",
        grad_bias=lambda grad_logits, shape: numpy.zeros(shape, grad_logits.dtype),
        needs=("bias",),
        bugs=("jax-ml/jax#27184",),
    ),
    mistake(
        "bias-gradient-not-summed",
        "returns the gradient of the first pair of a broadcast bias instead of the sum",
        "MHA-VJP-5",
        grad_bias=lambda grad_logits, shape: grad_logits[tuple(slice(size) for size in shape)],
        needs=("bias",),
        bugs=("NVIDIA/TransformerEngine PR#2537",),
    ),
    mistake(
        "bias-gradient-averaged",
        "averages the gradient of a broadcast bias instead of summing",
        "MHA-VJP-5",
        grad_bias=lambda grad_logits, shape: (
            steps.grad_bias(grad_logits, shape) * (numpy.prod(shape) / max(grad_logits.size, 1))
        ),
        needs=("bias",),
    ),
    mistake(
        "bias-gradient-unbroadcast",
        "returns the gradient of a broadcast bias in the shape of the scores",
        "MHA-VJP-5",
        "MHA-DTYPE-2",
        grad_bias=lambda grad_logits, shape: grad_logits,
        needs=("bias",),
        bugs=("NVIDIA/TransformerEngine PR#2537",),
    ),
    mistake(
        "sink-gradient-zero",
        "returns 0 as the gradient of the sinks",
        "MHA-VJP-6",
        grad_sinks=lambda sink_weights, row_dot: 0 * steps.grad_sinks(sink_weights, row_dot),
        needs=("sinks",),
    ),
    mistake(
        "sink-gradient-inverted",
        "inverts the sign of the gradient of the sinks",
        "MHA-VJP-6",
        grad_sinks=lambda sink_weights, row_dot: -steps.grad_sinks(sink_weights, row_dot),
        needs=("sinks",),
    ),
    mistake(
        "sink-gradient-averaged",
        "averages the gradient of the sinks over batch and rows instead of summing",
        "MHA-VJP-6",
        grad_sinks=lambda sink_weights, row_dot: (
            steps.grad_sinks(sink_weights, row_dot) / max(sink_weights[:, 0].size, 1)
        ),
        needs=("sinks",),
    ),
)

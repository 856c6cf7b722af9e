"""The backward pass done wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec import steps

from .mistake import VJP, Mistake, replacing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GRADIENTS"]


def by_group(choose: Callable[[numpy.ndarray], numpy.ndarray]) -> Callable[..., numpy.ndarray]:
    """Make one gradient of the (batch, kv_heads, group, kv_len, size) gradients of a group."""

    def collect(x: numpy.ndarray, kv_heads: int) -> numpy.ndarray:
        batch, heads, length, size = x.shape
        return choose(x.reshape(batch, kv_heads, heads // kv_heads, length, size))

    return collect


def with_heads_and_length_exchanged(
    grad_scores: numpy.ndarray, key: numpy.ndarray, visible: numpy.ndarray, scale: float
) -> numpy.ndarray:
    """dQ from a key that was saved as (batch, length, heads, size), where the shapes do not tell."""
    heads, length = key.shape[1:3]
    if length and heads % length == 0:
        key = steps.repeat_heads(key[:, :: heads // length].swapaxes(1, 2), heads)
    return steps.grad_query(grad_scores, key, visible, scale)


def ones_for_grad_output(dropped: numpy.ndarray, grad_output: numpy.ndarray, visible: numpy.ndarray) -> numpy.ndarray:
    """dV of a sum over the output."""
    return steps.grad_value(dropped, numpy.ones_like(grad_output), visible)


def lse_subtracted(
    weights: numpy.ndarray, grad_weights: numpy.ndarray, visible: numpy.ndarray, grad_lse: numpy.ndarray | None
) -> numpy.ndarray:
    """D with the sign of grad_lse the wrong way round."""
    return steps.row_dot(weights, grad_weights, visible, None if grad_lse is None else -grad_lse)


def dot_of_the_first_row(*given: numpy.ndarray) -> numpy.ndarray:
    """The D of the first row for every row."""
    dot = steps.row_dot(*given)
    return numpy.broadcast_to(dot[:, :, :1], dot.shape)


def mistake(
    name: str,
    title: str,
    *clauses: str,
    needs: tuple[str, ...] = (),
    bugs: tuple[str, ...] = (),
    **replaced: Callable[..., object],
) -> Mistake:
    """A mistake of the gradients alone."""
    return Mistake(name, title, clauses, replacing(**replaced), needs, VJP, bugs=bugs)


GRADIENTS = (
    mistake(
        "group-gradient-of-the-last-head",
        "gives key and value the gradient of the last query head of the group",
        "MHA-VJP-4",
        sum_group=by_group(lambda x: x[:, :, -1]),
        bugs=("stanford-crfm/levanter PR#449",),
    ),
    mistake(
        "group-gradient-of-the-mean",
        "gives key and value the mean gradient over the group in place of the sum",
        "MHA-VJP-4",
        sum_group=by_group(lambda x: x.mean(axis=2)),
        bugs=("stanford-crfm/levanter PR#449",),
    ),
    mistake(
        "group-gradient-tiled",
        "sums the gradient over the heads h % kv_heads",
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
        "takes grad_lse with the wrong sign",
        "MHA-VJP-1",
        "MHA-LSE-3",
        row_dot=lse_subtracted,
        needs=("grad_lse",),
    ),
    mistake(
        "grad-output-ignored",
        "takes grad_output as ones, the gradient of a sum",
        "MHA-VJP-1",
        "MHA-VJP-3",
        grad_weights=lambda grad_output, value: steps.grad_weights(numpy.ones_like(grad_output), value),
        grad_value=ones_for_grad_output,
        bugs=("mindspore-lab/mindone PR#1438",),
    ),
    mistake(
        "softmax-not-differentiated",
        "takes dS = dP - D without the weights",
        "MHA-VJP-1",
        grad_logits=lambda weights, grad_weights, row_dot, visible: numpy.where(visible, grad_weights - row_dot, 0.0),
    ),
    mistake(
        "cap-slope-missing",
        "leaves the slope of the soft cap out",
        "MHA-VJP-2",
        grad_scores=lambda grad_logits, cap_slope, visible: steps.grad_scores(grad_logits, 1.0, visible),
        needs=("softcap",),
    ),
    mistake(
        "cap-slope-not-squared",
        "takes 1 - |tanh| for the slope of the soft cap",
        "MHA-VJP-2",
        cap_slope=lambda scores, softcap: 1.0 if softcap is None else 1.0 - abs(numpy.tanh(scores / softcap)),
        needs=("softcap",),
    ),
    mistake(
        "query-gradient-not-scaled",
        "leaves the scale out of the gradient of query",
        "MHA-VJP-2",
        grad_query=lambda grad_scores, key, visible, scale: steps.grad_query(grad_scores, key, visible, 1.0),
    ),
    mistake(
        "key-gradient-not-scaled",
        "leaves the scale out of the gradient of key",
        "MHA-VJP-2",
        grad_key=lambda grad_scores, query, visible, scale: steps.grad_key(grad_scores, query, visible, 1.0),
    ),
    mistake(
        "key-saved-transposed",
        "reads the saved key as (batch, length, heads, size), where there are as many heads as keys",
        "MHA-VJP-2",
        grad_query=with_heads_and_length_exchanged,
        bugs=("huggingface/diffusers#14338",),
    ),
    mistake(
        "bias-gradient-zero",
        "gives a bias the gradient 0",
        "MHA-VJP-5",
        grad_bias=lambda grad_logits, shape: numpy.zeros(shape, grad_logits.dtype),
        needs=("bias",),
        bugs=("jax-ml/jax#27184",),
    ),
    mistake(
        "bias-gradient-not-summed",
        "gives a broadcast bias the gradient of its first use",
        "MHA-VJP-5",
        grad_bias=lambda grad_logits, shape: grad_logits[tuple(slice(size) for size in shape)],
        needs=("bias",),
        bugs=("NVIDIA/TransformerEngine PR#2537",),
    ),
    mistake(
        "bias-gradient-averaged",
        "gives a broadcast bias the mean gradient in place of the sum",
        "MHA-VJP-5",
        grad_bias=lambda grad_logits, shape: (
            steps.grad_bias(grad_logits, shape) * (numpy.prod(shape) / max(grad_logits.size, 1))
        ),
        needs=("bias",),
    ),
    mistake(
        "bias-gradient-unbroadcast",
        "gives a broadcast bias a gradient in the shape of the scores",
        "MHA-VJP-5",
        "MHA-DTYPE-2",
        grad_bias=lambda grad_logits, shape: grad_logits,
        needs=("bias",),
        bugs=("NVIDIA/TransformerEngine PR#2537",),
    ),
    mistake(
        "sink-gradient-zero",
        "gives the sinks the gradient 0",
        "MHA-VJP-6",
        grad_sinks=lambda sink_weights, row_dot: 0 * steps.grad_sinks(sink_weights, row_dot),
        needs=("sinks",),
    ),
    mistake(
        "sink-gradient-inverted",
        "gives the gradient of the sinks with the wrong sign",
        "MHA-VJP-6",
        grad_sinks=lambda sink_weights, row_dot: -steps.grad_sinks(sink_weights, row_dot),
        needs=("sinks",),
    ),
    mistake(
        "sink-gradient-averaged",
        "averages the gradient of the sinks over batch and rows in place of the sum",
        "MHA-VJP-6",
        grad_sinks=lambda sink_weights, row_dot: (
            steps.grad_sinks(sink_weights, row_dot) / max(sink_weights[:, 0].size, 1)
        ),
        needs=("sinks",),
    ),
)

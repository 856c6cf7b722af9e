"""Mistakes that accept an argument and do not use it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps

from .mistake import VJP, Mistake, changing, replacing

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

__all__ = ["IGNORED"]


def everywhere(array: numpy.ndarray, *others: object) -> numpy.ndarray:
    """Return True for every element of the first array."""
    return numpy.ones(array.shape, bool)


def without_constraints(constraints: list[numpy.ndarray]) -> numpy.ndarray:
    """Combine only the first constraint, which holds everywhere, and ignore those of the call."""
    return steps.all_of(constraints[:1])


def refuse_empty(a: Arguments) -> Arguments:
    """Raise for a batch, q_len or kv_len of 0."""
    if 0 in (a.batch, a.q_len, a.kv_len):
        raise ValueError("empty input")
    return a


IGNORED = (
    Mistake(
        "mask-ignored",
        "accepts a mask and does not use it",
        ("MHA-MASK-1", "MHA-MASK-3"),
        replacing(see_mask=everywhere),
        needs=("mask",),
        bugs=("pytorch/pytorch#109072", "pytorch/pytorch#163314"),
    ),
    Mistake(
        "mask-ignored-with-causal",
        "does not use the mask if causal=True",
        ("MHA-MASK-3",),
        changing(lambda a: replace(a, mask=None) if a.causal else a),
        needs=("mask", "causal"),
        bugs=("AI-Hypercomputer/maxtext#878",),
    ),
    Mistake(
        "bias-ignored",
        "accepts a bias and does not use it",
        ("MHA-BIAS-1",),
        replacing(add_bias=lambda scores, bias: scores, see_bias=everywhere),
        needs=("bias",),
    ),
    Mistake(
        "causal-ignored",
        "accepts causal=True and lets every row see the keys after it",
        ("MHA-CAUSAL-1",),
        replacing(see_causal=everywhere),
        needs=("causal",),
        bugs=("jax-ml/jax#19237", "NVIDIA/TransformerEngine#1524", "keras-team/keras#23038"),
    ),
    Mistake(
        "causal-ignored-with-mask",
        "does not use causal if there is a mask",
        ("MHA-MASK-3", "MHA-CAUSAL-1"),
        changing(lambda a: replace(a, causal=a.causal and a.mask is None)),
        needs=("mask", "causal"),
        bugs=("huggingface/transformers PR#41966",),
    ),
    Mistake(
        "causal-ignored-without-mask",
        "applies causal only if there is a mask",
        ("MHA-CAUSAL-1",),
        changing(lambda a: replace(a, causal=a.causal and a.mask is not None)),
        needs=("causal",),
        bugs=("facebookresearch/xformers#103",),
    ),
    Mistake(
        "causal-ignored-for-one-query",
        "does not use causal for a single query",
        ("MHA-CAUSAL-1", "MHA-POS-1"),
        changing(lambda a: replace(a, causal=a.causal and a.q_len > 1)),
        needs=("causal",),
        bugs=("microsoft/onnxruntime PR#29050",),
    ),
    Mistake(
        "causal-always",
        "applies causal although causal=False",
        ("MHA-SOFTMAX-1",),
        changing(lambda a: replace(a, causal=True)),
        bugs=("openvinotoolkit/openvino PR#37653", "huggingface/transformers#48172", "sgl-project/sglang PR#35434"),
    ),
    Mistake(
        "window-ignored",
        "accepts a window and lets every row see all keys",
        ("MHA-WINDOW-1", "MHA-WINDOW-2"),
        replacing(see_window_left=everywhere, see_window_right=everywhere),
        needs=("window",),
        bugs=("karpathy/nanochat#452", "EricLBuehler/mistral.rs#2094"),
    ),
    Mistake(
        "window-ignored-without-mask",
        "applies the window only if there is a mask",
        ("MHA-WINDOW-1", "MHA-WINDOW-2"),
        changing(lambda a: replace(a, window=None if a.mask is None else a.window)),
        needs=("window",),
        bugs=("jax-ml/jax#32300", "unslothai/unsloth PR#8253"),
    ),
    Mistake(
        "window-ignored-for-one-query",
        "does not use the window for a single query",
        ("MHA-WINDOW-1",),
        changing(lambda a: replace(a, window=None if a.q_len == 1 else a.window)),
        needs=("window",),
        bugs=("karpathy/nanochat#452",),
    ),
    Mistake(
        "window-left-ignored",
        "does not use the left side of the window",
        ("MHA-WINDOW-1",),
        replacing(see_window_left=everywhere),
        needs=("window",),
    ),
    Mistake(
        "window-right-ignored",
        "does not use the right side of the window, so that rows see later keys",
        ("MHA-WINDOW-2",),
        replacing(see_window_right=everywhere),
        needs=("window",),
        bugs=("jax-ml/jax PR#39576",),
    ),
    Mistake(
        "q-lengths-ignored",
        "computes the rows past q_lengths",
        ("MHA-LEN-2",),
        replacing(see_q_lengths=everywhere),
        needs=("q_lengths",),
    ),
    Mistake(
        "kv-lengths-ignored",
        "reads the keys past kv_lengths",
        ("MHA-LEN-1",),
        replacing(see_kv_lengths=lambda positions, lengths: everywhere(positions < lengths)),
        needs=("kv_lengths",),
        bugs=("tenstorrent/tt-metal#41215",),
    ),
    Mistake(
        "segments-ignored",
        "lets packed sequences see each other",
        ("MHA-SEG-1",),
        replacing(see_segments=lambda q_ids, kv_ids: everywhere(q_ids == kv_ids)),
        needs=("q_segment_ids",),
        bugs=("AI-Hypercomputer/maxtext#4476", "NVIDIA-NeMo/RL#2105", "pytorch/pytorch#177378"),
    ),
    Mistake(
        "segments-ignored-with-mask",
        "does not use the segments if there is a mask",
        ("MHA-SEG-1", "MHA-MASK-3"),
        changing(lambda a: a if a.mask is None else replace(a, q_segment_ids=None, kv_segment_ids=None)),
        needs=("q_segment_ids", "mask"),
        bugs=("huggingface/transformers PR#46634",),
    ),
    Mistake(
        "constraints-ignored",
        "treats every pair as visible, whatever the constraints hide",
        ("MHA-MASK-3",),
        replacing(all_of=without_constraints),
        bugs=("timeseriesAI/tsai#171",),
    ),
    Mistake(
        "scale-ignored",
        "uses 1/sqrt(qk_dim), whatever the scale is",
        ("MHA-SCORE-1",),
        replacing(scale_of=lambda scale, qk_dim: steps.scale_of(None, qk_dim)),
        needs=("scale",),
        bugs=("huggingface/transformers#44380", "tenstorrent/tt-metal#33304"),
    ),
    Mistake(
        "softcap-ignored",
        "accepts a softcap and does not use it",
        ("MHA-CAP-1",),
        replacing(soft_cap=lambda scores, softcap: scores, cap_slope=lambda scores, softcap: 1.0),
        needs=("softcap",),
        bugs=("sgl-project/sgl-kernel-xpu PR#491",),
    ),
    Mistake(
        "sinks-ignored",
        "accepts sinks and does not use them",
        ("MHA-SINK-1",),
        replacing(sink_column=lambda sinks, logits: steps.sink_column(None, logits)),
        needs=("sinks",),
        bugs=("NVIDIA/TransformerEngine PR#3551",),
    ),
    Mistake(
        "dropout-ignored",
        "accepts a dropout mask and a rate and does not use them",
        ("MHA-DROP-1",),
        replacing(drop=lambda x, dropout_mask, rate: x),
        needs=("dropout_mask",),
    ),
    Mistake(
        "dropout-mask-ignored",
        "divides the weights by 1 - dropout_rate and drops none",
        ("MHA-DROP-1",),
        replacing(drop=lambda x, dropout_mask, rate: x / (1 - rate)),
        needs=("dropout_mask",),
    ),
    Mistake(
        "dropout-rate-ignored",
        "drops weights and does not divide the others by 1 - dropout_rate",
        ("MHA-DROP-1",),
        replacing(drop=lambda x, dropout_mask, rate: steps.drop(x, dropout_mask, 0.0)),
        needs=("dropout_mask", "dropout_rate"),
    ),
    Mistake(
        "dropout-mask-ignored-at-rate-0",
        "does not use the dropout mask if the rate is 0",
        ("MHA-DROP-2",),
        replacing(drop=lambda x, dropout_mask, rate: steps.drop(x, dropout_mask, rate) if rate else x),
        needs=("dropout_mask",),
    ),
    Mistake(
        "grad-lse-ignored",
        "ignores grad_lse, as if lse had the gradient 0",
        ("MHA-LSE-3", "MHA-VJP-1"),
        replacing(
            row_dot=lambda weights, grad_weights, visible, grad_lse: steps.row_dot(weights, grad_weights, visible, None)
        ),
        needs=("grad_lse",),
        functions=VJP,
    ),
    Mistake(
        "empty-input-refused",
        "refuses a batch, q_len or kv_len of 0",
        ("MHA-SHAPE-2",),
        changing(refuse_empty),
        bugs=("pytorch/pytorch#81077", "Dao-AILab/flash-attention PR#2568"),
    ),
)

"""Mistakes in the scores: heads, layout, sizes, scale, soft cap and bias."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import steps
from mha_spec.reference import Reference
from mha_spec_conformance.suite.changed import Changed
from mha_spec_conformance.suite.conventions import Convention

from .ignored import everywhere
from .loops import first_keys, seeing, whole_tiles
from .mistake import FORWARD, Mistake, changing, replacing
from .visibility import first_along

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.arguments import Arguments

__all__ = ["SCORES"]

TILE = 64
"""The size of a tile in these mistakes; most kernels use this size."""


def reading_heads(index: Callable[[numpy.ndarray, int, int], numpy.ndarray]) -> steps.Steps:
    """Let query head h read key/value head index(h, heads, kv_heads), forward and backward."""

    def repeat(x: numpy.ndarray, heads: int) -> numpy.ndarray:
        return x[:, index(numpy.arange(heads), heads, x.shape[1])]

    def collect(x: numpy.ndarray, kv_heads: int) -> numpy.ndarray:
        read = index(numpy.arange(x.shape[1]), x.shape[1], kv_heads)
        return numpy.stack([x[:, read == head].sum(axis=1) for head in range(kv_heads)], axis=1)

    return replacing(repeat_heads=repeat, sum_group=collect)


def length_before_heads(a: Arguments) -> Arguments:
    """Read (batch, heads, length, size) as (batch, length, heads, size)."""
    return replace(a, query=a.query.swapaxes(1, 2), key=a.key.swapaxes(1, 2), value=a.value.swapaxes(1, 2))


def length_before_heads_of_output(name: str, array: numpy.ndarray, _: Mapping[str, Any]) -> numpy.ndarray:
    """Return the output, or its allowances, with the axes that the caller expects."""
    return array.swapaxes(1, 2) if name == "output" else array


def merged_by_reshape(name: str, array: numpy.ndarray, _: Mapping[str, Any]) -> numpy.ndarray:
    """Merge the heads of the output by a reshape without exchanging the axes."""
    return array.swapaxes(1, 2).reshape(array.shape) if name == "output" else array


def scaled_by(scale: Callable[[Arguments], float]) -> steps.Steps:
    """Use scale(a) as the default scale."""
    return changing(lambda a: replace(a, scale=scale(a)) if a.scale is None else a)


def first_components(x: numpy.ndarray, size: int) -> numpy.ndarray:
    """Keep the first `size` components and set the others to 0."""
    return numpy.where(numpy.arange(x.shape[3]) < size, x, 0).astype(x.dtype)


def scaled_bias(a: Arguments) -> Arguments:
    """Multiply the bias by the scale."""
    return a if a.bias is None else replace(a, bias=a.bias * steps.scale_of(a.scale, a.query.shape[3]))


def bias_of_columns(a: Arguments) -> Arguments:
    """Use the bias of the last query for all queries."""
    return a if a.bias is None else replace(a, bias=a.bias[:, :, -1:])


def folded_into_bias(a: Arguments) -> Arguments:
    """Express every constraint as a bias of -inf."""
    bias = numpy.where(Reference().visible(a), 0.0 if a.bias is None else a.bias, -math.inf)
    constraints = dict.fromkeys(("mask", "window", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids"))
    return replace(a, **constraints, causal=False, bias=numpy.broadcast_to(bias, (a.batch, a.heads, a.q_len, a.kv_len)))


def cap_after_bias(
    scores: numpy.ndarray, softcap: float | None, bias: numpy.ndarray | None, made: steps.Steps
) -> numpy.ndarray:
    """Add the bias first, then cap."""
    return made.soft_cap(made.add_bias(scores, bias), softcap)


def cap_as_clip(scores: numpy.ndarray, softcap: float | None) -> numpy.ndarray:
    """Clip the scores to the cap."""
    return scores if softcap is None else numpy.clip(scores, -softcap, softcap)


def tanh_of_exponentials(scores: numpy.ndarray, softcap: float | None) -> numpy.ndarray:
    """Compute tanh as (e^x - e^-x) / (e^x + e^-x)."""
    if softcap is None:
        return scores
    up, down = numpy.exp(scores / softcap), numpy.exp(-scores / softcap)
    return softcap * ((up - down) / (up + down))


HEADS = (
    Mistake(
        "heads-tiled",
        "lets query head h read key/value head h % kv_heads",
        ("MHA-HEAD-1",),
        reading_heads(lambda head, heads, kv_heads: head % kv_heads),
        convention=Convention("group_order", "tile"),
        bugs=("onnx/onnx PR#7274", "tracel-ai/burn#5783", "ekzhang/jax-js PR#180", "apple/axlearn PR#842"),
    ),
    Mistake(
        "heads-divided-by-kv-heads",
        "lets query head h read key/value head h // kv_heads",
        ("MHA-HEAD-1",),
        reading_heads(lambda head, heads, kv_heads: head // kv_heads % kv_heads),
        bugs=("HazyResearch/HipKittens PR#22", "PSAL-POSTECH/ONNXim#33"),
    ),
    Mistake(
        "heads-not-divided",
        "lets query head h read key/value head h, and the last head past the end",
        ("MHA-HEAD-1",),
        reading_heads(lambda head, heads, kv_heads: numpy.minimum(head, kv_heads - 1)),
        bugs=("NVIDIA/TensorRT-LLM PR#6538",),
    ),
    Mistake(
        "heads-read-the-first",
        "lets every query head read key/value head 0",
        ("MHA-HEAD-1",),
        reading_heads(lambda head, heads, kv_heads: 0 * head),
    ),
    Mistake(
        "length-before-heads",
        "reads the axes as (batch, length, heads, size)",
        ("MHA-SHAPE-1",),
        Changed(changing(length_before_heads), length_before_heads_of_output),
        functions=("attention",),
        bugs=("pytorch/opacus PR#825", "pytorch/pytorch#67651"),
    ),
    Mistake(
        "heads-merged-by-reshape",
        "mixes heads and rows of the output by a reshape without exchanging the axes",
        ("MHA-SHAPE-1",),
        Changed(steps.Steps(), merged_by_reshape),
        functions=("attention",),
        bugs=("jsbaan/transformer-from-scratch PR#6", "onnx/onnx#7118"),
    ),
    Mistake(
        "value-past-qk-dim-dropped",
        "drops the components of value past qk_dim",
        ("MHA-SHAPE-1",),
        changing(lambda a: a if a.value is None else replace(a, value=first_components(a.value, a.query.shape[3]))),
        functions=("attention", "attention_vjp"),
        bugs=("pytorch/pytorch#176767",),
    ),
    Mistake(
        "size-past-64-dropped",
        "drops the components of query and key past 64",
        ("MHA-SHAPE-1", "MHA-SCORE-1"),
        changing(lambda a: replace(a, query=first_components(a.query, TILE), key=first_components(a.key, TILE))),
    ),
    Mistake(
        "keys-past-64-dropped",
        "reads only the first 64 keys",
        ("MHA-SHAPE-1", "MHA-SOFTMAX-1"),
        seeing(first_keys(lambda kv_len: TILE)),
    ),
    Mistake(
        "partial-tile-dropped",
        "drops the keys past the last whole tile of 64",
        ("MHA-SHAPE-1", "MHA-SOFTMAX-1"),
        seeing(first_keys(whole_tiles(TILE))),
        bugs=("jax-ml/jax#27224",),
    ),
    Mistake(
        "last-key-dropped",
        "does not read the last key",
        ("MHA-SHAPE-1", "MHA-SOFTMAX-1"),
        seeing(first_keys(lambda kv_len: kv_len - 1)),
    ),
)

SCALES = (
    Mistake(
        "scale-missing",
        "uses the scale 1 if scale is None",
        ("MHA-SCORE-2",),
        scaled_by(lambda a: 1.0),
        bugs=("flexflow/flexflow-train#467",),
    ),
    Mistake(
        "scale-one",
        "uses the scale 1, whatever the scale is",
        ("MHA-SCORE-1", "MHA-SCORE-2"),
        replacing(scale_of=lambda scale, qk_dim: 1.0),
        bugs=("flexflow/flexflow-train#467",),
    ),
    Mistake(
        "scale-of-qk-dim-itself",
        "uses the scale 1/qk_dim instead of 1/sqrt(qk_dim)",
        ("MHA-SCORE-2",),
        scaled_by(lambda a: 1 / a.query.shape[3]),
    ),
    Mistake(
        "scale-multiplied",
        "multiplies by sqrt(qk_dim) instead of dividing",
        ("MHA-SCORE-2",),
        scaled_by(lambda a: math.sqrt(a.query.shape[3])),
        bugs=("AI-Hypercomputer/maxtext#1370",),
    ),
    Mistake(
        "scale-of-all-heads",
        "uses the scale 1/sqrt(heads * qk_dim)",
        ("MHA-SCORE-2",),
        scaled_by(lambda a: 1 / math.sqrt(a.heads * a.query.shape[3])),
        bugs=("karpathy/ng-video-lecture PR#6", "rezazad68/TMUnet#13"),
    ),
    Mistake(
        "scale-of-v-dim",
        "uses the scale 1/sqrt(v_dim)",
        ("MHA-SCORE-2", "MHA-SHAPE-1"),
        scaled_by(lambda a: 1 / math.sqrt(a.query.shape[3] if a.value is None else a.value.shape[3])),
        functions=("attention", "attention_vjp"),
        bugs=("NVIDIA/Megatron-LM#1501",),
    ),
    Mistake(
        "scale-of-padded-size",
        "computes the scale from qk_dim rounded up to a multiple of 8",
        ("MHA-SCORE-2",),
        scaled_by(lambda a: 1 / math.sqrt(-(-a.query.shape[3] // 8) * 8)),
        bugs=("intel/ipex-llm PR#12619",),
    ),
    Mistake(
        "scale-twice",
        "multiplies both query and key by the scale",
        ("MHA-SCORE-1",),
        replacing(scores=lambda query, key, scale: steps.scores(query, key, scale) * scale),
    ),
    Mistake(
        "scale-of-0-default",
        "treats a scale of 0 as None",
        ("MHA-SCORE-3",),
        replacing(scale_of=lambda scale, qk_dim: steps.scale_of(scale or None, qk_dim)),
        needs=("scale",),
    ),
    Mistake(
        "scale-without-sign",
        "drops the sign of the scale",
        ("MHA-SCORE-3",),
        replacing(scale_of=lambda scale, qk_dim: abs(steps.scale_of(scale, qk_dim))),
        needs=("scale",),
    ),
    Mistake(
        "scores-without-sign",
        "takes the absolute value of the scores",
        ("MHA-SCORE-1",),
        replacing(scores=lambda query, key, scale: abs(steps.scores(query, key, scale))),
    ),
    Mistake(
        "scores-clipped",
        "clips the scores to 50 in magnitude",
        ("MHA-SCORE-1",),
        replacing(scores=lambda query, key, scale: numpy.clip(steps.scores(query, key, scale), -50, 50)),
    ),
)

CAPS = (
    Mistake(
        "cap-after-bias",
        "adds the bias before the soft cap",
        ("MHA-CAP-2",),
        replacing(logits=cap_after_bias),
        needs=("softcap", "bias"),
        functions=FORWARD,
        convention=Convention("softcap_order", "after_bias"),
        bugs=("onnx/onnx#7865", "emmtrix/emx-onnx-cgen PR#731"),
    ),
    Mistake(
        "cap-after-mask",
        "caps hidden pairs too, so that -inf becomes -softcap",
        ("MHA-CAP-2",),
        changing(folded_into_bias, see_bias=everywhere, logits=cap_after_bias),
        needs=("softcap",),
        functions=FORWARD,
        bugs=("onnx/onnx#7865", "ggml-org/llama.cpp PR#29034"),
    ),
    Mistake(
        "cap-before-scale",
        "caps the scores before they are scaled",
        ("MHA-CAP-1",),
        changing(
            lambda a: (
                a if a.softcap is None else replace(a, softcap=a.softcap * steps.scale_of(a.scale, a.query.shape[3]))
            )
        ),
        needs=("softcap",),
    ),
    Mistake(
        "cap-without-factor",
        "leaves the factor softcap out of softcap * tanh(S / softcap)",
        ("MHA-CAP-1",),
        replacing(soft_cap=lambda scores, softcap: scores if softcap is None else numpy.tanh(scores / softcap)),
        needs=("softcap",),
    ),
    Mistake(
        "cap-times-the-score",
        "multiplies tanh(S / softcap) by S instead of softcap",
        ("MHA-CAP-1",),
        replacing(
            soft_cap=lambda scores, softcap: scores if softcap is None else scores * numpy.tanh(scores / softcap)
        ),
        needs=("softcap",),
        functions=FORWARD,
        bugs=("unslothai/unsloth-zoo#593",),
    ),
    Mistake(
        "cap-as-clip",
        "clips the scores to the cap instead of applying tanh",
        ("MHA-CAP-1",),
        replacing(
            soft_cap=cap_as_clip, cap_slope=lambda scores, softcap: 1.0 if softcap is None else abs(scores) < softcap
        ),
        needs=("softcap",),
    ),
    Mistake(
        "cap-overflows",
        "computes tanh from exponentials that overflow",
        ("MHA-CAP-1",),
        replacing(soft_cap=tanh_of_exponentials),
        needs=("softcap",),
        bugs=("vllm-project/vllm PR#56579",),
        native=True,
    ),
)

BIASES = (
    Mistake(
        "bias-scaled",
        "multiplies the bias by the scale",
        ("MHA-BIAS-1",),
        changing(scaled_bias),
        needs=("bias",),
        bugs=("tenstorrent/tt-metal PR#42891",),
    ),
    Mistake(
        "bias-subtracted",
        "subtracts the bias instead of adding it",
        ("MHA-BIAS-1",),
        replacing(add_bias=lambda scores, bias: scores if bias is None else scores - bias),
        needs=("bias",),
        functions=FORWARD,
        bugs=("meta-pytorch/attention-gym PR#86",),
    ),
    Mistake(
        "bias-as-keep-mask",
        "treats a bias other than 0 as a mask that shows the pair, and does not add it",
        ("MHA-BIAS-1",),
        replacing(add_bias=lambda scores, bias: scores, see_bias=lambda bias: bias != 0),
        needs=("bias",),
        bugs=("mlverse/torch PR#1208",),
    ),
    Mistake(
        "bias-as-hide-mask",
        "treats a bias other than 0 as a mask that hides the pair, and does not add it",
        ("MHA-BIAS-1",),
        replacing(add_bias=lambda scores, bias: scores, see_bias=lambda bias: bias == 0),
        needs=("bias",),
        bugs=("pytorch/pytorch#107084", "pytorch/pytorch#118628"),
    ),
    Mistake(
        "bias-of-the-first-batch-entry",
        "uses the bias of the first batch entry for all",
        ("MHA-BIAS-1",),
        first_along("bias", 0),
        needs=("bias",),
    ),
    Mistake(
        "bias-of-the-first-head",
        "uses the bias of the first head for all",
        ("MHA-BIAS-1",),
        first_along("bias", 1),
        needs=("bias",),
    ),
    Mistake(
        "bias-of-the-last-query",
        "uses the bias of the last query for all",
        ("MHA-BIAS-1",),
        changing(bias_of_columns),
        needs=("bias",),
        bugs=("keras-team/keras-hub#2861",),
    ),
    Mistake(
        "bias-in-query-dtype",
        "rounds the bias to the dtype of the query",
        ("MHA-BIAS-2",),
        replacing(
            convert_bias=lambda bias, query_dtype, softmax_dtype: steps.convert_bias(
                bias.astype(query_dtype), query_dtype, softmax_dtype
            )
        ),
        needs=("bias",),
        bugs=("huggingface/transformers PR#16901",),
        native=True,
    ),
    Mistake(
        "finite-bias-hides",
        "hides the pairs with a bias below -1e4",
        ("MHA-BIAS-3",),
        replacing(see_bias=lambda bias: bias > -1e4),
        needs=("bias",),
        bugs=("huggingface/transformers PR#17306",),
    ),
    Mistake(
        "infinite-bias-shown",
        "adds a bias of -inf without hiding the pair, so that a NaN remains",
        ("MHA-BIAS-3", "MHA-POISON-1"),
        replacing(see_bias=everywhere),
        needs=("bias",),
        bugs=("deepbeepmeep/Wan2GP PR#1628",),
    ),
)

SCORES = (*HEADS, *SCALES, *CAPS, *BIASES)

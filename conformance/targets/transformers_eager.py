# /// script
# dependencies = ["torch==2.13.0", "transformers==5.24.0"]
# ///
"""Transformers' eager attention, unchanged: the function of Gemma 2 with its soft cap, and with sinks that of GPT-OSS.

Causal, windows, an offset, lengths of keys and segments are the masks of `eager_mask`, which adds the lowest number of
the dtype where a pair is hidden, and so is a boolean mask. A bias is an additive mask, too. The softmax is computed in
float32, and float64 is not asked.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import torch
from transformers import masking_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

arrays = "torch"
dtypes = ("float32", "float16", "bfloat16")
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse the masks for which Transformers has no function."""
    options = question.options
    left, right = options.get("window") or (None, None)
    right = 0 if options.get("causal") else right
    if ((left is None) != (right is None) and right != 0) or right not in (None, 0, left):
        return "a window ends at the query's key, or is as long to both sides"
    ids = [question.arrays.get(name) for name in ("q_segment_ids", "kv_segment_ids")]
    if ids[0] is not None and not numpy.array_equal(*ids):
        return "the tokens of a packed sequence are queries and keys"
    offset = options.get("q_offset") or 0
    return ("q_offset" not in question.arrays and offset >= 0) or "the offset is a number that is not negative"


def attention(query, key, value, *, mask=None, bias=None, scale=None, softcap=None, sinks=None, **structure):
    """Call the function."""
    return call(query, key, value, mask, bias, scale, softcap, sinks, **structure)[0].transpose(1, 2)


def attention_weights(query, key, *, mask=None, bias=None, scale=None, softcap=None, sinks=None, **structure):
    """Return the weights, which the function returns, too."""
    return call(query, key, key, mask, bias, scale, softcap, sinks, **structure)[1]


def attention_vjp(grad_output, query, key, value, *, bias=None, sinks=None, **options):
    """Return the gradients of autograd."""
    operands = [None if x is None else x.detach().requires_grad_() for x in (query, key, value, bias, sinks)]
    output = attention(*operands[:3], bias=operands[3], sinks=operands[4], **options)
    gradients = iter(torch.autograd.grad(output, [x for x in operands if x is not None], grad_output))
    return tuple(None if x is None else next(gradients) for x in operands)


def call(query, key, value, mask, bias, scale, softcap, sinks, **structure):
    """Make the additive mask and call the function of a model."""
    pairs = bias
    if structure:
        built = masking_utils.eager_mask(**mask_arguments(query, key, **structure), dtype=query.dtype)
        pairs = built if bias is None else built + bias
    if mask is not None:
        lowest = torch.where(mask, torch.zeros((), dtype=query.dtype), torch.finfo(query.dtype).min)
        pairs = lowest if pairs is None else pairs + lowest
    scale = query.shape[3] ** -0.5 if scale is None else scale
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], training=False, sinks=sinks)
    if sinks is None:
        return modeling_gemma2.eager_attention_forward(module, query, key, value, pairs, scaling=scale, softcap=softcap)
    if softcap is not None:
        raise NotImplementedError("no model has sinks and a soft cap")
    return modeling_gpt_oss.eager_attention_forward(module, query, key, value, pairs, scale)


def mask_arguments(
    query, key, *, causal=False, window=None, q_offset=None, kv_lengths=None, q_segment_ids=None, kv_segment_ids=None
):
    """Return the arguments of the functions that make masks."""
    left, right = window or (None, None)
    causal = causal or right == 0
    functions = [masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function]
    if left is not None and causal:
        functions = [masking_utils.sliding_window_causal_mask_function(left + 1)]
    elif left is not None:
        functions = [masking_utils.sliding_window_bidirectional_mask_function(left)]
    if q_segment_ids is not None:
        functions.append(masking_utils.packed_sequence_mask_function(q_segment_ids))
    return {
        "batch_size": query.shape[0],
        "q_length": query.shape[2],
        "kv_length": key.shape[2],
        "q_offset": q_offset or 0,
        "mask_function": masking_utils.and_masks(*functions),
        "attention_mask": None if kv_lengths is None else torch.arange(key.shape[2]) < kv_lengths[:, None],
        "allow_is_causal_skip": False,
    }


features = ("mask", "bias", "causal", "window", "offset", "kv_lengths", "segments", "scale", "softcap", "sinks")

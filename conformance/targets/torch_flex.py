# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `flex_attention`, unchanged, without `torch.compile`.

Constraints are its `score_mod`, which gives hidden pairs the score -inf; the caps, biases and offsets are those of the
specification, since the caller writes them. On the CPU it has no gradients.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")

warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")


def supports(question):
    """Refuse ids that PyTorch does not compare with others."""
    ids = (question.arrays.get(name) for name in ("q_segment_ids", "kv_segment_ids"))
    wide = any(array is not None and array.dtype.name in ("uint16", "uint32", "uint64") for array in ids)
    return not wide or "PyTorch does not compare unsigned ids with others"


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    causal=False,
    window=None,
    q_offset=None,
    q_lengths=None,
    kv_lengths=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    scale=None,
    softcap=None,
    return_lse=False,
):
    """Call flex_attention."""
    batch, heads, q_len, kv_len = *query.shape[:3], key.shape[2]
    seen = visible((batch, 1, q_len, kv_len), causal, window, q_offset, q_lengths, kv_lengths)
    if mask is not None:
        seen = seen & mask
    if q_segment_ids is not None:
        seen = seen & (q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])
    seen = seen.expand(batch, heads, q_len, kv_len)
    bias = None if bias is None else bias.expand(batch, heads, q_len, kv_len)

    def score_mod(score, b, h, i, j):
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        score = score if bias is None else score + bias[b, h, i, j]
        return torch.where(seen[b, h, i, j], score, -math.inf)

    options = {"scale": scale, "enable_gqa": heads != key.shape[1]}
    if not return_lse:
        return flex_attention(query, key, value, score_mod, **options)
    output, further = flex_attention(query, key, value, score_mod, return_aux=AuxRequest(lse=True), **options)
    return output, further.lse


def visible(shape, causal, window, q_offset, q_lengths, kv_lengths):
    """Return the visible pairs (batch, 1, q_len, kv_len) of causal, window and lengths."""
    *_, q_len, kv_len = shape
    row, column = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    distance = column - row - torch.as_tensor(0 if q_offset is None else q_offset).reshape(-1, 1, 1, 1)
    left, right = window or (None, None)
    right = 0 if causal else right
    seen = torch.ones(shape, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    seen = seen if right is None else seen & (distance <= right)
    for index, lengths in ((row, q_lengths), (column, kv_lengths)):
        if lengths is not None:
            seen = seen & (index < torch.as_tensor(lengths).reshape(-1, 1, 1, 1))
    return seen

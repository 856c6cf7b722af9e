# /// script
# dependencies = ["einops==0.8.2", "flash-attn-4==4.0.0b36", "torch==2.13.0"]
# ///
"""FlashAttention's `attention_ref`, unchanged: the PyTorch function with which FlashAttention 4 tests its kernels.

It is read from its file, because the package imports CUDA. It computes in float32, and float64 is not asked.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import distribution

import torch

arrays = "torch"
layout = "bshd"
dtypes = ("float32", "float16", "bfloat16")
profile = "strict"
conventions = {"causal_alignment": "lower_right_of_lengths"}

_place = distribution("flash-attn-4").locate_file("flash_attn/cute/testing.py")
_spec = importlib.util.spec_from_file_location("flash_attention_testing", str(_place))
testing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(testing)


def attention(
    query,
    key,
    value,
    *,
    bias=None,
    causal=False,
    window=None,
    q_lengths=None,
    kv_lengths=None,
    softcap=None,
    sinks=None,
    dropout_rate=0.0,
    dropout_mask=None,
):
    """Call the function."""
    padding = [
        None if lengths is None else torch.arange(array.shape[1]) < lengths[:, None]
        for array, lengths in ((query, q_lengths), (key, kv_lengths))
    ]
    return testing.attention_ref(
        query,
        key,
        value,
        *padding,
        attn_bias=bias,
        dropout_p=dropout_rate,
        dropout_mask=dropout_mask,
        causal=causal,
        window_size=window or (None, None),
        learnable_sink=sinks,
        softcap=softcap or 0.0,
    )[0]

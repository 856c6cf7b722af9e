# /// script
# dependencies = ["einops==0.8.2", "hyper-connections==0.4.11", "local-attention==1.11.2", "torch==2.13.0"]
# ///
"""local-attention's `LocalAttention(exact_windowsize=True)`, unchanged, without rotary embeddings, padded by itself.

With `window_size=w` and `exact_windowsize`, a query sees its own key and w keys before it, and w keys after it unless
it is causal. Key padding is its `mask`.
"""

from __future__ import annotations

import torch
from local_attention import LocalAttention

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse the calls that the module does not have."""
    query, key = question.shapes["query"], question.shapes["key"]
    left, right = question.options.get("window", (None, None))
    right = 0 if question.options.get("causal") else right
    if query[2] != key[2] or 0 in query:
        return "there are as many keys as queries, and no axis is empty"
    return (left not in (None, 0) and right in (0, left) and left < 2**20) or "a window has w keys on one or both sides"


def attention(query, key, value, *, causal=False, window=None, kv_lengths=None, scale=None):
    """Call the module."""
    causal = causal or window[1] == 0
    module = LocalAttention(window[0], causal=causal, autopad=True, exact_windowsize=True, scale=scale)
    mask = None if kv_lengths is None else torch.arange(key.shape[2]) < kv_lengths[:, None]
    return module(query, key, value, mask=mask)


def attention_vjp(grad_output, query, key, value, **options):
    """Return the gradients of autograd."""
    operands = [x.detach().requires_grad_() for x in (query, key, value)]
    return (*torch.autograd.grad(attention(*operands, **options), operands, grad_output), None, None)


features = ("causal", "window", "kv_lengths", "scale")

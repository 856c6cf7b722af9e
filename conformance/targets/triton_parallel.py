# /// script
# dependencies = [
#     "einops==0.8.2",
#     "fla-core==0.6.0",
#     "flash-linear-attention==0.6.0",
#     "torch==2.13.0",
#     "triton==3.9.0",
# ]
# ///
"""flash-linear-attention's Triton kernel `parallel_attn`, unchanged, in Triton's interpreter, which needs no GPU.

Its axes are (batch, length, heads, size). It is always causal, with as many keys as queries, and its `window_size`
counts the query's own key.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from fla.ops.attn import parallel_attn

arrays = "torch"
dtypes = ("float32", "float16")


def supports(question):
    """Refuse the calls that the kernel does not have."""
    query, key = question.shapes["query"], question.shapes["key"]
    if not question.options.get("causal") or query[2] != key[2]:
        return "the kernel is causal, with as many keys as queries"
    if question.options.get("window", (None, 0))[1] not in (None, 0):
        return "a window ends at the query's own key"
    return 0 not in query or "no axis is empty"


def attention(query, key, value, *, causal=False, window=None, scale=None):
    """Call the kernel."""
    query, key, value = (array.transpose(1, 2).contiguous() for array in (query, key, value))
    left = None if window is None or window[0] is None else window[0] + 1
    return parallel_attn(query, key, value, scale=scale, window_size=left).transpose(1, 2)


def attention_vjp(grad_output, query, key, value, **options):
    """Return the gradients of the kernel's backward pass."""
    operands = [array.detach().requires_grad_() for array in (query, key, value)]
    return torch.autograd.grad(attention(*operands, **options), operands, grad_output)


features = ("causal", "window", "scale")

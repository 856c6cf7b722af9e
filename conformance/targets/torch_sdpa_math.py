# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `scaled_dot_product_attention` with its math kernel of the CPU alone, unchanged."""

from __future__ import annotations

import torch_sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel

arrays = "torch"
dtypes = torch_sdpa.dtypes
conventions = torch_sdpa.conventions
features = ("mask", "bias", "causal", "scale")


def attention(query, key, value, **options):
    """Call SDPA with this kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch_sdpa.attention(query, key, value, **options)


def attention_vjp(grad_output, query, key, value, **options):
    """Return the gradients of autograd."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch_sdpa.attention_vjp(grad_output, query, key, value, **options)

# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `scaled_dot_product_attention` with its flash kernel of the CPU alone, unchanged."""

from __future__ import annotations

import torch
import torch_sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel

arrays = "torch"
dtypes = torch_sdpa.dtypes
conventions = torch_sdpa.conventions
features = ("mask", "bias", "causal", "scale")


def attention(query, key, value, **options):
    """Call SDPA with this kernel."""
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch_sdpa.attention(query, key, value, **options)
    except RuntimeError as error:
        if "No available kernel" in str(error):
            raise NotImplementedError("this kernel does not take the call") from error
        raise


def attention_vjp(grad_output, query, key, value, *, mask=None, causal=False, scale=None):
    """Return the gradients of autograd."""
    operands = [x.detach().requires_grad_() for x in (query, key, value)]
    return (
        *torch.autograd.grad(attention(*operands, mask=mask, causal=causal, scale=scale), operands, grad_output),
        None,
        None,
    )

# /// script
# dependencies = ["tinygrad==0.14.0"]
# ///
"""tinygrad's `Tensor.scaled_dot_product_attention` on the CPU, unchanged, for which tinygrad needs `clang`.

Mask and bias are the same argument, `attn_mask`, which a causal call refuses; the causal diagonal begins at the upper
left. Each signature is compiled, and so only float32 is asked, and no gradients.
"""

from __future__ import annotations

import os

os.environ["DEV"] = "CPU"

from tinygrad import Tensor

dtypes = ("float32",)
conventions = {"causal_alignment": "upper_left"}


def attention(query, key, value, *, mask=None, bias=None, causal=False):
    """Call the method."""
    if sum((mask is not None, bias is not None, causal)) > 1:
        raise NotImplementedError("a call is causal, or has a boolean mask or a bias")
    pairs = bias if mask is None else mask
    return (
        Tensor(query)
        .scaled_dot_product_attention(
            Tensor(key),
            Tensor(value),
            None if pairs is None else Tensor(pairs),
            is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        .numpy()
    )

# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch: `default_attention` ignores its key padding mask if `causal=True`."""

import sys

import torch
from ring_attention_pytorch.ring_attention import default_attention

query, key, value = torch.randn(3, 1, 5, 2, 8).unbind()
mask = torch.tensor([[False, False, True, True, True]])  # padded on the left: causal does not hide the padding
with_mask, without = (default_attention(query, key, value, m, causal=True) for m in (mask, None))
print("with and without the mask, causal: differ by", float((with_mask - without).abs().max()))
print("with and without the mask, not causal: differ by", end=" ")
print(float((default_attention(query, key, value, mask) - default_attention(query, key, value)).abs().max()))
sys.exit(not torch.equal(with_mask, without))

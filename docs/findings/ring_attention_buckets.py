# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch: with fewer queries than keys, a causal `ring_flash_attn` depends on `bucket_size`."""

import sys

import torch
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

query, key = torch.zeros(1, 2, 1, 8), torch.zeros(1, 8, 1, 8)
value = torch.eye(8)[None, :, None]  # the output shows the weights
results = {size: ring_flash_attn(query, key, value, None, True, bucket_size=size) for size in (8, 2)}
for size, weights in results.items():
    print(f"bucket_size={size}: the weights of query 0 are", [round(w, 3) for w in weights[0, 0, 0].tolist()])
sys.exit(bool((results[8] - results[2]).abs().max() < 1e-3))

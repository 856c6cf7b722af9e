# /// script
# dependencies = ["einops==0.8.2", "hyper-connections==0.4.11", "local-attention==1.11.2", "torch==2.13.0"]
# ///
"""local-attention: with `autopad=True` and without `mask`, queries that are not causal attend to the padding."""

import sys

import torch
from local_attention import LocalAttention

query = torch.zeros(1, 1, 6, 8)
value = torch.ones(1, 1, 6, 1)  # any weighted mean of ones is 1
attend = LocalAttention(4, causal=False, autopad=True)
without, full = attend(query, query, value), attend(query, query, value, mask=torch.ones(1, 6, dtype=torch.bool))
print("without mask", without.flatten().tolist())  # 0.75: 2 of 8 keys are padding
print("with a mask of ones", full.flatten().tolist())
sys.exit(bool((without - full).abs().max() < 1e-3))

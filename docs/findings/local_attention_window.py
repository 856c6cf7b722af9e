# /// script
# dependencies = ["einops==0.8.2", "hyper-connections==0.4.11", "local-attention==1.11.2", "torch==2.13.0"]
# ///
"""local-attention: with `exact_windowsize=True` a causal query sees `window_size + 1` keys."""

import sys

import torch
from local_attention import LocalAttention

query = torch.zeros(1, 1, 6, 8)
value = torch.eye(6)[None, None]  # the output shows the weights
weights = LocalAttention(2, causal=True, exact_windowsize=True)(query, query, value)[0, 0]
print("window_size=2, weights:", *weights.tolist(), sep="\n")
sys.exit(int((weights[-1] > 0).sum()) <= 2)

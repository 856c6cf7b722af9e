# /// script
# dependencies = [
#     "einops==0.8.2",
#     "einx==0.4.3",
#     "frozendict==2.5.1",
#     "loguru==0.7.3",
#     "torch==2.13.0",
#     "torch-einops-utils==0.2.0",
#     "x-transformers==2.31.10",
# ]
# ///
"""x-transformers: with `flash=False`, a row whose causal keys are all masked attends to future keys."""

import sys

import torch
from x_transformers.attend import Attend

query, key = torch.randn(2, 1, 1, 3, 3).unbind()
value = torch.eye(3)[None, None]  # the output shows the weights
mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
mask[0, 0, 0, 0] = False  # hides the only key at or before query 0
weights = {flash: Attend(causal=True, flash=flash)(query, key, value, mask=mask)[0][0, 0, 0] for flash in (False, True)}
for flash, row in weights.items():
    print(f"flash={flash}: the weights of query 0 are", row.tolist())
sys.exit(not (weights[False][1:] > 0.3).all())

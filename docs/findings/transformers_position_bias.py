# /// script
# dependencies = ["torch==2.13.0", "transformers==5.24.0"]
# ///
"""Transformers: with `position_bias`, SDPA attends to masked keys if all of a row are masked."""

import sys
from types import SimpleNamespace

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

query, key = torch.randn(2, 1, 1, 3, 8).unbind()
value = torch.eye(3)[None, None]  # the output shows the weights
mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
mask[..., 0, :] = False
module = SimpleNamespace(is_causal=False)
without, with_bias = (
    sdpa_attention_forward(module, query, key, value, mask, scaling=1.0, position_bias=bias)[0][0, 0, 0]
    for bias in (None, torch.zeros(1, 1, 3, 3))
)
print("weights of query 0 without position_bias", without.tolist())
print("weights of query 0 with a position_bias of 0", with_bias.tolist())
sys.exit(not (without.sum() == 0 and with_bias.sum() > 0.9))

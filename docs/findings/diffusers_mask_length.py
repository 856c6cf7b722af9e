# /// script
# dependencies = ["diffusers==0.42.1", "torch==2.13.0"]
# ///
"""diffusers: `Attention.prepare_attention_mask` pads a mask to its own length plus `target_length`."""

import sys

import torch
from diffusers.models.attention_processor import Attention

layer = Attention(8, heads=2, dim_head=4)
mask = layer.prepare_attention_mask(torch.zeros(1, 1, 3), target_length=5, batch_size=1)
print("a mask of length 3 with target_length=5 has the length", mask.shape[-1])
sys.exit(mask.shape[-1] == 5)

# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch: `ring_flash_attn` fails for all dtypes except float32; `default_attention` takes them."""

import sys

import torch
from ring_attention_pytorch.ring_attention import default_attention
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

failed = []
for dtype in (torch.float16, torch.bfloat16, torch.float64):
    x = torch.randn(1, 4, 1, 8, dtype=dtype)
    print(dtype, "default_attention:", default_attention(x, x, x).dtype)
    try:
        print(dtype, "ring_flash_attn:", ring_flash_attn(x, x, x).dtype)
    except RuntimeError as error:
        failed.append(dtype)
        print(dtype, "ring_flash_attn:", error)
sys.exit(len(failed) < 3)

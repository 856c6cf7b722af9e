# /// script
# dependencies = ["openai-whisper==20250625", "torch==2.13.0"]
# ///
"""openai-whisper: with SDPA, its default, `MultiHeadAttention` reads no value of `mask`: every mask means causal."""

import sys

import torch
from whisper.model import MultiHeadAttention

layer, x = MultiHeadAttention(8, 2), torch.randn(1, 4, 8)
outputs = {}
with torch.no_grad():
    for sdpa in (False, True):
        MultiHeadAttention.use_sdpa = sdpa
        zeros = layer(x, mask=torch.zeros(4, 4))[0]  # added to the scores, zeros change nothing
        outputs[sdpa] = float((zeros - layer(x)[0]).abs().max())
        print(f"use_sdpa={sdpa}: a mask of zeros changes the output by", outputs[sdpa])
sys.exit(not (outputs[True] > 1e-3 > outputs[False]))

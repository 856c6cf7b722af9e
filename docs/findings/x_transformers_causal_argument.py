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
"""x-transformers: `Attend(flash=True)` ignores the argument `causal` of its call, which `flash=False` obeys."""

import sys

import torch
from x_transformers.attend import Attend

query, key, value = torch.randn(3, 1, 2, 5, 8).unbind()
outputs = {flash: Attend(flash=flash)(query, key, value, causal=True)[0] for flash in (False, True)}
without = Attend(flash=True)(query, key, value)[0]
print("flash=True, with and without causal=True, differ by", float((outputs[True] - without).abs().max()))
print(
    "flash=True and flash=False, both with causal=True, differ by", float((outputs[True] - outputs[False]).abs().max())
)
sys.exit(not (torch.equal(outputs[True], without) and (outputs[True] - outputs[False]).abs().max() > 0.01))

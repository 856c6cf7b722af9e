# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch: with few keys, the CPU's flash kernel of SDPA gives 0 for a query that contains NaN."""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

query = torch.randn(1, 1, 3, 64)
query[0, 0, 1, 5] = torch.nan
scrubbed = {}
for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
    with sdpa_kernel(kernel):
        for kv_len in range(1, 33):
            key = torch.randn(1, 1, kv_len, 64)
            output = torch.nn.functional.scaled_dot_product_attention(query, key, key)
            if not output[0, 0, 1].isnan().all():
                scrubbed.setdefault(kernel.name, []).append(kv_len)
print("kv_len for which the row of the NaN is not NaN:", scrubbed)
sys.exit(list(scrubbed) != ["FLASH_ATTENTION"])

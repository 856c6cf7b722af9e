# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch: `flex_attention(return_aux=...)` without `torch.compile` has no lse where the batch or q_len is 0."""

import sys
import warnings

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
query, key = torch.zeros(0, 2, 3, 8), torch.zeros(0, 2, 5, 8)
output, further = flex_attention(query, key, key, return_aux=AuxRequest(lse=True))
print("output", tuple(output.shape), "lse", further.lse)  # (0, 2, 3, 8), None; an lse of (0, 2, 3) is asked
try:
    flex_attention(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 0, 8))
    without_keys = None
except Exception as error:
    without_keys = error
print("without keys", type(without_keys).__name__, without_keys)
sys.exit(not (further.lse is None and isinstance(without_keys, IndexError)))

# /// script
# dependencies = ["tinygrad==0.14.0"]
# ///
"""tinygrad: a mask that hides the only key of a query has no effect; one that hides two keys gives NaN."""

import math
import os
import sys

os.environ["DEV"] = "PYTHON"  # needs no compiler; with DEV=CPU the results are the same

from tinygrad import Tensor

results = []
for kv_len in (1, 2):
    query, key, value = Tensor.ones(1, 1, 8), Tensor.ones(1, kv_len, 8), Tensor.full((1, kv_len, 8), 5.0)
    mask = Tensor([[[False] * kv_len]])
    results.append(query.scaled_dot_product_attention(key, value, attn_mask=mask).numpy()[0, 0, 0].item())
    print(kv_len, "hidden keys with values of 5 give", results[-1])
print(
    "softmax of -inf alone:",
    Tensor([[-math.inf]]).softmax(-1).numpy(),
    "of two:",
    Tensor([[-math.inf] * 2]).softmax(-1).numpy(),
)
sys.exit(not (results[0] == 5 and math.isnan(results[1])))

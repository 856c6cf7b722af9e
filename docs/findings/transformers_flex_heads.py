# /// script
# dependencies = ["torch==2.13.0", "transformers==5.24.0"]
# ///
"""Transformers: `flex_attention_forward` applies the mask of head 0 to every head; eager attention and SDPA do not."""

import os
import sys
import warnings
from types import SimpleNamespace

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled for a CPU, this score_mod corrupts the heap: torch_flex_heap.py

import torch
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
mask = torch.zeros(1, 2, 4, 4)
mask[:, 1, :, 2:] = -torch.inf  # head 1 sees two keys
module = SimpleNamespace(training=False, num_key_value_groups=1, is_causal=False)
flex, sdpa, eager = (
    function(module, query, key, value, mask, scaling=1.0)[0]
    for function in (flex_attention_forward, sdpa_attention_forward, eager_attention_forward)
)
print("eager and sdpa differ by", (eager - sdpa).abs().amax((0, 1, 3)).tolist(), "in heads 0 and 1")
print("eager and flex differ by", (eager - flex).abs().amax((0, 1, 3)).tolist())
sys.exit(not (eager - flex)[:, :, 1].abs().max() > 1e-2)

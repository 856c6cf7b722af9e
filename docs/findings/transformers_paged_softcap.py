# /// script
# dependencies = ["torch==2.13.0", "transformers==5.24.0"]
# ///
"""Transformers: `eager_paged_attention_forward` ignores `softcap`, which `sdpa_attention_forward` refuses."""

import sys
from types import SimpleNamespace

import torch
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
module = SimpleNamespace(training=False, num_key_value_groups=1, is_causal=False)
operands = (module, query, key, value, None)
capped, uncapped = (eager_paged_attention_forward(*operands, scaling=5.0, softcap=cap)[0] for cap in (0.5, None))
gemma = eager_attention_forward(*operands, scaling=5.0, softcap=0.5)[0]
print("eager_paged: with and without softcap differ by", float((capped - uncapped).abs().max()))
print("eager_paged and the eager function of Gemma 2 differ by", float((capped - gemma).abs().max()))
try:
    sdpa_attention_forward(*operands, scaling=5.0, softcap=0.5)
except ValueError as error:
    print("sdpa:", error)
sys.exit(not (torch.equal(capped, uncapped) and (capped - gemma).abs().max() > 1e-2))

# /// script
# dependencies = ["timm==1.0.31", "torch==2.13.0"]
# ///
"""timm: `Attention` without `fused_attn` drops `attn_mask` if `is_causal=True`; with it, both constraints hold."""

import sys
from unittest.mock import MagicMock

# timm imports torchvision, of which its attention uses nothing; a wheel of it works with a single build of torch.
for name in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
    sys.modules.setdefault(f"torchvision{name}", MagicMock())

import torch  # noqa: E402
from timm.layers.attention import Attention  # noqa: E402

torch.manual_seed(0)
layer, x = Attention(16, 2).eval(), torch.randn(1, 4, 16)
mask = torch.tensor([True, False, True, True]).expand(1, 1, 4, 4)  # hides key 1; causal leaves every query a key
outputs = {}
with torch.no_grad():
    for fused in (True, False):
        layer.fused_attn = fused
        outputs[fused] = layer(x, attn_mask=mask, is_causal=True)
        causal = layer(x, is_causal=True)
        combined = layer(x, attn_mask=mask & torch.ones(4, 4, dtype=torch.bool).tril())
        print(f"fused_attn={fused}: both differ from causal alone by", float((outputs[fused] - causal).abs().max()))
        print(
            f"fused_attn={fused}: both differ from a combined mask by", float((outputs[fused] - combined).abs().max())
        )
sys.exit(not (torch.equal(outputs[False], causal) and (outputs[True] - outputs[False]).abs().max() > 1e-3))

# /// script
# dependencies = ["torch==2.13.0", "torchscale==0.3.0"]
# ///
"""torchscale's `MultiheadAttention`, unchanged, in evaluation mode, without xPos and sub-layer normalisation.

All tokens have the size of all heads together, and all projections have a bias. `attn_mask`, (q_len, kv_len),
and `rel_pos`, which has batch entries and heads, are added to the scores; `key_padding_mask` is True where it hides.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torchscale.component.multihead_attention import MultiheadAttention

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse sizes that the layer does not have."""
    if not question.function.startswith("multi_head_attention"):
        return "only the layer is asked"
    embed, heads, size = question.shapes["w_q"]
    sizes = {embed, heads * size, question.shapes["w_o"][2], question.shapes["w_k"][0], question.shapes["w_v"][0]}
    return (len(sizes) == 1 and question.shapes["w_v"][2] == size) or "all tokens have the size of all heads together"


def multi_head_attention(query, key, value, params, *, bias=None, causal=False, kv_lengths=None):
    """Call a layer that has these parameters, with 0 for missing biases."""
    embed, heads, _ = params["w_q"].shape
    layer = MultiheadAttention(
        SimpleNamespace(multiway=False, xpos_rel_pos=False), embed, heads, encoder_decoder_attention=True
    )
    state = {f"{name}_proj.weight": params[f"w_{name}"].flatten(1).T for name in "qkv"}
    state["out_proj.weight"] = params["w_o"].flatten(0, 1).T
    for name in "qkvo":
        place = "out_proj.bias" if name == "o" else f"{name}_proj.bias"
        state[place] = params[f"b_{name}"].flatten() if f"b_{name}" in params else torch.zeros(embed)
    layer = layer.to(query.dtype).eval()
    layer.load_state_dict(state)
    pairs = (query.shape[0], heads, query.shape[1], key.shape[1])
    ahead = torch.full(pairs[2:], -torch.inf, dtype=query.dtype).triu(1) if causal else None
    hidden = None if kv_lengths is None else torch.arange(key.shape[1]) >= kv_lengths[:, None]
    relative = None if bias is None else bias.expand(pairs).flatten(0, 1)
    with torch.no_grad():
        return layer(query, key, value, key_padding_mask=hidden, attn_mask=ahead, rel_pos=relative)[0]

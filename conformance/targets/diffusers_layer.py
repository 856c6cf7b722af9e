# /// script
# dependencies = ["diffusers==0.42.1", "torch==2.13.0"]
# ///
"""diffusers' `Attention` with its default processor, `AttnProcessor2_0`, unchanged, in evaluation mode.

Keys and values are projected from the same tokens, and query, key and value all have a bias or none.
`attention_mask` is added to the scores.
"""

from __future__ import annotations

import numpy
import torch
from diffusers.models.attention_processor import Attention

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")


def supports(question):
    """Refuse the calls that the layer does not have."""
    if question.function != "multi_head_attention":
        return "only the layer is asked"
    if not numpy.array_equal(question.arrays["key"], question.arrays["value"]):
        return "keys and values are projected from the same tokens"
    return question.shapes["w_v"][2] == question.shapes["w_q"][2] or "values are as large as keys"


def multi_head_attention(query, key, value, params, *, bias=None):
    """Call a layer that has these parameters, with 0 for missing biases."""
    embed, heads, size = params["w_q"].shape
    layer = Attention(
        embed,
        params["w_k"].shape[0],
        heads,
        params["w_k"].shape[1],
        size,
        bias=any(f"b_{name}" in params for name in "qkv"),
        out_dim=heads * size,
    )
    out = torch.nn.Linear(heads * size, params["w_o"].shape[2])
    layer.to_out[0] = out
    state = {f"to_{name}.weight": params[f"w_{name}"].flatten(1).T for name in "qkv"}
    state["to_out.0.weight"] = params["w_o"].flatten(0, 1).T
    state |= {name: torch.zeros_like(array) for name, array in layer.state_dict().items() if name.endswith("bias")}
    state |= {f"to_{name}.bias": params[f"b_{name}"].flatten() for name in "qkv" if f"b_{name}" in params}
    state |= {"to_out.0.bias": params["b_o"]} if "b_o" in params else {}
    layer = layer.to(query.dtype).eval()
    layer.load_state_dict(state)
    pairs = None if bias is None else bias.expand(query.shape[0], heads, query.shape[1], key.shape[1]).flatten(0, 1)
    with torch.no_grad():
        return layer(query, encoder_hidden_states=key, attention_mask=pairs)

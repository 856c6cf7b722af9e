# /// script
# dependencies = ["timm==1.0.31", "torch==2.13.0"]
# ///
"""timm's `Attention`, unchanged, in evaluation mode: the layer of its vision transformers.

Queries, keys and values are the same tokens and have the same heads, in a fused projection. Mask, bias and lengths are
the same argument, `attn_mask`, which is boolean or a bias.
"""

from __future__ import annotations

import sys
from unittest.mock import MagicMock

import numpy
import torch

# timm imports torchvision, of which its attention uses nothing; a wheel of it works with a single build of torch.
for _name in ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
    sys.modules.setdefault(f"torchvision{_name}", MagicMock())

from timm.layers.attention import Attention  # noqa: E402

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse the calls that the layer does not have."""
    if question.function != "multi_head_attention":
        return "only the layer is asked"
    query, *others = (question.arrays.get(name) for name in ("query", "key", "value"))
    if not all(array is not None and numpy.array_equal(query, array) for array in others):
        return "queries, keys and values are the same tokens"
    if question.shapes["w_q"] != question.shapes["w_k"] or question.shapes["w_q"] != question.shapes["w_v"]:
        return "queries, keys and values have the same heads"
    names = {*question.arrays, *(name for name, option in question.options.items() if option is not False)}
    kinds = {"mask" if name == "kv_lengths" else name for name in names & {"mask", "bias", "kv_lengths", "causal"}}
    return len(kinds) <= 1 or "the layer is causal, or takes a boolean mask or a bias"


def multi_head_attention(query, key, value, params, *, mask=None, bias=None, causal=False, kv_lengths=None):
    """Call a layer that has these parameters, with 0 for missing biases if it has any of a kind."""
    embed, heads, size = params["w_q"].shape
    names = [f"b_{name}" for name in "qkv"]
    fused = any(name in params for name in names)
    layer = Attention(
        embed,
        heads,
        attn_head_dim=size,
        dim_out=params["w_o"].shape[2],
        qkv_bias=fused,
        proj_bias="b_o" in params,
        dtype=query.dtype,
    )
    state = {
        "qkv.weight": torch.cat([params[f"w_{name}"].flatten(1).T for name in "qkv"]),
        "proj.weight": params["w_o"].flatten(0, 1).T,
    }
    if fused:
        zero = torch.zeros(heads * size, dtype=query.dtype)
        state["qkv.bias"] = torch.cat([params[name].flatten() if name in params else zero for name in names])
    if "b_o" in params:
        state["proj.bias"] = params["b_o"]
    layer.load_state_dict(state)
    pairs = bias if mask is None else mask
    if kv_lengths is not None:
        within = torch.arange(query.shape[1]) < torch.as_tensor(kv_lengths)[:, None, None, None]
        pairs = within if pairs is None else pairs & within
    with torch.no_grad():
        return layer.eval()(query, attn_mask=pairs, is_causal=causal)

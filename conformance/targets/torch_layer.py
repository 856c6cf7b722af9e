# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""PyTorch's `torch.nn.MultiheadAttention`, unchanged, in evaluation mode with `batch_first=True`.

It has as many heads of keys as of queries, its query, its output and all heads together have the same size, and it has
all biases or none: smaller tokens, values and outputs are passed with zeros at their end. Its masks hide where they are
True; mask and bias are the same argument, `attn_mask`, and a causal call passes the causal mask as well. Where query,
key and value are the same tokens, they are one tensor, with which the layer takes its fast path if it has biases and
an even number of heads.
"""

from __future__ import annotations

import torch

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
groups = False
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse sizes that the layer does not have."""
    if not question.function.startswith("multi_head_attention"):
        return "only the layer is asked"
    embed, heads, size = question.shapes["w_q"]
    if max(embed, question.shapes["w_o"][2]) > heads * size:
        return "the query and the output are no larger than all heads together"
    return question.shapes["w_v"][2] <= size or "values are no larger than keys"


def multi_head_attention(query, key, value, params, *, mask=None, bias=None, causal=False, kv_lengths=None):
    """Compute the output."""
    return call(query, key, value, params, mask, bias, causal, kv_lengths)[0]


def multi_head_attention_and_weights(query, key, value, params, *, mask=None, bias=None, causal=False, kv_lengths=None):
    """Compute the output and the weights of every head."""
    return call(query, key, value, params, mask, bias, causal, kv_lengths, need_weights=True)


def call(query, key, value, params, mask, bias, causal, kv_lengths, *, need_weights=False):
    """Call a layer with these parameters."""
    itself = torch.equal(query, key) and torch.equal(query, value) if query.shape == key.shape == value.shape else False
    out_size = params["w_o"].shape[2]
    (query, key, value), params = widened((query, key, value), params)
    key, value = (query, query) if itself else (key, value)
    hidden = None if kv_lengths is None else torch.arange(key.shape[1]) >= torch.as_tensor(kv_lengths)[:, None]
    with torch.no_grad():
        output, weights = layer(params, query.dtype)(
            query,
            key,
            value,
            attn_mask=attn_mask(query, key, params["w_q"].shape[1], mask, bias, causal),
            key_padding_mask=hidden,
            is_causal=causal,
            need_weights=need_weights,
            average_attn_weights=False,
        )
    return output[..., :out_size], weights


def widened(tokens, params):
    """Append zeros to tokens of the query's size, to values and to the output, up to the sizes of the layer."""
    embed, heads, size = params["w_q"].shape
    wide = heads * size
    sizes = {"b_v": (heads, size), "w_o": (heads, size, wide), "b_o": (wide,)}
    for name in ("w_q", "w_k", "w_v"):
        tokens_size = params[name].shape[0]
        sizes[name] = (wide if tokens_size == embed else tokens_size, heads, size)
    tokens = [padded(array, (*array.shape[:2], wide)) if array.shape[2] == embed else array for array in tokens]
    return tokens, {name: padded(array, sizes.get(name, array.shape)) for name, array in params.items()}


def padded(array, shape):
    """Append zeros up to a shape."""
    ends = [end for size, length in zip(shape[::-1], array.shape[::-1], strict=True) for end in (0, size - length)]
    return torch.nn.functional.pad(array, ends)


def attn_mask(query, key, heads, mask, bias, causal):
    """Return the mask of (batch * heads, q_len, kv_len), or of (q_len, kv_len) for causal attention."""
    if (mask is not None) + (bias is not None) + causal > 1:
        raise NotImplementedError("attn_mask is boolean, floating-point or causal")
    if causal:
        return torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).triu(1)
    pairs = bias if mask is None else ~mask
    return None if pairs is None else pairs.expand(query.shape[0], heads, query.shape[1], key.shape[1]).flatten(0, 1)


def layer(params, dtype):
    """Make a layer that has these parameters, with 0 for missing biases if it has any."""
    embed, heads, _ = params["w_q"].shape
    biases = [params.get(f"b_{name}") for name in "qkvo"]
    kdim, vdim = params["w_k"].shape[0], params["w_v"].shape[0]
    bias = any(array is not None for array in biases)
    made = torch.nn.MultiheadAttention(embed, heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=True, dtype=dtype)
    weights = [params[f"w_{name}"].flatten(1).T for name in "qkv"]
    together = kdim == vdim == embed
    state = {"in_proj_weight": torch.cat(weights)} if together else dict(zip(PROJECTIONS, weights, strict=True))
    state["out_proj.weight"] = params["w_o"].flatten(0, 1).T
    if bias:
        flat = [torch.zeros(embed, dtype=dtype) if array is None else array.flatten() for array in biases]
        state |= {"in_proj_bias": torch.cat(flat[:3]), "out_proj.bias": flat[3]}
    made.load_state_dict(state)
    return made.eval()


PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

# /// script
# dependencies = ["asttokens==3.0.2", "dill==0.4.1", "mindspore==2.10.0", "numpy==1.26.4"]
# ///
"""MindSpore's `nn.MultiheadAttention` on the CPU, unchanged, in evaluation mode with `batch_first=True`.

It has as many heads of keys as of queries, its query, its output and all heads together have the same size, and it has
all biases or none. Its masks hide where they are True; mask and bias are the same argument, `attn_mask`, and a causal
call passes the causal mask. MindSpore computes nothing with NumPy 2.
"""

from __future__ import annotations

import mindspore
import numpy
from mindspore import Parameter, Tensor

dtypes = ("float32",)
groups = False
conventions = {"causal_alignment": "upper_left"}


def supports(question):
    """Refuse sizes that the layer does not have."""
    if not question.function.startswith("multi_head_attention"):
        return "only the layer is asked"
    shapes = question.shapes
    embed, heads, size = shapes["w_q"]
    if not embed == heads * size == shapes["w_o"][2] or shapes["w_v"][2] != size:
        return "the query, the output and all heads together have the same size, and values that of keys"
    biases = [f"b_{name}" in shapes for name in "qkvo"]
    return all(biases) or not any(biases) or "all projections have biases, or none"


def multi_head_attention(query, key, value, params, *, mask=None, bias=None, causal=False, kv_lengths=None):
    """Compute the output."""
    return call(query, key, value, params, mask, bias, causal, kv_lengths)[0]


def multi_head_attention_and_weights(query, key, value, params, *, mask=None, bias=None, causal=False, kv_lengths=None):
    """Compute the output and the weights of every head."""
    return call(query, key, value, params, mask, bias, causal, kv_lengths)


def call(query, key, value, params, mask, bias, causal, kv_lengths):
    """Call a layer with these parameters."""
    hidden = None if kv_lengths is None else numpy.arange(key.shape[1]) >= kv_lengths[:, None]
    pairs = attn_mask(query, key, params["w_q"].shape[1], mask, bias, causal)
    output, weights = layer(params)(
        Tensor(query),
        Tensor(key),
        Tensor(value),
        key_padding_mask=None if hidden is None else Tensor(hidden),
        attn_mask=None if pairs is None else Tensor(pairs),
        average_attn_weights=False,
    )
    return output.asnumpy(), weights.asnumpy()


def attn_mask(query, key, heads, mask, bias, causal):
    """Return the mask of (batch * heads, q_len, kv_len), or of (q_len, kv_len) for causal attention."""
    if (mask is not None) + (bias is not None) + causal > 1:
        raise NotImplementedError("attn_mask is boolean, floating-point or causal")
    (batch, q_len), kv_len = query.shape[:2], key.shape[1]
    if causal:
        return ~numpy.tri(q_len, kv_len, dtype=bool)
    pairs = bias if mask is None else ~mask
    if pairs is None:
        return None
    return numpy.broadcast_to(pairs, (batch, heads, q_len, kv_len)).reshape(batch * heads, q_len, kv_len)


def layer(params):
    """Make a layer that has these parameters."""
    embed, heads, _ = params["w_q"].shape
    kdim, vdim = params["w_k"].shape[0], params["w_v"].shape[0]
    made = mindspore.nn.MultiheadAttention(
        embed, heads, has_bias="b_q" in params, kdim=kdim, vdim=vdim, batch_first=True
    )
    weights = [params[f"w_{name}"].reshape(-1, heads * params["w_q"].shape[2]).T for name in "qkv"]
    values = {"out_proj.weight": params["w_o"].reshape(embed, embed).T}
    values |= {"in_proj_weight": numpy.concatenate(weights)} if kdim == vdim == embed else named(weights)
    if "b_q" in params:
        values["in_proj_bias"] = numpy.concatenate([params[f"b_{name}"].ravel() for name in "qkv"])
        values["out_proj.bias"] = params["b_o"]
    tensors = {name: Parameter(Tensor(numpy.ascontiguousarray(value)), name=name) for name, value in values.items()}
    if unread := mindspore.load_param_into_net(made, tensors, strict_load=True)[0]:
        raise RuntimeError(f"the layer did not take {unread}")
    return made.set_train(False)


def named(weights):
    """Name the weights of projections from tokens of different sizes."""
    return {f"{name}_proj_weight": weight for name, weight in zip("qkv", weights, strict=True)}

# /// script
# dependencies = ["onnx==1.23.2"]
# ///
"""ONNX's reference evaluator: `Attention` of opset 25, unchanged, in models of a single node.

Mask and bias are the same input, `attn_mask`; kv_lengths are `nonpad_kv_seqlen`, which also move the causal diagonal.
In 16 bits it keeps scores and weights in 16 bits.
"""

from __future__ import annotations

from functools import cache

import numpy
from onnx import helper
from onnx.reference import ReferenceEvaluator

dtypes = ("float64", "float32")
features = ("mask", "bias", "causal", "window", "kv_lengths", "scale", "softcap")
conventions = {"causal_alignment": "upper_left"}

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")


def attention(query, key, value, **options):
    """Compute the output."""
    return run({"Q": query, "K": key, "V": value}, ("Y",), **options)[0]


def attention_weights(query, key, **options):
    """Compute the scores after the softmax; the node also has an output, which is ignored."""
    outputs = ("Y", "", "", "qk_matmul_output")
    return run({"Q": query, "K": key, "V": key}, outputs, qk_matmul_output_mode=3, **options)[1]


def run(
    feed,
    outputs,
    *,
    mask=None,
    bias=None,
    causal=False,
    window=None,
    kv_lengths=None,
    scale=None,
    softcap=None,
    qk_matmul_output_mode=None,
):
    """Run the node with the options that it supports."""
    if mask is not None and bias is not None:
        raise NotImplementedError("attn_mask is either boolean or floating-point, not both")
    if bias is not None and bias.dtype != feed["Q"].dtype:
        raise NotImplementedError("a floating-point attn_mask has the type of the query")
    if mask is not None or bias is not None:
        feed["attn_mask"] = bias if mask is None else mask
    if kv_lengths is not None:
        feed["nonpad_kv_seqlen"] = numpy.asarray(kv_lengths, dtype=numpy.int64)
    left, right = (None, None) if window is None else (-1 if side is None else side for side in window)
    attributes = {
        "is_causal": int(causal),
        "left_window_size": left,
        "qk_matmul_output_mode": qk_matmul_output_mode,
        "right_window_size": right,
        "scale": scale,
        "softcap": softcap,
    }
    passed = tuple((name, value) for name, value in attributes.items() if value is not None)
    signature = tuple((name, array.dtype) for name, array in feed.items())
    return evaluator(signature, outputs, passed).run(None, feed)


@cache
def evaluator(inputs, outputs, attributes):
    """Load the model whose inputs have these names and dtypes; other inputs are omitted."""
    names = [name if name in dict(inputs) else "" for name in INPUTS]
    node = helper.make_node("Attention", names, outputs, **dict(attributes))
    types = [(name, helper.np_dtype_to_tensor_dtype(dtype)) for name, dtype in inputs]
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in types],
        [helper.make_tensor_value_info(name, types[0][1], None) for name in outputs if name],
    )
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)]))

# /// script
# dependencies = ["onnx==1.23.2", "onnxruntime==1.32.0"]
# ///
"""ONNX Runtime's `Attention` on the CPU, unchanged: for each signature a model of a single node is built in memory.

Mask and bias are the same input, `attn_mask`; kv_lengths are `nonpad_kv_seqlen`, which also move the causal diagonal.
In float16 it keeps scores and weights in 16 bits. It has no kernel for float64, and its expansion computes the scale
in float32.
"""

from __future__ import annotations

from functools import cache

import numpy
import onnxruntime
from onnx import TensorProto, helper

dtypes = ("float32",)
features = ("mask", "bias", "causal", "window", "kv_lengths", "scale", "softcap")
conventions = {"causal_alignment": "upper_left"}

WITHOUT_WINDOWS, WITH_WINDOWS = 24, 25
"""The opsets: 25 added windows; ONNX Runtime 1.32 has no kernel for it, and runs ONNX's expansion of the node."""

TYPES = {
    "bool": TensorProto.BOOL,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
}
INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
QUIET = 4


@cache
def session(inputs, outputs, attributes):
    """Build and load the model whose inputs have these names and dtypes; other inputs are omitted."""
    opset = WITH_WINDOWS if "left_window_size" in dict(attributes) else WITHOUT_WINDOWS
    dtype = dict(inputs)["Q"]
    names = [name if name in dict(inputs) else "" for name in INPUTS]
    node = helper.make_node("Attention", names, outputs, **dict(attributes))
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in inputs],
        [helper.make_tensor_value_info(name, TYPES[dtype], None) for name in outputs if name],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


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
    if bias is not None and bias.dtype.name not in TYPES:
        raise NotImplementedError(f"the kernel takes no bias in {bias.dtype.name}")
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
    signature = tuple((name, array.dtype.name) for name, array in feed.items())
    passed = tuple((name, value) for name, value in attributes.items() if value is not None)
    return session(signature, outputs, passed).run(None, feed)

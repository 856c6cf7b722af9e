# /// script
# dependencies = ["onnx==1.23.2", "onnxruntime==1.32.0"]
# ///
"""ONNX Runtime's contrib operator `MultiHeadAttention` on the CPU, unchanged, in models of a single node.

It has as many heads of keys as of queries; its lengths are `key_padding_mask`, its causal flag is `unidirectional`.
"""

from __future__ import annotations

from functools import cache

import numpy
import onnxruntime
from onnx import TensorProto, helper

dtypes = ("float32",)
groups = False
conventions = {"causal_alignment": "upper_left"}

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
INPUTS = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias")
QUIET = 4


def supports(question):
    """Refuse the calls that the operator does not have."""
    query, key = question.shapes["query"], question.shapes["key"]
    if 0 in query or 0 in key:
        return "no axis is empty"
    if question.shapes.get("bias", (1, 1, query[2], key[2]))[2:] != (query[2], key[2]):
        return "attention_bias has all queries and keys"
    return question.arrays.get("bias", question.arrays["query"]).dtype.name == "float32" or "attention_bias is float32"


@cache
def session(inputs, attributes):
    """Build and load the model whose inputs have these names and dtypes; other inputs are omitted."""
    names = [name if name in dict(inputs) else "" for name in INPUTS]
    node = helper.make_node("MultiHeadAttention", names, ["output"], domain="com.microsoft", **dict(attributes))
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in inputs],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attention(query, key, value, *, bias=None, causal=False, kv_lengths=None, scale=None):
    """Compute the output."""
    batch, heads, q_len, _ = query.shape
    feed = {"query": joined(query), "key": joined(key), "value": joined(value)}
    if kv_lengths is not None:
        feed["key_padding_mask"] = numpy.asarray(kv_lengths, numpy.int32)
    if bias is not None:
        feed["attention_bias"] = bias
    attributes = {"num_heads": heads, "scale": scale, "unidirectional": int(causal)}
    signature = tuple((name, array.dtype.name) for name, array in feed.items())
    passed = tuple((name, value) for name, value in attributes.items() if value is not None)
    output = session(signature, passed).run(None, feed)[0]
    return output.reshape(batch, q_len, heads, value.shape[3]).swapaxes(1, 2)


def joined(array):
    """Reshape (batch, heads, length, size) to (batch, length, heads * size)."""
    batch, heads, length, size = array.shape
    return numpy.ascontiguousarray(array.swapaxes(1, 2)).reshape(batch, length, heads * size)

# /// script
# dependencies = ["onnx==1.23.2", "onnxruntime==1.32.0"]
# ///
"""ONNX Runtime's contrib operator `GroupQueryAttention` on the CPU, unchanged, in models of a single node.

It is always causal. With as many keys as queries its diagonal begins at the upper left, and with more it ends at the
last key in use: of the keys in use, the last q_len are passed as new keys, and the others as its cache. Its
`local_window_size` counts the query's own key. Keys and values have the same size, a multiple of 8: smaller heads are
passed with zeros at their end, and the scale of the smaller size.
"""

from __future__ import annotations

from functools import cache

import numpy
import onnxruntime
from onnx import TensorProto, helper

dtypes = ("float32", "float16")

TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
INPUTS = (*INPUTS, "cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink")
QUIET = 4
MULTIPLE = 8
"""The size of heads is a multiple of this number."""


def supports(question):
    """Refuse the calls that the operator does not have."""
    query, key = (question.shapes[name] for name in ("query", "key"))
    right = question.options.get("window", (None, None))[1]
    if 0 in query or 0 in key or key[2] < query[2]:
        return "there are at least as many keys as queries, and no axis is empty"
    if not (question.options.get("causal") or right == 0 or (query[2] == 1 and right is None)):
        return "the operator is causal"
    if question.shapes.get("bias", (1, 1, query[2], key[2]))[2:] != (query[2], key[2]):
        return "attention_bias has all queries and keys"
    return "bias" not in question.arrays or question.arrays["bias"].dtype.name == question.dtype


@cache
def session(inputs, attributes):
    """Build and load the model whose inputs have these names and dtypes; other inputs are omitted."""
    names = [name if name in dict(inputs) else "" for name in INPUTS]
    outputs = ("output", "present_key", "present_value")
    node = helper.make_node("GroupQueryAttention", names, outputs, domain="com.microsoft", **dict(attributes))
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in inputs],
        [helper.make_tensor_value_info(name, TYPES[dict(inputs)["query"]], None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attention(
    query,
    key,
    value,
    *,
    causal=False,
    window=None,
    q_offset=None,
    kv_lengths=None,
    bias=None,
    sinks=None,
    scale=None,
    softcap=None,
):
    """Compute the output of the batch, or of each entry if several queries follow a cache, which only one may have."""
    batch, _, q_len, qk_dim = query.shape
    kv_len, v_dim = key.shape[2], value.shape[3]
    lengths = numpy.full(batch, kv_len) if kv_lengths is None else numpy.minimum(kv_lengths, kv_len)
    check_positions(q_len, kv_len, lengths, q_offset if causal or window is not None else None)
    size = -(-max(qk_dim, v_dim) // MULTIPLE) * MULTIPLE
    attributes = {
        "num_heads": query.shape[1],
        "kv_num_heads": key.shape[1],
        "scale": qk_dim**-0.5 if scale is None and size != qk_dim else scale,
        "softcap": softcap,
        "local_window_size": None if window is None or window[0] is None else window[0] + 1,
    }
    passed = tuple((name, value) for name, value in attributes.items() if value is not None)
    whole = batch == 1 or q_len in (1, kv_len)
    outputs = [
        call(
            *(padded(array[part], size) for array in (query, key, value)),
            lengths[part],
            bias if bias is None or len(bias) == 1 else bias[part],
            sinks,
            passed,
        )
        for part in ([slice(None)] if whole else [slice(entry, entry + 1) for entry in range(batch)])
    ]
    return numpy.concatenate(outputs)[..., :v_dim]


def check_positions(q_len, kv_len, lengths, q_offset):
    """Refuse a diagonal that is not that of the operator."""
    past = kv_len > q_len
    if lengths.min() < (q_len if past else 1):
        raise NotImplementedError("there are at least as many keys as queries")
    readings = {None: 0, "upper_left": 0, "lower_right": lengths - q_len}
    offset = readings[q_offset] if q_offset is None or isinstance(q_offset, str) else q_offset
    if numpy.not_equal(offset, lengths - q_len if past else 0).any():
        raise NotImplementedError("the diagonal begins at the upper left, or after a cache ends at the last key")


def call(query, key, value, lengths, bias, sinks, attributes):
    """Call the operator: of the keys in use, the last q_len are new, and those before them are its cache."""
    batch, heads, q_len, size = query.shape
    past = key.shape[2] - q_len
    first = numpy.reshape(lengths - q_len if past else numpy.zeros(batch, int), (-1, 1))
    new = (first + numpy.arange(q_len))[:, None, :, None]
    feed = {
        "query": joined(query),
        "key": joined(numpy.take_along_axis(key, new, 2)),
        "value": joined(numpy.take_along_axis(value, new, 2)),
        "past_key": key[:, :, :past],
        "past_value": value[:, :, :past],
        "seqlens_k": (lengths - 1).astype(numpy.int32),
        "total_sequence_length": numpy.asarray(key.shape[2], numpy.int32),
        "attention_bias": bias,
        "head_sink": sinks,
    }
    feed = {name: array for name, array in feed.items() if array is not None}
    signature = tuple((name, array.dtype.name) for name, array in feed.items())
    output = session(signature, attributes).run(["output"], feed)[0]
    return output.reshape(batch, q_len, heads, size).swapaxes(1, 2)


def padded(array, size):
    """Append zeros to the last axis."""
    return numpy.pad(array, [(0, 0), (0, 0), (0, 0), (0, size - array.shape[3])])


def joined(array):
    """Reshape (batch, heads, length, size) to (batch, length, heads * size)."""
    batch, heads, length, size = array.shape
    return numpy.ascontiguousarray(array.swapaxes(1, 2)).reshape(batch, length, heads * size)

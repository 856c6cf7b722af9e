# /// script
# dependencies = ["onnx==1.23.2", "onnxruntime==1.32.0"]
# ///
"""ONNX Runtime: `GroupQueryAttention` gives NaN in float16, and 0 in float32, where a bias of -inf hides all keys."""

import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}
NAMES = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")


def last_row(dtype):
    """Return the output of the last query, for which the bias of all keys is -inf; all values are 1."""
    bias = np.zeros((1, 1, 3, 3), dtype)
    bias[0, 0, 2] = -np.inf
    feed = {name: np.ones((1, 3, 8), dtype) for name in NAMES[:3]}
    feed |= {"seqlens_k": np.array([[2]], np.int32), "total_sequence_length": np.array(3, np.int32)}
    feed["attention_bias"] = bias
    names = [name if name in feed else "" for name in (*NAMES, "cos_cache", "sin_cache", "position_ids")]
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention",
        [*names, "attention_bias"],
        outputs,
        domain="com.microsoft",
        num_heads=1,
        kv_num_heads=1,
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TYPES[array.dtype.name], None) for name, array in feed.items()],
        [helper.make_tensor_value_info(name, TYPES[dtype], None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["output"], feed)[0][0, 2]


rows = {dtype: last_row(dtype) for dtype in ("float32", "float16")}
for dtype, row in rows.items():
    print(dtype, row[:4])  # 0 in float32, NaN in float16
sys.exit(not ((rows["float32"] == 0).all() and np.isnan(rows["float16"]).all()))

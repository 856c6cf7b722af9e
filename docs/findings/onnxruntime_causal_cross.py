# /// script
# dependencies = ["onnx==1.23.2", "onnxruntime==1.32.0"]
# ///
"""ONNX Runtime: the last query of a causal `MultiHeadAttention` sees every key, if there are more keys than queries."""

import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def weights_of(q_len, kv_len):
    """Return the weights, because the value of key j is the unit vector j, and all scores are equal."""
    names = ["query", "key", "value"]
    node = helper.make_node(
        "MultiHeadAttention", names, ["output"], domain="com.microsoft", num_heads=1, unidirectional=1
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {"query": (q_len, kv_len), "key": (kv_len, kv_len)}
    arrays = {name: np.zeros((1, *shape), np.float32) for name, shape in feed.items()}
    return session.run(None, {**arrays, "value": np.eye(kv_len, dtype=np.float32)[None]})[0][0]


print(weights_of(3, 3))
cross = weights_of(3, 5)
print(cross)  # the rows see 1, 2 and 5 keys; with 3 keys they see 1, 2 and 3
sys.exit(list((cross > 0).sum(axis=1)) != [1, 2, 5])

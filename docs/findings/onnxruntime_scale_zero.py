# /// script
# dependencies = ["onnx==1.23.2", "onnxruntime==1.32.0"]
# ///
"""ONNX Runtime: `MultiHeadAttention` with `scale=0.0` has the default scale."""

import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

NAMES = ["query", "key", "value"]
RNG = np.random.default_rng(0)
FEED = {name: RNG.normal(size=(1, 4, 8)).astype(np.float32) for name in NAMES}


def output(**scale):
    """Run the operator with this scale."""
    node = helper.make_node("MultiHeadAttention", NAMES, ["output"], domain="com.microsoft", num_heads=1, **scale)
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in NAMES],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, FEED)[
        0
    ]


zero, tiny, default = output(scale=0.0), output(scale=1e-30), output()
print("0.0 differs from the default by", abs(zero - default).max())  # 0.0
print("1e-30 differs from the default by", abs(tiny - default).max())  # more than 0.1
sys.exit(not (np.array_equal(zero, default) and abs(tiny - default).max() > 0.1))

# /// script
# dependencies = ["onnx==1.23.2"]
# ///
"""ONNX: `Attention` of the reference evaluator gives NaN for a negative scale."""

import sys

import numpy as np
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "QKV"]
output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
node = helper.make_node("Attention", ["Q", "K", "V"], ["Y"], scale=-1.0)
model = helper.make_model(
    helper.make_graph([node], "attention", inputs, [output]), opset_imports=[helper.make_opsetid("", 25)]
)
with np.errstate(all="ignore"):
    (result,) = ReferenceEvaluator(model).run(None, {name: np.ones((1, 1, 2, 4), np.float32) for name in "QKV"})
print(result.ravel())  # NaN; 1 is the mean of equal values
sys.exit(not np.isnan(result).all())

# /// script
# dependencies = ["openvino==2026.4.1", "openvino-telemetry==2025.2.0"]
# ///
"""OpenVINO: `ScaledDotProductAttention` on a CPU gives NaN where a boolean mask hides all keys."""

import sys

import numpy as np
import openvino
from openvino import opset13

shape = [1, 1, 2, 8]
inputs = [*(opset13.parameter(shape, np.float32) for _ in range(3)), opset13.parameter([1, 1, 2, 2], np.bool_)]
model = openvino.Model([opset13.scaled_dot_product_attention(*inputs)], inputs)
compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
operands = [np.ones(shape, np.float32)] * 3
output = next(iter(compiled([*operands, np.array([[True, True], [False, False]])[None, None]]).values()))
print(output[0, 0, :, 0])  # 1 and NaN
sys.exit(not (output[0, 0, 0, 0] == 1 and np.isnan(output[0, 0, 1, 0])))

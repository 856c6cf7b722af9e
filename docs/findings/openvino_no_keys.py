# /// script
# dependencies = ["openvino==2026.4.1", "openvino-telemetry==2025.2.0"]
# ///
"""OpenVINO: `ScaledDotProductAttention` on a CPU returns uninitialised memory where there are no keys."""

import sys

import numpy as np
import openvino
from openvino import opset13

shapes = ([1, 2, 3, 8], [1, 2, 0, 8], [1, 2, 0, 8])
inputs = [opset13.parameter(shape, np.float32) for shape in shapes]
model = openvino.Model([opset13.scaled_dot_product_attention(*inputs)], inputs)
compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
outputs = []
for fill in range(1, 4):
    garbage = np.full(1 << 20, fill, np.float32)  # so that the memory that is reused is not 0
    del garbage
    outputs.append(next(iter(compiled([np.ones(shape, np.float32) for shape in shapes]).values())).copy())
print(outputs[-1].shape, outputs[-1].ravel()[:4])  # any numbers; the inputs hold nothing but ones
sys.exit(not any(np.any(output != 0) for output in outputs))

# /// script
# dependencies = ["openvino==2026.4.1", "openvino-telemetry==2025.2.0"]
# ///
"""OpenVINO's `ScaledDotProductAttention` (opset 13) on the CPU, unchanged, in models of a single node.

Scores are set to float32. Mask and bias are the same input, `attention_mask`, which a causal node ignores, as its
documentation says. The causal diagonal begins at the upper left, and keys have as many heads as queries.
"""

from __future__ import annotations

from functools import cache

import numpy
import openvino
from openvino import opset13

dtypes = ("float32",)
groups = False
conventions = {"causal_alignment": "upper_left"}

CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "KV_CACHE_PRECISION": "f32"}


def supports(question):
    """Refuse the calls that the operator does not have."""
    names = {name for name in ("mask", "bias") if name in question.arrays}
    names |= {"causal"} if question.options.get("causal") else set()
    if len(names) > 1:
        return "a node is causal, or has a boolean mask or a bias"
    bias = question.arrays.get("bias")
    return bias is None or bias.dtype.name == question.dtype or "a bias has the type of the query"


def attention(query, key, value, *, mask=None, bias=None, causal=False, scale=None):
    """Compute the output."""
    operands = [query, key, value]
    pairs = bias if mask is None else mask
    operands += [] if pairs is None else [pairs]
    signature = tuple((array.shape, array.dtype.name) for array in operands)
    return next(iter(compiled(signature, causal, scale)(operands).values()))


@cache
def compiled(signature, causal, scale):
    """Compile the model whose inputs have these shapes and dtypes."""
    inputs = [opset13.parameter(list(shape), numpy.dtype(dtype)) for shape, dtype in signature]
    pairs = inputs[3] if len(inputs) > 3 else None
    scale = None if scale is None else opset13.constant(numpy.float32(scale))
    node = opset13.scaled_dot_product_attention(*inputs[:3], pairs, scale, causal)
    return openvino.compile_model(openvino.Model([node], inputs), "CPU", CONFIG)

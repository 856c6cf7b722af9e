# /// script
# dependencies = ["pywhispercpp==1.5.1"]
# ///
"""ggml: with a soft cap and no mask, `ggml_flash_attn_ext` attends to keys that only fill its last tile."""

import ctypes
import sys
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import distribution
from pathlib import Path

import numpy

FLOAT32, FLOAT16 = 0, 1


class Parameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def library(name):
    """Load a library of ggml from the wheel."""
    folder = Path(str(distribution("pywhispercpp").locate_file("pywhispercpp.libs")))
    (path,) = folder.glob(f"lib{name}-[0-9a-f]*")
    return ctypes.CDLL(str(path))


def declared(function, result, *arguments):
    """Declare the types of a function of C."""
    function.restype, function.argtypes = result, arguments
    return function


base, cpu = library("ggml-base"), library("ggml-cpu")
new_context = declared(base.ggml_init, c_void_p, Parameters)
new_tensor = declared(base.ggml_new_tensor, c_void_p, c_void_p, c_int, c_int, POINTER(c_int64))
data_of = declared(base.ggml_get_data, c_void_p, c_void_p)
flash_attention = declared(base.ggml_flash_attn_ext, c_void_p, *[c_void_p] * 5, *[c_float] * 3)
new_graph = declared(base.ggml_new_graph, c_void_p, c_void_p)
build_forward = declared(base.ggml_build_forward_expand, None, c_void_p, c_void_p)
compute = declared(cpu.ggml_graph_compute_with_ctx, c_int, c_void_p, c_void_p, c_int)
cpu.ggml_cpu_init()
context = new_context(Parameters(2**28, None, False))


def tensor(array):
    """Copy an array to a tensor."""
    kind = FLOAT32 if array.dtype == "float32" else FLOAT16
    made = new_tensor(context, kind, array.ndim, (c_int64 * array.ndim)(*reversed(array.shape)))
    ctypes.memmove(data_of(made), array.ctypes.data, array.nbytes)
    return made


def attention(query, key, value, softcap, mask=None):
    """Compute the attention of one head with the scale 1."""
    operands = [tensor(array) for array in (query, key, value)] + [None if mask is None else tensor(mask)]
    node, graph = flash_attention(context, *operands, 1.0, 0.0, softcap), new_graph(context)
    build_forward(graph, node)
    output = numpy.empty((len(query), value.shape[1]), "float32")
    compute(context, graph, 1)
    ctypes.memmove(output.ctypes.data, data_of(node), output.nbytes)
    return output


numbers = numpy.random.default_rng(0)
query, key, value = (numbers.standard_normal((length, 8), "float32") for length in (64, 65, 65))
weights = numpy.exp(numpy.tanh(query @ key.T))  # the cap is 1
expected = weights @ value / weights.sum(axis=1, keepdims=True)
with_mask = attention(query, key, value, 1.0, numpy.zeros((64, 65), "float16"))
without = attention(query, key, value, 1.0)
print("largest error with a mask of zeros:", abs(with_mask - expected).max())
print("largest error without a mask:", abs(without - expected).max())
sys.exit(not (abs(with_mask - expected).max() < 1e-5 and abs(without - expected).max() > 0.01))

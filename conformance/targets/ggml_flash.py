# /// script
# dependencies = ["pywhispercpp==1.5.1"]
# ///
"""ggml's `ggml_flash_attn_ext` on the CPU, the attention of llama.cpp and whisper.cpp, unchanged, through ctypes.

The library is ggml 0.13.1, which the wheels of pywhispercpp have. Queries, sinks and the output are float32, keys and
values have the dtype of the question; the output is rounded to it here. `mask` is a float16 bias that is added, and so
are the masks of llama.cpp, in which -inf hides a key.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import distribution
from pathlib import Path

import numpy

dtypes = ("float32", "float16", "bfloat16")

TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
"""The numbers of `enum ggml_type`."""
THREADS = 1
WORKSPACE = 2**24
"""Bytes for the graph and the buffers of the kernel, in addition to the tensors."""


class Parameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def library(name):
    """Load a library of the wheel, which finds those that it needs."""
    folder = Path(str(distribution("pywhispercpp").locate_file("pywhispercpp.libs")))
    (path,) = folder.glob(f"lib{name}-[0-9a-f]*")
    return ctypes.CDLL(str(path))


def declared(function, result, *arguments):
    """Declare the types of a function of C, whose pointers ctypes would cut to 32 bits."""
    function.restype, function.argtypes = result, arguments
    return function


base, cpu = library("ggml-base"), library("ggml-cpu")
new_context = declared(base.ggml_init, c_void_p, Parameters)
free_context = declared(base.ggml_free, None, c_void_p)
new_tensor = declared(base.ggml_new_tensor, c_void_p, c_void_p, c_int, c_int, POINTER(c_int64))
data_of = declared(base.ggml_get_data, c_void_p, c_void_p)
flash_attention = declared(base.ggml_flash_attn_ext, c_void_p, *[c_void_p] * 5, *[c_float] * 3)
add_sinks = declared(base.ggml_flash_attn_ext_add_sinks, None, c_void_p, c_void_p)
new_graph = declared(base.ggml_new_graph, c_void_p, c_void_p)
build_forward = declared(base.ggml_build_forward_expand, None, c_void_p, c_void_p)
compute = declared(cpu.ggml_graph_compute_with_ctx, c_int, c_void_p, c_void_p, c_int)
cpu.ggml_cpu_init()


def supports(question):
    """Refuse the biases that a float16 mask does not hold."""
    bias = question.arrays.get("bias")
    with numpy.errstate(over="ignore"):
        fits = bias is None or numpy.array_equal(bias.astype("float16").astype(bias.dtype), bias, equal_nan=True)
    return fits or "a mask of ggml is float16"


def attention(query, key, value, *, mask=None, bias=None, scale=None, softcap=None, sinks=None):
    """Build a graph of one node and compute it."""
    (batch, heads, q_len, qk_dim), v_dim = query.shape, value.shape[3]
    operands = [query.astype("float32"), key, value]
    if mask is not None or bias is not None:
        added = numpy.float16(0) if bias is None else bias.astype("float16")
        pairs = added if mask is None else numpy.where(mask, added, numpy.float16(-numpy.inf))
        operands.append(numpy.broadcast_to(pairs, (*pairs.shape[:2], q_len, key.shape[2])))
    output = numpy.empty((batch, q_len, heads, v_dim), "float32")
    context = new_context(Parameters(sum(x.nbytes for x in [*operands, output]) + WORKSPACE, None, False))
    tensors = [tensor_of(context, operand) for operand in operands] + [None] * (4 - len(operands))
    node = flash_attention(context, *tensors, qk_dim**-0.5 if scale is None else scale, 0, softcap or 0)
    if sinks is not None:
        add_sinks(node, tensor_of(context, sinks.astype("float32")))
    graph = new_graph(context)
    build_forward(graph, node)
    status = compute(context, graph, THREADS)
    ctypes.memmove(output.ctypes.data, data_of(node), output.nbytes)
    free_context(context)
    if status != 0:
        raise RuntimeError(f"ggml returned the status {status}")
    return output.swapaxes(1, 2).astype(query.dtype)


def tensor_of(context, array):
    """Copy an array to a tensor, whose axes are named from the last to the first."""
    array = numpy.ascontiguousarray(array)
    shape = (c_int64 * array.ndim)(*reversed(array.shape))
    tensor = new_tensor(context, TYPES[array.dtype.name], array.ndim, shape)
    ctypes.memmove(data_of(tensor), array.ctypes.data, array.nbytes)
    return tensor

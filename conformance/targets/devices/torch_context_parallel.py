# /// script
# dependencies = ["torch==2.13.0"]
# ///
"""The ring of PyTorch's `context_parallel`, unchanged, in four processes under gloo, with the flash kernel of the CPU.

`context_parallel` itself runs on GPUs alone: on the CPU it raises NotImplementedError, "does not have a sharding
strategy registered". What it calls is `_templated_ring_attention` and its backward pass, which take the kernel as an
argument; the GPU kernels of SDPA have no float64. As in `context_parallel`, a causal call has the layout zigzag.
"""

from __future__ import annotations

import processes
import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel

from mha_spec.sharding import shard_order

arrays = "torch"
dtypes = ("float32", "float16", "bfloat16")
groups = False
ranks, rank_layout = processes.RANKS, "zigzag"
conventions = {"causal_alignment": "upper_left"}

OPTIONS = context_parallel._cp_options
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports(question):
    """Refuse the calls that it does not have."""
    query, key, value = (question.shapes[name] for name in ("query", "key", "value"))
    causal = question.options.get("causal", False)
    if causal and query[2] != key[2]:
        return "a causal call has as many keys as queries"
    if query[2] % _unit(causal) or key[2] % _unit(causal):
        return f"lengths are multiples of {_unit(causal)}"
    return (query[3] == value[3] and 0 not in (*query, *key)) or "values are as large as keys, and no axis is empty"


def attention(query, key, value, *, causal=False, scale=None, return_lse=False):
    """Call it on every rank."""
    output, lse = processes.everywhere(of_rank, (query, key, value), causal, scale, None)
    return (output, lse) if return_lse else output


def attention_vjp(grad_output, query, key, value, *, causal=False, scale=None):
    """Return the gradients of its backward pass."""
    return (*processes.everywhere(of_rank, (query, key, value), causal, scale, grad_output), None, None)


def of_rank(operands, causal, scale, grad_output):
    """Call it on the tokens of this rank, and join the results of all ranks, or the gradients."""
    OPTIONS.enable_load_balance = causal
    lengths = [x.shape[2] for x in operands]
    orders = [shard_order("zigzag" if causal else "contiguous", processes.RANKS, length) for length in lengths]
    local = [processes.of_rank(x, order) for x, order in zip(operands, orders, strict=True)]
    options = {"is_causal": causal, "scale": scale, "dropout_p": 0.0}
    output, lse, *_ = context_parallel._templated_ring_attention(dist.group.WORLD, 2, KERNEL, *local, **options)
    if grad_output is None:
        return [processes.joined(x, orders[0], lengths[0]) for x in (output, lse)]
    named = dict(zip(("query", "key", "value"), local, strict=True)) | {"out": output, "logsumexp": lse}
    cotangent = {"grad_out": processes.of_rank(grad_output, orders[0]), "grad_out_name": "grad_out"}
    backward = context_parallel._templated_ring_attention_backward
    gradients = backward(dist.group.WORLD, 2, BACKWARD, **cotangent, **named, **options)
    return [processes.joined(x, *place) for x, *place in zip(gradients[:3], orders, lengths, strict=True)]


def _unit(causal):
    return processes.RANKS * (2 if causal else 1)

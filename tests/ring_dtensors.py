"""Attention and the layer on DTensors that are sharded over batch and heads; parts of ring_processes.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from support.comparisons import differences
from support.numbers import numbers
from support.ring import BATCH, HEADS, KV_HEADS, message, tensors

import mha_spec_torch
from mha_spec.errors import ArgumentTypeError, ArgumentValueError


def spread(placements: Any, *arrays: Any) -> list[Any]:
    """Distribute arrays over a mesh of two ranks along the batch and two along the heads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "heads"))
    return [distribute_tensor(array, mesh, of_array) for array, of_array in zip(arrays, placements, strict=True)]


def whole_of(*arrays: Any) -> list[Any]:
    """Gather DTensors."""
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (x.detach() for x in arrays)]


def dtensors() -> dict[str, Any]:
    """Compare attention on DTensors that are sharded over batch and heads with attention in one process."""
    from torch.distributed.tensor import Replicate, Shard

    query, key, value, sinks = operands = tensors(7, 11)
    bias = torch.from_numpy(numbers(1, HEADS, 7, 11, seed=7))
    plain: dict[str, Any] = {
        "causal": True,
        "q_offset": torch.tensor([4, 2]),
        "kv_lengths": [11, 7],
        "mask": bias[:, :1] > -1,
    }

    def options_of(query: Any, sinks: Any, bias: Any) -> dict[str, Any]:
        entries = {name: plain[name][: query.shape[0]] for name in ("q_offset", "kv_lengths")}
        return plain | entries | {"sinks": sinks, "bias": bias}

    def whole(query: Any, key: Any, value: Any, sinks: Any, bias: Any) -> Any:
        options = options_of(query, sinks, bias)
        return mha_spec_torch.attention(query, key, value, return_lse=True, **options)

    def run(arrays: Any) -> list[Any]:
        """Return the results of attention with its gradients, by autograd and by attention_vjp, and the weights."""
        leaves = [array.detach().requires_grad_() for array in arrays]
        outputs = whole(*leaves)
        cotangents = [torch.from_numpy(numbers(*output.shape, seed=9)) for output in outputs]
        if hasattr(outputs[0], "placements"):
            cotangents = spread([output.placements for output in outputs], *cotangents)
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
        query, key, value, sinks, bias = arrays
        options = options_of(query, sinks, bias)
        again = mha_spec_torch.attention_vjp(cotangents[0], query, key, value, grad_lse=cotangents[1], **options)
        weights: Any = mha_spec_torch.attention_weights(query, key, **options)
        if hasattr(query, "placements"):
            assert [x.placements for x in (*again[:3], weights)] == [x.placements for x in (*arrays[:3], query)]
        return whole_of(*outputs, *gradients, *again, weights)

    def fault(arrays: Any, placements: Any) -> list[str]:
        names = ("query", "key", "value")
        of_vjp = (*(f"vjp {name}" for name in names), "vjp bias", "vjp sinks")
        labels = ("output", "lse", *names, "sinks", "bias", *of_vjp, "weights")
        return differences(labels, run(spread(placements, *arrays)), run(arrays))

    both, everywhere = [Shard(0), Shard(1)], [Replicate(), Replicate()]
    single = [query, key[:, :1], value[:, :1], sinks, bias]
    first = [query[:1], key[:1], value[:1], sinks, bias]
    of_single = [both, *[[Shard(0), Replicate()]] * 2, [Replicate(), Shard(0)], everywhere]
    return {
        "dtensor both": fault([*operands, bias], [both, both, both, everywhere, [Replicate(), Shard(1)]]),
        "dtensor one entry": fault(first, [both, both, both, everywhere, everywhere]),
        "dtensor one kv head": fault(single, of_single),
        "dtensor replicated": fault([*operands, bias], [everywhere] * 5),
        "dtensor layer": layer_of_dtensors(),
    }


def layer_of_dtensors() -> list[str]:
    """Compare the layer, with parameters that are sharded over the heads, with that in one process."""
    from torch.distributed.tensor import Replicate, Shard

    layer = mha_spec_torch.MultiHeadAttention(6, HEADS, kv_heads=KV_HEADS, qk_dim=4, qk_norm=True, dtype=torch.float64)
    params = {name: torch.from_numpy(numbers(*x.shape, seed=7)) for name, x in layer.params.items()}
    axes = {"w_q": 1, "w_k": 1, "w_v": 1, "w_o": 0, "b_q": 0, "b_k": 0, "b_v": 0}
    of_params = [[Replicate(), Shard(axes[name]) if name in axes else Replicate()] for name in params]
    x = torch.from_numpy(numbers(BATCH, 7, 6))

    def run(arrays: Any) -> list[Any]:
        x, *rest = leaves = [array.detach().requires_grad_() for array in arrays]
        named = dict(zip(params, rest, strict=True))
        options: Any = {"causal": True, "rotary": {"interleaved": True}}
        results: Any = mha_spec_torch.multi_head_attention_and_weights(x, x, x, named, **options)
        return whole_of(*results, *torch.autograd.grad((results[0] ** 2).sum(), leaves))

    arrays = x, *params.values()
    spread_arrays = spread([[Shard(0), Replicate()], *of_params], *arrays)
    return differences(("output", "weights", "x", *params), run(spread_arrays), run(arrays))


def refusals_of_dtensors() -> dict[str, Any]:
    """Collect the messages of errors of calls on DTensors."""
    from torch.distributed.tensor import Replicate, Shard

    both, everywhere = [Shard(0), Shard(1)], [Replicate(), Replicate()]
    query, key, value, sinks = tensors(7, 11)
    of_value, of_type = partial(message, ArgumentValueError), partial(message, ArgumentTypeError)
    (by_tokens,) = spread([[Shard(2), Replicate()]], query)
    x, k, v = spread([both] * 3, query, key, value)
    attention = mha_spec_torch.attention
    return {
        "refused sequence": of_value(attention, by_tokens, *spread([everywhere] * 2, key, value)),
        "refused placement": of_value(attention, x, *spread([everywhere] * 2, key, value)),
        "refused mixture": of_type(attention, x, key, value),
        "refused sinks": of_type(attention, x, k, v, sinks=sinks.requires_grad_()),
        "refused dropout": of_value(attention, x, k, v, dropout_rate=0.5),
        "refused uneven": of_value(attention, *spread([both] * 3, query[:, :6], key[:, :3], value[:, :3])),
        "refused cotangent": of_type(mha_spec_torch.attention_vjp, query, x, k, k),
        "refused packed": of_type(mha_spec_torch.varlen_attention, x, k, v, [0, 7], [0, 7]),
        "refused ring": of_type(mha_spec_torch.ring_attention, x, k, v),
    }

"""Attention on DTensors that are sharded over batch and heads: a call on the local tensors, without communication.

The results are DTensors with the placements of the query.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from mha_spec.arguments import Arguments
from mha_spec.checks import check, check_cotangents, check_dropout_mask, refuse_unknown
from mha_spec.errors import refuse_type, refuse_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["attend", "attend_and_weigh", "differentiate", "is_distributed", "refuse_distributed", "replicated", "weigh"]

BROADCAST = ("mask", "bias", "dropout_mask")
"""The options of which an axis of size 1 stays whole (MHA-MASK-2)."""

AXES = {
    **{name: {0: 0, 1: 1} for name in BROADCAST},
    **{name: {0: 0} for name in ("q_offset", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts")},
    **{name: {0: 0} for name in ("q_segment_ids", "kv_segment_ids")},
    "sinks": {1: 0},
}
"""The axis of each option that follows axis 0 (batch) or axis 1 (heads) of the query."""


def is_distributed(*arrays: object) -> bool:
    """Tell whether an array is a DTensor, without importing its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(array, module.DTensor) for array in arrays)


def replicated(tensor: Tensor, like: Any) -> Tensor:
    """Return a tensor that every rank holds as a DTensor of the mesh of `like`, if that is one."""
    if not is_distributed(like):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(tensor, like.device_mesh, run_check=False)


def refuse_distributed(function: str, *arrays: object) -> None:
    """Refuse a DTensor in a function that takes the tensors of a rank."""
    if is_distributed(*arrays):
        refuse_type(
            "MHA-SHARD-6",
            f"`query`, `key` and `value` must not be DTensors in {function}. Pass the tensors of the rank, "
            "x.to_local(); attention itself takes DTensors that are sharded over batch and heads.",
        )


def attend(call: Callable[..., Any], query: Any, key: Any, value: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return output and lse of `call`."""
    output, lse = _attended(call, query, key, value, options)
    return _whole(output, query, (*query.shape[:3], value.shape[3])), _whole(lse, query, query.shape[:3])


def attend_and_weigh(
    call: Callable[..., Any], query: Any, key: Any, value: Any, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Return output and weights of `call`."""
    output, weights = _attended(call, query, key, value, options)
    rows = query.shape[:3]
    return _whole(output, query, (*rows, value.shape[3])), _whole(weights, query, (*rows, key.shape[2]))


def weigh(call: Callable[..., Any], query: Any, key: Any, options: Mapping[str, Any]) -> Any:
    """Return the weights of `call`."""
    refuse_unknown(options, "attention_weights")
    check(Arguments(query, key, None, function="attention_weights", **options))
    weights = _local_call(call, {"query": query, "key": key}, options)
    return _whole(weights, query, (*query.shape[:3], key.shape[2]))


def differentiate(
    call: Callable[..., Any], operands: Sequence[Any], grad_output: Any, grad_lse: Any, options: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return the gradients of `attend`, those of autograd, each with the placements of its operand."""
    refuse_unknown(options, "attention_vjp")
    a = Arguments(*operands, function="attention_vjp", **options)
    check_cotangents(check(a), grad_output, grad_lse)
    check_dropout_mask(a)
    cotangents = (
        {"grad_output": grad_output} if grad_lse is None else {"grad_output": grad_output, "grad_lse": grad_lse}
    )
    for name, cotangent in cotangents.items():
        if not is_distributed(cotangent):
            refuse_type("MHA-SHAPE-3", f"`{name}` must be a DTensor, as `query`, received {type(cotangent).__name__}.")
    further = {name: options[name] for name in ("bias", "sinks") if options.get(name) is not None}
    sources = [*operands, *further.values()]
    is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*sources, *cotangents.values()))
    with torch.enable_grad():
        leaves = [x if x.requires_grad and is_recorded else x.detach().requires_grad_() for x in sources]
        query, key, value, *rest = leaves
        outputs = attend(call, query, key, value, {**options, **dict(zip(further, rest, strict=True))})
    outputs = outputs[: len(cotangents)]
    gradients: Any = torch.autograd.grad(outputs, leaves, [*cotangents.values()], create_graph=is_recorded)
    placed = [x.redistribute(placements=leaf.placements) for x, leaf in zip(gradients, leaves, strict=True)]
    of_further = dict(zip(further, placed[3:], strict=True))
    return *placed[:3], of_further.get("bias"), of_further.get("sinks")


def _attended(call: Callable[..., Any], query: Any, key: Any, value: Any, options: Mapping[str, Any]) -> Any:
    refuse_unknown(options)
    check(Arguments(query, key, value, **options))
    if options.get("dropout_rate") and options.get("dropout_mask") is None:
        refuse_value(
            "MHA-DROP-4", "`dropout_mask` must be given with dropout_rate on DTensors: each rank would draw its own."
        )
    return _local_call(call, {"query": query, "key": key, "value": value}, options)


def _local_call(call: Callable[..., Any], tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Call `call` on the local tensors with the local options."""
    _check_placements(tensors)
    query = tensors["query"]
    local = {name: _local(name, option, query) for name, option in options.items()}
    return call(*(_of_tensor(tensor, query) for tensor in tensors.values()), **local)


def _check_placements(tensors: Mapping[str, Any]) -> None:
    """Require three DTensors of a mesh, each replicated or sharded over batch or heads, all in the same way."""
    query, kv_heads = tensors["query"], tensors["key"].shape[1]
    for name, tensor in tensors.items():
        if not is_distributed(tensor) or not is_distributed(query) or tensor.device_mesh != query.device_mesh:
            refuse_type(
                "MHA-SHAPE-3",
                f"`{name}` must be a DTensor of the same mesh as the others, received {type(tensor).__name__}. "
                "torch.distributed.tensor.distribute_tensor makes one.",
            )
        for axis, (placement, of_query) in enumerate(zip(tensor.placements, query.placements, strict=True)):
            _check_placement(name, axis, placement)
            is_shared = name != "query" and kv_heads == 1 and placement.is_replicate() and of_query.is_shard(1)
            if placement != of_query and not is_shared:
                refuse_value(
                    "MHA-SHAPE-3",
                    f"`{name}` must have the placements of `query`, {query.placements}, received {tensor.placements}. "
                    "Redistribute it; only a single kv head may be replicated where the query heads are sharded.",
                )
            ranks = tensor.device_mesh.size(axis)
            if placement.is_shard(1) and tensor.shape[1] % ranks:
                refuse_value(
                    "MHA-SHARD-6",
                    f"`{name}` must have heads that are a multiple of the ranks of its mesh axis, {ranks}, received "
                    f"{tensor.shape[1]} heads.",
                )


def _check_placement(name: str, axis: int, placement: Any) -> None:
    received = f"received {placement} on axis {axis} of the mesh"
    if placement.is_shard(2):
        refuse_value(
            "MHA-SHARD-1",
            f"`{name}` must not be sharded over the sequence, {received}. Call ring_attention or all_to_all_attention "
            f"on x.to_local() with group=x.device_mesh.get_group({axis}).",
        )
    if not (placement.is_replicate() or placement.is_shard(0) or placement.is_shard(1)):
        refuse_value(
            "MHA-SHARD-1",
            f"`{name}` must be replicated, or sharded over batch (Shard(0)) or heads (Shard(1)), {received}. "
            "Redistribute it first.",
        )


def _of_tensor(tensor: Any, query: Any) -> Tensor:
    """Return the local tensor; what ranks with other queries add to its gradient is a part of a sum."""
    return tensor.to_local(grad_placements=_gradient_placements(tensor.placements, query))


def _gradient_placements(placements: Any, query: Any) -> list[Any]:
    from torch.distributed.tensor import Partial

    pairs = zip(placements, query.placements, strict=True)
    return [
        Partial() if placement.is_replicate() and of_query.is_shard() else placement for placement, of_query in pairs
    ]


def _local(name: str, option: Any, query: Any) -> Any:
    """Return the part of an option that belongs to the batch entries and heads of this rank."""
    axes = AXES.get(name, {})
    if is_distributed(option):
        from torch.distributed.tensor import Replicate, Shard

        followed = [axes.get(placement.dim) if placement.is_shard() else None for placement in query.placements]
        wanted = [Replicate() if axis is None or _stays_whole(name, option, axis) else Shard(axis) for axis in followed]
        return _of_tensor(option.redistribute(placements=wanted), query)
    if not axes or option is None or isinstance(option, (int, str)):
        return option
    if getattr(option, "requires_grad", False):
        refuse_type(
            "MHA-SHARD-4",
            f"`{name}` must be a DTensor, as `query`, to have a gradient: torch.distributed.tensor.distribute_tensor "
            "makes one. Detach it otherwise.",
        )
    if isinstance(option, (list, tuple)):
        return option[_rows(query, 0)]
    for axis, place in axes.items():
        if not _stays_whole(name, option, place):
            option = option[(slice(None),) * place + (_rows(query, axis),)]
    return option


def _stays_whole(name: str, option: Any, axis: int) -> bool:
    return name in BROADCAST and option.shape[axis] == 1


def _rows(query: Any, axis: int) -> slice:
    """Return the indices of this rank on an axis of the query."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(query.shape, query.device_mesh, query.placements)
    return slice(offset[axis], offset[axis] + shape[axis])


def _whole(tensor: Tensor, query: Any, shape: tuple[int, ...]) -> Any:
    """Wrap a local result with the placements of the query."""
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    of_mesh = query.device_mesh, query.placements
    return DTensor.from_local(tensor, *of_mesh, run_check=False, shape=torch.Size(shape), stride=strides)

"""Packed and paged attention for PyTorch, by the paths of dense attention.

| call | forward and backward |
| --- | --- |
| eager | the tasks of every sequence: `packing`; a few queries of sequences in blocks on the CPU: `decoding` |
| eager, 16-bit tokens on CUDA | forward by the kernel of `varlen_attn`: `flash_varlen`; backward as above |
| graph | an operator that does the same when it runs, see `varlen_operators` |
| transforms, the backward of a backward | the formula of each sequence, in differentiable operations |

The integers of a call are read when it runs, also from an accelerator, where that waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from mha_spec.arguments import expand_options
from mha_spec.checks import check_flag
from mha_spec.errors import ArgumentTypeError
from mha_spec.varlen_checks import check_cotangents

from . import varlen_operators
from .calls import varlen_arguments_of
from .function import transformed
from .host import in_graph
from .packing import Packed
from .symbols import is_open_tensor, traced, unwrapped
from .varlen_passes import Results, backward, differentiable, forward, gradients, operands_of, recorded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from jaxtyping import Float, Int
    from torch import Tensor

    from mha_spec.varlen_arguments import VarlenArguments, VarlenOptions
    from mha_spec.varlen_reference import VarlenGradients

__all__ = ["varlen_attention", "varlen_attention_vjp"]


@expand_options
def varlen_attention(
    query: Float[Tensor, "q_tokens heads qk_dim"],
    key: Float[Tensor, "kv_tokens kv_heads qk_dim"],
    value: Float[Tensor, "kv_tokens kv_heads v_dim"],
    cu_seqlens_q: Int[Tensor, "sequences+1"] | Sequence[int],
    cu_seqlens_kv: Int[Tensor, "sequences+1"] | Sequence[int] | None,
    *,
    return_lse: bool = False,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute packed or paged attention; see `mha_spec.reference.varlen_attention`.

    Under autocast query, key and value are cast first.
    """
    tensors = query, key, value, *_bounds(query, cu_seqlens_q, cu_seqlens_kv)
    return _attend(tensors, return_lse, in_graph(options, query))


def _bounds(query: Tensor, of_queries: Any, of_keys: Any) -> tuple[Any, Any]:
    """Move bounds of NumPy to the device in a graph; an array for both stays a single one (MHA-VARLEN-5)."""
    moved = in_graph(of_queries, query)
    return moved, moved if of_keys is of_queries else in_graph(of_keys, query)


@torch.compiler.allow_in_graph
def _attend(tensors: Sequence[Any], return_lse: bool, options: VarlenOptions) -> Tensor | tuple[Tensor, Tensor]:
    a = varlen_arguments_of("varlen_attention", options, *tensors)
    return_lse = check_flag("return_lse", return_lse)
    operands = operands_of(a)
    if transformed():
        _check_transform(a)
        output, lse = differentiable(Packed.of(a), *operands)
    elif traced(a.query):
        output, lse = varlen_operators.attend(a)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        output, lse = recorded(Packed.of(a), *operands)
    else:
        output, lse = forward(Packed.of(a), *operands, needs_lse=return_lse)
    return (output, lse) if return_lse else output


@expand_options
def varlen_attention_vjp(
    grad_output: Float[Tensor, "q_tokens heads v_dim"],
    query: Float[Tensor, "q_tokens heads qk_dim"],
    key: Float[Tensor, "kv_tokens kv_heads qk_dim"],
    value: Float[Tensor, "kv_tokens kv_heads v_dim"],
    cu_seqlens_q: Int[Tensor, "sequences+1"] | Sequence[int],
    cu_seqlens_kv: Int[Tensor, "sequences+1"] | Sequence[int] | None,
    *,
    grad_lse: Float[Tensor, "heads q_tokens"] | None = None,
    **options: Unpack[VarlenOptions],
) -> VarlenGradients:
    """Compute the gradients of `varlen_attention`; see `mha_spec.reference.varlen_attention_vjp`."""
    tensors = query, key, value, *_bounds(query, cu_seqlens_q, cu_seqlens_kv)
    return _differentiate((grad_output, grad_lse), tensors, in_graph(options, query))


@torch.compiler.allow_in_graph
def _differentiate(
    cotangents: tuple[Tensor, Tensor | None], tensors: Sequence[Any], options: VarlenOptions
) -> VarlenGradients:
    a = varlen_arguments_of("varlen_attention_vjp", options, *tensors)
    check_cotangents(a, *cotangents)
    operands = operands_of(a)
    is_differentiated = any(x is not None and x.requires_grad for x in (*operands, *cotangents))
    if transformed() or (torch.is_grad_enabled() and is_differentiated):
        _check_transform(a)
        return gradients(Packed.of(a), operands, *cotangents)
    if traced(a.query):
        return varlen_operators.gradients(a, *cotangents)
    packed = Packed.of(a)
    return backward(packed, Results(*operands, *forward(packed, *operands, needs_lse=True)), *cotangents)


def _check_transform(a: VarlenArguments) -> None:
    """Refuse integers that cannot be read: those of a graph, and those that `torch.func.vmap` maps."""
    if is_open_tensor(unwrapped(a.query)):
        raise ArgumentTypeError(
            f"`query` of {a.function} must not be transformed by torch.func, nor require gradients of gradients, where "
            "torch.compile or torch.jit.trace records the call, received such a tensor. Record it without the "
            "transform and take gradients with torch.autograd or varlen_attention_vjp under torch.no_grad(), or leave "
            "out the recording. [MHA-ARG-4]"
        )
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "seqused_kv", "q_offset", "block_table"):
        value = getattr(a, name)
        while isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value):
            if is_batchedtensor(value):
                raise ArgumentTypeError(
                    f"`{name}` of {a.function} must be the same for all entries of torch.func.vmap, received a tensor "
                    f"that vmap maps. Pass in_dims=None for `{name}`, or call {a.function} for each entry. [MHA-ARG-4]"
                )
            value = get_unwrapped(value)

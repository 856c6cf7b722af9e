"""Packed and paged attention for JAX, whose lengths may be traced: a program is compiled for the total sizes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy

from mha_spec.arguments import expand_options
from mha_spec.array_checks import check_library
from mha_spec.arrays import host_integers
from mha_spec.scalars import check_flag
from mha_spec.varlen_checks import check_cotangents, varlen_arguments

from . import packed_softmax
from .checks import check_devices
from .packed import Lengths, Packing, Sizes, shapes_of
from .packed_softmax import Packed
from .problem import bounded, scale_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from jax import Array
    from jaxtyping import Float, Int

    from mha_spec.varlen_arguments import VarlenArguments, VarlenOptions
    from mha_spec.varlen_reference import VarlenGradients

__all__ = ["varlen_attention", "varlen_attention_vjp"]


@expand_options
def varlen_attention(
    query: Float[Array, "q_tokens heads qk_dim"],
    key: Float[Array, "kv_tokens kv_heads qk_dim"],
    value: Float[Array, "kv_tokens kv_heads v_dim"],
    cu_seqlens_q: Int[Array, "sequences+1"] | Sequence[int],
    cu_seqlens_kv: Int[Array, "sequences+1"] | Sequence[int] | None,
    *,
    return_lse: bool = False,
    **options: Unpack[VarlenOptions],
) -> Array | tuple[Array, Array]:
    """Compute packed or paged attention in blocks of queries; see `mha_spec.reference.varlen_attention`.

    Lengths, offsets and the table may be traced, and other lengths compile no other program. Forward-mode and second
    derivatives raise ArgumentTypeError.
    """
    a = _arguments("varlen_attention", options, query, key, value, cu_seqlens_q, cu_seqlens_kv)
    return_lse = check_flag("return_lse", return_lse)
    output, lse = packed_softmax.attention(*_problem(a))
    return (output, lse) if return_lse else output


@expand_options
def varlen_attention_vjp(
    grad_output: Float[Array, "q_tokens heads v_dim"],
    query: Float[Array, "q_tokens heads qk_dim"],
    key: Float[Array, "kv_tokens kv_heads qk_dim"],
    value: Float[Array, "kv_tokens kv_heads v_dim"],
    cu_seqlens_q: Int[Array, "sequences+1"] | Sequence[int],
    cu_seqlens_kv: Int[Array, "sequences+1"] | Sequence[int] | None,
    *,
    grad_lse: Float[Array, "heads q_tokens"] | None = None,
    **options: Unpack[VarlenOptions],
) -> VarlenGradients:
    """Compute the gradients of `varlen_attention`, as jax.vjp does; see `mha_spec.reference.varlen_attention_vjp`."""
    a = _arguments("varlen_attention_vjp", options, query, key, value, cu_seqlens_q, cu_seqlens_kv)
    check_cotangents(a, grad_output, grad_lse)
    return tuple(packed_softmax.vjp(*_problem(a), grad_output, grad_lse))


def _arguments(function: str, options: VarlenOptions, *tensors: Any) -> VarlenArguments:
    check_library("jax", tensors[0])
    a = varlen_arguments(function, {**options}, *tensors)
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv")
    check_devices(dict(zip(names, tensors, strict=True)) | {**options})
    return a


def _problem(a: VarlenArguments) -> tuple[Packing, Packed, Lengths]:
    """Split the arguments of a call into the constants of a program and its arrays."""
    left, right = a.window or (None, None)
    alignment = a.q_offset if isinstance(a.q_offset, str) else None
    page = a.key.shape[1] if a.block_table is not None else None
    kv_tokens = a.key.shape[0] if page is None else a.capacity
    sizes = Sizes(a.q_tokens, kv_tokens, a.sequences, a.heads, a.kv_heads, page)
    softcap = None if a.softcap is None else float(a.softcap)
    scale = scale_for(a.scale, a.query.shape[2])
    packing = Packing(scale, softcap, left, 0 if a.causal else right, alignment, *shapes_of(sizes))
    cu_seqlens_kv, seqused_kv = _bounds_of_keys(a)
    lengths = Lengths(
        _integers(a.cu_seqlens_q),
        _integers(cu_seqlens_kv),
        _integers(seqused_kv),
        _integers(a.block_table),
        None if alignment else _integers(a.q_offset),
        a.alibi_slopes,
    )
    return packing, Packed(a.query, a.key, a.value, a.sinks), lengths


def _bounds_of_keys(a: VarlenArguments) -> tuple[Any, Any]:
    """Return cu_seqlens_kv and seqused_kv, of which the first, of keys in blocks, may exceed int32 on the host.

    Its differences do not, and are keys in use as well (MHA-VARLEN-2, MHA-VARLEN-4).
    """
    bounds = None if a.cu_seqlens_kv is None or not a.is_paged else host_integers(a.cu_seqlens_kv)
    if bounds is None:
        return a.cu_seqlens_kv, a.seqused_kv
    lengths = _integers(numpy.diff(bounds))
    if a.seqused_kv is None:
        return None, lengths
    return None, jnp.minimum(bounded(_integers(a.seqused_kv), 2**31 - 1), lengths)


def _integers(value: Any) -> Any:
    """Convert host integers to an array, within the range of int32, which tells them from what the table may hold."""
    if value is None or isinstance(value, jax.Array):
        return value
    if host_integers(value) is None:  # Symbolic sizes become traced integers.
        return jnp.asarray(value, jnp.int32)
    return jnp.asarray(numpy.clip(numpy.asarray(value, numpy.int64), -(2**31), 2**31 - 1), jnp.int32)

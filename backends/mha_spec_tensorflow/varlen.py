"""Packed and paged attention for TensorFlow; a graph takes any lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from mha_spec.arguments import expand_options
from mha_spec.checks import check_flag, check_library
from mha_spec.varlen_checks import check_cotangents, varlen_arguments

from . import packed
from .layouts import KNOWN, PACKED, PAGED
from .unknown import with_known_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from jaxtyping import Float, Int

    from mha_spec.varlen_arguments import VarlenOptions
    from mha_spec.varlen_reference import VarlenGradients

__all__ = ["varlen_attention", "varlen_attention_vjp"]


@expand_options
@tf.autograph.experimental.do_not_convert
def varlen_attention(
    query: Float[tf.Tensor, "q_tokens heads qk_dim"],
    key: Float[tf.Tensor, "kv_tokens kv_heads qk_dim"],
    value: Float[tf.Tensor, "kv_tokens kv_heads v_dim"],
    cu_seqlens_q: Int[tf.Tensor, "sequences+1"] | Sequence[int],
    cu_seqlens_kv: Int[tf.Tensor, "sequences+1"] | Sequence[int] | None,
    *,
    return_lse: bool = False,
    **options: Unpack[VarlenOptions],
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Compute packed or paged attention, sequence after sequence; see `mha_spec.reference.varlen_attention`.

    Eager calls read the lengths. A graph takes any lengths, numbers of tokens, sequences and blocks. XLA
    (`jit_compile=True`) needs lengths and block table on the host.
    """
    a = _checked("varlen_attention", options, query, key, value, cu_seqlens_q, cu_seqlens_kv)[0]
    return_lse = check_flag("return_lse", return_lse)
    output, lse = packed.attention(a, needs_lse=return_lse)
    return (output, lse) if lse is not None else output


@expand_options
@tf.autograph.experimental.do_not_convert
def varlen_attention_vjp(
    grad_output: Float[tf.Tensor, "q_tokens heads v_dim"],
    query: Float[tf.Tensor, "q_tokens heads qk_dim"],
    key: Float[tf.Tensor, "kv_tokens kv_heads qk_dim"],
    value: Float[tf.Tensor, "kv_tokens kv_heads v_dim"],
    cu_seqlens_q: Int[tf.Tensor, "sequences+1"] | Sequence[int],
    cu_seqlens_kv: Int[tf.Tensor, "sequences+1"] | Sequence[int] | None,
    *,
    grad_lse: Float[tf.Tensor, "heads q_tokens"] | None = None,
    **options: Unpack[VarlenOptions],
) -> VarlenGradients:
    """Compute the gradients of `varlen_attention` as a tape does; see `mha_spec.reference.varlen_attention_vjp`."""
    cotangents = {"grad_output": grad_output, "grad_lse": grad_lse}
    a, grad_output, grad_lse = _checked(
        "varlen_attention_vjp", options, query, key, value, cu_seqlens_q, cu_seqlens_kv, cotangents=cotangents
    )
    check_cotangents(a, grad_output, grad_lse)
    return packed.vjp(a, grad_output, grad_lse)


def _checked(
    function: str, options: VarlenOptions, *tensors: Any, cotangents: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """Check the arguments of a call; return them and the cotangents, which depend on their shapes."""
    names, cotangents = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_kv"), cotangents or {}
    layouts = PACKED if options.get("block_table") is None else PAGED
    arguments = dict(zip(names, tensors, strict=True)) | {**options} | cotangents
    values = with_known_shapes(layouts, arguments, KNOWN)
    rest = [values.pop(name) for name in cotangents]
    first = [values.pop(name) for name in names]
    check_library("tensorflow", first[0])
    return varlen_arguments(function, values, *first), *rest

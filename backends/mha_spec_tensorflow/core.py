"""The functions of attention for TensorFlow, which compute blocks of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import tensorflow as tf

from mha_spec.arguments import Arguments, expand_options
from mha_spec.checks import (
    check,
    check_cotangents,
    check_dropout_mask,
    check_flag,
    check_halves,
    check_library,
    check_merge_cotangents,
    refuse_unknown,
)

from . import function, merging
from .dropout import seed_of
from .layouts import ATTENTION, HALVES, KNOWN
from .unknown import with_known_shapes

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float

    from mha_spec.arguments import NoOptions, Options, WeightOptions
    from mha_spec.reference import Gradients

__all__ = ["attention", "attention_vjp", "attention_weights", "merge_attention", "merge_attention_vjp"]


@expand_options
@tf.autograph.experimental.do_not_convert
def attention(
    query: Float[tf.Tensor, "batch heads q_len qk_dim"],
    key: Float[tf.Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[tf.Tensor, "batch kv_heads kv_len v_dim"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Compute attention over blocks of queries; see `mha_spec.reference.attention`.

    `dropout_key` is an int or a scalar integer tensor; None takes a seed from TensorFlow's global generator.
    """
    refuse_unknown(options, "attention")
    needs_lse = check_flag("return_lse", return_lse)
    a = _checked("attention", {"query": query, "key": key, "value": value, **options})[0]
    output, lse = function.attention(a, seed_of(a), needs_lse=needs_lse)
    return output if lse is None else (output, lse)


@expand_options
@tf.autograph.experimental.do_not_convert
def attention_weights(
    query: Float[tf.Tensor, "batch heads q_len qk_dim"],
    key: Float[tf.Tensor, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[tf.Tensor, "batch heads q_len kv_len"]:
    """Compute the normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    refuse_unknown(options, "attention_weights")
    return function.weights(_checked("attention_weights", {"query": query, "key": key, "value": None, **options})[0])


@expand_options
@tf.autograph.experimental.do_not_convert
def attention_vjp(
    grad_output: Float[tf.Tensor, "batch heads q_len v_dim"],
    query: Float[tf.Tensor, "batch heads q_len qk_dim"],
    key: Float[tf.Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[tf.Tensor, "batch kv_heads kv_len v_dim"],
    *,
    grad_lse: Float[tf.Tensor, "batch heads q_len"] | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """Compute the gradients of `attention` as a tape does; see `mha_spec.reference.attention_vjp`."""
    refuse_unknown(options, "attention_vjp")
    cotangents = {"grad_output": grad_output, "grad_lse": grad_lse}
    a, grad_output, grad_lse = _checked(
        "attention_vjp", {"query": query, "key": key, "value": value, **options}, cotangents
    )
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    gradients = function.vjp(a, grad_output, grad_lse)
    return gradients.query, gradients.key, gradients.value, gradients.bias, gradients.sinks


@expand_options
@tf.autograph.experimental.do_not_convert
def merge_attention(
    output_a: Float[tf.Tensor, "batch heads q_len v_dim"],
    lse_a: Float[tf.Tensor, "batch heads q_len"],
    output_b: Float[tf.Tensor, "batch heads q_len v_dim"],
    lse_b: Float[tf.Tensor, "batch heads q_len"],
    **options: Unpack[NoOptions],
) -> tuple[Float[tf.Tensor, "batch heads q_len v_dim"], Float[tf.Tensor, "batch heads q_len"]]:
    """Merge two halves of a softmax; see `mha_spec.reference.merge_attention`."""
    refuse_unknown(options, "merge_attention")
    halves = with_known_shapes(HALVES, {"output_a": output_a, "lse_a": lse_a, "output_b": output_b, "lse_b": lse_b})
    check_library("tensorflow", halves["output_a"], "output_a")
    check_halves(**halves)
    return merging.merge(**halves)


@expand_options
@tf.autograph.experimental.do_not_convert
def merge_attention_vjp(
    grad_output: Float[tf.Tensor, "batch heads q_len v_dim"],
    output_a: Float[tf.Tensor, "batch heads q_len v_dim"],
    lse_a: Float[tf.Tensor, "batch heads q_len"],
    output_b: Float[tf.Tensor, "batch heads q_len v_dim"],
    lse_b: Float[tf.Tensor, "batch heads q_len"],
    *,
    grad_lse: Float[tf.Tensor, "batch heads q_len"] | None = None,
    **options: Unpack[NoOptions],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Compute the gradients of `merge_attention` as a tape does; see `mha_spec.reference.merge_attention_vjp`."""
    refuse_unknown(options, "merge_attention_vjp")
    halves = {"output_a": output_a, "lse_a": lse_a, "output_b": output_b, "lse_b": lse_b}
    halves = with_known_shapes(HALVES, halves | {"grad_output": grad_output, "grad_lse": grad_lse})
    grad_output, grad_lse = halves.pop("grad_output"), halves.pop("grad_lse")
    check_library("tensorflow", halves["output_a"], "output_a")
    check_halves(**halves)
    check_merge_cotangents(grad_output, grad_lse, halves["output_a"])
    return merging.gradients(grad_output, **halves, grad_lse=grad_lse)


def _checked(name: str, options: dict[str, Any], others: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """Check the arguments of a call of attention; return them and other tensors that depend on their shapes."""
    others = others or {}
    tensors = with_known_shapes(ATTENTION, options | others, KNOWN, aligned=_must_be_aligned(options))
    rest = [tensors.pop(label) for label in others]
    check_library("tensorflow", tensors["query"])
    return check(Arguments(**tensors, function=name)), *rest


def _must_be_aligned(options: dict[str, Any]) -> bool:
    """Return True if q_len and kv_len must be equal, since positions matter and no offset was passed (MHA-POS-2)."""
    causal, window = options.get("causal"), options.get("window")
    bounded = isinstance(window, (list, tuple)) and any(bound is not None for bound in window)
    bounded = bounded or options.get("chunk") is not None
    positional = bounded or (isinstance(causal, (bool, numpy.bool)) and bool(causal))
    return positional and options.get("q_offset") is None and options.get("kv_lengths") is None

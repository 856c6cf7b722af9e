"""The functions of attention for TensorFlow, over blocks of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tensorflow as tf

from mha_spec.arguments import Arguments, spells_options
from mha_spec.checks import check, check_cotangents, check_dropout_mask, check_halves, refuse_unknown

from . import function
from .dropout import seed_of
from .merging import merge
from .unknown import settled

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float

    from mha_spec.arguments import NoOptions, Options, WeightOptions
    from mha_spec.reference import Gradients

__all__ = ["attention", "attention_vjp", "attention_weights", "merge_attention"]


@spells_options
@tf.autograph.experimental.do_not_convert
def attention(
    query: Float[tf.Tensor, "batch heads q_len qk_dim"],
    key: Float[tf.Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[tf.Tensor, "batch kv_heads kv_len v_dim"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Attention over blocks of queries; see `mha_spec.reference.attention`.

    `dropout_key` is an int, or one in a tensor; None is TensorFlow's global generator.
    """
    a = _arguments("attention", query, key, value, **options)
    output, lse = function.attention(a, seed_of(a), needs_lse=return_lse)
    return output if lse is None else (output, lse)


@spells_options
@tf.autograph.experimental.do_not_convert
def attention_weights(
    query: Float[tf.Tensor, "batch heads q_len qk_dim"],
    key: Float[tf.Tensor, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[tf.Tensor, "batch heads q_len kv_len"]:
    """The normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    return function.weights(_arguments("attention_weights", query, key, None, **options))


@spells_options
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
    """The gradients that a tape gives of `attention`; see `mha_spec.reference.attention_vjp`."""
    a = _arguments("attention_vjp", query, key, value, **options)
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    found = function.vjp(a, grad_output, grad_lse)
    return found.query, found.key, found.value, found.bias, found.sinks


@spells_options
@tf.autograph.experimental.do_not_convert
def merge_attention(
    output_a: Float[tf.Tensor, "batch heads q_len v_dim"],
    lse_a: Float[tf.Tensor, "batch heads q_len"],
    output_b: Float[tf.Tensor, "batch heads q_len v_dim"],
    lse_b: Float[tf.Tensor, "batch heads q_len"],
    **options: Unpack[NoOptions],
) -> tuple[Float[tf.Tensor, "batch heads q_len v_dim"], Float[tf.Tensor, "batch heads q_len"]]:
    """Two halves of one softmax; see `mha_spec.reference.merge_attention`."""
    refuse_unknown(options, "merge_attention")
    check_halves(output_a, lse_a, output_b, lse_b)
    return merge(output_a, lse_a, output_b, lse_b)


def _arguments(
    function: str, query: tf.Tensor, key: tf.Tensor, value: tf.Tensor | None, /, **options: Unpack[Options]
) -> Arguments:
    refuse_unknown(options, function)
    return check(settled(Arguments(query, key, value, **options)))

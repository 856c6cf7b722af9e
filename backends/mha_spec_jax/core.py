"""The functions of attention for JAX, by cuDNN where its meaning is the same, else in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.arguments import Arguments, expand_options
from mha_spec.array_checks import check_library
from mha_spec.checks import (
    check,
    check_cotangents,
    check_dropout_mask,
    check_halves,
    check_merge_cotangents,
    refuse_unknown,
)
from mha_spec.scalars import check_flag

from . import function, native
from .checks import check_devices
from .dropout import key_of
from .merging import Halves, merge, merge_vjp
from .problem import problem_of, with_offset

if TYPE_CHECKING:
    from typing import Unpack

    from jax import Array
    from jaxtyping import Float

    from mha_spec.arguments import NoOptions, Options, WeightOptions
    from mha_spec.reference import Gradients, MergeGradients

__all__ = ["attention", "attention_vjp", "attention_weights", "merge_attention", "merge_attention_vjp"]


@expand_options
def attention(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Compute attention in blocks of queries; see `mha_spec.reference.attention`.

    `dropout_key` is a key of jax.random, required where a mask must be drawn. Forward-mode differentiation raises
    ArgumentTypeError.
    """
    a = _arguments("attention", query, key, value, **options)
    return_lse = check_flag("return_lse", return_lse)
    dropout_key = key_of(a)
    if not return_lse and native.supports(a):
        return native.attention(a)
    output, lse = function.attention(*problem_of(a, dropout_key))
    return (output, lse) if return_lse else output


@expand_options
def attention_weights(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[Array, "batch heads q_len kv_len"]:
    """Compute the normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    a = _arguments("attention_weights", query, key, None, **options)
    return function.weights(*problem_of(a))


@expand_options
def attention_vjp(
    grad_output: Float[Array, "batch heads q_len v_dim"],
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    grad_lse: Float[Array, "batch heads q_len"] | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """Compute the gradients of `attention`, as jax.vjp does; see `mha_spec.reference.attention_vjp`."""
    a = _arguments("attention_vjp", query, key, value, **options)
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    gradients = function.vjp(*problem_of(a), grad_output, grad_lse)
    return gradients.query, gradients.key, gradients.value, gradients.bias, gradients.sinks


@expand_options
def merge_attention(
    output_a: Float[Array, "batch heads q_len v_dim"],
    lse_a: Float[Array, "batch heads q_len"],
    output_b: Float[Array, "batch heads q_len v_dim"],
    lse_b: Float[Array, "batch heads q_len"],
    **options: Unpack[NoOptions],
) -> tuple[Float[Array, "batch heads q_len v_dim"], Float[Array, "batch heads q_len"]]:
    """Merge two halves of a softmax, differentiable in both modes; see `mha_spec.reference.merge_attention`."""
    refuse_unknown(options, "merge_attention")
    return merge(_halves(output_a, lse_a, output_b, lse_b))


@expand_options
def merge_attention_vjp(
    grad_output: Float[Array, "batch heads q_len v_dim"],
    output_a: Float[Array, "batch heads q_len v_dim"],
    lse_a: Float[Array, "batch heads q_len"],
    output_b: Float[Array, "batch heads q_len v_dim"],
    lse_b: Float[Array, "batch heads q_len"],
    *,
    grad_lse: Float[Array, "batch heads q_len"] | None = None,
    **options: Unpack[NoOptions],
) -> MergeGradients:
    """Compute the gradients of `merge_attention`, as jax.vjp does; see `mha_spec.reference.merge_attention_vjp`."""
    refuse_unknown(options, "merge_attention_vjp")
    halves = _halves(output_a, lse_a, output_b, lse_b)
    check_merge_cotangents(grad_output, grad_lse, output_a)
    gradients = merge_vjp(halves, grad_output, grad_lse)
    return gradients.output_a, gradients.lse_a, gradients.output_b, gradients.lse_b


def _halves(output_a: Array, lse_a: Array, output_b: Array, lse_b: Array) -> Halves:
    check_library("jax", output_a, "output_a")
    check_halves(output_a, lse_a, output_b, lse_b)
    halves = Halves(output_a, lse_a, output_b, lse_b)
    check_devices(halves._asdict())
    return halves


def _arguments(
    function: str, query: Array, key: Array, value: Array | None, /, **options: Unpack[Options]
) -> Arguments:
    refuse_unknown(options, function)
    check_library("jax", query)
    a = check(Arguments(query, key, value, function=function, **options))
    check_devices({"query": query, "key": key, "value": value, **options})
    return with_offset(a)

"""The functions of attention for JAX: the native call where it has this meaning, else blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.arguments import Arguments, spells_options
from mha_spec.checks import check, check_cotangents, check_dropout_mask, check_halves, refuse_unknown

from . import function, native
from .dropout import key_of
from .merging import merge
from .problem import problem_of

if TYPE_CHECKING:
    from typing import Unpack

    from jax import Array
    from jaxtyping import Float

    from mha_spec.arguments import NoOptions, Options, WeightOptions
    from mha_spec.reference import Gradients

__all__ = ["attention", "attention_vjp", "attention_weights", "merge_attention"]


@spells_options
def attention(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Attention over blocks of queries; see `mha_spec.reference.attention`.

    `dropout_key` is a key of jax.random, and must be given where a mask has to be drawn. Forward-mode differentiation
    raises ArgumentTypeError.
    """
    a = _arguments("attention", query, key, value, **options)
    dropout_key = key_of(a)
    if not return_lse and native.answers(a):
        return native.attention(a)
    output, lse = function.attention(*problem_of(a, dropout_key))
    return (output, lse) if return_lse else output


@spells_options
def attention_weights(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[Array, "batch heads q_len kv_len"]:
    """The normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    a = _arguments("attention_weights", query, key, None, **options)
    return function.weights(*problem_of(a))


@spells_options
def attention_vjp(
    grad_output: Float[Array, "batch heads q_len v_dim"],
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    grad_lse: Float[Array, "batch heads q_len"] | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """The gradients that jax takes of `attention`; see `mha_spec.reference.attention_vjp`."""
    a = _arguments("attention_vjp", query, key, value, **options)
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    found = function.vjp(*problem_of(a), grad_output, grad_lse)
    return found.query, found.key, found.value, found.bias, found.sinks


@spells_options
def merge_attention(
    output_a: Float[Array, "batch heads q_len v_dim"],
    lse_a: Float[Array, "batch heads q_len"],
    output_b: Float[Array, "batch heads q_len v_dim"],
    lse_b: Float[Array, "batch heads q_len"],
    **options: Unpack[NoOptions],
) -> tuple[Float[Array, "batch heads q_len v_dim"], Float[Array, "batch heads q_len"]]:
    """Two halves of one softmax; see `mha_spec.reference.merge_attention`."""
    refuse_unknown(options, "merge_attention")
    check_halves(output_a, lse_a, output_b, lse_b)
    return merge(output_a, lse_a, output_b, lse_b)


def _arguments(
    function: str, query: Array, key: Array, value: Array | None, /, **options: Unpack[Options]
) -> Arguments:
    refuse_unknown(options, function)
    return check(Arguments(query, key, value, **options))

"""The functions of attention: each cuts a call into tiles, computes them, and assembles the results."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy

from mha_spec import steps
from mha_spec.arguments import expand_options
from mha_spec.arrays import dtype_name
from mha_spec.checks import check_cotangents, check_dropout_mask, check_flag

from .backward import gradients
from .dropout import dropout_of
from .forward import attend
from .parallel import each
from .plan import plan_of
from .problem import Problem
from .strip import strip_rows, weigh
from .tiling import Assembly, tiles

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float

    from mha_spec.arguments import Options, WeightOptions
    from mha_spec.arrays import Array
    from mha_spec.reference import Gradients

__all__ = ["attention", "attention_vjp", "attention_weights"]


@expand_options
@numpy.errstate(all="ignore")
def attention(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Compute attention with an online softmax over blocks of keys; see `mha_spec.reference.attention`.

    `dropout_key` is an integer seed; None draws a seed from `numpy.random`.
    """
    plan = plan_of("attention", query, key, value, options)
    return_lse = check_flag("return_lse", return_lse)
    problem = Problem.of(plan, query, key, value, dropout_of(plan.a))
    rows = query.shape[:3]
    output = Assembly((*rows, value.shape[3]), problem.query)
    lse = Assembly(rows, problem.query) if return_lse else None
    each(partial(attend, problem, output, lse), plan.tiles, plan.a, tiny=plan.is_tiny)
    rounded = steps.round_output(output.whole(), dtype_name(query)) if plan.rounds else output.whole()
    return rounded if lse is None else (rounded, lse.whole())


@expand_options
@numpy.errstate(all="ignore")
def attention_weights(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[Array, "batch heads q_len kv_len"]:
    """Compute the normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    plan = plan_of("attention_weights", query, key, None, options)
    a, problem = plan.a, Problem.of(plan, query, key, None)
    weights = Assembly((a.batch, a.heads, a.q_len, a.kv_len), problem.query)
    each(partial(weigh, problem, weights), tiles(a, strip_rows(a)), a, tiny=plan.is_tiny)
    return steps.round_output(weights.whole(), dtype_name(query))


@expand_options
@numpy.errstate(all="ignore")
def attention_vjp(
    grad_output: Float[Array, "batch heads q_len v_dim"],
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    grad_lse: Float[Array, "batch heads q_len"] | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """Compute the gradients in closed form, strip by strip of queries; see `mha_spec.reference.attention_vjp`."""
    plan = plan_of("attention_vjp", query, key, value, options)
    a = plan.a
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    return gradients(Problem.of(plan, query, key, value), grad_output, grad_lse)

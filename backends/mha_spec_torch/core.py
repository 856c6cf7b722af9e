"""Attention for PyTorch: choose the path of each call, and show autograd and tracers a function they can handle."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

from mha_spec.arguments import expand_options
from mha_spec.checks import (
    check_cotangents,
    check_dropout_mask,
    check_flag,
    check_halves,
    check_merge_cotangents,
    refuse_unknown,
)
from mha_spec.errors import refuse_type

from . import direct, distributed, fused, operators, paths
from .calls import PREPARED, arguments_of, cast, prepared, problem_of, signature_of
from .dropout import drawn
from .function import any_needs_gradient, attend, check_tensor, gradients, transformed
from .host import in_graph
from .merging import merge, merge_gradients
from .symbols import in_jit_trace, traced
from .tasks import Operands

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float
    from torch import Tensor

    from mha_spec.arguments import Arguments, NoOptions, Options, WeightOptions
    from mha_spec.reference import Gradients, MergeGradients

    from .calls import Signature
    from .problem import Problem

    Halves = tuple[Tensor, Tensor, Tensor, Tensor]

__all__ = [
    "attention",
    "attention_and_weights",
    "attention_vjp",
    "attention_weights",
    "merge_attention",
    "merge_attention_vjp",
]


@expand_options
def attention(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention, by native kernels where they have the same meaning; see `mha_spec.reference.attention`.

    `dropout_key` is a torch.Generator; None selects torch's default. Under autocast the three tensors are cast first.
    """
    # `in_graph` tests this, too; a call of a function less matters here, as `direct` explains.
    if is_compiling():
        options = in_graph(options, query)
    return _attention(query, key, value, return_lse, options)


@torch.compiler.allow_in_graph
def _attention(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    if type(return_lse) is not bool:
        return_lse = check_flag("return_lse", return_lse)
    signature = signature_of(query, key, value, options)
    problem = PREPARED.get(signature)
    # `_attend` would do the same after two more calls of functions.
    if problem is not None and problem.direct is not None and not return_lse:
        return direct.attend(problem, problem.direct, query, key, value, options.get("mask"))
    if problem is None:
        output, lse = _first(signature, query, key, value, return_lse, options)
    else:
        x = Operands(query, key, value, options.get("bias"), options.get("sinks"), options.get("mask"))
        output, lse = _attend(problem, x, return_lse)
    return (output, lse) if return_lse else output


def _first(
    signature: Signature | None, query: Tensor, key: Tensor, value: Tensor, needs_lse: bool, options: Options
) -> tuple[Tensor, Any]:
    """Check and compute a call that equals no earlier call, or that is not eager."""
    if distributed.is_distributed(query, key, value):
        return distributed.attend(partial(attention, return_lse=True), query, key, value, options)
    if isinstance(query, torch.Tensor) and paths.autocasts(query.device.type):
        tensors = cast(query=query, key=key, value=value)
        with torch.autocast(query.device.type, enabled=False):
            return _first(None, **tensors, needs_lse=needs_lse, options=options)
    a = drawn(arguments_of("attention", query, key, value, options))
    if traced(query) and not transformed():
        return _in_graph(a, needs_lse)
    problem, x = problem_of(a), Operands.of(a)
    if transformed():
        return paths.differentiable(problem, x, needs_lse=needs_lse)
    return _attend(prepared(signature, problem, x), x, needs_lse)


def _in_graph(a: Arguments, needs_lse: bool) -> tuple[Tensor, Any]:
    # The choice of a kernel depends on sizes, which torch.jit.trace would fix.
    if not needs_lse and fused.on_cuda(a.query) and not in_jit_trace():
        problem, x = problem_of(a), Operands.of(a)
        if fused.takes(problem, x):
            return fused.attend(problem, x), None
    return operators.attend(a)


def _attend(problem: Problem, x: Operands, needs_lse: bool) -> tuple[Tensor, Any]:
    if problem.direct is not None and not needs_lse:
        return direct.attend(problem, problem.direct, *x[:3], x.mask), None
    if needs_lse or problem.host or not fused.takes(problem, x):
        return attend(problem, x, needs_lse=needs_lse)
    needs_gradient = torch.is_grad_enabled() and any_needs_gradient(x)
    return (fused.Fused.apply(problem, x.mask, *x[:3]) if needs_gradient else fused.attend(problem, x)), None


@expand_options
def attention_weights(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[Tensor, "batch heads q_len kv_len"]:
    """Compute the normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    return _weights(query, key, in_graph(options, query))


@torch.compiler.allow_in_graph
def _weights(query: Tensor, key: Tensor, options: WeightOptions) -> Tensor:
    if distributed.is_distributed(query, key):
        return distributed.weigh(attention_weights, query, key, options)
    a = arguments_of("attention_weights", query, key, None, options)
    if traced(query) and not transformed():
        return operators.weigh(a)
    return paths.weigh(_of_formula(a), Operands.of(a))


def attention_and_weights(
    query: Tensor, key: Tensor, value: Tensor, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """Compute the output from the weights and return both, for the layer that needs both."""
    if distributed.is_distributed(query, key, value):
        return distributed.attend_and_weigh(attention_and_weights, query, key, value, options)
    a = drawn(arguments_of("attention", query, key, value, options))
    if traced(query) and not transformed():
        return operators.attend(a)[0], operators.weigh(a)
    return paths.output_and_weights(_of_formula(a), Operands.of(a))


def _of_formula(a: Arguments) -> Problem:
    """Prepare a call for the formula alone; under autograd, non-finite values must stay out of its products."""
    problem = problem_of(a)
    if torch.is_grad_enabled() and any_needs_gradient(Operands.of(a)) and not problem.finite(a.query, a.key):
        return problem.unread()
    return problem


@expand_options
def attention_vjp(
    grad_output: Float[Tensor, "batch heads q_len v_dim"],
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    grad_lse: Float[Tensor, "batch heads q_len"] | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """Compute the gradients of `attention`, those of autograd; see `mha_spec.reference.attention_vjp`."""
    return _vjp(grad_output, query, key, value, grad_lse, in_graph(options, query))


@torch.compiler.allow_in_graph
def _vjp(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_lse: Tensor | None, options: Options
) -> Gradients:
    if distributed.is_distributed(query, key, value):
        call = partial(attention, return_lse=True)
        return distributed.differentiate(call, (query, key, value), grad_output, grad_lse, options)
    a = arguments_of("attention_vjp", query, key, value, options)
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    x = Operands.of(a)
    if transformed() or (torch.is_grad_enabled() and any_needs_gradient((*x, grad_output, grad_lse))):
        if in_jit_trace():
            refuse_type(
                "MHA-ARG-4",
                "`query` of attention_vjp and its other operands must not require gradients of gradients within "
                "torch.jit.trace. Call it under torch.no_grad(), detach the operands, or use torch.compile.",
            )
        return _as_tuple(gradients(problem_of(a), x, grad_output, grad_lse))
    if traced(query):
        return _as_tuple(operators.gradients(a, grad_output, grad_lse))
    problem = problem_of(a)
    output, lse = paths.forward(problem, x, needs_lse=True)
    return _as_tuple(paths.backward(problem, x, output, lse, grad_output, grad_lse, needs_bias=a.bias is not None))


def _as_tuple(x: Operands) -> Gradients:
    return x.query, x.key, x.value, x.bias, x.sinks


@expand_options
def merge_attention(
    output_a: Float[Tensor, "batch heads q_len v_dim"],
    lse_a: Float[Tensor, "batch heads q_len"],
    output_b: Float[Tensor, "batch heads q_len v_dim"],
    lse_b: Float[Tensor, "batch heads q_len"],
    **options: Unpack[NoOptions],
) -> tuple[Float[Tensor, "batch heads q_len v_dim"], Float[Tensor, "batch heads q_len"]]:
    """Merge two halves of a softmax; see `mha_spec.reference.merge_attention`."""
    return _merged((output_a, lse_a, output_b, lse_b), options)


@torch.compiler.allow_in_graph
def _merged(halves: Halves, options: NoOptions) -> tuple[Tensor, Tensor]:
    refuse_unknown(options, "merge_attention")
    _check_halves(halves)
    return merge(*halves)


@expand_options
def merge_attention_vjp(
    grad_output: Float[Tensor, "batch heads q_len v_dim"],
    output_a: Float[Tensor, "batch heads q_len v_dim"],
    lse_a: Float[Tensor, "batch heads q_len"],
    output_b: Float[Tensor, "batch heads q_len v_dim"],
    lse_b: Float[Tensor, "batch heads q_len"],
    *,
    grad_lse: Float[Tensor, "batch heads q_len"] | None = None,
    **options: Unpack[NoOptions],
) -> MergeGradients:
    """Compute the gradients of `merge_attention`, those of autograd; see `mha_spec.reference.merge_attention_vjp`."""
    return _merge_vjp(grad_output, grad_lse, (output_a, lse_a, output_b, lse_b), options)


@torch.compiler.allow_in_graph
def _merge_vjp(grad_output: Tensor, grad_lse: Tensor | None, halves: Halves, options: NoOptions) -> MergeGradients:
    refuse_unknown(options, "merge_attention_vjp")
    _check_halves(halves)
    check_merge_cotangents(grad_output, grad_lse, halves[0])
    return merge_gradients(grad_output, grad_lse, *halves)


def _check_halves(halves: Halves) -> None:
    check_tensor(halves[0], "output_a")
    check_halves(*halves)

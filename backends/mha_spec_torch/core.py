"""Attention for PyTorch: choose the path of each call, and show autograd and tracers a function they can handle."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mha_spec.arguments import Arguments, expand_options
from mha_spec.array_checks import check_library
from mha_spec.checks import (
    check,
    check_cotangents,
    check_dropout_mask,
    check_flag,
    check_halves,
    check_merge_cotangents,
    refuse_unknown,
)

from . import fused, operators, paths
from .dropout import drawn
from .function import Attention, gradients, transformed
from .merging import merge, merge_gradients
from .native import dense_rows, keeps_nan
from .problem import Problem, readable
from .symbols import checked, entries, is_open, traced
from .tasks import Operands
from .visibility import with_integers

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float
    from torch import Tensor

    from mha_spec.arguments import NoOptions, Options, WeightOptions
    from mha_spec.reference import Gradients, MergeGradients

    Halves = tuple[Tensor, Tensor, Tensor, Tensor]

__all__ = [
    "attention",
    "attention_and_weights",
    "attention_to_all",
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
    return _attention(query, key, value, return_lse, options)


@torch.compiler.allow_in_graph
def _attention(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    a = _arguments("attention", query, key, value, options)
    return_lse = check_flag("return_lse", return_lse)
    if not return_lse and not transformed():
        if options.keys() <= {"scale"} and _direct(a.query, a.key, a.value, a.scale):
            return _native(a.query, a.key, a.value, a.scale)
        if fused.takes(a):
            return _fused(a)
    output, lse = _attend(drawn(a), return_lse)
    return (output, lse) if return_lse else output


def attention_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention without options; the shapes are not checked, because the layer made the tensors."""
    if not transformed() and _direct(query, key, value, None):
        return _native(query, key, value, None)
    return attention(query, key, value)


def _direct(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    """Tell whether torch's own function gives exactly this meaning on the CPU, without options except scale.

    Its backward sums 16-bit gradients in 16 bit, it returns no lse, and with few keys it drops NaN. See `paths`.
    """
    if not query.is_cpu or traced(query) or _needs_gradient(query, key, value):
        return False
    if query.shape[3] != value.shape[3] or 0 in query.shape or 0 in value.shape:
        return False
    return keeps_nan(query, key, 1.0 if scale is None else scale)


def _native(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)


def _fused(a: Arguments) -> Tensor:
    problem = Problem.of(a, host=False)
    if _needs_gradient(a.query, a.key, a.value) and not traced(a.query):
        return fused.Fused.apply(a, problem, a.query, a.key, a.value)
    return fused.attend(problem, fused.operands_of(a.query, a.key, a.value))


def _needs_gradient(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands)


def _attend(a: Arguments, needs_lse: bool) -> tuple[Tensor, Any]:
    x = Operands(a.query, a.key, a.value, a.bias, a.sinks)
    if transformed():
        return paths.differentiable(Problem.of(a, host=False), x)
    if traced(a.query):
        return operators.attend(a)
    problem = Problem.of(a, host=readable(a.query))
    if _needs_gradient(*x):
        return Attention.apply(a, problem, *x)
    return paths.forward(problem, x, needs_lse=needs_lse)


@expand_options
def attention_weights(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[Tensor, "batch heads q_len kv_len"]:
    """Compute the normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    return _weights(query, key, options)


@torch.compiler.allow_in_graph
def _weights(query: Tensor, key: Tensor, options: WeightOptions) -> Tensor:
    a = _arguments("attention_weights", query, key, None, options)
    if traced(query) and not transformed():
        return operators.weigh(a)
    return paths.weigh(_of_formula(a), Operands(a.query, a.key, a.key[..., :0], a.bias, a.sinks))


def attention_and_weights(
    query: Tensor, key: Tensor, value: Tensor, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """Compute the output from the weights and return both, for the layer that needs both."""
    a = drawn(_arguments("attention", query, key, value, options))
    if traced(query) and not transformed():
        return operators.attend(a)[0], operators.weigh(a)
    return paths.output_and_weights(_of_formula(a), Operands(a.query, a.key, a.value, a.bias, a.sinks))


def _of_formula(a: Arguments) -> Problem:
    """Prepare a call for the formula alone; under autograd, non-finite values must stay out of its products."""
    problem = Problem.of(a, host=readable(a.query) and not traced(a.query) and not transformed())
    if _needs_gradient(a.query, a.key, a.value, a.bias, a.sinks) and not problem.finite(a.query, a.key):
        return Problem.of(a, host=False)
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
    return _vjp(grad_output, query, key, value, grad_lse, options)


@torch.compiler.allow_in_graph
def _vjp(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_lse: Tensor | None, options: Options
) -> Gradients:
    a = _arguments("attention_vjp", query, key, value, options)
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    x = Operands(a.query, a.key, a.value, a.bias, a.sinks)
    if transformed() or _needs_gradient(*x, grad_output, grad_lse):
        return _as_tuple(gradients(a, x, grad_output, grad_lse))
    if traced(query):
        return _as_tuple(operators.gradients(a, grad_output, grad_lse))
    problem = Problem.of(a, host=readable(query))
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
    check_library("torch", halves[0], "output_a")
    check_halves(*halves)


def _arguments(function: str, query: Tensor, key: Tensor, value: Tensor | None, options: WeightOptions) -> Arguments:
    """Check the arguments of a call, and replace a named offset by its integers."""
    refuse_unknown(options, function)
    check_library("torch", query)
    a = Arguments(query, key, value, function=function, **options)
    if paths.autocasts(query.device.type):
        a = _autocast(a)
    if not traced(query):
        return with_integers(check(a))
    return with_integers(checked(_with_tensors(a)))


def _with_tensors(a: Arguments) -> Arguments:
    """Replace each sequence that holds a symbol by a tensor, because tensors are never read here."""
    options = {name: getattr(a, name) for name in ("q_offset", "q_lengths", "kv_lengths")}
    tensors = {name: entries(value, a.query.device) for name, value in options.items() if is_open(value)}
    return replace(a, **tensors) if tensors else a


def _autocast(a: Arguments) -> Arguments:
    """Cast query, key and value to the type of autocast, which leaves float64 unchanged."""
    dtype = torch.get_autocast_dtype(a.query.device.type)
    tensors = {name: getattr(a, name) for name in ("query", "key", "value")}
    cast: dict[str, Any] = {
        name: tensor.to(dtype)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    }
    return replace(a, **cast)

"""The functions of attention for PyTorch: which of the paths a call takes, and what autograd and tracers see of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mha_spec.arguments import Arguments, spells_options
from mha_spec.checks import (
    check,
    check_cotangents,
    check_dropout_mask,
    check_halves,
    refuse_unknown,
)

from . import fused, operators, paths
from .dropout import drawn
from .function import Attention, gradients, transformed
from .merging import merge
from .native import FEWEST_KEYS
from .problem import Problem, readable
from .tasks import Operands

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float
    from torch import Tensor

    from mha_spec.arguments import NoOptions, Options, WeightOptions
    from mha_spec.reference import Gradients

__all__ = [
    "attention",
    "attention_and_weights",
    "attention_to_all",
    "attention_vjp",
    "attention_weights",
    "merge_attention",
]


@spells_options
def attention(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by native kernels where they have this meaning; see `mha_spec.reference.attention`.

    `dropout_key` is a torch.Generator; None is torch's own. Under autocast the three tensors take its type first.
    """
    return _attention(query, key, value, return_lse, options)


@torch.compiler.allow_in_graph
def _attention(
    query: Tensor, key: Tensor, value: Tensor, return_lse: bool, options: Options
) -> Tensor | tuple[Tensor, Tensor]:
    a = _arguments("attention", query, key, value, **options)
    if not return_lse and not transformed():
        if options.keys() <= {"scale"} and _direct(a.query, a.key, a.value):
            return _native(a.query, a.key, a.value, a.scale)
        if fused.takes(a):
            return _fused(a)
    output, lse = _attend(drawn(a), return_lse)
    return (output, lse) if return_lse else output


def attention_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Attention without options, of tensors that are known to fit: a layer has made them."""
    if not transformed() and _direct(query, key, value):
        return _native(query, key, value, None)
    return attention(query, key, value)


def _direct(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call without options but scale is exactly torch's own on the CPU: see `paths`.

    Its backward sums 16-bit gradients in 16 bit, its lse is hidden, and a few keys scrub NaN.
    """
    if not query.is_cpu or 0 in query.shape or 0 in value.shape:
        return False
    sizes = query.shape[3] == value.shape[3] and value.shape[2] >= FEWEST_KEYS
    return sizes and not (_traced(query) or _needs_gradient(query, key, value))


def _native(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)


def _fused(a: Arguments) -> Tensor:
    problem = Problem.of(a, host=False)
    if _needs_gradient(a.query, a.key, a.value) and not _traced(a.query):
        return fused.Fused.apply(a, problem, a.query, a.key, a.value)
    return fused.attend(problem, fused.operands_of(a.query, a.key, a.value))


def _needs_gradient(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in operands)


def _attend(a: Arguments, needs_lse: bool) -> tuple[Tensor, Tensor]:
    x = Operands(a.query, a.key, a.value, a.bias, a.sinks)
    if transformed():
        return paths.differentiable(Problem.of(a, host=False), x)
    if _traced(a.query):
        return operators.attend(a)
    problem = Problem.of(a, host=readable(a.query))
    if _needs_gradient(*x):
        return Attention.apply(a, problem, needs_lse, *x)
    return paths.forward(problem, x, needs_lse=needs_lse)


@spells_options
def attention_weights(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    **options: Unpack[WeightOptions],
) -> Float[Tensor, "batch heads q_len kv_len"]:
    """The normalised weights, before dropout; see `mha_spec.reference.attention_weights`."""
    return _weights(query, key, options)


@torch.compiler.allow_in_graph
def _weights(query: Tensor, key: Tensor, options: WeightOptions) -> Tensor:
    a = _arguments("attention_weights", query, key, None, **options)
    return paths.weigh(_of_formula(a), Operands(a.query, a.key, a.key, a.bias, a.sinks))


def attention_and_weights(
    query: Tensor, key: Tensor, value: Tensor, **options: Unpack[Options]
) -> tuple[Tensor, Tensor]:
    """The output and the weights, one from the other, for the layer that is asked for both."""
    a = drawn(_arguments("attention", query, key, value, **options))
    return paths.both(_of_formula(a), Operands(a.query, a.key, a.value, a.bias, a.sinks))


def _of_formula(a: Arguments) -> Problem:
    """A call for the formula alone; where autograd goes through, what is not finite must stay out of its products."""
    problem = Problem.of(a, host=readable(a.query) and not _traced(a.query) and not transformed())
    if _needs_gradient(a.query, a.key, a.value, a.bias, a.sinks) and not problem.finite(a.query, a.key):
        return Problem.of(a, host=False)
    return problem


@spells_options
def attention_vjp(
    grad_output: Float[Tensor, "batch heads q_len v_dim"],
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    grad_lse: Float[Tensor, "batch heads q_len"] | None = None,
    **options: Unpack[Options],
) -> Gradients:
    """The gradients that autograd gives of `attention`; see `mha_spec.reference.attention_vjp`."""
    return _vjp(grad_output, query, key, value, grad_lse, options)


@torch.compiler.allow_in_graph
def _vjp(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_lse: Tensor | None, options: Options
) -> Gradients:
    a = _arguments("attention_vjp", query, key, value, **options)
    check_cotangents(a, grad_output, grad_lse)
    check_dropout_mask(a)
    x = Operands(a.query, a.key, a.value, a.bias, a.sinks)
    if transformed() or _needs_gradient(*x, grad_output, grad_lse):
        return _spelled(gradients(a, x, grad_output, grad_lse))
    if _traced(query):
        return _spelled(operators.gradients(a, grad_output, grad_lse))
    problem = Problem.of(a, host=readable(query))
    output, lse = paths.forward(problem, x, needs_lse=False)
    return _spelled(paths.backward(problem, x, output, lse, grad_output, grad_lse, of_bias=a.bias is not None))


def _spelled(x: Operands) -> Gradients:
    return x.query, x.key, x.value, x.bias, x.sinks


@spells_options
def merge_attention(
    output_a: Float[Tensor, "batch heads q_len v_dim"],
    lse_a: Float[Tensor, "batch heads q_len"],
    output_b: Float[Tensor, "batch heads q_len v_dim"],
    lse_b: Float[Tensor, "batch heads q_len"],
    **options: Unpack[NoOptions],
) -> tuple[Float[Tensor, "batch heads q_len v_dim"], Float[Tensor, "batch heads q_len"]]:
    """Two halves of one softmax; see `mha_spec.reference.merge_attention`."""
    return _merged(output_a, lse_a, output_b, lse_b, options)


@torch.compiler.allow_in_graph
def _merged(
    output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor, options: NoOptions
) -> tuple[Tensor, Tensor]:
    refuse_unknown(options, "merge_attention")
    check_halves(output_a, lse_a, output_b, lse_b)
    return merge(output_a, lse_a, output_b, lse_b)


def _arguments(
    function: str, query: Tensor, key: Tensor, value: Tensor | None, /, **options: Unpack[Options]
) -> Arguments:
    refuse_unknown(options, function)
    a = Arguments(query, key, value, **options)
    return check(_autocast(a) if torch.is_autocast_enabled(query.device.type) else a)


def _autocast(a: Arguments) -> Arguments:
    """Give query, key and value the type of autocast, which leaves float64 as it is."""
    dtype = torch.get_autocast_dtype(a.query.device.type)
    tensors = {name: getattr(a, name) for name in ("query", "key", "value")}
    cast: dict[str, Any] = {
        name: one.to(dtype)
        for name, one in tensors.items()
        if one is not None and one.is_floating_point() and one.dtype != torch.float64
    }
    return replace(a, **cast)


def _traced(tensor: Tensor) -> bool:
    """Whether a tensor stands for one that is not there yet."""
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter)

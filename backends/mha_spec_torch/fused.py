"""Attention on CUDA by the kernel that torch chooses, for calls to which its kernels give exactly the same meaning.

No tensor is read, so that nothing waits for the device. The kernels differ on a row that sees no key, and let a NaN in
unused storage through. Therefore rows and keys without a visible pair are set to 0, an empty row is shown all keys, and
its output is then set to 0 (MHA-EMPTY-1, MHA-EMPTY-3, MHA-POISON-1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .function import gradients
from .paths import without_autocast, without_unused
from .symbols import surely
from .tasks import Operands

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Fused", "attend", "takes"]


def takes(problem: Problem, x: Operands) -> bool:
    """Tell whether these kernels take a call: its only options hide pairs or are a positive scale.

    Some kernels round a bias to the query's dtype, or scale after the maximum.
    """
    if not on_cuda(x.query) or 0 in x.query.shape or 0 in x.key.shape:
        return False
    plain = x.bias is None and x.sinks is None and problem.softcap is None
    return plain and not problem.drops and problem.dropout_rate == 0 and problem.scale > 0


def operands_of(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Operands:
    """Return operands without bias and sinks."""
    return Operands(query, key, value, None, None, mask)


def on_cuda(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is on a device that has these kernels."""
    return tensor.is_cuda


@without_autocast
def attend(problem: Problem, x: Operands) -> torch.Tensor:
    """Compute the output by differentiable operations, among them the kernel."""
    whole = problem.visibility.whole
    is_square = surely(whole.queries.size == whole.keys.size)
    causal = is_square and x.mask is None and problem.visibility.diagonal(whole)
    visible = None if causal else problem.visible(whole, x)
    if visible is None:
        return _native(x, None, scale=problem.scale, causal=causal)
    x, rows = without_unused(x, visible)
    output = _native(x, visible | ~visible.any(-1, keepdim=True), scale=problem.scale, causal=False)
    return torch.where(rows, output, 0.0)


def _native(x: Operands, mask: torch.Tensor | None, *, scale: float, causal: bool) -> torch.Tensor:
    """Call torch's function; a single kernel has groups of heads, and only without a mask and in 16 bit."""
    query, key, value = x[:3]
    group = query.shape[1] // key.shape[1]
    if not causal and (mask is None or mask.shape[1] == mask.shape[2] == 1):
        folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        output = scaled_dot_product_attention(folded, key, value, mask, scale=scale)
        return output.reshape(*query.shape[:3], value.shape[3])
    grouped = group > 1 and causal and query.dtype in {torch.float16, torch.bfloat16}
    if group > 1 and not grouped:
        key, value = (operand.repeat_interleave(group, 1) for operand in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


class Fused(torch.autograd.Function):
    """The output of a prepared call, with the kernel's backward and derivatives of higher order."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, mask: torch.Tensor | None, *operands: torch.Tensor) -> torch.Tensor:
        """Keep the graph that autograd records of the kernel."""
        leaves = [
            operand.detach().requires_grad_(needed)
            for operand, needed in zip(operands, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad():
            output = attend(problem, operands_of(mask, *leaves))
        ctx.save_for_backward(*operands, mask, *problem.tensors)
        ctx.problem, ctx.output, ctx.leaves = problem, output, leaves
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Differentiate that graph; if the gradient must be differentiable too, use differentiable operations."""
        if torch.is_grad_enabled():
            query, key, value, mask, *_ = ctx.saved_tensors
            results = gradients(ctx.problem, operands_of(mask, query, key, value), grad_outputs[0], None)[:3]
            needed = zip(results, ctx.needs_input_grad[2:], strict=True)
            return None, None, *(gradient if is_needed else None for gradient, is_needed in needed)
        leaves = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        results = iter(torch.autograd.grad(ctx.output, leaves, grad_outputs[0], retain_graph=True))
        return None, None, *(next(results) if leaf.requires_grad else None for leaf in ctx.leaves)

"""Attention on CUDA by torch's own choice among its kernels, where that has exactly the asked meaning.

Nothing is read, so that nothing waits for the device. What the kernels do with a row that sees nothing differs, and a
NaN in storage that nobody sees comes through: rows and keys without a pair are replaced by 0, an empty row may see all,
and its output is replaced by 0 (MHA-EMPTY-1, MHA-EMPTY-3, MHA-POISON-1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .function import gradients
from .paths import used, without_autocast
from .tasks import Operands

if TYPE_CHECKING:
    from mha_spec.arguments import Arguments

    from .problem import Problem

__all__ = ["Fused", "attend", "operands_of", "takes"]


def takes(a: Arguments) -> bool:
    """Whether a call goes to these kernels: one that hides pairs, or has no option, and a positive scale.

    Some of them round a bias to the query's dtype, or scale after the maximum.
    """
    if not on_cuda(a.query) or 0 in a.query.shape or 0 in a.key.shape:
        return False
    plain = a.bias is None and a.sinks is None and a.softcap is None
    return plain and a.dropout_rate == 0 and a.dropout_mask is None and (a.scale is None or a.scale > 0)


def operands_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Operands:
    """The operands of these kernels, without bias and sinks."""
    return Operands(query, key, value, None, None)


def on_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies where these kernels are."""
    return tensor.is_cuda


@without_autocast
def attend(problem: Problem, x: Operands) -> torch.Tensor:
    """The output by differentiable operations, the kernel's backward among them."""
    visibility = problem.visibility
    whole = visibility.whole
    causal = len(whole.queries) == len(whole.keys) and visibility.diagonal(whole)
    visible = None if causal else visibility.visible(whole)
    if visible is None:
        return _native(x, None, scale=problem.scale, causal=causal)
    x, rows = used(x, visible)
    output = _native(x, visible | ~visible.any(-1, keepdim=True), scale=problem.scale, causal=False)
    return torch.where(rows, output, 0.0)


def _native(x: Operands, mask: torch.Tensor | None, *, scale: float, causal: bool) -> torch.Tensor:
    """torch's own; of its kernels only one knows groups of heads, and that without a mask and in 16 bit."""
    query, key, value = x[:3]
    group = query.shape[1] // key.shape[1]
    if not causal and (mask is None or mask.shape[1] == mask.shape[2] == 1):
        folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        output = scaled_dot_product_attention(folded, key, value, mask, scale=scale)
        return output.reshape(*query.shape[:3], value.shape[3])
    grouped = group > 1 and causal and query.dtype in {torch.float16, torch.bfloat16}
    if group > 1 and not grouped:
        key, value = (one.repeat_interleave(group, 1) for one in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


class Fused(torch.autograd.Function):
    """The output of a prepared call, with the kernel's own backward and what lies beyond it."""

    @staticmethod
    def forward(ctx: Any, a: Arguments, problem: Problem, *operands: torch.Tensor) -> torch.Tensor:
        """Keep the kernel's own graph."""
        leaves = [
            one.detach().requires_grad_(needed) for one, needed in zip(operands, ctx.needs_input_grad[2:], strict=True)
        ]
        with torch.enable_grad():
            output = attend(problem, operands_of(*leaves))
        ctx.save_for_backward(*operands)
        ctx.a, ctx.output, ctx.leaves = a, output, leaves
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Walk that graph; where the gradient's own gradient may be asked, that of differentiable operations."""
        if torch.is_grad_enabled():
            found = gradients(ctx.a, operands_of(*ctx.saved_tensors), grad_outputs[0], None)[:3]
            needed = ctx.needs_input_grad[2:]
            return None, None, *(one if wanted else None for one, wanted in zip(found, needed, strict=True))
        asked = [one for one in ctx.leaves if one.requires_grad]
        given = iter(torch.autograd.grad(ctx.output, asked, grad_outputs[0], retain_graph=True))
        return None, None, *(next(given) if one.requires_grad else None for one in ctx.leaves)

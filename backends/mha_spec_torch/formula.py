"""Attention of a task by the formula of the specification, with every option, in the softmax's type.

`attend` uses differentiable operations alone and no operation in place; `gradients` is its gradient in closed form.
Heads that share a key/value head are stacked as rows of a matrix, so that keys and values are not repeated.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .problem import Problem
    from .tasks import Operands, Task

__all__ = ["Cotangents", "Gradients", "Logits", "attend", "gradients", "logits", "product", "softmax", "weigh"]


class Logits(NamedTuple):
    """The logits of a task, (batch, heads, queries, keys), -inf where a pair is not visible."""

    values: torch.Tensor
    visible: torch.Tensor | None
    """Broadcastable to the logits, or None where all pairs are visible."""
    slope: torch.Tensor | None
    """The slope of the soft cap (MHA-VJP-2)."""


def attend(
    problem: Problem, task: Task, x: Operands, *, needs_lse: bool, is_differentiated: bool = False
) -> tuple[torch.Tensor, Any]:
    """Compute the output (batch, heads, queries, v_dim) of a task and, if needed, lse (batch, heads, queries)."""
    x = x.to(problem.dtype)
    if needs_lse:
        weights, visible, lse = softmax(problem, task, x, is_differentiated=is_differentiated)
    else:
        (weights, visible), lse = weigh(problem, task, x), None
    keep = problem.keep(task)
    dropped = weights if keep is None else weights * keep
    return product(dropped, x.value, visible, clean=visible is None or problem.finite(x.value)), lse


def softmax(
    problem: Problem, task: Task, x: Operands, *, is_differentiated: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute weights, visible pairs, and lse; a row that sees no key has weights 0 and lse -inf (MHA-EMPTY-1).

    Where they are differentiated, both come from the same exponentials: the gradients of torch's softmax and logsumexp
    hold the weights with different errors, which do not cancel where the gradients of output and lse do (MHA-ACC-1).
    """
    scores = logits(problem, task, x)
    if x.sinks is None and not is_differentiated:
        return _shares(scores), scores.visible, torch.logsumexp(scores.values, -1)
    maximum = scores.values.amax(-1, keepdim=True)
    maximum = maximum if x.sinks is None else torch.maximum(maximum, x.sinks)
    anchor = torch.where(maximum == -math.inf, 0.0, maximum).detach()
    exponentials = torch.exp(scores.values - anchor)
    total = exponentials.sum(-1, keepdim=True)
    total = total if x.sinks is None else total + torch.exp(x.sinks - anchor)
    empty = total == 0
    divisor = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, anchor + torch.log(divisor))
    return exponentials / divisor, scores.visible, lse[..., 0]


def weigh(problem: Problem, task: Task, x: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the weights, and which pairs are visible."""
    if x.sinks is not None:
        return softmax(problem, task, x)[:2]
    scores = logits(problem, task, x)
    return _shares(scores), scores.visible


def _shares(scores: Logits) -> torch.Tensor:
    """Apply torch's softmax, and replace its NaN in a row that sees no key by 0 (MHA-EMPTY-1)."""
    weights = torch.softmax(scores.values, -1)
    return weights if scores.visible is None else torch.where(scores.visible.any(-1, keepdim=True), weights, 0.0)


def logits(problem: Problem, task: Task, x: Operands, *, slope: bool = False) -> Logits:
    """Compute, cap, bias and hide the scores (MHA-SCORE-1, MHA-CAP-1, MHA-CAP-2, MHA-BIAS-1, MHA-POISON-2)."""
    visible = problem.visible(task, x)
    values, cap_slope = _scores(problem, x, visible), None
    if problem.softcap is not None:
        tanh = torch.tanh(values / problem.softcap)
        cap_slope = 1 - tanh**2 if slope else None
        values = problem.softcap * tanh
    if x.bias is not None:
        values = values + x.bias
    if visible is not None:
        values = torch.where(visible, values, -math.inf)
    return Logits(values, visible, cap_slope)


def _scores(problem: Problem, x: Operands, visible: torch.Tensor | None) -> torch.Tensor:
    """Compute the scores; if some are hidden, keep non-finite values out of the product, for its gradient."""
    query, key = x.query * problem.scale, x.key
    if problem.host or visible is None:
        return _spread(_gather(query, key) @ key.mT, query)
    finite = torch.isfinite(query), torch.isfinite(key)
    query, key = (torch.where(mask, operand, 0.0) for mask, operand in zip(finite, (query, key), strict=True))
    rows, keys = (mask.all(-1, keepdim=True) for mask in finite)
    usable = _spread(_gather(rows, key) & keys.mT, query)
    return torch.where(usable, _spread(_gather(query, key) @ key.mT, query), math.nan)


class Cotangents(NamedTuple):
    """The cotangents of each row; None stands for 0."""

    output: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    row_dot: torch.Tensor | None = None
    """D of each row over all its keys (MHA-VJP-1), where the task does not have all of them; it includes lse."""

    def cut(self, task: Task) -> Cotangents:
        """Select the rows of a task."""
        return Cotangents(*(None if cotangent is None else task.of_rows(cotangent) for cotangent in self))


class Gradients(NamedTuple):
    """The gradients of a task in the softmax's type, and D of each row (MHA-VJP-1), which sinks need."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    row_dot: torch.Tensor


def gradients(problem: Problem, task: Task, x: Operands, lse: torch.Tensor, cotangents: Cotangents) -> Gradients:
    """Compute the gradients in closed form (MHA-VJP-1 to MHA-VJP-4)."""
    x = x.to(problem.dtype)
    values, visible, slope = logits(problem, task, x, slope=True)
    weights = torch.exp(values - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    weights = _shown(weights, visible)
    keep = problem.keep(task)
    grad_weights = _grad_weights(problem, x, cotangents, keep)
    pairs = _shown(weights * grad_weights, visible)
    row_dot = cotangents.row_dot
    if row_dot is None:
        row_dot = pairs.sum(-1) if cotangents.lse is None else pairs.sum(-1) - cotangents.lse.to(problem.dtype)
    grad_logits = _shown(pairs - weights * row_dot[..., None], visible)
    grad_scores = grad_logits if slope is None else _shown(grad_logits * slope, visible)
    clean = visible is None or problem.finite(x.query, x.key)
    grad_query = problem.scale * product(grad_scores, x.key, visible, clean=clean)
    grad_key = problem.scale * _sum_over_rows(grad_scores, x.query, x.key, visible, clean=clean)
    if cotangents.output is None:
        return Gradients(grad_query, grad_key, torch.zeros_like(x.value), grad_logits, row_dot)
    dropped, grad_output = weights if keep is None else weights * keep, cotangents.output.to(problem.dtype)
    clean = visible is None or problem.finite(grad_output)
    grad_value = _sum_over_rows(dropped, grad_output, x.value, visible, clean=clean)
    return Gradients(grad_query, grad_key, grad_value, grad_logits, row_dot)


def _grad_weights(problem: Problem, x: Operands, cotangents: Cotangents, keep: torch.Tensor | None) -> torch.Tensor:
    """Compute dP from the cotangents of the output and of the weights before dropout (MHA-VJP-1, MHA-DROP-3)."""
    if cotangents.output is None:
        assert cotangents.weights is not None
        return cotangents.weights.to(problem.dtype)
    grad_output = cotangents.output.to(problem.dtype)
    from_output = _spread(_gather(grad_output, x.value) @ x.value.mT, grad_output)
    from_output = from_output if keep is None else from_output * keep
    return from_output if cotangents.weights is None else from_output + cotangents.weights.to(problem.dtype)


def _gather(rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Stack the heads of a group: (batch, kv_heads, group * queries, size) (MHA-HEAD-1)."""
    return rows.reshape(rows.shape[0], of.shape[1], -1, rows.shape[3])


def _spread(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo `_gather`: (batch, heads, queries, size)."""
    return rows.reshape(*like.shape[:3], rows.shape[-1])


def _shown(array: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Set pairs that are not visible to 0 (MHA-POISON-1, MHA-POISON-2)."""
    return array if visible is None else torch.where(visible, array, 0.0)


def product(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None, *, clean: bool) -> torch.Tensor:
    """Compute sum_j weights_ij values_jc over the visible pairs.

    `clean` says that all values are finite. Otherwise a plain product would give NaN for a hidden pair, as 0 * NaN is
    NaN (MHA-POISON-1, MHA-POISON-2).
    """
    if clean or visible is None:
        return _spread(_gather(weights, values) @ values, weights)
    finite = torch.isfinite(values)
    total = _gather(_shown(weights, visible), values) @ torch.where(finite, values, 0.0)
    seen = _gather(visible.expand_as(weights).to(weights.dtype), values) @ (~finite).to(weights.dtype)
    return _spread(torch.where(seen > 0, math.nan, total), weights)


def _sum_over_rows(
    weights: torch.Tensor, rows: torch.Tensor, of: torch.Tensor, visible: torch.Tensor | None, *, clean: bool
) -> torch.Tensor:
    """Compute sum_i weights_ij rows_ic over the visible pairs, summed over each group of heads (MHA-VJP-4)."""
    if clean or visible is None:
        return _gather(weights, of).mT @ _gather(rows, of)
    finite = torch.isfinite(rows)
    total = _gather(weights, of).mT @ _gather(torch.where(finite, rows, 0.0), of)
    seen = _gather(visible.expand_as(weights).to(weights.dtype), of).mT @ _gather((~finite).to(weights.dtype), of)
    return torch.where(seen > 0, math.nan, total)

"""Attention of one task as the specification writes it, with every option, in the softmax's type.

`attend` is made of differentiable operations alone and writes to none of its tensors; `gradients` is its closed form.
Heads that share a key/value head lie one under another as rows of one matrix, so that keys and values are not repeated.
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


def attend(problem: Problem, task: Task, x: Operands, *, needs_lse: bool = True) -> tuple[torch.Tensor, Any]:
    """Output (batch, heads, queries, v_dim) and, where it is needed, lse (batch, heads, queries) of a task."""
    x = x.to(problem.dtype)
    weights, visible, lse = softmax(problem, task, x) if needs_lse else (*weigh(problem, task, x), None)
    keep = problem.keep(task)
    dropped = weights if keep is None else weights * keep
    return product(dropped, x.value, visible, clean=visible is None or problem.finite(x.value)), lse


def softmax(problem: Problem, task: Task, x: Operands) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weights, which pairs are visible, and lse; a row that sees nothing has weights 0 and lse -inf (MHA-EMPTY-1)."""
    scores = logits(problem, task, x)
    if x.sinks is None:
        return _shares(scores), scores.visible, torch.logsumexp(scores.values, -1)
    maximum = torch.maximum(scores.values.amax(-1, keepdim=True), x.sinks)
    anchor = torch.where(maximum == -math.inf, 0.0, maximum).detach()
    exponentials = torch.exp(scores.values - anchor)
    total = exponentials.sum(-1, keepdim=True) + torch.exp(x.sinks - anchor)
    empty = total == 0
    divisor = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, anchor + torch.log(divisor))
    return exponentials / divisor, scores.visible, lse[..., 0]


def weigh(problem: Problem, task: Task, x: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights alone, and which pairs are visible."""
    if x.sinks is not None:
        return softmax(problem, task, x)[:2]
    scores = logits(problem, task, x)
    return _shares(scores), scores.visible


def _shares(scores: Logits) -> torch.Tensor:
    """torch's softmax, which gives NaN in a row that sees nothing (MHA-EMPTY-1)."""
    weights = torch.softmax(scores.values, -1)
    return weights if scores.visible is None else torch.where(scores.visible.any(-1, keepdim=True), weights, 0.0)


def logits(problem: Problem, task: Task, x: Operands, *, slope: bool = False) -> Logits:
    """The scores, capped, then biased, then hidden (MHA-SCORE-1, MHA-CAP-1, MHA-CAP-2, MHA-BIAS-1, MHA-POISON-2)."""
    visible = problem.visibility.visible(task, x.bias)
    values, of_cap = _scores(problem, x, visible), None
    if problem.softcap is not None:
        tanh = torch.tanh(values / problem.softcap)
        of_cap = 1 - tanh**2 if slope else None
        values = problem.softcap * tanh
    if x.bias is not None:
        values = values + x.bias
    if visible is not None:
        values = torch.where(visible, values, -math.inf)
    return Logits(values, visible, of_cap)


def _scores(problem: Problem, x: Operands, visible: torch.Tensor | None) -> torch.Tensor:
    """The scores; where some are hidden, what is not finite stays out of the product that autograd goes through."""
    query, key = x.query * problem.scale, x.key
    if problem.host or visible is None:
        return _spread(_gather(query, key) @ key.mT, query)
    finite = torch.isfinite(query), torch.isfinite(key)
    query, key = (torch.where(where, one, 0.0) for where, one in zip(finite, (query, key), strict=True))
    rows, keys = (where.all(-1, keepdim=True) for where in finite)
    usable = _spread(_gather(rows, key) & keys.mT, query)
    return torch.where(usable, _spread(_gather(query, key) @ key.mT, query), math.nan)


class Cotangents(NamedTuple):
    """What the backward is given of each row; those that are None are 0."""

    output: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def cut(self, task: Task) -> Cotangents:
        """The rows of a task."""
        return Cotangents(*(None if cotangent is None else task.of_rows(cotangent) for cotangent in self))


class Gradients(NamedTuple):
    """The gradients of a task in the softmax's type, and the D of each row (MHA-VJP-1), which sinks need."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    row_dot: torch.Tensor


def gradients(problem: Problem, task: Task, x: Operands, lse: torch.Tensor, cotangents: Cotangents) -> Gradients:
    """The closed form (MHA-VJP-1 to MHA-VJP-4)."""
    x, given = x.to(problem.dtype), cotangents
    values, visible, slope = logits(problem, task, x, slope=True)
    weights = torch.exp(values - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    weights = _shown(weights, visible)
    keep = problem.keep(task)
    grad_weights = _grad_weights(problem, x, given, keep)
    pairs = _shown(weights * grad_weights, visible)
    row_dot = pairs.sum(-1) if given.lse is None else pairs.sum(-1) - given.lse.to(problem.dtype)
    grad_logits = _shown(pairs - weights * row_dot[..., None], visible)
    grad_scores = grad_logits if slope is None else _shown(grad_logits * slope, visible)
    clean = visible is None or problem.finite(x.query, x.key)
    grad_query = problem.scale * product(grad_scores, x.key, visible, clean=clean)
    grad_key = problem.scale * _sum_over_rows(grad_scores, x.query, x.key, visible, clean=clean)
    if given.output is None:
        return Gradients(grad_query, grad_key, torch.zeros_like(x.value), grad_logits, row_dot)
    dropped, grad_output = weights if keep is None else weights * keep, given.output.to(problem.dtype)
    clean = visible is None or problem.finite(grad_output)
    grad_value = _sum_over_rows(dropped, grad_output, x.value, visible, clean=clean)
    return Gradients(grad_query, grad_key, grad_value, grad_logits, row_dot)


def _grad_weights(problem: Problem, x: Operands, given: Cotangents, keep: torch.Tensor | None) -> torch.Tensor:
    """dP, through the output and of the weights themselves, which know no dropout (MHA-VJP-1, MHA-DROP-3)."""
    if given.output is None:
        assert given.weights is not None
        return given.weights.to(problem.dtype)
    grad_output = given.output.to(problem.dtype)
    through = _spread(_gather(grad_output, x.value) @ x.value.mT, grad_output)
    through = through if keep is None else through * keep
    return through if given.weights is None else through + given.weights.to(problem.dtype)


def _gather(rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Put the heads of a group one under another: (batch, kv_heads, group * queries, size) (MHA-HEAD-1)."""
    return rows.reshape(rows.shape[0], of.shape[1], -1, rows.shape[3])


def _spread(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give gathered rows their heads again: (batch, heads, queries, size)."""
    return rows.reshape(*like.shape[:3], rows.shape[-1])


def _shown(array: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """0 at the pairs that are not visible (MHA-POISON-1, MHA-POISON-2)."""
    return array if visible is None else torch.where(visible, array, 0.0)


def product(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None, *, clean: bool) -> torch.Tensor:
    """sum_j weights_ij values_jc over visible pairs alone.

    Where some are hidden, and the values not `clean`, that is all finite, a plain product would carry their NaN through
    a weight of 0 (MHA-POISON-1, MHA-POISON-2).
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
    """sum_i weights_ij rows_ic over visible pairs alone, for each key/value head over its whole group (MHA-VJP-4)."""
    if clean or visible is None:
        return _gather(weights, of).mT @ _gather(rows, of)
    finite = torch.isfinite(rows)
    total = _gather(weights, of).mT @ _gather(torch.where(finite, rows, 0.0), of)
    seen = _gather(visible.expand_as(weights).to(weights.dtype), of).mT @ _gather((~finite).to(weights.dtype), of)
    return torch.where(seen > 0, math.nan, total)

"""The paths that a call can take, and the two passes that work it task by task.

| path | taken where | forward | backward |
| --- | --- | --- | --- |
| fused | CUDA, see (1) | `scaled_dot_product_attention` | the kernel's |
| flash | CPU, see (2) | aten's CPU flash kernel | its backward, see (3) |
| formula | all others; flash tasks with a NaN or an infinity | `formula.attend` | `formula.gradients` |
| differentiable | transforms, see (4); attention weights | the formula, not cut into tasks | its operations' |

1. No option but a positive scale and those that hide pairs, no lse: see `fused`.
2. No softcap and no dropout.
3. In the softmax's type; the formula where the bias needs a gradient.
4. Those of torch.func, forward mode, and the backward of a backward.

A call that needs nothing but the flash kernel, which takes it whole, goes there by `direct`, with torch's gradient.
`Visibility.tasks` cuts a call into tasks: queries that share a range of keys. In a graph, flash and formula are a
single operator, and the weights are another; an operator chooses its path when it runs. See `operators`.
"""

from __future__ import annotations

import math
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from . import formula, native
from .tasks import Operands, converted, pieces

if TYPE_CHECKING:
    from collections.abc import Callable

    from .problem import Problem
    from .tasks import Task

__all__ = [
    "Rows",
    "attend",
    "autocasts",
    "backward",
    "differentiable",
    "dot_of_rows",
    "forward",
    "gradients",
    "output_and_weights",
    "sink_gradient",
    "weigh",
    "weigh_backward",
    "without_autocast",
    "without_unused",
]

_Result = TypeVar("_Result")


class Rows(NamedTuple):
    """The results and their cotangents, which the backward reads row by row."""

    output: torch.Tensor
    lse: torch.Tensor
    grad_output: torch.Tensor
    grad_lse: torch.Tensor | None
    row_dot: torch.Tensor | None = None
    """D of each row, where the call does not have all keys of a row (MHA-SHARD-4)."""

    def cut(self, task: Task) -> Rows:
        """Select the rows of a task."""
        if task.is_whole:
            return self
        return Rows(*(None if rows is None else task.of_rows(rows) for rows in self))  # pyright: ignore[reportArgumentType]

    @property
    def cotangents(self) -> formula.Cotangents:
        """The cotangents without output and lse."""
        return formula.Cotangents(self.grad_output, self.grad_lse, row_dot=self.row_dot)


class Sums(NamedTuple):
    """Gradients of query, key, value and bias in the softmax's type: those of a task, or the sum over tasks."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, problem: Problem, x: Operands) -> Sums:
        """Return zeros, to which the tasks are added."""
        return cls(*x.each(lambda operand: torch.zeros_like(operand, dtype=problem.dtype))[:4])

    def add(self, task: Task, part: Sums | formula.Gradients) -> None:
        """Add the gradients of a task; no two tasks share a row."""
        task.of_rows(self.query).copy_(part.query)
        task.of_keys(self.key).add_(part.key)
        task.of_keys(self.value).add_(part.value)
        if self.bias is not None and part.bias is not None:
            whole = task.of_pairs(self.bias)
            whole.add_(part.bias.sum_to_size(whole.shape))


def without_autocast(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Switch autocast off for a pass, which chooses the types."""

    @wraps(function)
    def inner(problem: Problem, x: Operands, *arguments: object, **options: object) -> _Result:
        if not autocasts(x.query.device.type):
            return function(problem, x, *arguments, **options)
        with torch.autocast(x.query.device.type, enabled=False):
            return function(problem, x, *arguments, **options)

    return inner


def autocasts(device: str) -> bool:
    """Tell whether autocast is on for a type of device; some types do not support it."""
    return _supports_autocast(device) and torch.is_autocast_enabled(device)


_supports_autocast = cache(torch.amp.is_autocast_available)


def attend(problem: Problem, x: Operands, *, needs_lse: bool) -> tuple[torch.Tensor, Any]:
    """Return the output in the query's dtype, with the kernel's memory layout, and lse if it is needed."""
    tasks = problem.visibility.tasks
    if len(tasks) == 1 and tasks[0].has_all_rows:
        results = native.attend(problem, tasks[0], problem.cut(x, tasks[0]), needs_lse=needs_lse)
        if results is not None:
            return results
        piece, *others = pieces(tasks[0])
        if not others:
            output, lse = formula.attend(problem, piece, problem.cut(x, piece), needs_lse=needs_lse)
            return converted(output, x.query.dtype), lse
    return _by_task(problem, x, needs_lse=needs_lse)


def _by_task(problem: Problem, x: Operands, *, needs_lse: bool) -> tuple[torch.Tensor, Any]:
    """Write the results of each task before the next one, which then takes the same memory; no two share a row."""
    tasks, (batch, heads, q_len, _) = problem.visibility.tasks, x.query.shape
    # Rows without a task, which see no key, have the output 0.
    is_covered = sum(task.rows for task in tasks) == batch * heads * q_len
    new = x.query.new_empty if is_covered else x.query.new_zeros
    output = new((batch, q_len, heads, x.value.shape[3])).transpose(1, 2)
    lse = _empty_lse(problem, x) if needs_lse else None
    for task in tasks:
        _write_task(problem, task, x, output, lse)
    return output, lse


def _write_task(problem: Problem, task: Task, x: Operands, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Write the results of a task to its rows; the kernel takes a task whole."""
    needs_lse = lse is not None
    results = native.attend(problem, task, problem.cut(x, task), needs_lse=needs_lse)
    if results is not None:
        _write(task, results, output, lse)
        return
    for piece in pieces(task):
        _write(piece, formula.attend(problem, piece, problem.cut(x, piece), needs_lse=needs_lse), output, lse)


def _write(task: Task, results: tuple[torch.Tensor, Any], output: torch.Tensor, lse: torch.Tensor | None) -> None:
    task.of_rows(output).copy_(results[0])
    if lse is not None:
        task.of_rows(lse).copy_(results[1])


forward = without_autocast(attend)


def _empty_lse(problem: Problem, x: Operands) -> torch.Tensor:
    """Return the lse of rows that see no key: -inf, or the sink (MHA-EMPTY-2)."""
    rows = x.query.shape[:3]
    if x.sinks is None:
        return x.query.new_full(rows, -math.inf, dtype=problem.dtype)
    sinks = x.sinks.to(problem.dtype)
    # By `where`, the gradient of a sink of -inf is 0 (MHA-VJP-6).
    return torch.where(sinks == -math.inf, -math.inf, sinks)[:, None].expand(rows).clone()


@without_autocast
def backward(
    problem: Problem,
    x: Operands,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    *,
    needs_bias: bool,
) -> Operands:
    """Return the gradients, each in the dtype and shape of its operand (MHA-DTYPE-2)."""
    tasks = problem.visibility.tasks
    if len(tasks) == 1 and tasks[0].is_whole and problem.suits_flash and x.bias is None and x.sinks is None:
        part = native.gradients(problem, tasks[0], x, output, lse, grad_output, grad_lse)
        if part is not None:
            return _rounded(x, Sums(*part, None), None)
    return _rounded(x, *gradients(problem, x, Rows(output, lse, grad_output, grad_lse), needs_bias=needs_bias))


@without_autocast
def gradients(problem: Problem, x: Operands, rows: Rows, *, needs_bias: bool) -> tuple[Sums, torch.Tensor | None]:
    """Return the gradients of query, key, value and bias, and of the sinks, in the softmax's type."""
    sums, row_dot = _gradients(problem, x, rows, needs_bias=needs_bias)
    return sums, None if row_dot is None or x.sinks is None else sink_gradient(x.sinks, rows.lse, row_dot)


@without_autocast
def weigh_backward(problem: Problem, x: Operands, grad_weights: torch.Tensor) -> Operands:
    """Return the gradients of `weigh`; the gradient of the value is 0."""
    sums, lse = Sums.of(problem, x), _empty_lse(problem, x)
    row_dot = torch.zeros_like(lse)
    for task in problem.visibility.tasks:
        for piece in pieces(task):
            of_piece = x.cut(piece)
            lse_of_piece = formula.softmax(problem, piece, of_piece.to(problem.dtype))[2]
            cotangents = formula.Cotangents(weights=piece.of_pairs(grad_weights))
            part = formula.gradients(problem, piece, of_piece, lse_of_piece, cotangents)
            sums.add(piece, part)
            piece.of_rows(lse).copy_(lse_of_piece)
            piece.of_rows(row_dot).copy_(part.row_dot)
    return _rounded(x, sums, None if x.sinks is None else sink_gradient(x.sinks, lse, row_dot))


def _rounded(x: Operands, sums: Sums, of_sinks: torch.Tensor | None) -> Operands:
    """Convert each gradient to the dtype of its operand (MHA-DTYPE-2)."""
    query, key, value, bias, sinks, _ = x
    return Operands(
        converted(sums.query, query.dtype),
        converted(sums.key, key.dtype),
        converted(sums.value, value.dtype),
        None if bias is None or sums.bias is None else converted(sums.bias, bias.dtype),
        None if sinks is None or of_sinks is None else converted(of_sinks, sinks.dtype),
    )


def _gradients(problem: Problem, x: Operands, rows: Rows, *, needs_bias: bool) -> tuple[Sums, torch.Tensor | None]:
    """Return the gradients of query, key, value and bias (0 for a bias that needs none), and D if sinks need it.

    The formula computes D from the weights in the softmax's type, which is more accurate than a 16-bit output.
    """
    sums, row_dot = None, None if x.sinks is None else dot_of_rows(problem.dtype, rows)
    for task in problem.visibility.tasks:
        flash = not needs_bias and problem.suits_flash
        part = native.gradients(problem, task, problem.cut(x, task), *rows.cut(task)[:4]) if flash else None
        if part is not None and x.bias is None and task.is_whole:
            return Sums(*part, None), row_dot
        sums = Sums.of(problem, x) if sums is None else sums
        if part is not None:
            sums.add(task, Sums(*part, None))
            continue
        for piece in pieces(task):
            of_rows = rows.cut(piece)
            part = formula.gradients(problem, piece, problem.cut(x, piece), of_rows.lse, of_rows.cotangents)
            sums.add(piece, part)
            if row_dot is not None:
                piece.of_rows(row_dot).copy_(part.row_dot)
    return Sums.of(problem, x) if sums is None else sums, row_dot


def dot_of_rows(dtype: torch.dtype, rows: Rows) -> torch.Tensor:
    """rowsum(dO O) - grad_lse; a row of zeros, which may see no key, gives 0 whatever dO holds (MHA-EMPTY-3)."""
    output = rows.output.to(dtype)
    dot = torch.where(output == 0, 0.0, output * rows.grad_output.to(dtype)).sum(-1)
    return dot if rows.grad_lse is None else dot - rows.grad_lse.to(dtype)


def sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, row_dot: torch.Tensor) -> torch.Tensor:
    """dsinks_h = -sum over batch and rows of P_sink D (MHA-VJP-6)."""
    weights = torch.exp(sinks.to(lse.dtype)[:, None] - torch.where(lse == -math.inf, 0.0, lse))
    return -torch.where(weights == 0, 0.0, weights * row_dot).sum((0, 2))


@without_autocast
def differentiable(
    problem: Problem, x: Operands, *, needs_lse: bool = True, is_differentiated: bool = True
) -> tuple[torch.Tensor, Any]:
    """Compute output and, if needed, lse by differentiable operations alone.

    Storage that no pair uses is replaced by 0, because the gradient of a product multiplies it by 0, and 0 * NaN is NaN
    (MHA-POISON-1).
    """
    whole = problem.visibility.whole
    if not whole.pairs:
        return x.query.new_zeros((*x.query.shape[:3], x.value.shape[3])), _empty_lse(problem, x)
    visible = problem.visible(whole, x)
    x, rows = (x, None) if visible is None else without_unused(x, visible)
    output, lse = formula.attend(problem, whole, x.cut(whole), needs_lse=needs_lse, is_differentiated=is_differentiated)
    output = output if rows is None else torch.where(rows, output, 0.0)
    return output.to(x.query.dtype), lse


@without_autocast
def output_and_weights(problem: Problem, x: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the weights, and the output from them, by differentiable operations (MHA-LAYER-4)."""
    whole, dtype = problem.visibility.whole, x.query.dtype
    if not whole.pairs:
        rows = x.query.shape[:3]
        return x.query.new_zeros((*rows, x.value.shape[3])), x.query.new_zeros((*rows, x.key.shape[2]))
    visible = problem.visible(whole, x)
    x, rows = (x, None) if visible is None else without_unused(x, visible)
    wide, keep = x.cut(whole).to(problem.dtype), problem.keep(whole)
    weights = formula.weigh(problem, whole, wide)[0]
    dropped = weights if keep is None else weights * keep
    output = formula.product(dropped, wide.value, visible, clean=problem.finite(wide.value))
    output = output if rows is None else torch.where(rows, output, 0.0)
    return output.to(dtype), weights.to(dtype)


def without_unused(x: Operands, visible: torch.Tensor) -> tuple[Operands, torch.Tensor]:
    """Set storage that no pair uses to 0; return also which rows see a key, (batch*, heads*, q_len*, 1)."""
    rows, keys = visible.any(-1, keepdim=True), visible.any(2)
    if keys.shape[1] > 1:
        keys = keys.unflatten(1, (x.key.shape[1], -1)).any(2)
    keys = keys[..., None]
    query, key, value = (
        torch.where(seen, operand, 0.0) for seen, operand in ((rows, x.query), (keys, x.key), (keys, x.value))
    )
    return x._replace(query=query, key=key, value=value), rows


@without_autocast
def weigh(problem: Problem, x: Operands) -> torch.Tensor:
    """Compute the weights in the query's dtype, by differentiable operations (MHA-WEIGHTS-1)."""
    whole = problem.visibility.whole
    if not whole.pairs:
        return x.query.new_zeros((*x.query.shape[:3], x.key.shape[2]))
    dtype, visible = x.query.dtype, problem.visible(whole, x)
    x = x if visible is None else without_unused(x, visible)[0]
    return formula.weigh(problem, whole, x.cut(whole).to(problem.dtype))[0].to(dtype)

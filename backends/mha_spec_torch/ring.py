"""Ring attention: keys and values travel around the ranks, and each rank merges what its queries see.

The backward pass sends keys and values around once more, together with the sums of their gradients, which arrive at the
rank that holds the keys. Both need memory of O(length / ranks).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from mha_spec.errors import refuse_type

from . import paths
from .merging import merge
from .shards import Shard, visit
from .tasks import softmax_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from .groups import Group
    from .shards import Block, Form
    from .tasks import Span

__all__ = ["Ring", "without_keys"]


class Ring(torch.autograd.Function):
    """Output in the query's dtype, and lse in the softmax's, of the queries of this rank."""

    @staticmethod
    def forward(ctx: Any, group: Group, form: Form, ids: Sequence[Any], *operands: Any) -> tuple[Tensor, Tensor]:
        """Keep output and lse over all keys, which the backward reads."""
        query, key, value, sinks = operands
        queries = Shard((query.to(softmax_dtype(query)),), ids[0])
        output, lse = without_keys(queries.tensors[0], value.shape[3], sinks)
        for _, blocks in _around(group, form, queries, Shard((key, value), ids[1])):
            for block in blocks:
                _merge_into(output, lse, block)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, output, lse, *ids)
        ctx.group, ctx.form = group, form
        return output.to(query.dtype), lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Add the gradients of all blocks (MHA-SHARD-4)."""
        tensors = ctx.saved_tensors  # Once, because a checkpoint forbids to read them again.
        operands, saved = tensors[:4], tensors[4:]
        with torch.no_grad():
            gradients = _gradients(ctx.group, ctx.form, operands, saved, *grad_outputs)
        if torch.is_grad_enabled():
            sources = [tensor for tensor in (*operands, *grad_outputs) if tensor is not None and tensor.requires_grad]
            gradients = [None if gradient is None else _Once.apply(gradient, *sources) for gradient in gradients]
        return None, None, None, *gradients


class _Once(torch.autograd.Function):
    """The identity on a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:  # noqa: ARG004
        ctx.set_materialize_grads(False)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ARG004
        refuse_type(
            "MHA-SHARD-4",
            "ring_attention of mha_spec_torch has no second derivative. Use all_to_all_attention, which has it.",
        )


def _around(group: Group, form: Form, queries: Shard, keys: Shard) -> Iterator[tuple[Shard, Iterator[Block]]]:
    """Yield the keys of every rank, beginning with this one, and their blocks with the queries of this rank.

    The next keys travel while the blocks are computed.
    """
    q_length, kv_length = queries.tensors[0].shape[2], keys.tensors[0].shape[2]
    of_queries = queries, form.pieces(group.rank, q_length)
    for distance in range(group.ranks):
        travelling = None
        if distance + 1 < group.ranks:
            travelling = group.send(keys.tensors if keys.ids is None else (*keys.tensors, keys.ids))
        source = (group.rank - distance) % group.ranks
        yield keys, visit(form, of_queries, (keys, form.pieces(source, kv_length)))
        if travelling is not None:
            key, value, *ids = travelling.wait()
            keys = Shard((key, value), ids[0] if ids else None)


def without_keys(query: Tensor, v_dim: int, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the results of queries that see nothing but the sink, which enters once (MHA-EMPTY-1, MHA-SINK-1)."""
    output = query.new_zeros((*query.shape[:3], v_dim))
    lse = query.new_full(query.shape[:3], -math.inf)
    return output, lse if sinks is None else lse.copy_(sinks.to(lse.dtype)[:, None])


def _merge_into(output: Tensor, lse: Tensor, block: Block) -> None:
    """Merge the rows of a block with their results over the keys so far."""
    part = paths.forward(block.problem, block.x, needs_lse=True)
    rows, of_rows = (_of_rows(array, block.rows) for array in (output, lse))
    merged_output, merged_lse = merge(rows, of_rows, *part)
    rows.copy_(merged_output)
    of_rows.copy_(merged_lse)


def _of_rows(array: Tensor, rows: Span) -> Tensor:
    return array.narrow(2, rows.start, rows.size)


def _gradients(
    group: Group,
    form: Form,
    operands: Sequence[Any],
    saved: Sequence[Any],
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of query, key, value and sinks; sums for keys follow the keys around the ranks."""
    query, key, value, sinks = operands
    output, lse, q_ids, kv_ids = saved
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output.to(output.dtype)
    rows = paths.Rows(output, lse, grad_output, grad_lse)
    row_dot = paths.dot_of_rows(output.dtype, rows)
    rows = rows._replace(row_dot=row_dot)
    wide = query.to(output.dtype)
    of_query, travelling, totals = torch.zeros_like(wide), None, []
    for keys, blocks in _around(group, form, Shard((wide,), q_ids), Shard((key, value), kv_ids)):
        sums = [torch.zeros_like(tensor, dtype=output.dtype) for tensor in keys.tensors]
        for block in blocks:
            _add(block, rows, of_query, sums)
        if travelling is not None:
            sums = [part.add_(total) for part, total in zip(sums, travelling.wait(), strict=True)]
        travelling = group.send(sums) if group.ranks > 1 else None
        totals = sums
    totals = totals if travelling is None else travelling.wait()
    of_sinks = None if sinks is None else group.sum(paths.sink_gradient(sinks, lse, row_dot)).to(sinks.dtype)
    of_keys = (total.to(tensor.dtype) for total, tensor in zip(totals, (key, value), strict=True))
    return [of_query.to(query.dtype), *of_keys, of_sinks]


def _add(block: Block, rows: paths.Rows, of_query: Tensor, sums: Sequence[Tensor]) -> None:
    """Add the gradients of a block, from the results over all keys."""
    part = paths.Rows(*(None if array is None else _of_rows(array, block.rows) for array in rows))  # pyright: ignore[reportArgumentType]
    gradients, _ = paths.gradients(block.problem, block.x, part, needs_bias=False)
    _of_rows(of_query, block.rows).add_(gradients.query)
    for total, gradient in zip(sums, (gradients.key, gradients.value), strict=True):
        _of_rows(total, block.keys).add_(gradient)

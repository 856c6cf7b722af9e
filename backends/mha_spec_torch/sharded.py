"""Attention over several devices: functions that each rank of a process group calls on its shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch

from mha_spec.arguments import expand_options
from mha_spec.checks import check_flag, refuse_unknown
from mha_spec.errors import refuse_type
from mha_spec.sharding import Piece, ShardedArguments, check_heads_over, check_sharded, shard_order

from . import core
from .calls import cast
from .distributed import refuse_distributed
from .function import Attention, check_tensor, transformed
from .groups import Group, attached, exchanged, shared, summed
from .host import on_device
from .merging import merge
from .paths import autocasts
from .ring import Ring, without_keys
from .shards import Form, Shard, visit
from .symbols import in_jit_trace
from .tasks import Span, softmax_dtype

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from mha_spec.arguments import Options

__all__ = ["all_to_all_attention", "ring_attention", "sharded_kv_attention"]


_Function = TypeVar("_Function")


def _eager(function: _Function) -> _Function:
    """Run a function between the graphs of torch.compile, because it reads lengths and skips pairs by them."""
    disabled: Any = torch.compiler.disable(function)
    return disabled


@expand_options
@_eager
def ring_attention(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the rank's shard of attention, sending keys and values around the ranks of a process group.

    Every rank holds q_len queries and kv_len keys of a sequence, as `layout` says ("contiguous", "striped" or "zigzag";
    the last two balance a causal call), and computes the rows of its queries (MHA-SHARD-1 to MHA-SHARD-6). Lengths,
    `q_offset` and windows count in the whole sequence and are the same on every rank; segment ids lie with their
    tokens. Heads are never split, and keys are sent in kv_heads, not repeated. Every rank makes the same calls, forward
    and backward; the gradient of `sinks` is the sum over the ranks. `group` is None for the default group.

    Raises:
        ArgumentValueError: The layout is unknown, or an argument does not fit the whole sequence.
        ArgumentTypeError: `group` is not a process group of this process, or an option holds a number for each pair:
            `mask`, `bias` or dropout; in the backward of a backward, which ring_attention does not have.
    """
    a, ranks = _arguments("ring_attention", query, key, value, group, options)
    check_sharded(a, layout)
    return_lse = check_flag("return_lse", return_lse)
    output, lse = Ring.apply(ranks, Form.of(a, layout), _ids(a), a.query, a.key, a.value, a.sinks)
    return (output, lse) if return_lse else output


@expand_options
@_eager
def all_to_all_attention(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the rank's shard of attention, exchanging the axis of the sequence for that of the heads (Ulysses).

    Arguments and result are those of `ring_attention`. Each rank computes all rows of heads / ranks heads, so that
    every layout is balanced, and heads and kv_heads must be multiples of the number of ranks (MHA-SHARD-6). It has
    derivatives of any order.

    Raises:
        ArgumentValueError: As `ring_attention`, or the heads cannot be dealt out.
        ArgumentTypeError: As `ring_attention`.
    """
    a, ranks = _arguments("all_to_all_attention", query, key, value, group, options)
    check_sharded(a, layout)
    check_heads_over(a, ranks.ranks)
    return_lse = check_flag("return_lse", return_lse)
    exchange = _Exchange(ranks, layout)
    q_ids, kv_ids = _ids(a)
    if q_ids is not None and kv_ids is not None:
        options["q_segment_ids"] = exchange.joined_ids(q_ids)
        options["kv_segment_ids"] = exchange.joined_ids(kv_ids)
    if a.sinks is not None:
        options["sinks"] = exchange.heads_of_rank(a.sinks)
    tensors = (exchange.to_heads(tensor) for tensor in (a.query, a.key, a.value))
    results: Any = core.attention(*tensors, **options, return_lse=return_lse)
    if not return_lse:
        return exchange.to_sequence(results)
    output, lse = results
    return exchange.to_sequence(output), exchange.to_sequence(lse)


class _Exchange:
    """The exchange of a part of the sequence, of all heads, for a part of the heads, of the whole sequence."""

    def __init__(self, group: Group, layout: str) -> None:
        self.group, self.layout = group, layout

    def to_heads(self, tensor: Tensor) -> Tensor:
        """Exchange (batch, heads, length / ranks, size) for (batch, heads / ranks, length, size)."""
        parts = tensor.unflatten(1, (self.group.ranks, -1)).movedim(1, 0)
        joined = exchanged(self.group, parts).movedim(0, 2).flatten(2, 3)
        return self._taken(joined, 2, inverse=True)

    def to_sequence(self, tensor: Tensor) -> Tensor:
        """Exchange (batch, heads / ranks, length, ...) for (batch, heads, length / ranks, ...)."""
        parts = self._taken(tensor, 2).unflatten(2, (self.group.ranks, -1)).movedim(2, 0)
        return exchanged(self.group, parts).movedim(0, 1).flatten(1, 2)

    def joined_ids(self, ids: Tensor) -> Tensor:
        """Gather segment ids of all ranks to (batch, length)."""
        return self._taken(self.group.gather(ids).movedim(0, 1).flatten(1, 2), 1, inverse=True)

    def heads_of_rank(self, sinks: Tensor) -> Tensor:
        """Cut the heads of this rank; the gradients of the others are added by their ranks."""
        size = sinks.shape[0] // self.group.ranks
        return shared(self.group, sinks).narrow(0, self.group.rank * size, size)

    def _taken(self, tensor: Tensor, axis: int, *, inverse: bool = False) -> Tensor:
        if self.layout == "contiguous":
            return tensor
        order = shard_order(self.layout, self.group.ranks, tensor.shape[axis])
        places = torch.from_numpy(numpy.argsort(order) if inverse else order).to(tensor.device)
        return tensor[(slice(None),) * axis + (places,)]


@expand_options
@_eager
def sharded_kv_attention(
    query: Float[Tensor, "batch heads q_len qk_dim"],
    key: Float[Tensor, "batch kv_heads kv_len qk_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    *,
    group: ProcessGroup | None = None,
    layout: str = "contiguous",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention of queries that every rank holds over keys of which each holds a shard, as in decoding.

    Each rank attends to its keys, and the halves are merged by a sum over the ranks: what is sent does not depend on
    the number of keys. The result is the same on every rank (MHA-SHARD-7). `q_segment_ids` are those of all queries.

    Raises:
        ArgumentValueError: As `ring_attention`.
        ArgumentTypeError: As `ring_attention`.
    """
    a, ranks = _arguments("sharded_kv_attention", query, key, value, group, options)
    a.q_ranks = 1
    check_sharded(a, layout)
    return_lse = check_flag("return_lse", return_lse)
    with torch.autocast(a.query.device.type, enabled=False):
        output, lse = _over_ranks(ranks, *_of_rank(ranks, Form.of(a, layout), a), a.sinks)
    output = output.to(a.query.dtype)
    return (output, lse) if return_lse else output


def _of_rank(group: Group, form: Form, a: ShardedArguments) -> tuple[Tensor, Tensor]:
    """Compute output and lse of all queries over the keys of this rank."""
    # The ranks add their gradients in the type of the softmax, which are then rounded once.
    query = shared(group, a.query.to(softmax_dtype(a.query)))
    ids = _ids(a)
    queries = Shard((query,), ids[0]), [(Span(0, a.q_len), Piece(0, 1, a.q_len))]
    keys = Shard((a.key, a.value), ids[1]), form.pieces(group.rank, a.key.shape[2])
    output, lse = without_keys(query, a.value.shape[3])
    for block in visit(form, queries, keys):
        of_rows = (array.narrow(2, block.rows.start, block.rows.size) for array in (output, lse))
        merged = merge(*of_rows, *Attention.apply(block.problem, *block.x))
        output, lse = (_with_rows(array, block.rows, part) for array, part in zip((output, lse), merged, strict=True))
    return attached(output, query, *keys[0].tensors), lse


def _with_rows(array: Tensor, rows: Span, part: Tensor) -> Tensor:
    """Replace rows without writing in place, for autograd."""
    if rows.size == array.shape[2]:
        return part
    return torch.cat([array[:, :, : rows.start], part, array[:, :, rows.stop :]], 2)


def _over_ranks(group: Group, output: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge the halves of all ranks and the sink (MHA-MERGE-1 to MHA-MERGE-3); an empty row adds an output of 0."""
    anchor = group.maximum(lse)
    if sinks is not None:
        sinks = sinks.to(lse.dtype)[:, None]
        anchor = torch.maximum(anchor, sinks.detach())
    anchor = torch.where(anchor == -torch.inf, 0.0, anchor)
    share = torch.exp(lse - anchor)[..., None]
    parts = summed(group, torch.cat([share * output, share], -1))
    output, total = parts[..., :-1], parts[..., -1]
    if sinks is not None:
        total = total + torch.exp(sinks - anchor)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    return output / total[..., None], torch.where(empty, -torch.inf, anchor + torch.log(total))


def _arguments(
    name: str, query: Tensor, key: Tensor, value: Tensor, group: Any, options: Options
) -> tuple[ShardedArguments, Group]:
    refuse_unknown(options, name)
    check_tensor(query)
    refuse_distributed(name, query, key, value)
    if transformed():
        refuse_type(
            "MHA-SHARD-4",
            f"`query` must not be transformed by torch.func or by forward mode: {name} of mha_spec_torch has the "
            "gradient of torch.autograd.",
        )
    if in_jit_trace():
        refuse_type(
            "MHA-SHARD-4",
            f"`query` must not be recorded by torch.jit.trace: {name} of mha_spec_torch reads lengths, which the trace "
            "would fix. Call it without the trace, or compile the call with torch.compile.",
        )
    ranks = Group.of(group)
    if autocasts(query.device.type):
        query, key, value = cast(query=query, key=key, value=value).values()
    a = ShardedArguments(query, key, value, **options, function=name, q_ranks=ranks.ranks, kv_ranks=ranks.ranks)
    return a, ranks


def _ids(a: ShardedArguments) -> tuple[Tensor | None, Tensor | None]:
    """Convert segment ids to tensors on the device of the queries."""
    ids = a.q_segment_ids, a.kv_segment_ids
    q_ids, kv_ids = (None if array is None else on_device(array, a.query.device) for array in ids)
    return q_ids, kv_ids

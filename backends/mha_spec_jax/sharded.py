"""Attention over several devices: functions that each rank calls on its shard inside `jax.shard_map`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
from jax import lax

from mha_spec.arguments import expand_options
from mha_spec.array_checks import check_library
from mha_spec.arrays import host_integers
from mha_spec.checks import refuse_unknown
from mha_spec.errors import refuse_type, refuse_value
from mha_spec.scalars import check_flag, short_repr
from mha_spec.sharding import Piece, ShardedArguments, check_heads_over, check_sharded, pieces, shard_order

from . import core, function, ring
from .merging import Halves, merge
from .mesh import axes_of, varying
from .problem import Operands, anchor_of, bounded, digits_of, with_offset
from .shards import Form, Keys, Numbers, Pair, Queries, cut

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from jax import Array
    from jaxtyping import Float

    from mha_spec.arguments import Options

__all__ = ["all_to_all_attention", "ring_attention", "sharded_kv_attention"]


@expand_options
def ring_attention(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    axis_name: str,
    layout: str = "contiguous",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Compute the rank's shard of attention, sending keys and values around the ranks of a mesh axis.

    Every rank holds q_len queries and kv_len keys of a sequence, as `layout` says ("contiguous", "striped" or "zigzag";
    the last two balance a causal call), and computes the rows of its queries (MHA-SHARD-1 to MHA-SHARD-6). Lengths,
    `q_offset` and windows count in the whole sequence and are the same on every rank; segment ids lie with their
    tokens. Heads are never split, and keys are sent in kv_heads, not repeated. Differentiable in reverse mode; the
    gradient of `sinks` is the sum over the ranks.

    Raises:
        ArgumentValueError: The layout or the axis is unknown, or an argument does not fit the whole sequence.
        ArgumentTypeError: An option holds a number for each pair: `mask`, `bias` or dropout.
    """
    a, ranks = _arguments("ring_attention", query, key, value, axis_name, options)
    check_sharded(a, layout)
    return_lse = check_flag("return_lse", return_lse)
    form, numbers = _form(a, axis_name, ranks, layout)
    x = Operands(a.query, a.key, a.value, None, a.sinks)
    output, lse = ring.attention(form, x, ring.Constants(numbers, *digits_of(a)))
    return (output, lse) if return_lse else output


@expand_options
def all_to_all_attention(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    axis_name: str,
    layout: str = "contiguous",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Compute the rank's shard of attention, exchanging the axis of the sequence for that of the heads (Ulysses).

    Arguments and result are those of `ring_attention`. Each rank computes all rows of heads / ranks heads, so that
    every layout is balanced, and heads and kv_heads must be multiples of the number of ranks (MHA-SHARD-6).

    Raises:
        ArgumentValueError: As `ring_attention`, or the heads cannot be dealt out.
        ArgumentTypeError: As `ring_attention`.
    """
    a, ranks = _arguments("all_to_all_attention", query, key, value, axis_name, options)
    check_sharded(a, layout)
    check_heads_over(a, ranks)
    return_lse = check_flag("return_lse", return_lse)
    exchange = _Exchange(axis_name, ranks, layout)
    if a.q_segment_ids is not None and a.kv_segment_ids is not None:
        options["q_segment_ids"] = exchange.joined_ids(a.q_segment_ids)
        options["kv_segment_ids"] = exchange.joined_ids(a.kv_segment_ids)
    if a.sinks is not None:
        options["sinks"] = exchange.heads_of_rank(a.sinks)
    tensors = (exchange.to_heads(array) for array in (query, key, value))
    output, lse = core.attention(*tensors, **options, return_lse=True)
    output = exchange.to_sequence(output)
    return (output, exchange.to_sequence(lse)) if return_lse else output


class _Exchange:
    """The exchange of a part of the sequence, of all heads, for a part of the heads, of the whole sequence."""

    def __init__(self, axis: str, ranks: int, layout: str) -> None:
        self.axis, self.ranks, self.layout = axis, ranks, layout

    def to_heads(self, array: Array) -> Array:
        """Exchange (batch, heads, length / ranks, size) for (batch, heads / ranks, length, size)."""
        joined = lax.all_to_all(array, self.axis, 1, 2, tiled=True)
        return self._taken(joined, numpy.argsort(self._order(joined.shape[2])), 2)

    def to_sequence(self, array: Array) -> Array:
        """Exchange (batch, heads / ranks, length, ...) for (batch, heads, length / ranks, ...)."""
        return lax.all_to_all(self._taken(array, self._order(array.shape[2]), 2), self.axis, 2, 1, tiled=True)

    def joined_ids(self, ids: Any) -> Array:
        """Gather segment ids of all ranks to (batch, length)."""
        joined = lax.all_gather(jnp.asarray(ids), self.axis, axis=1, tiled=True)
        return self._taken(joined, numpy.argsort(self._order(joined.shape[1])), 1)

    def heads_of_rank(self, sinks: Array) -> Array:
        """Cut the heads of this rank; the gradients of the others are added by their ranks."""
        size = sinks.shape[0] // self.ranks
        sinks = varying(frozenset({self.axis}), sinks)
        return lax.dynamic_slice_in_dim(sinks, lax.axis_index(self.axis) * size, size)

    def _order(self, length: int) -> numpy.ndarray:
        return shard_order(self.layout, self.ranks, length)

    def _taken(self, array: Array, order: numpy.ndarray, axis: int) -> Array:
        return array if self.layout == "contiguous" else jnp.take(array, order, axis)


@expand_options
def sharded_kv_attention(
    query: Float[Array, "batch heads q_len qk_dim"],
    key: Float[Array, "batch kv_heads kv_len qk_dim"],
    value: Float[Array, "batch kv_heads kv_len v_dim"],
    *,
    axis_name: str,
    layout: str = "contiguous",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Compute attention of queries that every rank holds over keys of which each holds a shard, as in decoding.

    Each rank attends to its keys, and the halves are merged by a sum over the ranks: what is sent does not depend on
    the number of keys. The result is the same on every rank (MHA-SHARD-7). `q_segment_ids` are those of all queries.

    Raises:
        ArgumentValueError: As `ring_attention`.
        ArgumentTypeError: As `ring_attention`.
    """
    a, ranks = _arguments("sharded_kv_attention", query, key, value, axis_name, options)
    a.q_ranks = 1
    check_sharded(a, layout)
    return_lse = check_flag("return_lse", return_lse)
    form, numbers = _form(a, axis_name, ranks, layout, on_host=False)
    output, lse = _over_ranks(axis_name, *_of_rank(form, numbers, a), a.sinks)
    output = output.astype(query.dtype)
    return (output, lse) if return_lse else output


def _of_rank(form: Form, numbers: Numbers, a: ShardedArguments) -> tuple[Array, Array]:
    """Compute output and lse of all queries over the keys of this rank."""
    # The ranks add the gradients of what they all hold in its own type; those of the query are then rounded once.
    wide = a.query.astype(function.softmax_dtype(a.query))
    wide, key, value, ids, numbers = varying(form.axes, (wide, a.key, a.value, digits_of(a), numbers))
    q_piece = Piece(0, 1, a.q_len)
    kv_pieces = pieces(form.layout, lax.axis_index(form.axis), form.ranks, key.shape[2])
    halves = []
    for b, kv_piece in enumerate(kv_pieces):
        keys = cut(form, Keys(key, value, ids[1]), b)
        call = Pair(form, numbers, q_piece, kv_piece, Queries(wide, ids[0]), keys).call(None)
        halves.append(function.attention(*call))
    return halves[0] if len(halves) == 1 else merge(Halves(*halves[0], *halves[1]))


def _over_ranks(axis: str, output: Array, lse: Array, sinks: Array | None) -> tuple[Array, Array]:
    """Merge the halves of all ranks and the sink (MHA-MERGE-1 to MHA-MERGE-3); an empty row adds an output of 0."""
    anchor = lax.pmax(lax.stop_gradient(lse), axis)
    if sinks is not None:
        sinks = sinks.astype(lse.dtype)[:, None]
        anchor = jnp.maximum(anchor, lax.stop_gradient(sinks))
    anchor = anchor_of(anchor)
    share = jnp.exp(lse - anchor)
    total = lax.psum(share, axis)
    if sinks is not None:
        total = total + jnp.exp(sinks - anchor)
    empty, total = total == 0, jnp.where(total == 0, 1.0, total)
    output = lax.psum(share[..., None] * output, axis) / total[..., None]
    return output, jnp.where(empty, -jnp.inf, anchor + jnp.log(total))


def _arguments(
    name: str, query: Array, key: Array, value: Array, axis_name: object, options: Options
) -> tuple[ShardedArguments, int]:
    refuse_unknown(options, name)
    check_library("jax", query)
    ranks = _ranks_of(axis_name)
    return ShardedArguments(query, key, value, **options, function=name, q_ranks=ranks, kv_ranks=ranks), ranks


def _ranks_of(axis_name: object) -> int:
    """Return the number of ranks of an axis of the enclosing `shard_map`."""
    received = f"received axis_name={short_repr(axis_name)}"
    if not isinstance(axis_name, str):
        refuse_type("MHA-SHARD-1", f"`axis_name` must be the name of an axis of the mesh, {received}.")
    try:
        return lax.psum(1, axis_name)
    except NameError:
        refuse_value(
            "MHA-SHARD-1",
            f"`axis_name` must be an axis of the mesh of the jax.shard_map that calls this function, {received}.",
        )


def _form(a: ShardedArguments, axis: str, ranks: int, layout: str, *, on_host: bool = True) -> tuple[Form, Numbers]:
    """Split the options of the whole sequence into constants and arrays (MHA-SHARD-2).

    Without `on_host` an offset is an array, wherever it comes from.
    """
    offset: Any = 0 if a.q_offset is None else with_offset(a).q_offset
    shifts = a.causal or a.bounded_window is not None
    known = host_integers(offset) or []
    fixed = 0 if not shifts else None
    if shifts and on_host and len({*known}) == 1 and a.prefix_lengths is None:
        fixed, offset = known[0], None
    elif not shifts and a.chunk is None:
        offset = None
    lengths = (a.q_lengths, a.q_len), (a.kv_lengths, a.kv_len), (a.kv_starts, a.kv_len), (a.prefix_lengths, a.kv_len)
    numbers = Numbers(
        None if offset is None else jnp.asarray(offset).astype(jnp.int32),
        *(None if length is None else bounded(_array(length), size) for length, size in lengths),
    )
    arrays = jax.tree.leaves((a.query, a.key, a.value, a.sinks, numbers, digits_of(a)))
    axes = axes_of(*map(jnp.asarray, arrays)) | {axis}
    return Form(axis, axes, ranks, layout, a.causal, a.bounded_window, a.chunk, fixed, a.scale, a.softcap), numbers


def _array(numbers: Array | Sequence[int]) -> Array | numpy.ndarray:
    return numbers if isinstance(numbers, jax.Array) else numpy.asarray(numbers, numpy.int32)

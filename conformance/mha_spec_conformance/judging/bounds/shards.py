"""The errors of merging the partial results of ranks that share the keys of a call (MHA-SHARD-3).

A rank computes a partial result for each piece of a shard, and merges it with what it has; the first half is the sink
or an empty one. The errors of the partial results themselves are those of the one call.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy

from mha_spec.arrays import softmax_dtype_name
from mha_spec.sharding import pieces
from mha_spec.steps import Steps

from .evaluation import weighted_sum
from .merge import MergeBounds
from .roundoff import underflow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mha_spec_conformance.targets.claims import Shards

    from .evaluation import Evaluation
    from .roundoff import Precision

    Arrays = dict[str, numpy.ndarray]

__all__ = ["Merging", "merging_errors", "merging_variances"]

NAMES = "output", "lse"


class Merging(NamedTuple):
    """What the merges of a row add to its error, or to the variance of its error, with a last axis for the lse too."""

    output: numpy.ndarray | float = 0.0
    lse: numpy.ndarray | float = 0.0


def merging_errors(evaluation: Evaluation, precision: Precision) -> Merging:
    """Return the largest errors of the merges."""
    return _over_orders(evaluation, precision, MergeBounds.allowances)


def merging_variances(evaluation: Evaluation, precision: Precision) -> Merging:
    """Return the variances of the errors of the merges."""

    def variances(merge: MergeBounds, precision: Precision) -> Arrays:
        return {name: deviation**2 for name, deviation in merge.deviations(precision).items()}

    return _over_orders(evaluation, precision, variances)


def _over_orders(e: Evaluation, p: Precision, of_merge: Callable[[MergeBounds, Precision], Arrays]) -> Merging:
    """Sum over the merges of a row; each rank begins with its own keys, and the largest of their sums counts.

    Partial results are kept in the softmax's type.
    """
    if p.shards is None:
        return Merging()
    of_parts = replace(p, u_o=p.u_a, w=underflow(softmax_dtype_name(p.dtype)))
    by_rank = [[_partial(e, keys) for keys in shard] for shard in _keys(p.shards, e.logits.shape[-1])]
    orders = [[by_rank[first - step] for step in range(len(by_rank))] for first in range(len(by_rank))]
    sums = [_sums(e, chain.from_iterable(order), of_parts, of_merge) for order in orders]
    output, lse = (numpy.max([total[name] for total in sums], axis=0) for name in NAMES)
    return Merging(output, lse[..., None])


def _sums(
    e: Evaluation, parts: Iterable[Arrays], p: Precision, of_merge: Callable[[MergeBounds, Precision], Arrays]
) -> Arrays:
    """Merge partial results one after the other, and sum what each merge adds."""
    merged = _without_keys(e)
    sums = {name: numpy.zeros_like(array) for name, array in merged.items()}
    for part in parts:
        halves = {f"{name}_{half}": x[name] for half, x in (("a", merged), ("b", part)) for name in NAMES}
        merge = MergeBounds(halves, {}, Steps())
        added = of_merge(merge, p)
        sums = {name: sums[name] + added[name] for name in NAMES}
        merged = merge.values
    return sums


def _keys(shards: Shards, kv_len: int) -> list[list[numpy.ndarray]]:
    """Return the keys of each piece of each rank; a sequence that cannot be dealt out is padded (MHA-SHARD-1)."""
    unit = shards.ranks * (2 if shards.layout == "zigzag" else 1)
    length = -(-kv_len // unit) * unit // shards.ranks
    of_ranks = [pieces(shards.layout, rank, shards.ranks, length) for rank in range(shards.ranks)]
    tokens = [[piece.first + piece.stride * numpy.arange(piece.size) for piece in shard] for shard in of_ranks]
    return [[keys[keys < kv_len] for keys in shard] for shard in tokens]


def _without_keys(e: Evaluation) -> Arrays:
    """Return the results of rows without keys: an output of 0, and as lse the sink, or -inf without one."""
    rows = e.logits.shape[:3]
    lse = numpy.full(rows, -numpy.inf) if e.sinks is None else numpy.broadcast_to(e.sinks[..., 0], rows)
    return {"output": numpy.zeros(e.output.shape), "lse": lse}


def _partial(e: Evaluation, keys: numpy.ndarray) -> Arrays:
    """Return the results of every row over some of the keys."""
    pairs, logits = e.pairs[..., keys], e.logits[..., keys]
    largest = numpy.max(logits, axis=-1, keepdims=True, initial=-numpy.inf, where=pairs)
    anchor = numpy.where(largest == -numpy.inf, 0.0, largest)
    weights = numpy.where(pairs, numpy.exp(logits - anchor), 0.0)
    total = numpy.sum(weights, axis=-1, keepdims=True)
    lse = numpy.where(total == 0, -numpy.inf, anchor + numpy.log(total))
    weights = weights / numpy.where(total == 0, 1.0, total)
    weights = weights if e.kept is None else weights * e.kept[..., keys]
    return {"output": weighted_sum(weights, e.value[..., keys, :]), "lse": lse[..., 0]}

"""Visibility of pairs, from which the catalogue places poison and cites the clauses about empty rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from description import Input

    from .sizes import Sizes

__all__ = ["visible_pairs"]


def visible_pairs(sizes: Sizes, inputs: Mapping[str, Input], options: Mapping[str, Any]) -> numpy.ndarray:
    """Return True for pairs that every constraint shows, (batch, heads, q_len, kv_len)."""
    arrays = {name: item.values for name, item in inputs.items()}
    row, key = numpy.arange(sizes.q_len)[:, None], numpy.arange(sizes.kv_len)
    visible = numpy.ones(sizes.scores, dtype=bool)
    if "mask" in arrays:
        visible &= arrays["mask"]
    if "bias" in arrays:
        visible &= arrays["bias"] != -numpy.inf
    if "kv_lengths" in arrays:
        visible &= key < arrays["kv_lengths"].reshape(-1, 1, 1, 1)
    if "q_lengths" in arrays:
        visible &= row < arrays["q_lengths"].reshape(-1, 1, 1, 1)
    if "kv_starts" in arrays:
        visible &= key >= _of_entries(arrays["kv_starts"])
    if "q_segment_ids" in arrays:
        visible &= arrays["q_segment_ids"][:, None, :, None] == arrays["kv_segment_ids"][:, None, None, :]
    position = _offset(sizes, arrays, options) + row
    if "chunk" in options:
        start = _of_entries(arrays.get("kv_starts", 0))
        visible &= (position - start) // options["chunk"] == (key - start) // options["chunk"]
    return visible & _near(key - position, options, key < _of_entries(arrays.get("prefix_lengths", 0)))


def _offset(sizes: Sizes, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any]) -> numpy.ndarray:
    """Return the offset of each batch entry, (batch or 1, 1, 1, 1)."""
    offset = arrays.get("q_offset", options.get("q_offset", 0))
    if isinstance(offset, str):
        queries, keys = arrays.get("q_lengths", sizes.q_len), arrays.get("kv_lengths", sizes.kv_len)
        offset = keys - queries if offset == "lower_right" else 0
    return _of_entries(offset)


def _of_entries(numbers: Any) -> numpy.ndarray:
    """Return integers of the batch entries, or of all, as (batch or 1, 1, 1, 1)."""
    return numpy.asarray(numbers).reshape(-1, 1, 1, 1)


def _near(distance: numpy.ndarray, options: Mapping[str, Any], prefix: numpy.ndarray) -> numpy.ndarray:
    near = numpy.ones_like(distance, dtype=bool)
    left, right = options.get("window") or (None, None)
    if options.get("causal"):
        near = near & ((distance <= 0) | prefix)
    if left is not None:
        near = near & (distance >= -left)
    if right is not None:
        near = near & (distance <= right)
    return near

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
    if "q_segment_ids" in arrays:
        visible &= arrays["q_segment_ids"][:, None, :, None] == arrays["kv_segment_ids"][:, None, None, :]
    return visible & _near(key - (_offset(sizes, arrays, options) + row), options)


def _offset(sizes: Sizes, arrays: Mapping[str, numpy.ndarray], options: Mapping[str, Any]) -> numpy.ndarray:
    """Return the offset of each batch entry, (batch or 1, 1, 1, 1)."""
    offset = arrays.get("q_offset", options.get("q_offset", 0))
    if isinstance(offset, str):
        queries, keys = arrays.get("q_lengths", sizes.q_len), arrays.get("kv_lengths", sizes.kv_len)
        offset = keys - queries if offset == "lower_right" else 0
    return numpy.asarray(offset).reshape(-1, 1, 1, 1)


def _near(distance: numpy.ndarray, options: Mapping[str, Any]) -> numpy.ndarray:
    near = numpy.ones_like(distance, dtype=bool)
    left, right = options.get("window") or (None, None)
    if options.get("causal"):
        near &= distance <= 0
    if left is not None:
        near &= distance >= -left
    if right is not None:
        near &= distance <= right
    return near

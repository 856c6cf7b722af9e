"""What the flash kernel gets for visible pairs: `is_causal`, or logits that are added to the scores.

A caller often makes the pairs of a causal mask instead of passing `causal=True`; the kernel leaves out the blocks that
they hide. All layers of a model get the same mask, so that the logits of the last masks are kept. Masks are compared by
their bytes, so that a change in place counts; NumPy and Python compare many at a time, and torch compares one by one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy

from .tasks import logits_of

if TYPE_CHECKING:
    import torch

    Key = tuple[bytes, torch.Size, torch.dtype, bool]

__all__ = ["constraint_of"]

SMALLEST = 2**12
"""The smallest number of pairs that are compared; fewer are converted in the time of a comparison."""
LARGEST = 2**20
"""The largest number of pairs that are kept; conversion takes little of the time of a call with more."""


class Constraint(NamedTuple):
    """Arguments of the kernel."""

    is_causal: bool
    added: torch.Tensor | None


# Two, because some models have layers with a window between layers without.
_kept: deque[tuple[Key, Constraint]] = deque(maxlen=2)


def constraint_of(visible: torch.Tensor, dtype: torch.dtype, *, may_be_causal: bool) -> Constraint:
    """Return the arguments of the kernel for visible pairs, (batch*, heads*, q_len, kv_len); logits have `dtype`."""
    count = visible.numel()
    if count < SMALLEST:
        return Constraint(is_causal=False, added=logits_of(visible, dtype))
    if count > LARGEST:
        return _constraint(visible, visible.numpy(), dtype, may_be_causal=may_be_causal)
    pairs = visible.numpy()
    asked = pairs.tobytes(), visible.shape, dtype, may_be_causal
    for kept, constraint in tuple(_kept):
        if kept == asked:
            return constraint
    constraint = _constraint(visible, pairs, dtype, may_be_causal=may_be_causal)
    _kept.append((asked, constraint))
    return constraint


def _constraint(visible: torch.Tensor, pairs: numpy.ndarray, dtype: torch.dtype, *, may_be_causal: bool) -> Constraint:
    if may_be_causal and _are_causal(pairs):
        return Constraint(is_causal=True, added=None)
    return Constraint(is_causal=False, added=logits_of(visible, dtype))


def _are_causal(pairs: numpy.ndarray) -> bool:
    """Tell whether pairs are visible exactly if j <= i, for q_len = kv_len (MHA-CAUSAL-1)."""
    q_len, kv_len = pairs.shape[2:]
    # Most masks show the last key to the first query.
    if q_len != kv_len or pairs[0, 0, 0, -1]:
        return False
    triangle = numpy.tri(kv_len, dtype=bool)
    return all(bool((square == triangle).all()) for square in pairs.reshape(-1, q_len, kv_len))

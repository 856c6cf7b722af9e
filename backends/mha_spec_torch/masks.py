"""What the flash kernel gets for visible pairs: `is_causal`, or logits that are added to the scores.

A caller often makes the pairs of a causal mask instead of passing `causal=True`; the kernel leaves out the blocks that
they hide. All layers of a model get the same mask, so that the logits of the last masks are kept. Masks are compared by
their bytes, so that a change in place counts; NumPy and Python compare many at a time, and torch compares one by one.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from ctypes import string_at
from typing import TYPE_CHECKING

import numpy
import torch

from .tasks import CAUSAL, Constraint, logits_of

if TYPE_CHECKING:
    Key = tuple[bytes, torch.Size, torch.dtype, bool]

__all__ = ["LARGEST_KEPT", "constraint_of"]

BITS_OF_MINUS_INFINITY = {
    torch.float32: numpy.float32(-numpy.inf).view(numpy.int32),
    torch.float64: numpy.float64(-numpy.inf).view(numpy.int64),
}

SMALLEST = 2**12
"""The smallest number of pairs that are compared; fewer are converted in the time of a comparison."""
LARGEST_KEPT = 2**20
"""The largest number of pairs that are kept; conversion takes little of the time of a call with more."""


# Two, because some models have layers with a window between layers without.
_kept: deque[tuple[Key, Constraint]] = deque(maxlen=2)


def constraint_of(visible: torch.Tensor, dtype: torch.dtype, *, may_be_causal: bool) -> Constraint:
    """Return the arguments of the kernel for visible pairs, (batch*, heads*, q_len, kv_len); logits have `dtype`."""
    count = visible.numel()
    if count < SMALLEST:
        return Constraint(is_causal=False, added=logits_of(visible, dtype))
    if count > LARGEST_KEPT:
        return _constraint(visible.numpy(), dtype, may_be_causal=may_be_causal)
    pairs = _bytes_of(visible)
    asked = pairs, visible.shape, dtype, may_be_causal
    for kept, constraint in tuple(_kept):
        if kept == asked:
            return constraint
    # Kept logits must serve a call that autograd records, for which it refuses tensors of inference mode.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        array = numpy.frombuffer(pairs, bool).reshape(visible.shape)
        constraint = _constraint(array, dtype, may_be_causal=may_be_causal)
    _kept.append((asked, constraint))
    return constraint


def _bytes_of(pairs: torch.Tensor) -> bytes:
    """Copy the elements in their order; right after a kernel, the conversion to NumPy takes longer than the copy."""
    if pairs.is_contiguous():
        return string_at(pairs.data_ptr(), pairs.numel())
    return pairs.numpy().tobytes()


def _constraint(pairs: numpy.ndarray, dtype: torch.dtype, *, may_be_causal: bool) -> Constraint:
    if may_be_causal and _are_causal(pairs):
        return CAUSAL
    return Constraint(is_causal=False, added=_logits(pairs, dtype))


def _logits(pairs: numpy.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Convert pairs to logits, as `logits_of` does, by a product with the bits of -inf.

    `torch.where` selects by branches, and takes longer for a mask whose values the processor cannot predict.
    """
    bits = BITS_OF_MINUS_INFINITY[dtype]
    return torch.from_numpy(numpy.multiply(~pairs, bits, dtype=bits.dtype)).view(dtype)


def _are_causal(pairs: numpy.ndarray) -> bool:
    """Tell whether pairs are visible exactly if j <= i, for q_len = kv_len (MHA-CAUSAL-1).

    Axes of size 1 broadcast, so that a mask of 1 x 1 does not tell the lengths.
    """
    q_len, kv_len = pairs.shape[2:]
    # Most masks show several keys to the first query, and a count takes less time than a triangle.
    if q_len != kv_len or q_len == 1 or numpy.count_nonzero(pairs[0, 0, 0]) != 1:
        return False
    triangle = numpy.tri(kv_len, dtype=bool)
    return all(bool((square == triangle).all()) for square in pairs.reshape(-1, q_len, kv_len))

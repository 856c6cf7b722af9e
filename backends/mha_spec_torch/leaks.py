"""Tell whether a NaN may have passed a hidden pair in the flash kernel.

The kernel multiplies hidden values by a weight of 0. The product of 0 with an infinity or a NaN is NaN (MHA-POISON-1,
MHA-POISON-2), and no sum drops a NaN: a finite sum of a result proves that it has none. With `is_causal`, that of the
last row of the output proves the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .problem import Problem

__all__ = ["has_nan", "may_be_in_gradients", "may_be_in_output"]

_LEAST_SCALE = torch.finfo(torch.float32).tiny


def may_be_in_output(output: torch.Tensor, *, is_causal: bool) -> bool:
    """Return True if a NaN may have passed a pair that `is_causal` or logits hide.

    With `is_causal`, the kernel replaces hidden scores, so that only hidden values pass. The last row sees every key:
    it is finite only if all values are.
    """
    # Where autograd records each operation, a selection and its sum take longer than the sum of all rows.
    is_selected = is_causal and not output.requires_grad
    evidence = output.select(2, -1) if is_selected else output
    if math.isfinite(evidence.sum().item()):
        return False
    return not bool(evidence.isfinite().all()) if is_selected else _is_nan(output.detach())


def may_be_in_gradients(problem: Problem, gradients: Sequence[torch.Tensor | None]) -> bool:
    """Return True if a gradient of query, key or value may have a NaN that has passed a hidden pair; None is absent.

    Such a NaN reaches dQ or dK; a NaN in dV alone is that of a visible pair. The kernel multiplies each dS_ij by a key
    for dQ and by a query for dK; so a finite dQ proves that all dS and keys are finite. The first row of dK then proves
    the same of all queries, because the kernel computes the pairs of each query with the first key, hidden or not. With
    a scale that is 0 in float32, the kernel computes no product for dQ and dK, and a NaN in grad_output reaches dV
    alone.
    """
    of_query, of_key, _ = gradients
    if abs(problem.scale) < _LEAST_SCALE or of_query is None or of_key is None:
        return any(has_nan(gradient) for gradient in gradients if gradient is not None)
    # The sums of most calls are finite; after a kernel, each call of `has_nan` takes 2 us more.
    if math.isfinite(of_query.sum().item()) and math.isfinite(of_key.select(2, 0).sum().item()):
        return False
    return has_nan(of_query) or has_nan(of_key)


def has_nan(result: torch.Tensor) -> bool:
    """Return True if a result has a NaN, or, unless it is contiguous, if it has both infinities.

    A finite sum proves that there is none, and takes a quarter of the time of a maximum. It may overflow, so that only
    a maximum can prove that there is a NaN.
    """
    return not math.isfinite(result.sum().item()) and _is_nan(result.detach())


def _is_nan(array: torch.Tensor) -> bool:
    """Return True if an array holds NaN, or if its sum is NaN because it has both infinities.

    Neither a maximum nor a sum drops a NaN. The maximum takes less time, but copies what is not contiguous first.
    """
    return math.isnan((array.max() if array.is_contiguous() and array.numel() else array.sum()).item())

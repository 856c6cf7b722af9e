"""Packed attention on CUDA by the kernel of torch's `varlen_attn`, for calls to which it gives the same meaning.

The kernel ends the diagonal of a sequence at its last key, gives a row that sees no key the lse +inf, and leaves the
rows of no sequence as they are. It multiplies hidden values by 0, so that each key must be visible to some query
(MHA-POISON-1). The gradients are those of the other paths, from its output and lse.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .packing import Packed, Part

__all__ = ["attend", "takes"]

LARGEST_SIZE = 256
"""The largest size of a head that the kernel takes; sizes are multiples of 8."""
OLDEST = (8, 0)
"""The oldest generation of GPUs that the kernel runs on."""


def takes(packed: Packed, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel takes a call: 16-bit tokens, a positive scale, a diagonal that ends at the last key."""
    a, size = packed.a, query.shape[2]
    if a.is_paged or a.sinks is not None or a.alibi_slopes is not None or a.softcap is not None or not packed.parts:
        return False
    if query.dtype not in {torch.float16, torch.bfloat16} or size % 8 or not 0 < size == value.shape[2] <= LARGEST_SIZE:
        return False
    is_whole = 0 not in key.shape and packed.problem.scale > 0 and all(_is_taken(packed, part) for part in packed.parts)
    return is_whole and has_kernel(query)


def _is_taken(packed: Packed, part: Part) -> bool:
    """Tell whether the diagonal of a sequence ends at its last key, and some query sees each key."""
    before = part.keys.size - part.queries.size
    left = _window(packed)[0]
    return not packed.a.positional or (part.offset == before and (left < 0 or left >= before))


def has_kernel(tensor: Tensor) -> bool:
    """Tell whether a tensor is on a device for which torch has the kernel."""
    return (
        tensor.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(tensor.device) >= OLDEST
    )


def attend(packed: Packed, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Compute output (q_tokens, heads, v_dim) and lse (heads, q_tokens)."""
    parts, (left, right) = packed.parts, _window(packed)

    def integers(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=query.device)

    used = [part.keys.size for part in parts]
    is_gapless = all(first.keys.stop == second.keys.start for first, second in pairwise(parts))
    results: Any = torch.ops.aten._flash_attention_forward(
        *(_dense_rows(operand) for operand in (query, key, value)),
        integers([part.queries.start for part in parts] + [parts[-1].queries.stop]),
        integers([part.keys.start for part in parts] + [parts[-1].keys.stop]),
        max(part.queries.size for part in parts),
        max(used),
        0.0,
        (left, right) == (-1, 0),
        False,
        scale=packed.problem.scale,
        window_size_left=left,
        window_size_right=right,
        seqused_k=None if is_gapless else integers(used),
    )
    output, lse = results[:2]
    lse = torch.where(lse == math.inf, -math.inf, lse)
    for tokens in packed.outside:
        output[tokens], lse[:, tokens] = 0.0, -math.inf
    return output, lse


def _window(packed: Packed) -> tuple[int, int]:
    """Return how far a row sees to the left and to the right as the kernel takes it: -1 is no bound."""
    a = packed.a
    left, right = a.window or (None, None)
    # A bound behind all tokens bounds nothing, and the kernel's integers are small.
    most = a.q_tokens + a.key.shape[0]
    left, right = (-1 if bound is None or bound >= most else bound for bound in (left, 0 if a.causal else right))
    return left, right


def _dense_rows(x: Tensor) -> Tensor:
    """Copy an operand whose components are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()

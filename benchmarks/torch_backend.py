"""Compare mha_spec_torch with torch's attention and the direct formula: ratios of interleaved medians on the CPU.

Run it with `python benchmarks/torch_backend.py [NAME ...]`; a row past its limit fails the run.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from measure import ratio, report
from settings import SETTINGS, Setting
from torch.nn.functional import scaled_dot_product_attention

import mha_spec_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

attention: Callable[..., Any] = mha_spec_torch.attention
NATIVE = {"encoder": 1.03, "window": 1 / 5, "padded": 1 / 1.6, "packed": 1 / 5}
FORMULA = 1 / 0.97


def direct(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the formula."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[3] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, -1), value)


def native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """Call torch's function, with `is_causal` for the causal mask."""
    return scaled_dot_product_attention(
        query, key, value, None if causal else mask, is_causal=causal, enable_gqa=key.shape[1] != query.shape[1]
    )


def trained(function: Callable[..., Tensor], operands: list[Tensor], *rest: object) -> Callable[[], object]:
    """Make a call of forward and backward."""
    leaves = [x.clone().requires_grad_() for x in operands]
    return lambda: torch.autograd.grad(function(*leaves, *rest).sum(), leaves)


def compare(name: str, setting: Setting) -> bool:
    """Measure every row of a setting."""
    operands = [torch.from_numpy(array) for array in setting.operands()]
    mask = None if setting.visible is None else torch.from_numpy(setting.visible)
    ours, good = partial(attention, **setting.options(torch.from_numpy)), True
    for other, limit in ((partial(native, causal=setting.causal), NATIVE.get(name)), (direct, FORMULA)):
        label = "direct" if other is direct else "native"
        measured = ratio(partial(ours, *operands), partial(other, *operands, mask))
        good &= report(f"{name}, forward, {label}", limit, measured)
        if not setting.step:
            measured = ratio(trained(ours, operands), trained(other, operands, mask))
            good &= report(f"{name}, forward and backward, {label}", limit if other is direct else None, measured)
    return good


def step() -> bool:
    """Compare a decode step with torch's; the step is so small that the fixed cost dominates."""
    query, key, value = torch.randn(1, 32, 1, 128), torch.randn(1, 8, 16, 128), torch.randn(1, 8, 16, 128)
    theirs = partial(scaled_dot_product_attention, query, key, value, enable_gqa=True)
    _, our_time, their_time = ratio(partial(attention, query, key, value), theirs)
    extra = (our_time - their_time) * 1000
    print(f"decode step, above torch's: {extra:.1f} us  limit 20 {'ok' if extra <= 20 else 'EXCEEDED'}")
    return extra <= 20


def causal_mask() -> bool:
    """Compare a call with a mask that is causal with torch's call with this mask."""
    operands = [torch.randn(1, 8, 2048, 64) for _ in range(3)]
    mask = torch.ones(1, 1, 2048, 2048, dtype=torch.bool).tril()
    theirs = partial(scaled_dot_product_attention, *operands, attn_mask=mask)
    return report("causal mask, forward, native", 1 / 1.5, ratio(partial(attention, *operands, mask=mask), theirs))


OTHERS = {"step": step, "causal mask": causal_mask}


def main() -> None:
    """Print every row, or those of the settings named."""
    names = sys.argv[1:] or [*SETTINGS, *OTHERS]
    good = [OTHERS[name]() if name in OTHERS else compare(name, SETTINGS[name]) for name in names]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()

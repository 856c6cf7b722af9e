"""mha_spec_torch against torch's own attention and the direct formula: ratios of interleaved medians on the CPU.

Run it with `python -P benchmarks/torch_backend.py [NAME ...]`; a row past its limit fails the run.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import mha_spec_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

attention: Callable[..., Any] = mha_spec_torch.attention
SECONDS = 3.0
"""How long each row is measured."""


@dataclass(frozen=True)
class Setting:
    """One kind of call: its sizes, our options, and the mask that says the same."""

    query: tuple[int, int, int, int]
    kv: tuple[int, int]
    """kv_heads and kv_len."""
    options: dict[str, object] = field(default_factory=dict)
    mask: Callable[[], Tensor] | None = None
    causal: bool = False
    step: bool = False
    """A decode step, which has no backward."""

    def operands(self) -> list[Tensor]:
        """Query, key and value of standard normal numbers."""
        batch, _, _, size = self.query
        torch.manual_seed(7)
        return [torch.randn(self.query), *(torch.randn(batch, *self.kv, size) for _ in range(2))]


def near(length: int, left: int) -> Tensor:
    """The mask of a causal window."""
    distance = torch.arange(length) - torch.arange(length)[:, None]
    return ((distance <= 0) & (distance >= -left))[None, None]


def padding(lengths: list[int], length: int) -> Tensor:
    """The mask of lengths."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None])[:, None, None, :]


def packing(ids: Tensor) -> Tensor:
    """The mask of segments."""
    return ids[:, None, :, None] == ids[:, None, None, :]


LENGTHS = [512, 448, 384, 320, 192, 128, 64, 1]
IDS = torch.arange(4096)[None] // 256
SETTINGS = {
    "encoder": Setting((2, 8, 512, 64), (8, 512)),
    "causal": Setting((1, 8, 2048, 64), (8, 2048), {"causal": True}, causal=True),
    "decode": Setting((8, 32, 1, 128), (8, 2048), step=True),
    "cross": Setting((2, 8, 128, 64), (8, 1500)),
    "window": Setting((1, 8, 4096, 64), (8, 4096), {"window": (256, 0)}, lambda: near(4096, 256)),
    "padded": Setting((8, 8, 512, 64), (8, 512), {"kv_lengths": LENGTHS}, lambda: padding(LENGTHS, 512)),
    "packed": Setting((1, 8, 4096, 64), (8, 4096), {"q_segment_ids": IDS, "kv_segment_ids": IDS}, lambda: packing(IDS)),
    "multi-query": Setting((2, 8, 512, 64), (1, 512)),
}
NATIVE = {"encoder": 1.03, "window": 1 / 5, "padded": 1 / 1.6, "packed": 1 / 5}
FORMULA = 1 / 0.97


def direct(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """Einsum, softmax, einsum."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[3] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, -1), value)


def native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """torch's own."""
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, enable_gqa=key.shape[1] != query.shape[1]
    )


def timed(function: Callable[[], object]) -> float:
    """Run once, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """The median of the ratios of runs in turn, and both medians in ms."""
    pairs: list[tuple[float, float]] = []
    timed(ours)
    timed(theirs)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(pairs) < 5:
        pairs.append((timed(ours), timed(theirs)))
    mine, other = (statistics.median(one) * 1000 for one in zip(*pairs, strict=True))
    return statistics.median(a / b for a, b in pairs), mine, other


def trained(
    function: Callable[..., Tensor], operands: list[Tensor], *rest: object, **options: object
) -> Callable[[], object]:
    """Forward and backward."""
    leaves = [x.clone().requires_grad_() for x in operands]
    return lambda: torch.autograd.grad(function(*leaves, *rest, **options).sum(), leaves)


def report(name: str, limit: float | None, measured: tuple[float, float, float]) -> bool:
    """Print a row; whether it is within its limit."""
    found, mine, other = measured
    good = limit is None or found <= limit
    bound = "" if limit is None else f"  limit {limit:.2f} {'ok' if good else 'EXCEEDED'}"
    print(f"{name:45s} {mine:9.3f} ms against {other:9.3f} ms: {found:5.2f}{bound}", flush=True)
    return good


def compare(name: str, setting: Setting) -> bool:
    """Every row of one setting."""
    operands, mask, good = setting.operands(), setting.mask() if setting.mask else None, True
    for other, limit in ((native, NATIVE.get(name)), (direct, FORMULA)):
        forward = ratio(
            partial(attention, *operands, **setting.options),
            partial(other, *operands, mask, causal=setting.causal),
        )
        good &= report(f"{name}, forward, {other.__name__}", limit, forward)
        if not setting.step:
            ours = trained(attention, operands, **setting.options)
            both = ratio(ours, trained(other, operands, mask, causal=setting.causal))
            good &= report(f"{name}, forward and backward, {other.__name__}", limit if other is direct else None, both)
    return good


def step() -> bool:
    """What a decode step costs above torch's own, in microseconds: both on a step so small that little else is left."""
    query, key, value = torch.randn(1, 32, 1, 128), torch.randn(1, 8, 16, 128), torch.randn(1, 8, 16, 128)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(3000):
        ours.append(timed(lambda: attention(query, key, value)))
        theirs.append(timed(lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True)))
    extra = (statistics.median(ours) - statistics.median(theirs)) * 1e6
    print(f"decode step, above torch's own: {extra:.1f} us  limit 20 {'ok' if extra <= 20 else 'EXCEEDED'}")
    return extra <= 20


def main() -> None:
    """Print every row, or those of the settings named."""
    names = sys.argv[1:] or [*SETTINGS, "step"]
    good = [step() if name == "step" else compare(name, SETTINGS[name]) for name in names]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()

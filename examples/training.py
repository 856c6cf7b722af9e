"""Training in PyTorch, with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from trees import each, leaves

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["console", "train"]

console = Console()


def train(first: Any, loss: Callable[[Any], torch.Tensor], steps: int, rate: float) -> Any:
    """Train from the parameters `first`, nested arrays of NumPy, and return the trained arrays.

    `loss` draws another batch in every call. The learning rate rises to `rate` in a tenth of the steps, and then falls
    as a cosine.
    """
    params = each(first, lambda array: torch.from_numpy(array.copy()).requires_grad_())
    optimizer = torch.optim.Adam(leaves(params), betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in track(range(steps), "training", console=console):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()
        schedule.step()
    return each(params, lambda tensor: tensor.detach().numpy())

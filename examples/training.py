"""The common parts of the programs that train: training in PyTorch, the comparison of the backends, and figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from trees import each, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy

__all__ = ["compared", "console", "subplots", "train"]

console = Console()


def train(first: Any, loss: Callable[[Any], torch.Tensor], steps: int, rate: float) -> Any:
    """Train from the parameters `first`, nested arrays of NumPy, and return the trained arrays.

    `loss` draws another batch in every call. The learning rate rises to `rate` in a tenth of the steps, and then falls
    as a cosine. PyTorch has a single thread from now on.
    """
    torch.set_num_threads(1)  # More threads do not help matrices of this size, and would change the last bits.
    params = each(first, lambda array: torch.from_numpy(array.copy()).requires_grad_())
    optimizer = torch.optim.Adam(leaves(params), betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in track(range(steps), "training", console=console):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()
        schedule.step()
    return each(params, lambda tensor: tensor.detach().numpy())


def compared(results: Mapping[str, numpy.ndarray], verb: str) -> bool:
    """Print how many results of each backend are those of PyTorch, and tell whether all are."""
    expected = results["torch"]
    equal = {name: (result == expected).reshape(len(expected), -1).all(axis=1) for name, result in results.items()}
    for name, same in equal.items():
        console.print(f"{name}: {same.sum()} of {same.size} {verb} as on PyTorch")
    return all(same.all() for same in equal.values())


def subplots(rows: int, columns: int, **options: Any) -> Any:
    """Make a figure that is drawn without a display, with its axes."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, layout="constrained", **options)

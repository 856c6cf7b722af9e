"""Compare the layer of mha_spec_torch with torch.nn.MultiheadAttention and SDPA: ratios of interleaved medians.

Run it with `python benchmarks/torch_layer.py [NAME ...]`; a speed below its limit fails the run.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from measure import medians
from torch.nn.functional import scaled_dot_product_attention

from mha_spec.weights import save_weights
from mha_spec_torch import MultiHeadAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.nn import Module

BATCH, LENGTH, EMBED, HEADS = 2, 512, 512, 8
CACHED, STEPS, ROUNDS = 1024, 512, 7
"""Tokens that are cached before the first step, the most steps that a cache has room for, and fresh caches."""


class Theirs(torch.nn.Module):
    """The layer of torch as self-attention, with or without the weights of every head."""

    def __init__(self, layer: torch.nn.MultiheadAttention, *, weights: bool) -> None:
        super().__init__()
        self.layer, self.weights = layer, weights

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Attend from x to x."""
        return self.layer(x, x, x, need_weights=self.weights, average_attn_weights=False)


class Ours(torch.nn.Module):
    """Our layer as self-attention, with or without the weights of every head."""

    def __init__(self, layer: MultiHeadAttention, *, weights: bool) -> None:
        super().__init__()
        self.layer, self.weights = layer, weights

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Attend from x to x."""
        return self.layer.output_and_weights(x) if self.weights else (self.layer(x),)


def pair() -> tuple[MultiHeadAttention, torch.nn.MultiheadAttention]:
    """Make both layers, with the same weights."""
    torch.manual_seed(7)
    ours, theirs = MultiHeadAttention(EMBED, HEADS), torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    theirs.load_state_dict(save_weights({name: param.detach() for name, param in ours.params.items()}, "torch"))
    return ours, theirs


def forward(module: Module, x: Tensor) -> Callable[[], object]:
    """Make a call without gradients."""

    def run() -> None:
        with torch.no_grad():
            module(x)

    return run


def trained(module: Module, x: Tensor) -> Callable[[], object]:
    """Make a call of forward and backward, for every parameter and the input, from all results of the module."""
    leaves = [x.clone().requires_grad_(), *module.parameters()]

    def run() -> None:
        results = [result for result in module(leaves[0]) if result is not None]
        torch.autograd.grad([result.sum() for result in results], leaves, allow_unused=True)

    return run


def self_attention(*, compiled: bool, weights: bool) -> bool:
    """Measure forward, and forward with backward, at (2, 512, 512) with 8 heads."""
    x = torch.randn(BATCH, LENGTH, EMBED)
    layers = pair()
    modules: dict[str, Any] = {"ours": Ours(layers[0], weights=weights), "theirs": Theirs(layers[1], weights=weights)}
    if compiled:
        modules = {name: torch.compile(module, fullgraph=True) for name, module in modules.items()}
    good = True
    for name, prepare in (("forward", forward), ("forward and backward", trained)):
        times = medians({side: prepare(module, x) for side, module in modules.items()}, seconds=8)
        label = f"{'compiled' if compiled else 'eager'}{', with weights' if weights else ''}, {name}"
        good &= report(label, times, 0.97)
    return good


def decode(batch: int) -> bool:
    """Measure a step at 1024 tokens; the addresses of its buffers change it by 5 %, so take a median."""
    rounds = sorted((steps_of(batch) for _ in range(ROUNDS)), key=speed)
    return report(f"decode step, batch {batch}", rounds[ROUNDS // 2], 1.0)


def steps_of(batch: int) -> dict[str, float]:
    """Return the times of a step; each side writes to separate buffers."""
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.requires_grad_(False)
    x, prompt = torch.randn(batch, 1, EMBED), torch.randn(batch, CACHED, EMBED)
    full, other = (ours(prompt, causal=True, cache=ours.empty_cache(batch, CACHED + STEPS))[1] for _ in range(2))
    caches = [full]

    def our_step() -> None:
        _, caches[0] = ours(x, causal=True, cache=caches[0])

    step = partial(their_step, theirs, x, other.key, other.value, [CACHED])
    return medians({"ours": our_step, "theirs": step}, seconds=3)


def their_step(
    layer: torch.nn.MultiheadAttention, x: Tensor, keys: Tensor, values: Tensor, length: list[int]
) -> Tensor:
    """Project, store key and value in preallocated buffers, attend with SDPA, and project the output."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    query, key, value = (
        torch.nn.functional.linear(x, *pair).unflatten(2, (HEADS, -1)).transpose(1, 2)
        for pair in zip(weights, biases, strict=True)
    )
    at = length[0]
    keys[:, :, at : at + 1], values[:, :, at : at + 1] = key, value
    length[0] = at + 1
    attended = scaled_dot_product_attention(query, keys[:, :, : at + 1], values[:, :, : at + 1])
    return layer.out_proj(attended.transpose(1, 2).flatten(2))


def report(label: str, times: Mapping[str, float], limit: float) -> bool:
    """Print a row; return True if our speed relative to theirs reaches its limit."""
    reached = speed(times)
    verdict = "ok" if reached >= limit else "BELOW"
    ours, theirs = (times[side] * 1000 for side in ("ours", "theirs"))
    print(
        f"{label:45s} {ours:9.3f} ms against {theirs:9.3f} ms: {reached:5.2f}x  limit {limit:.2f} {verdict}", flush=True
    )
    return reached >= limit


def speed(times: Mapping[str, float]) -> float:
    """Return our speed relative to theirs."""
    return times["theirs"] / times["ours"]


ROWS: dict[str, Callable[[], bool]] = {
    "eager": partial(self_attention, compiled=False, weights=False),
    "eager-weights": partial(self_attention, compiled=False, weights=True),
    "compiled": partial(self_attention, compiled=True, weights=False),
    "compiled-weights": partial(self_attention, compiled=True, weights=True),
    "decode": partial(decode, BATCH),
}


def main() -> None:
    """Print every row, or those named."""
    good = [ROWS[name]() for name in sys.argv[1:] or ROWS]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()

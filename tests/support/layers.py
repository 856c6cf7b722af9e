"""The sizes, options and parameters of a layer in which all sizes differ, and the reference's results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch

from mha_spec import reference
from mha_spec.parameters import AXES
from support.numbers import numbers, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "BATCH",
    "CROSS",
    "EMBED",
    "HEADS",
    "KV_HEADS",
    "LENGTH",
    "OPTIONS",
    "OUT",
    "QK_DIM",
    "SIZES",
    "STEPS",
    "V_DIM",
    "Options",
    "assert_drawn_as_in_the_paper",
    "by_reference",
    "heads",
    "parameters",
    "tokens",
    "uneven",
    "weight_options",
]

Options = dict[str, Any]
BATCH, LENGTH, EMBED, HEADS, KV_HEADS, QK_DIM, V_DIM, OUT = 2, 11, 7, 6, 3, 4, 5, 13
SIZES: Options = {"kv_heads": KV_HEADS, "qk_dim": QK_DIM, "v_dim": V_DIM, "out": OUT}
CROSS: Options = {"k_embed": 3, "v_embed": 17}
STEPS = {"token by token": [1] * LENGTH, "chunks": [5, 1, 5], "at once": [LENGTH]}
"""Ways to cut a sequence."""

OPTIONS: dict[str, tuple[Options, Callable[[], Options]]] = {
    "plain": ({"bias": False}, dict),
    "norms": ({"qk_norm": True, "norm_epsilon": 0.25}, lambda: {"causal": True, "q_offset": -1}),
    "joint norms": ({"qk_norm": "joint", "norm_epsilon": 0.25, "rotary": {}}, lambda: {"causal": True, "q_offset": 2}),
    "halves": ({"rotary": {}}, lambda: {"q_offset": [2, 5]}),
    "interleaved": ({"rotary": {"interleaved": True, "base": 7.0}}, lambda: {"q_offset": numpy.asarray([1, 3])}),
    "partial": ({"rotary": {"rotary_dim": 2}, "qk_norm": True}, lambda: {"window": (4, 1), "q_offset": 3}),
    "frequencies": ({"rotary": {"frequencies": [0.7, 0.05], "attention_factor": 1.3}}, lambda: {"q_offset": [4, 1]}),
    "cross": (CROSS, lambda: {"kv_lengths": [5, 8], "q_lengths": numpy.asarray([3, 2])}),
    "mask": ({}, lambda: {"mask": pattern(BATCH, 1, 3, 8), "scale": -0.7, "softcap": 1.9, "sinks": numbers(HEADS)}),
    "dropout": (
        {},
        lambda: {
            "bias": numbers(1, HEADS, 1, 8),
            "dropout_rate": 0.3,
            "dropout_mask": pattern(1, HEADS, 3, 8),
            "q_segment_ids": numpy.asarray([[0, 1, 1]] * 2),
            "kv_segment_ids": numpy.arange(16).reshape(2, 8) // 4,
        },
    ),
}
"""Options of a layer, and of a call on 3 tokens that attend to 8."""


def tokens(length: int = LENGTH, size: int = EMBED, seed: int = 5) -> numpy.ndarray:
    """Draw tokens from the normal distribution."""
    return numbers(BATCH, length, size, seed=seed)


def heads(length: int, seed: int = 5) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Draw keys and values for a cache."""
    return numbers(BATCH, KV_HEADS, length, QK_DIM, seed=seed), numbers(BATCH, KV_HEADS, length, V_DIM, seed=seed)


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, numpy.ndarray]:
    """Draw numbers for every parameter, different in each."""
    return {name: numbers(*shape, seed=list(AXES).index(name)) / 2 for name, shape in shapes.items()}


def weight_options(options: Mapping[str, Any]) -> Options:
    """Return the options that `multi_head_attention_weights` accepts."""
    return {name: value for name, value in options.items() if "dropout" not in name}


def uneven(shape: Sequence[int]) -> numpy.ndarray:
    """Return a cotangent whose elements all differ."""
    return numpy.linspace(-1, 2, int(numpy.prod(shape, dtype=int))).reshape(shape)


def by_reference(
    params: Mapping[str, numpy.ndarray], inputs: Sequence[numpy.ndarray], **options: Any
) -> list[numpy.ndarray]:
    """Compute output and weights by the reference, and by PyTorch the gradients of parameters by name and of inputs."""
    options = {name: torch.from_numpy(x) if isinstance(x, numpy.ndarray) else x for name, x in options.items()}
    tensors = {name: torch.from_numpy(params[name].copy()).requires_grad_() for name in sorted(params)}
    x = [torch.from_numpy(array.copy()).requires_grad_() for array in inputs]
    layer: Any = reference
    weights = layer.multi_head_attention_weights(*x[:2], tensors, **weight_options(options))
    outputs = [layer.multi_head_attention(*x, tensors, **options), weights]
    cotangents = [torch.from_numpy(uneven(output.shape)) for output in outputs]
    gradients = torch.autograd.grad(outputs, [*tensors.values(), *x], cotangents)
    return [result.detach().numpy() for result in (*outputs, *gradients)]


def assert_drawn_as_in_the_paper(params: Mapping[str, numpy.ndarray]) -> None:
    """Check the initial parameters of `MultiHeadAttention(64, 4, qk_dim=24, out=96, qk_norm=True)`."""
    for name, fans in {"w_q": (64, 96), "w_k": (64, 96), "w_v": (64, 96), "w_o": (96, 96)}.items():
        drawn, bound = params[name], (6 / sum(fans)) ** 0.5
        assert drawn.dtype == numpy.float32
        assert bound * 0.99 < abs(drawn).max() <= bound
        assert abs(drawn.mean()) < 4 * bound / (3 * drawn.size) ** 0.5
    assert all((params[name] == 0).all() for name in ("b_q", "b_k", "b_v", "b_o"))
    assert all((params[name] == 1).all() for name in ("q_norm", "k_norm"))
    assert not numpy.array_equal(params["w_q"], params["w_k"])

"""Compare the layer with torch.nn.MultiheadAttention: equal parameters give equal outputs, weights and gradients.

docs/judges.md lists the differences in meaning; each of its rows is tested here.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.comparisons import assert_equal, assert_same
from support.layers import BATCH
from support.numbers import numbers
from support.numbers import pattern as plain_pattern
from support.torch_world import filled, tensor, tokens, with_gradients

import mha_spec_torch
from mha_spec import ArgumentValueError
from mha_spec.weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Options = dict[str, Any]
multi_head_attention: Callable[..., Any] = mha_spec_torch.multi_head_attention
multi_head_attention_weights: Callable[..., Any] = mha_spec_torch.multi_head_attention_weights


def pattern(*shape: int) -> Tensor:
    """Return which pairs are visible; each row sees the first key."""
    return tensor(plain_pattern(*shape))


def padding(*lengths: int) -> Tensor:
    """Return which of 8 keys are hidden."""
    return torch.arange(8) >= torch.tensor(lengths)[:, None]


SHARED: dict[str, tuple[Options, Callable[[], tuple[Options, Options]]]] = {
    "plain": ({}, lambda: ({}, {})),
    "no bias": ({"bias": False}, lambda: ({}, {})),
    "other sizes": ({"kdim": 3, "vdim": 17}, lambda: ({}, {})),
    "length first": ({"batch_first": False}, lambda: ({}, {})),
    "padding": ({}, lambda: ({"key_padding_mask": padding(3, 8)}, {"kv_lengths": [3, 8]})),
    "boolean mask": ({}, lambda: ({"attn_mask": ~pattern(5, 8)}, {"mask": pattern(5, 8)[None, None]})),
    "mask of heads": (
        {},
        lambda: (
            {"attn_mask": ~pattern(BATCH * 3, 5, 8)},
            {"mask": pattern(BATCH * 3, 5, 8).unflatten(0, (BATCH, 3))},
        ),
    ),
    "float mask": ({}, lambda: ({"attn_mask": tensor(numbers(5, 8))}, {"bias": tensor(numbers(5, 8))[None, None]})),
    "mask and padding": (
        {},
        lambda: (
            {"attn_mask": ~pattern(5, 8), "key_padding_mask": padding(7, 8)},
            {"mask": pattern(5, 8)[None, None], "kv_lengths": [7, 8]},
        ),
    ),
    "causal": (
        {},
        lambda: (
            {"attn_mask": torch.ones(5, 8, dtype=torch.bool).triu(1), "is_causal": True},
            {"causal": True, "q_offset": 0},
        ),
    ),
}
"""The arguments of the constructor of torch's layer, and its options with the equivalent options of ours."""


def torch_layer(**options: Any) -> torch.nn.MultiheadAttention:
    """Create torch's layer with numbers in every parameter."""
    return filled(torch.nn.MultiheadAttention(15, 3, **{"batch_first": True} | options, dtype=torch.float64))


def by_torch(layer: torch.nn.MultiheadAttention, inputs: list[Tensor], options: Options) -> list[Tensor]:
    """Return output, weights of each head and their mean by torch's layer, and gradients."""
    x = inputs if layer.batch_first else [x.transpose(0, 1) for x in inputs]
    output, weights = layer(*x, **options, need_weights=True, average_attn_weights=False)
    averaged = layer(*x, **options)[1]
    output = output if layer.batch_first else output.transpose(0, 1)
    return with_gradients([output, weights, averaged], [*inputs, *layer.parameters()])


@pytest.mark.parametrize("name", SHARED)
def test_the_layer_of_torch_gives_the_same_outputs_gradients_and_weights(name: str) -> None:
    arguments, make_options = SHARED[name]
    layer, (torch_options, options) = torch_layer(**arguments), make_options()
    layout = "torch_separate" if "kdim" in arguments else "torch"

    def inputs(dtype: str) -> list[Tensor]:
        sizes = (5, 15), (8, arguments.get("kdim", 15)), (8, arguments.get("vdim", 15))
        return [tokens(*size, seed=seed, dtype=dtype).requires_grad_() for seed, size in enumerate(sizes)]

    def ours(dtype: str) -> list[Tensor]:
        converted, x = copy.deepcopy(layer).to(getattr(torch, dtype)), inputs(dtype)
        params = load_weights(dict(converted.named_parameters()), layout, heads=3)
        output = multi_head_attention(*x, params, **options)
        weights = multi_head_attention_weights(*x[:2], params, **options)
        return with_gradients([output, weights, weights.mean(1)], [*x, *converted.parameters()])

    assert_same(ours, by_torch(layer, inputs("float64"), torch_options))


def test_a_row_without_keys_is_nan_in_torch() -> None:
    x, layer = tokens(5, 15), torch_layer()
    params = load_weights(dict(layer.named_parameters()), "torch", heads=3)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[2] = True
    output, _ = layer(x, x, x, attn_mask=hidden)
    assert output[:, 2].isnan().all()
    assert with_gradients([output[:, 3]], [layer.in_proj_weight])[1].isnan().any()
    output = multi_head_attention(x, x, x, params, mask=~hidden[None, None])
    assert_equal(output[:, 2], params["b_o"].expand(2, -1))
    output, _ = layer(x, x, x, attn_mask=hidden.T)
    assert not torch.equal(output, multi_head_attention(x, x, x, params, mask=hidden.T[None, None]))


def test_add_zero_attn_of_torch_is_a_sink() -> None:
    layer = torch_layer(add_zero_attn=True)

    def ours(dtype: str) -> list[Tensor]:
        converted, x = copy.deepcopy(layer).to(getattr(torch, dtype)), tokens(5, 15, dtype=dtype)
        params = load_weights(dict(converted.named_parameters()), "torch", heads=3)
        return [multi_head_attention(x, x, x, params, sinks=torch.zeros(3, dtype=x.dtype))]

    x = tokens(5, 15)
    output, weights = layer(x, x, x, average_attn_weights=False)
    assert weights.shape == (BATCH, 3, 5, 6)
    assert_same(ours, [output])


def test_differences_from_the_layer_of_torch() -> None:
    """docs/judges.md lists these differences, and rows without keys, which have a test above."""
    x = tokens(5, 15)
    _, weights = torch_layer(dropout=0.5)(x, x, x, average_attn_weights=False)
    assert (weights == 0).any()
    with pytest.raises(ArgumentValueError, match="bias_k"):
        load_weights(dict(torch_layer(add_bias_kv=True).named_parameters()), "torch", heads=3)
    with pytest.raises(RuntimeError, match="attn_mask"):
        torch_layer()(x, x, x, is_causal=True)

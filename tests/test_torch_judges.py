"""torch.nn.MultiheadAttention as a judge of ours: same weights, same outputs, weights and gradients.

What means something else there stands in docs/judges.md; each of its rows is seen here.
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
    """Which pairs may be seen, in each row the first key."""
    return tensor(plain_pattern(*shape))


def padding(*lengths: int) -> Tensor:
    """Which of 8 keys are hidden."""
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
"""What torch's layer is made with, its options, and ours that say the same."""


def own_layer(**options: Any) -> torch.nn.MultiheadAttention:
    """torch's layer with numbers in every parameter."""
    return filled(torch.nn.MultiheadAttention(15, 3, **{"batch_first": True} | options, dtype=torch.float64))


def by_torch(layer: torch.nn.MultiheadAttention, inputs: list[Tensor], options: Options) -> list[Tensor]:
    """Output, weights of each head and their mean by torch's layer, and gradients."""
    x = inputs if layer.batch_first else [one.transpose(0, 1) for one in inputs]
    output, weights = layer(*x, **options, need_weights=True, average_attn_weights=False)
    averaged = layer(*x, **options)[1]
    output = output if layer.batch_first else output.transpose(0, 1)
    return with_gradients([output, weights, averaged], [*inputs, *layer.parameters()])


@pytest.mark.parametrize("name", SHARED)
def test_torchs_own_layer_has_the_same_outputs_gradients_and_weights(name: str) -> None:
    arguments, made = SHARED[name]
    layer, (theirs, options) = own_layer(**arguments), made()
    layout = "torch_separate" if "kdim" in arguments else "torch"

    def inputs(dtype: str) -> list[Tensor]:
        sizes = (5, 15), (8, arguments.get("kdim", 15)), (8, arguments.get("vdim", 15))
        return [tokens(*size, seed=seed, dtype=dtype).requires_grad_() for seed, size in enumerate(sizes)]

    def ours(dtype: str) -> list[Tensor]:
        held, x = copy.deepcopy(layer).to(getattr(torch, dtype)), inputs(dtype)
        params = load_weights(dict(held.named_parameters()), layout, heads=3)
        output = multi_head_attention(*x, params, **options)
        weights = multi_head_attention_weights(*x[:2], params, **options)
        return with_gradients([output, weights, weights.mean(1)], [*x, *held.parameters()])

    assert_same(ours, by_torch(layer, inputs("float64"), theirs))


def test_a_row_without_keys_is_nan_in_torch() -> None:
    x, layer = tokens(5, 15), own_layer()
    params = load_weights(dict(layer.named_parameters()), "torch", heads=3)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[2] = True
    output, _ = layer(x, x, x, attn_mask=hidden)
    assert output[:, 2].isnan().all()
    assert with_gradients([output[:, 3]], [layer.in_proj_weight])[1].isnan().any()
    found = multi_head_attention(x, x, x, params, mask=~hidden[None, None])
    assert_equal(found[:, 2], params["b_o"].expand(2, -1))
    output, _ = layer(x, x, x, attn_mask=hidden.T)
    assert not torch.equal(output, multi_head_attention(x, x, x, params, mask=hidden.T[None, None]))


def test_a_zero_that_torch_adds_is_a_sink() -> None:
    layer = own_layer(add_zero_attn=True)

    def ours(dtype: str) -> list[Tensor]:
        held, x = copy.deepcopy(layer).to(getattr(torch, dtype)), tokens(5, 15, dtype=dtype)
        params = load_weights(dict(held.named_parameters()), "torch", heads=3)
        return [multi_head_attention(x, x, x, params, sinks=torch.zeros(3, dtype=x.dtype))]

    x = tokens(5, 15)
    output, weights = layer(x, x, x, average_attn_weights=False)
    assert weights.shape == (BATCH, 3, 5, 6)
    assert_same(ours, [output])


def test_torchs_own_layer_means_something_else() -> None:
    """What docs/judges.md says of `torch.nn.MultiheadAttention`, beside rows without keys."""
    x = tokens(5, 15)
    _, weights = own_layer(dropout=0.5)(x, x, x, average_attn_weights=False)
    assert (weights == 0).any()
    with pytest.raises(ArgumentValueError, match="bias_k"):
        load_weights(dict(own_layer(add_bias_kv=True).named_parameters()), "torch", heads=3)
    with pytest.raises(RuntimeError, match="attn_mask"):
        own_layer()(x, x, x, is_causal=True)

"""No NaN and no infinity passes a hidden pair of the flash kernel, and nothing else is sent to the formula."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.comparisons import assert_near
from support.torch_world import operands
from torch import Tensor

import mha_spec_torch
from mha_spec_torch import leaks

if TYPE_CHECKING:
    from collections.abc import Callable

Q_LEN, FEWER_KEYS, LENGTH, SIZE = 601, 523, 591, 8
"""Numbers of queries and keys that need two of the kernel's tiles of 512, so that a NaN does not reach every tile."""
BATCH_ENTRY, HEAD, KV_HEAD = 1, 3, 1
"""The place of the element that is not finite."""
HEADS = (2, 3)
"""The query heads that read this key/value head."""
PLACES = ("query", "key", "value", "grad_output")
attention: Callable[..., Any] = mha_spec_torch.attention


def visible_pairs(constraint: str) -> Tensor:
    """Return the pairs that a constraint leaves visible, (q_len, kv_len)."""
    kv_len = FEWER_KEYS if constraint == "causal, few keys" else Q_LEN
    every = torch.ones(Q_LEN, kv_len, dtype=torch.bool)
    if constraint == "kv_lengths":
        return every & (torch.arange(kv_len) < LENGTH)
    if constraint == "mask":  # Row 17 sees no key.
        shown = torch.rand(every.shape, generator=torch.Generator().manual_seed(5)) < 0.6
        return shown & (torch.arange(Q_LEN) != 17)[:, None]
    return every.tril()


def options_of(constraint: str, visible: Tensor) -> dict[str, Any]:
    """Return the options of a call with a constraint."""
    if constraint == "kv_lengths":
        return {"kv_lengths": [LENGTH, LENGTH]}
    return {"causal": True, "q_offset": 0} if constraint.startswith("causal,") else {"mask": visible[None, None]}


def results_of(tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Return output, dQ, dK and dV, after a comparison with the output of a call without gradients."""
    leaves = [tensors[name].clone().requires_grad_() for name in PLACES[:3]]
    alone, output = attention(*(leaf.detach() for leaf in leaves), **options), attention(*leaves, **options)
    assert_near(*(array.detach().nan_to_num(0.0, 0.0, 0.0) for array in (alone, output)))
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors["grad_output"])]


def reached(place: str, index: int, visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tell which rows of output and dQ, and which keys of dK and dV, may depend on an element of an operand."""
    rows = torch.arange(len(visible)) == index if place in {"query", "grad_output"} else visible[:, index]
    keys = (visible & rows[:, None]).any(0)
    return rows, rows, keys, keys


@pytest.mark.parametrize("size", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("constraint", ["causal, square", "causal, few keys", "causal mask", "mask", "kv_lengths"])
def test_nothing_passes_a_hidden_pair(constraint: str, place: str, size: float) -> None:
    visible = visible_pairs(constraint)
    options = options_of(constraint, visible)
    query, key, value = (tensor.double() for tensor in operands(*visible.shape, qk_dim=SIZE, v_dim=SIZE))
    # An infinite key then has the same sign of score in all rows, so that its weight may be 0 in all of them.
    query[..., -1].abs_()
    clean = dict(zip(PLACES, (query, key, value, query.flip(2)), strict=True))
    expected = results_of(clean, options)
    for index in (0, 520, clean[place].shape[2] - 1):
        tensors = {name: tensor.clone() for name, tensor in clean.items()}
        tensors[place][BATCH_ENTRY, KV_HEAD if place in {"key", "value"} else HEAD, index, -1] = size
        for result, wanted, is_reached in zip(
            results_of(tensors, options), expected, reached(place, index, visible), strict=True
        ):
            unreached = torch.ones(result.shape[:3], dtype=torch.bool)
            unreached[BATCH_ENTRY, HEADS if result.shape[1] > len(HEADS) else KV_HEAD] = ~is_reached
            assert_near(result[unreached], wanted[unreached])


def test_a_product_of_a_hidden_pair_that_overflows_is_not_passed() -> None:
    tensors = [tensor.requires_grad_() for tensor in operands(Q_LEN, Q_LEN)]
    output, cotangent = attention(*tensors, causal=True), torch.ones(2, 4, Q_LEN, SIZE)
    expected = torch.autograd.grad(output, tensors, cotangent)[0][:, :, :15].double()
    with torch.no_grad():
        tensors[2][..., 520, 3] = 1e30
    cotangent[:, :, 15, 3] = 1e30
    gradients = torch.autograd.grad(attention(*tensors, causal=True), tensors, cotangent)
    assert all(gradient[:, :, 16:].isfinite().all() for gradient in gradients)
    assert_near(gradients[0][:, :, :15].double(), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("values", [[], [math.nan], [math.inf], [math.inf, -math.inf], [math.nan, math.inf, -math.inf]])
def test_the_search_of_a_result_finds_nan_alone(values: list[float], dtype: str) -> None:
    whole = torch.ones((2, 3, 31, 7), dtype=getattr(torch, dtype))
    # Whole results whose sum is finite, and others whose sum overflows in 16 bits, or in every dtype.
    for scale in (1.0, 6e4, torch.finfo(whole.dtype).max):
        array = whole * scale
        for place, size in enumerate(values):
            array[1, 2, 5 * place, 3] = size
        assert leaks.has_nan(array) is any(map(math.isnan, values))
        # Both infinities of an array that is not contiguous count as a NaN.
        for view in (array.transpose(1, 2).contiguous().transpose(1, 2), array.repeat_interleave(2, -1)[..., ::2]):
            assert leaks.has_nan(view) is math.isnan(sum(values))

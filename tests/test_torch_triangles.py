"""A mask that is causal costs as little as `causal=True` in PyTorch, and has the same results."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.comparisons import assert_equal, assert_near
from torch import Tensor

import mha_spec_torch
from mha_spec_torch import native, triangles

BATCH, HEADS, KV_HEADS, SIZE = 3, 10, 5, 7


def operands(length: int, heads: int = HEADS, kv_heads: int = KV_HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(BATCH, count, length, SIZE) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute output and lse as the specification says, for rows that see a key."""
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (key, value))
    scores = (query @ key.mT / math.sqrt(SIZE)).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.fixture(params=[8, 1024], ids=["large", "kept"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let triangles of the tests be larger than those that are kept, and then smaller."""
    monkeypatch.setattr(triangles, "KEPT", request.param)


def lower_triangle(length: int, batch: int = 1, heads: int = 1) -> Tensor:
    return torch.ones(batch, heads, length, length, dtype=torch.bool).tril()


@pytest.fixture
def is_causal(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The argument `is_causal` of every call of the kernel."""
    arguments: list[bool] = []
    forward: Any = native._forward

    def recording(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        arguments.append(tensors[4])
        return forward(*tensors, **options)

    monkeypatch.setattr(native, "_forward", recording)
    return arguments


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("length", [8, 40])
def test_a_causal_mask_has_the_results_of_causal(is_causal: list[bool], length: int) -> None:
    tensors = operands(length)
    masked = mha_spec_torch.attention(*tensors, mask=lower_triangle(length), return_lse=True)
    causal = mha_spec_torch.attention(*tensors, causal=True, return_lse=True)
    assert is_causal == [True, True]
    assert_equal(masked, causal)


def test_its_gradients_are_those_of_causal() -> None:
    tensors = [tensor.requires_grad_() for tensor in operands(40)]
    masked: Any = mha_spec_torch.attention(*tensors, mask=lower_triangle(40))
    causal: Any = mha_spec_torch.attention(*tensors, causal=True)
    cotangent = torch.randn(masked.shape, generator=torch.Generator().manual_seed(0), dtype=masked.dtype)
    gradients = [torch.autograd.grad(output, tensors, cotangent) for output in (masked, causal)]
    assert_equal(*gradients)


def test_a_mask_for_each_head_and_entry_is_compared_too(is_causal: list[bool]) -> None:
    mask = lower_triangle(24, BATCH, HEADS)
    mha_spec_torch.attention(*operands(24), mask=mask)
    mask[2, 7, 5, 6] = True
    mha_spec_torch.attention(*operands(24), mask=mask)
    assert is_causal == [True, False]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("pair", [(0, 1), (5, 6), (-1, 0), (-1, -1)])
def test_a_mask_that_differs_in_one_pair_is_not_causal(is_causal: list[bool], pair: tuple[int, int]) -> None:
    (query, key, value), mask = operands(24), lower_triangle(24)
    mask[0, 0, pair[0], pair[1]] ^= True
    results = mha_spec_torch.attention(query, key, value, mask=mask, return_lse=True)
    assert is_causal == [False]
    assert_near(results, formula(query, key, value, mask))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_the_kernel_would_multiply_by_minus_infinity(is_causal: list[bool], scale: float) -> None:
    tensors = operands(24)
    masked = mha_spec_torch.attention(*tensors, mask=lower_triangle(24), scale=scale)
    assert is_causal == [False]
    assert_equal(masked, mha_spec_torch.attention(*tensors, causal=True, scale=scale))


def test_hidden_values_of_a_causal_mask_reach_no_result() -> None:
    query, key, value = operands(24)
    mask = lower_triangle(24)
    expected: Any = mha_spec_torch.attention(query, key, value, mask=mask)
    key[:, :, 17], value[:, :, 17] = math.nan, math.inf
    output: Any = mha_spec_torch.attention(query, key, value, mask=mask)
    assert_near(output[:, :, :17], expected[:, :, :17])
    assert output[:, :, 17:].isnan().all()


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.ones(1, 1, 23, 23, dtype=torch.bool).tril(), id="not a multiple of 8"),
        pytest.param(torch.ones(1, 1, 24, 24, dtype=torch.bool).triu().mT, id="transposed"),
        pytest.param(torch.ones(577, dtype=torch.bool)[1:].view(1, 1, 24, 24), id="begins inside of a word"),
        pytest.param(torch.ones(1, 1, 24, 40, dtype=torch.bool).tril(), id="more keys than queries"),
    ],
)
def test_other_pairs_in_memory_have_their_meaning(mask: Tensor) -> None:
    query, (_, key, value) = operands(mask.shape[2])[0], operands(mask.shape[3])
    results = mha_spec_torch.attention(query, key, value, mask=mask, return_lse=True)
    assert_near(results, formula(query, key, value, mask))

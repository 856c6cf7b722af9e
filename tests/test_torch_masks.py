"""What the CPU's kernel of PyTorch gets for a mask: `is_causal`, or logits, which the layers of a model share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.comparisons import assert_equal, assert_near
from torch import Tensor

import mha_spec_torch
from mha_spec_torch import masks, native

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


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the masks of the tests, which are small, and forget those of other tests."""
    monkeypatch.setattr(masks, "SMALLEST", 2)
    masks._kept.clear()


@pytest.fixture(params=[0, masks.LARGEST_KEPT], ids=["large", "kept"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the masks of the tests be larger than those that are kept, and then smaller."""
    monkeypatch.setattr(masks, "LARGEST_KEPT", request.param)


def lower_triangle(length: int, batch: int = 1, heads: int = 1) -> Tensor:
    return torch.ones(batch, heads, length, length, dtype=torch.bool).tril()


@pytest.fixture
def is_causal(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The argument `is_causal` of every call of the kernel."""
    arguments: list[bool] = []
    forward: Any = native.forward

    def recording(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        arguments.append(tensors[4])
        return forward(*tensors, **options)

    monkeypatch.setattr(native, "forward", recording)
    return arguments


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("length", [11, 41])
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


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("poison", [0.0, math.nan])
@pytest.mark.parametrize("kind", ["causal", "random"])
def test_a_mask_that_changes_between_the_passes_changes_no_gradient(
    kind: str, poison: float, create_graph: bool
) -> None:
    # The NaN is hidden from all rows but the last, so that the kernel's gradients must be replaced.
    mask = lower_triangle(40)
    if kind == "random":
        mask &= torch.rand(mask.shape, generator=torch.Generator().manual_seed(4)) < 0.7
        mask[..., -1, -1] = True
    tensors = [tensor.requires_grad_() for tensor in operands(40)]
    cotangent = torch.ones(*tensors[0].shape[:3], tensors[2].shape[3], dtype=torch.float64)
    cotangent[:, :, -1] = poison
    results: list[Any] = []
    for change in (False, True):
        passed = mask.clone()
        output: Any = mha_spec_torch.attention(*tensors, mask=passed)
        if change:
            passed.logical_not_()
        gradients = torch.autograd.grad(output, tensors, cotangent, create_graph=create_graph)
        if create_graph:
            gradients += torch.autograd.grad(gradients[0][:, :, 0].square().sum(), tensors)
        results.append([gradient.detach().nan_to_num() for gradient in gradients])
    assert_equal(*results)
    expected: Any = mha_spec_torch.attention(*tensors, mask=mask, return_lse=True)[0]
    assert_near(results[0][0][:, :, :-1], torch.autograd.grad(expected, tensors, cotangent)[0][:, :, :-1])


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


TRIANGLE = lower_triangle(23)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        pytest.param(TRIANGLE.mT.contiguous().mT, True, id="transposed in memory"),
        pytest.param(torch.cat([TRIANGLE.flatten()] * 2)[529:].view(1, 1, 23, 23), True, id="behind other pairs"),
        pytest.param(TRIANGLE.expand(BATCH, HEADS, 23, 23), True, id="shared by all heads"),
        pytest.param(TRIANGLE.mT, False, id="upper triangle"),
        pytest.param(torch.ones(1, 1, 23, 41, dtype=torch.bool).tril(), False, id="more keys than queries"),
        pytest.param(torch.ones(1, 1, 1, 1, dtype=torch.bool), False, id="a single pair"),
    ],
)
def test_pairs_have_their_meaning_however_they_lie_in_memory(
    is_causal: list[bool], mask: Tensor, expected: bool
) -> None:
    query, (_, key, value) = operands(mask.shape[2])[0], operands(mask.shape[3])
    results = mha_spec_torch.attention(query, key, value, mask=mask, return_lse=True)
    assert is_causal == [expected]
    assert_near(results, formula(query, key, value, mask))


@pytest.mark.parametrize("shape", [(BATCH, HEADS, 1, 1), (BATCH, HEADS, 1, 13), (BATCH, HEADS, 13, 1)])
def test_a_mask_that_broadcasts_over_queries_or_keys_is_not_causal(
    is_causal: list[bool], shape: tuple[int, ...]
) -> None:
    query, key, value = operands(13)
    mask = torch.ones(shape, dtype=torch.bool)
    results = mha_spec_torch.attention(query, key, value, mask=mask, return_lse=True)
    output = mha_spec_torch.attention(query, key, value, mask=mask)
    assert is_causal == [False, False]
    expected = formula(query, key, value, mask)
    assert_near((*results, output), (*expected, expected[0]))


@pytest.mark.parametrize("shape", [(0, 1, 5, 5), (2, 1, 0, 0), (1, 1, 23, 23)])
def test_a_few_pairs_are_converted_without_a_comparison(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(masks, "SMALLEST", 23 * 23 + 1)
    mask = torch.ones(shape, dtype=torch.bool).tril()
    assert logits(mask) is not logits(mask)


def logits(mask: Tensor, dtype: torch.dtype = torch.float64, *, may_be_causal: bool = True) -> Any:
    """Return the logits of a mask, which must have their values whether they were kept or not."""
    added: Any = masks.constraint_of(mask, dtype, may_be_causal=may_be_causal).added
    assert_equal(added, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf))
    return added


def test_equal_masks_share_their_logits() -> None:
    mask = torch.rand((BATCH, 1, 13, 17), generator=torch.Generator().manual_seed(2)) < 0.6
    windowed = mask.tril(3).triu(-3)
    added, of_window = logits(mask), logits(windowed)
    for _ in range(2):
        assert logits(mask.clone()) is added
        assert logits(windowed.mT.contiguous().mT) is of_window
    mask[2, 0, 7, 5] ^= True
    assert logits(mask) is not added, "a change in place counts"
    assert logits(mask.view(1, BATCH, 13, 17)) is not logits(mask)
    assert logits(mask, torch.float32).dtype == torch.float32


def test_a_kept_triangle_is_not_causal_for_a_scale_that_forbids_it() -> None:
    triangle = lower_triangle(13)
    assert masks.constraint_of(triangle, torch.float64, may_be_causal=True).is_causal
    logits(triangle, may_be_causal=False)


def test_logits_of_inference_mode_serve_a_call_that_is_differentiated() -> None:
    tensors = operands(13)
    mask = torch.rand((BATCH, 1, 13, 13), generator=torch.Generator().manual_seed(2)) < 0.6
    with torch.inference_mode():
        expected: Any = mha_spec_torch.attention(*tensors, mask=mask)
    output: Any = mha_spec_torch.attention(*(tensor.requires_grad_() for tensor in tensors), mask=mask)
    assert_equal(output.detach(), expected)
    output.sum().backward()
    shared = [tensor.grad for tensor in tensors]
    masks._kept.clear()
    fresh: Any = mha_spec_torch.attention(*tensors, mask=mask)
    assert_equal(shared, torch.autograd.grad(fresh.sum(), tensors))

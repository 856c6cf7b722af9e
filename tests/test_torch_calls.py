"""mha_spec_torch prepares an eager call once per signature: an equal call later takes the same path."""

from __future__ import annotations

import gc
import math
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.torch_world import forget_calls, operands
from torch.utils.checkpoint import checkpoint

import mha_spec_torch
from mha_spec.errors import ArgumentTypeError
from mha_spec_torch import calls, visibility

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

attention: Any = mha_spec_torch.attention

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 1), "q_offset": 2},
    "lengths": {"kv_lengths": [17, 5], "q_lengths": [29, 11]},
    "mask": {"mask": torch.arange(32) % 3 != 1},
    "bias": {"bias": torch.linspace(-1, 1, 32)},
    "sinks": {"sinks": torch.linspace(-1, 1, 4)},
    "softcap": {"softcap": 2.0},
}
OPTIONS["mask"]["mask"] = OPTIONS["mask"]["mask"].reshape(1, 1, 1, 32)
OPTIONS["bias"]["bias"] = OPTIONS["bias"]["bias"].reshape(1, 1, 1, 32)


@pytest.fixture(autouse=True)
def _no_call_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_calls(monkeypatch)


def inputs(number: float | None = None) -> list[Tensor]:
    """Return query, key and value that need gradients; `number` replaces an element of the last value."""
    tensors = operands()
    if number is not None:
        tensors[2][-1, -1, -1, -1] = number
    return [tensor.requires_grad_() for tensor in tensors]


def gradients(tensors: list[Tensor], options: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
    """Return output and gradients of a call, through a checkpoint if `more` has its options."""

    def call(*operands: Tensor) -> Tensor:
        return attention(*operands, **options)

    output = checkpoint(call, *tensors, **more) if more else call(*tensors)
    return output.detach(), *torch.autograd.grad((output * output.detach().cos()).sum(), tensors)


def assert_equal(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Require that results are equal to the bit, NaN included."""
    for result, other in zip(results, expected, strict=True):
        numpy.testing.assert_array_equal(result.numpy(), other.numpy(), strict=True)


@pytest.mark.parametrize("number", [None, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_an_equal_call_has_equal_results(options: str, number: float | None) -> None:
    first, second = (gradients(inputs(number), OPTIONS[options]) for _ in range(2))
    assert calls.PREPARED
    assert_equal(second, first)


@pytest.mark.parametrize("number", [None, math.nan], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_checkpoint_repeats_the_call(options: str, number: float | None) -> None:
    """The forward pass of the first call is not prepared, and its repetition in the backward pass is."""
    expected = gradients(inputs(number), OPTIONS[options])
    calls.PREPARED.clear()
    for _ in range(3):
        assert_equal(gradients(inputs(number), OPTIONS[options], use_reentrant=False), expected)


@pytest.mark.parametrize("options", ["plain", "causal"])
def test_a_checkpoint_has_gradients_of_gradients(options: str) -> None:
    def second_order(**more: Any) -> tuple[Tensor, ...]:
        tensors = inputs()

        def call(*operands: Tensor) -> Tensor:
            return attention(*operands, **OPTIONS[options])

        output = checkpoint(call, *tensors, **more) if more else call(*tensors)
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(torch.stack([gradient.square().sum() for gradient in first]).sum(), tensors)

    expected = second_order()
    for _ in range(2):
        assert_equal(second_order(use_reentrant=False), expected)


def norm_of_gradients(*tensors: Tensor) -> Tensor:
    """A function of gradients, such as a penalty or the forces of an energy."""
    energy = attention(*tensors, causal=True).square().sum()
    gradients = torch.autograd.grad(energy, tensors, create_graph=True)
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum()


def norm_of_vjp(*tensors: Tensor) -> Tensor:
    return mha_spec_torch.attention_vjp(tensors[0], *tensors, causal=True)[1].square().sum()


def norm_of_packed_vjp(*tensors: Tensor) -> Tensor:
    query, key, value = (tensor[0].transpose(0, 1) for tensor in tensors)
    return mha_spec_torch.varlen_attention_vjp(query, query, key, value, [0, 9, 32], [0, 9, 32])[1].square().sum()


@pytest.mark.parametrize("function", [norm_of_gradients, norm_of_vjp, norm_of_packed_vjp])
def test_gradients_within_hooks_of_saved_tensors(function: Callable[..., Tensor]) -> None:
    def on_cpu(*tensors: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return function(*tensors)

    expected = torch.autograd.grad(function(*(tensors := inputs())), tensors)
    for call in (on_cpu, partial(checkpoint, function, use_reentrant=False)):
        total = call(*(tensors := inputs()))
        assert_equal(torch.autograd.grad(total, tensors), expected)


class Cut(torch.autograd.Function):
    """Passes its input on, and has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:  # noqa: ARG004
        return None


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("options", ["plain", "causal", "bias"])
def test_an_output_without_a_cotangent(options: str, create_graph: bool) -> None:
    for _ in range(2):
        tensors = inputs()
        total = Cut.apply(attention(*tensors, **OPTIONS[options])).sum() + tensors[0].sum()
        results = torch.autograd.grad(total, tensors, create_graph=create_graph, allow_unused=True)
        assert torch.equal(results[0], torch.ones_like(tensors[0]))
        assert all(gradient is None or not gradient.any() for gradient in results[1:])


@pytest.mark.parametrize("maps", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_cotangents_in_a_batch(options: str, maps: str) -> None:
    """autograd's `is_grads_batched` and torch.vmap map the backward pass, in which nothing can be read."""
    tensors = inputs()
    cotangents = [attention(*operands(), **OPTIONS[options]).roll(shift) for shift in range(3)]
    for _ in range(2):
        output = attention(*tensors, **OPTIONS[options])
        pull = partial(torch.autograd.grad, output, tensors, retain_graph=True)
        stacked = torch.stack(cotangents)
        batched = torch.vmap(pull)(stacked) if maps == "vmap" else pull(stacked, is_grads_batched=True)
        for place, cotangent in enumerate(cotangents):
            single = torch.autograd.grad(attention(*tensors, **OPTIONS[options]), tensors, cotangent)
            torch.testing.assert_close([gradient[place] for gradient in batched], list(single))


LENGTHS: dict[str, Any] = {
    "an array of lists": numpy.array([[1], [2, 3]], dtype=object),
    "an array of floats": numpy.array([3.0, 5.0]),
    "a sparse tensor": torch.tensor([3, 5]).to_sparse(),
    "a tensor of booleans": torch.tensor([True, False]),
}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_checks_come_before_anything_is_read(lengths: str) -> None:
    for _ in range(2):
        with pytest.raises(ArgumentTypeError, match="`kv_lengths`"):
            attention(*operands(), kv_lengths=LENGTHS[lengths])


def test_a_prepared_call_keeps_no_argument() -> None:
    lengths, mask = torch.tensor([17, 5]), torch.ones(1, 1, 32, 32, dtype=torch.bool)
    tensors = operands()
    attention(*tensors, kv_lengths=lengths, mask=mask, bias=torch.zeros(1, 1, 1, 32))
    assert calls.PREPARED
    references = [weakref.ref(tensor) for tensor in (*tensors, lengths, mask)]
    del tensors, lengths, mask
    gc.collect()
    assert not any(reference() is not None for reference in references)


@pytest.mark.parametrize("options", [{"window": (64, 0)}, {"window": (64, 0), "kv_lengths": [2000, 1500]}], ids=str)
def test_the_comparisons_of_a_call_have_a_limit_together(options: dict[str, Any]) -> None:
    attention(*operands(2048, 2048), q_offset=0, **options)
    (problem,) = calls.PREPARED.values()
    kept = [task.visible for task in problem.visibility.tasks if task.visible is not None]
    assert len(problem.visibility.tasks) > 1
    assert sum(visible.numel() for visible in kept) <= visibility.KEPT_PAIRS


def test_the_number_of_prepared_calls_has_a_limit() -> None:
    tensors = operands(3, 5)
    for number in range(calls.MOST_PREPARED + 7):
        attention(*tensors, scale=1 + number / 512)
    assert 0 < len(calls.PREPARED) <= calls.MOST_PREPARED

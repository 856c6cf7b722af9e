"""An argument that changes in place between the two passes of PyTorch changes no gradient, or autograd refuses it.

Integers, ids and slopes are copied when a call is made. Tensors that hold a number for each pair or operand are saved,
and so is each tensor of which the numbers are not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.numbers import numbers
from support.torch_world import forget_calls
from support.varlen import HEADS as PACKED_HEADS
from support.varlen import cotangents, packed, paged

import mha_spec_torch
from mha_spec_torch import calls, fused

if TYPE_CHECKING:
    from collections.abc import Callable

    Call = dict[str, Any]

BATCH, HEADS, KV_HEADS, LENGTH, SIZE = 2, 4, 2, 7, 5
IDS = numpy.array([[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 2, 3]])
NUMBERS: dict[str, tuple[Call, Call]] = {
    "kv_lengths": ({"kv_lengths": numpy.array([5, 3])}, {}),
    "q_lengths": ({"q_lengths": numpy.array([5, 3])}, {}),
    "kv_starts": ({"kv_starts": numpy.array([1, 3])}, {}),
    "prefix_lengths": ({"prefix_lengths": numpy.array([5, 3])}, {"causal": True}),
    "q_offset": ({"q_offset": numpy.array([2, 0])}, {"causal": True}),
    "segments": ({"q_segment_ids": IDS, "kv_segment_ids": IDS[::-1].copy()}, {}),
}
"""Options whose numbers a call keeps, and the options that they need."""
PAIRS: dict[str, Call] = {
    "mask": {"mask": numpy.random.default_rng(3).random((BATCH, 1, LENGTH, LENGTH)) < 0.6},
    "dropout": {"dropout_mask": numpy.random.default_rng(3).random((BATCH, HEADS, LENGTH, LENGTH)) < 0.6},
    "bias": {"bias": numbers(1, HEADS, LENGTH, LENGTH, seed=7)},
    "sinks": {"sinks": numbers(HEADS, seed=7)},
}
PACKED: dict[str, tuple[Callable[..., Call], Call]] = {
    "packed": (packed, {"seqused_kv": numpy.array([5, 1, 0, 9, 2])}),
    "paged": (paged, {}),
    "offsets": (packed, {"causal": True, "q_offset": numpy.array([1, 0, 0, 2, 1])}),
    "slopes": (packed, {"alibi_slopes": abs(numbers(PACKED_HEADS, seed=9)), "q_offset": 0}),
    "slopes in pages": (paged, {"alibi_slopes": abs(numbers(PACKED_HEADS, seed=9)), "q_offset": 0}),
}
FORMS: dict[str, Callable[[numpy.ndarray], Any]] = {"tensor": torch.tensor, "array": numpy.array}
REFUSED = "modified by an inplace operation"


def dense(**options: Any) -> tuple[Any, list[torch.Tensor]]:
    """Return the output and lse of a dense call, and its operands."""
    shapes = (BATCH, HEADS, LENGTH, SIZE), (BATCH, KV_HEADS, LENGTH, SIZE), (BATCH, KV_HEADS, LENGTH, 3)
    operands = [torch.tensor(numbers(*shape, seed=seed)).requires_grad_() for seed, shape in enumerate(shapes)]
    return mha_spec_torch.attention(*operands, **options, return_lse=True), operands


def gradients(results: Any, operands: list[torch.Tensor], *, create_graph: bool) -> list[torch.Tensor]:
    cotangent = [torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape) for result in results]
    return [*torch.autograd.grad(results, operands, cotangent, create_graph=create_graph)]


def change(arguments: Call) -> None:
    """Set each number of the arguments to that of its neighbour, in place."""
    for array in arguments.values():
        array[...] = array.roll(1) if isinstance(array, torch.Tensor) else numpy.roll(array, 1)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_the_call(name: str, form: str, create_graph: bool) -> None:
    arrays, others = NUMBERS[name]
    arguments = {label: FORMS[form](array) for label, array in arrays.items()}
    expected = gradients(*dense(**arguments, **others), create_graph=create_graph)
    results, operands = dense(**arguments, **others)
    change(arguments)
    ours = gradients(results, operands, create_graph=create_graph)
    changed = gradients(*dense(**arguments, **others), create_graph=create_graph)
    assert all(map(torch.equal, ours, expected))
    assert not torch.equal(changed[0], expected[0])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_a_change_of_a_tensor_for_pairs_is_refused(name: str, create_graph: bool) -> None:
    arguments = {label: torch.tensor(array) for label, array in PAIRS[name].items()}
    results, operands = dense(**arguments)
    change(arguments)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradients(results, operands, create_graph=create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_change_of_a_tensor_that_is_not_read_is_refused(
    name: str, create_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_calls(monkeypatch)
    monkeypatch.setattr(calls, "readable", lambda _: False)
    arrays, others = NUMBERS[name]
    for label in arrays:
        arguments = {label: torch.tensor(array) for label, array in arrays.items()}
        results, operands = dense(**arguments, **others)
        change({label: arguments[label]})
        with pytest.raises(RuntimeError, match=REFUSED):
            gradients(results, operands, create_graph=create_graph)


@pytest.mark.parametrize("arguments", [NUMBERS["segments"][0], PAIRS["mask"]], ids=["segments", "mask"])
def test_a_fused_kernel_refuses_a_change_before_a_second_derivative(
    arguments: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_calls(monkeypatch)
    monkeypatch.setattr(fused, "on_cuda", lambda _: True)
    monkeypatch.setattr(calls, "readable", lambda _: False)
    tensors = {label: torch.tensor(numpy.array(array)) for label, array in arguments.items()}
    shape = BATCH, HEADS, LENGTH, SIZE
    operands = [torch.tensor(numbers(*shape, seed=seed)).requires_grad_() for seed in range(3)]
    output: Any = mha_spec_torch.attention(*operands, **tensors)
    change(tensors)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradients((output,), operands, create_graph=True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_call_has_the_gradients_of_its_numbers(name: str, form: str, create_graph: bool) -> None:
    layout, options = PACKED[name]
    call = layout() | options
    labels = ("query", "key", "value")
    arguments = {label: x for label, x in call.items() if isinstance(x, numpy.ndarray) and label not in labels}
    cotangent = [torch.tensor(x) for x in cotangents(call).values()]
    operands = [torch.tensor(call[label]).requires_grad_() for label in labels]

    def attend(*, changes: bool) -> list[torch.Tensor]:
        copies = {label: FORMS[form](x) for label, x in arguments.items() if label != "alibi_slopes"}
        copies |= {label: torch.tensor(arguments[label]) for label in arguments.keys() - copies.keys()}
        results: Any = mha_spec_torch.varlen_attention(
            **call | dict(zip(labels, operands, strict=True)) | copies, return_lse=True
        )
        for array in copies.values() if changes else ():
            array[...] = 0
        return [*torch.autograd.grad(results, operands, cotangent, create_graph=create_graph)]

    assert all(map(torch.equal, attend(changes=True), attend(changes=False)))

"""mha_spec_torch prepares equal calls once: whatever changes after equal calls must count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.torch_world import forget_calls, operands
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import mha_spec_torch
from mha_spec.errors import ArgumentTypeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

attention: Any = mha_spec_torch.attention

MASK = torch.arange(32 * 32).reshape(1, 1, 32, 32) % 3 != 1
OTHER_MASK = torch.arange(32 * 32).reshape(1, 1, 32, 32) % 5 != 1


@pytest.fixture(autouse=True)
def _no_call_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_calls(monkeypatch)


def fresh(tensors: list[Tensor], **options: Any) -> Tensor:
    """Return the output of a call that follows none."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        forget_calls(monkeypatch)
        return attention(*tensors, **options)


def assert_like(output: Tensor, expected: Tensor) -> None:
    numpy.testing.assert_array_equal(output.detach().numpy(), expected.detach().numpy(), strict=True)


def test_another_mask_of_the_same_shape_counts() -> None:
    tensors = operands()
    for mask in (MASK, OTHER_MASK, MASK, OTHER_MASK):
        assert_like(attention(*tensors, mask=mask), fresh(tensors, mask=mask))
    changed = MASK.clone()
    for _ in range(2):
        changed.logical_not_()
        assert_like(attention(*tensors, mask=changed), fresh(tensors, mask=changed))


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another value": ({"causal": True}, {"causal": False}),
    "another scale": ({"scale": 0.25}, {"scale": 0.5}),
    "an option more": ({}, {"causal": True}),
    "an option less": ({"causal": True, "scale": 0.25}, {"scale": 0.25}),
    "another option": ({"mask": None}, {"bias": None}),
    "a mask after no mask": ({"mask": None}, {"mask": MASK}),
    "no mask after a mask": ({"mask": MASK}, {"mask": None}),
    "another shape of the mask": ({"mask": MASK}, {"mask": MASK[..., :1, :]}),
    "a bias in place of a mask": ({"mask": MASK}, {"bias": MASK.to(torch.float32)}),
}


@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_an_option_counts(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors = operands()
    for _ in range(2):
        attention(*tensors, **before)
    output = attention(*tensors, **after)
    assert_like(output, fresh(tensors, **after))


@pytest.mark.parametrize(
    ("before", "after"),
    [({"causal": True}, {"causal": 1}), ({"scale": 1.0}, {"scale": True}), ({"mask": MASK}, {"mask": MASK.numpy()})],
    ids=["1 for True", "True for 1.0", "an array of NumPy"],
)
def test_an_equal_value_of_another_type_is_refused(before: dict[str, Any], after: dict[str, Any]) -> None:
    for _ in range(2):
        attention(*operands(), **before)
    with pytest.raises(ArgumentTypeError):
        attention(*operands(), **after)


def test_a_list_that_changes_in_place_counts() -> None:
    tensors, lengths = operands(), [32, 32]
    for length in (32, 32, 32, 7, 7):
        lengths[:] = [length, length]
        assert_like(attention(*tensors, kv_lengths=lengths), fresh(tensors, kv_lengths=[length, length]))


OF_ALL: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda x: x[:, :, :16],
    "dtype": lambda x: x.to(torch.float64),
    "16 bits": lambda x: x.to(torch.bfloat16),
}
OF_EACH: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last stride": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "gradient": lambda x: x.clone().requires_grad_(),
    "parameter": torch.nn.Parameter,
    "negated": lambda x: torch.view_as_complex(torch.stack([x, -x], dim=-1)).conj().imag,
}


@pytest.mark.parametrize(
    ("places", "change"),
    [
        *(pytest.param((0, 1, 2), change, id=f"{name} of all") for name, change in (OF_ALL | OF_EACH).items()),
        *(pytest.param((place,), OF_EACH[name], id=f"{name} of {place}") for name in OF_EACH for place in range(3)),
    ],
)
def test_a_change_of_the_tensors_counts(places: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> None:
    for _ in range(2):
        attention(*operands(), causal=True)
    tensors = [change(tensor) if place in places else tensor for place, tensor in enumerate(operands())]
    output = attention(*tensors, causal=True)
    expected = fresh(tensors, causal=True)
    assert output.dtype == expected.dtype
    assert output.requires_grad == expected.requires_grad
    assert torch.equal(output, expected)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor([row[0] for row in x], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x[0, 0].to_sparse_csr(),
    "mkldnn": lambda x: x.to(torch.float32).to_mkldnn(),
    "an array of NumPy": lambda x: x.numpy(),
    "nothing": lambda _: None,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("place", ["query", "key", "value", "mask"])
def test_another_kind_of_operand_is_refused(place: str, kind: Callable[[Tensor], Any]) -> None:
    """A description of the call must not fail at an operand that has no shape or no strides."""
    arguments = dict(zip(("query", "key", "value"), operands(), strict=True), mask=MASK)
    for _ in range(2):
        attention(**arguments)
    changed = kind(arguments[place])
    if place == "mask" and changed is None:
        assert_like(attention(**arguments | {place: None}), fresh(operands()))
        return
    with pytest.raises(ArgumentTypeError):
        attention(**arguments | {place: changed})


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_mode_counts(mode: Callable[[], Any]) -> None:
    tensors = [tensor.requires_grad_() for tensor in operands()]
    for _ in range(2):
        attention(*tensors, causal=True)
    with mode():
        output = attention(*tensors, causal=True)
        expected = fresh(tensors, causal=True)
    assert output.dtype == expected.dtype
    assert output.requires_grad == expected.requires_grad
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_dual_number_keeps_its_tangent() -> None:
    tensors = operands()
    for _ in range(2):
        attention(*tensors, causal=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        tangent = forward_ad.unpack_dual(attention(dual, *tensors[1:], causal=True)).tangent
    jvp: Any = torch.func.jvp
    ones = (torch.ones_like(tensors[0]),)
    _, expected = jvp(lambda query: attention(query, *tensors[1:], causal=True), (tensors[0],), ones)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": MASK}], ids=["plain", "causal", "mask"])
def test_modes_of_tracers_count(options: dict[str, Any]) -> None:
    """A call that is prepared already must still become an operator of the trace."""
    tensors = operands()
    for _ in range(2):
        attention(*tensors, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = attention(*tensors, **options)
    assert isinstance(output, FakeTensor)
    assert output.shape == tensors[0].shape
    traced = make_fx(lambda *tensors: attention(*tensors, **options), tracing_mode="real")(*tensors)
    assert any("mha_spec_torch" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize", "trace"])
def test_a_transform_counts(transform: str) -> None:
    tensors = operands()
    for _ in range(2):
        attention(*tensors, causal=True)

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, causal=True)

    if transform == "vmap":
        output = torch.vmap(call)(*(tensor[None] for tensor in tensors))[0]
    elif transform == "grad":
        output = torch.func.vjp(call, *tensors)[0]
    elif transform == "functionalize":
        output = torch.func.functionalize(call)(*tensors)
    else:
        # A trace of the call must hold its operators for other tensors.
        traced: Any = torch.jit.trace(call, tuple(tensors), check_trace=False)
        tensors = [tensor + 1 for tensor in tensors]
        output = traced(*tensors)
    torch.testing.assert_close(output, fresh(tensors, causal=True))


def test_a_call_that_needs_lse_counts() -> None:
    tensors = operands()
    for _ in range(2):
        attention(*tensors, causal=True)
    output, lse = attention(*tensors, causal=True, return_lse=True)
    assert lse.shape == output.shape[:3]
    with pytest.raises(ArgumentTypeError):
        attention(*tensors, causal=True, return_lse=0)

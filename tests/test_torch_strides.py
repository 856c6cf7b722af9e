"""Operands of mha_spec_torch that lie otherwise than their shape says: strides, overlaps, and other kinds of tensor."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_equal
from support.random_calls import ask, assert_allowed
from support.torch_world import tensor
from torch.nn.functional import pad

import mha_spec_torch
from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec_conformance.targets.conversion import to_numpy
from mha_spec_torch import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, SIZE = 2, 6, 3, 5, 23, 8


weights_of: Callable[..., Any] = mha_spec_torch.attention_weights


def call(v_dim: int = SIZE) -> dict[str, Tensor]:
    """Every floating operand, in a call that the kernels of the CPU take."""
    random = numpy.random.default_rng(7)
    shapes = {
        "query": (BATCH, HEADS, Q_LEN, SIZE),
        "key": (BATCH, KV_HEADS, KV_LEN, SIZE),
        "value": (BATCH, KV_HEADS, KV_LEN, v_dim),
        "grad_output": (BATCH, HEADS, Q_LEN, v_dim),
        "grad_lse": (BATCH, HEADS, Q_LEN),
        "bias": (BATCH, HEADS, Q_LEN, KV_LEN),
        "sinks": (HEADS,),
    }
    return {name: tensor(random.standard_normal(shape), "float32") for name, shape in shapes.items()}


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def reversed_axes(x: Tensor) -> Tensor:
    axes = tuple(range(x.ndim))[::-1]
    return x.permute(axes).contiguous().permute(axes)


def inner(x: Tensor) -> Tensor:
    return pad(x, (1, 3), value=math.nan)[..., 1:-3]


def same_component(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def same_row(x: Tensor) -> Tensor:
    return x[..., :1, :].expand(x.shape) if x.ndim > 1 else x


def overlapping(x: Tensor) -> Tensor:
    """Rows that begin one component apart."""
    return torch.arange(0.0, x.numel()).cos().as_strided(x.shape, [1] * x.ndim)


LAYOUTS = {
    layout.__name__: layout for layout in (every_other, reversed_axes, inner, same_component, same_row, overlapping)
}
PATHS: dict[str, dict[str, Any]] = {
    "flash": {},
    "flash with sizes that differ": {"v_dim": SIZE - 1},
    "flash with causal": {"causal": True, "q_offset": KV_LEN - Q_LEN},
    "formula": {"softcap": 2.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_strides_do_not_matter(function: str, path: str, layout: str) -> None:
    """The kernels of the CPU look at no stride of the last axis, and were given it."""
    options = dict(PATHS[path])
    operands = call(options.pop("v_dim", SIZE))
    for used in ({}, {"bias", "sinks"}):
        given = {name: one for name, one in operands.items() if name in used or name not in {"bias", "sinks"}}
        for name, one in given.items():
            odd = given | {name: LAYOUTS[layout](one)}
            plain = odd | {name: odd[name].clone(memory_format=torch.contiguous_format)}
            assert_allowed(
                function,
                {name: to_numpy(one) for name, one in plain.items()} | options,
                {name: to_numpy(one) for name, one in ask(mha_spec_torch, function, odd | options).items()},
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_without_options(layout: str) -> None:
    operands = {name: one for name, one in call().items() if name in {"query", "key", "value"}}
    for name, one in operands.items():
        odd = operands | {name: LAYOUTS[layout](one)}
        output = {"output": to_numpy(mha_spec_torch.attention(**odd))}
        assert_allowed("attention", {name: to_numpy(one) for name, one in odd.items()}, output)


def test_one_row_is_not_copied() -> None:
    """The stride of an axis of one row says nothing: a decoding step takes its query as the projection left it."""
    row = torch.ones(BATCH, 1, HEADS, SIZE).transpose(1, 2)
    assert native.dense_rows(row) is row


def test_the_gradient_of_a_wide_bias_is_not_that_of_a_rounded_output() -> None:
    """D comes from the weights in float32; an output that was rounded to bfloat16 would be 100 times farther off."""
    given = call()
    operands = [given[name].bfloat16() for name in ("query", "key", "value")]
    bias = given["bias"].requires_grad_()
    grad_output = given["grad_output"].bfloat16()
    (narrow,) = torch.autograd.grad(mha_spec_torch.attention(*operands, bias=bias), bias, grad_output)
    wide_bias = bias.detach().double().requires_grad_()
    wide = mha_spec_torch.attention(*(one.double() for one in operands), bias=wide_bias)
    (exact,) = torch.autograd.grad(wide, wide_bias, grad_output.double())
    assert narrow.dtype == torch.float32
    assert float((narrow - exact).abs().max()) < 2**-8 * 2**-8 * float(exact.abs().max())


# Kinds of tensor that are refused, and those that are not tensors at all.

DENSE = torch.ones(BATCH, KV_HEADS, 5, SIZE)
KINDS: dict[str, tuple[Callable[[], Any], type[MhaSpecError]]] = {
    "numpy": (DENSE.numpy, ArgumentTypeError),
    "list": (lambda: [1.0], ArgumentTypeError),
    "None": (lambda: None, ArgumentTypeError),
    "sparse": (DENSE.to_sparse, ArgumentTypeError),
    "mkldnn": (DENSE.to_mkldnn, ArgumentTypeError),
    "nested": (lambda: torch.nested.nested_tensor(list(DENSE)), ArgumentTypeError),
    "jagged": (lambda: torch.nested.nested_tensor(list(DENSE), layout=torch.jagged), ArgumentTypeError),
    "complex": (lambda: DENSE.to(torch.complex64), ArgumentTypeError),
    "quantized": (lambda: torch.quantize_per_tensor(DENSE, 0.1, 0, torch.qint8), ArgumentTypeError),
    "another device": (lambda: DENSE.to("meta"), ArgumentValueError),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*[qQ]uantiz")
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind: str, name: str) -> None:
    make, error = KINDS[kind]
    operands: dict[str, Any] = dict.fromkeys(("query", "key", "value"), DENSE) | {name: make()}
    with pytest.raises(MhaSpecError) as caught:
        mha_spec_torch.attention(**operands)
    assert isinstance(caught.value, error)
    others = {"another device": ("key", "value")}.get(kind, (name,))
    assert any(f"`{label}`" in str(caught.value) for label in (name, *others))


def test_ids_are_compared_by_value() -> None:
    """What only uint64 holds is a negative number in int64; in one array of floats it would lose its last digits."""
    pairs = [("uint64", "int64", 2**64 - 1, -1), ("uint32", "int32", 2**32 - 1, -1)]
    for (q_type, kv_type, q_id, kv_id), library in product(pairs, (numpy.array, torch_ids)):
        ids = {
            "q_segment_ids": library([[q_id, 3]] * BATCH, q_type),
            "kv_segment_ids": library([[kv_id, 3, q_id % 2**31]] * BATCH, kv_type),
        }
        query, key = torch.ones(BATCH, 1, 2, SIZE), torch.ones(BATCH, 1, 3, SIZE)
        for mapped in (
            mha_spec_torch.attention_weights,
            torch.compile(mha_spec_torch.attention_weights, backend="eager"),
        ):
            weights = mapped(query, key, **ids)
            assert_equal(weights[0, 0], torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def torch_ids(ids: list[list[int]], dtype: str) -> Tensor:
    return torch.tensor(ids, dtype=getattr(torch, dtype))

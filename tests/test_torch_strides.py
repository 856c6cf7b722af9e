"""Memory layouts of the operands of mha_spec_torch: strides, overlaps, and other kinds of tensor."""

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
from mha_spec_torch import tasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, SIZE = 2, 6, 3, 5, 23, 8


weights_of: Callable[..., Any] = mha_spec_torch.attention_weights


def floating_operands(v_dim: int = SIZE) -> dict[str, Tensor]:
    """Return every floating operand of a call that the kernels of the CPU take."""
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


def channels_last(x: Tensor) -> Tensor:
    """Return the layout in which heads lie side by side; torch keeps it in copies and in padding."""
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def inner(x: Tensor) -> Tensor:
    return pad(x, (1, 3), value=math.nan)[..., 1:-3]


def same_component(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


def same_row(x: Tensor) -> Tensor:
    return x[..., :1, :].expand(x.shape) if x.ndim > 1 else x


def overlapping(x: Tensor) -> Tensor:
    """Return rows that begin one component apart."""
    return torch.arange(0.0, x.numel()).cos().as_strided(x.shape, [1] * x.ndim)


LAYOUTS = {
    layout.__name__: layout
    for layout in (every_other, reversed_axes, channels_last, inner, same_component, same_row, overlapping)
}
PATHS: dict[str, dict[str, Any]] = {
    "flash": {},
    "flash with smaller values": {"v_dim": SIZE - 1},
    "flash with larger values": {"v_dim": SIZE + 1},
    "flash with causal": {"causal": True, "q_offset": KV_LEN - Q_LEN},
    "formula": {"softcap": 2.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("function", ["attention", "attention_vjp"])
def test_strides_do_not_matter(function: str, path: str, layout: str) -> None:
    """The kernels of the CPU ignore the stride of the last axis, so that it must be 1."""
    options = dict(PATHS[path])
    operands = floating_operands(options.pop("v_dim", SIZE))
    optional = {"bias", "sinks"}
    for left_out in (optional, set[str]()):
        arguments = {name: x for name, x in operands.items() if name not in left_out}
        for name, x in arguments.items():
            strided = arguments | {name: LAYOUTS[layout](x)}
            plain = strided | {name: strided[name].clone(memory_format=torch.contiguous_format)}
            results = ask(mha_spec_torch, function, strided | options)
            assert_allowed(
                function,
                {label: to_numpy(array) for label, array in plain.items()} | options,
                {label: to_numpy(array) for label, array in results.items()},
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_without_options(layout: str) -> None:
    operands = {name: x for name, x in floating_operands().items() if name in {"query", "key", "value"}}
    for name, x in operands.items():
        strided = operands | {name: LAYOUTS[layout](x)}
        output = {"output": to_numpy(mha_spec_torch.attention(**strided))}
        assert_allowed("attention", {label: to_numpy(array) for label, array in strided.items()}, output)


def test_a_single_row_is_not_copied() -> None:
    """The stride of an axis of size 1 does not matter: a decoding step uses the query of the projection directly."""
    row = torch.ones(BATCH, 1, HEADS, SIZE).transpose(1, 2)
    assert tasks.dense_rows(row) is row


def test_the_gradient_of_a_wide_bias_does_not_use_the_rounded_output() -> None:
    """D is computed from the weights in float32; an output in bfloat16 would give 100 times the error."""
    arguments = floating_operands()
    operands = [arguments[name].bfloat16() for name in ("query", "key", "value")]
    bias = arguments["bias"].requires_grad_()
    grad_output = arguments["grad_output"].bfloat16()
    (narrow,) = torch.autograd.grad(mha_spec_torch.attention(*operands, bias=bias), bias, grad_output)
    wide_bias = bias.detach().double().requires_grad_()
    wide = mha_spec_torch.attention(*(operand.double() for operand in operands), bias=wide_bias)
    (exact,) = torch.autograd.grad(wide, wide_bias, grad_output.double())
    assert narrow.dtype == torch.float32
    assert float((narrow - exact).abs().max()) < 2**-8 * 2**-8 * float(exact.abs().max())


# Kinds of tensor, and other objects, that are refused.

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
def test_an_error_names_an_operand_of_another_kind(kind: str, name: str) -> None:
    make, error = KINDS[kind]
    mha_spec_torch.attention(DENSE, DENSE, DENSE)  # What is kept of this call must not serve another kind of tensor.
    operands: dict[str, Any] = dict.fromkeys(("query", "key", "value"), DENSE) | {name: make()}
    with pytest.raises(MhaSpecError) as caught:
        mha_spec_torch.attention(**operands)
    assert isinstance(caught.value, error)
    others = {"another device": ("key", "value")}.get(kind, (name,))
    assert any(f"`{label}`" in str(caught.value) for label in (name, *others))


def test_ids_are_compared_by_value() -> None:
    """A large id of uint64 becomes negative in int64, and would lose digits in floating point."""
    pairs = [("uint64", "int64", 2**64 - 1, -1), ("uint32", "int32", 2**32 - 1, -1)]
    for (q_type, kv_type, q_id, kv_id), library in product(pairs, (numpy.array, torch_ids)):
        ids = {
            "q_segment_ids": library([[q_id, 3]] * BATCH, q_type),
            "kv_segment_ids": library([[kv_id, 3, q_id % 2**31]] * BATCH, kv_type),
        }
        query, key = torch.ones(BATCH, 1, 2, SIZE), torch.ones(BATCH, 1, 3, SIZE)
        for call in (
            mha_spec_torch.attention_weights,
            torch.compile(mha_spec_torch.attention_weights, backend="eager"),
        ):
            weights = call(query, key, **ids)
            assert_equal(weights[0, 0], torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def torch_ids(ids: list[list[int]], dtype: str) -> Tensor:
    return torch.tensor(ids, dtype=getattr(torch, dtype))

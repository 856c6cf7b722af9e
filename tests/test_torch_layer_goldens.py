"""Compare the functions of PyTorch's layer with the goldens and the reference, eager and compiled."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_equal, assert_same
from support.goldens import LAYER, PER_ENTRY, cases, cases_with_each, layer_failures, names
from support.layers import EMBED, OPTIONS, by_reference, weight_options
from support.torch_world import sized, tensor, tokens, with_gradients

import mha_spec_torch
from mha_spec import reference

if TYPE_CHECKING:
    from torch import Tensor


def test_every_golden() -> None:
    assert not layer_failures("torch", cases(*LAYER), "float32")


def test_goldens_in_other_dtypes() -> None:
    assert not layer_failures("torch", cases_with_each(LAYER), "float64", "float16", "bfloat16")


def test_lengths_on_the_host_give_the_same_results() -> None:
    selected = [case for case in cases(*LAYER) if {"cache_lengths", "q_offset"} & names(case)]
    assert not layer_failures("torch", selected, "float32", host=PER_ENTRY)


@pytest.mark.usefixtures("quiet")
def test_compiled_without_a_graph_break() -> None:
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    for case in cases_with_each(LAYER[:2], "rotary", "bias", "dropout_mask", "cache_key"):
        torch.compiler.reset()
        assert not layer_failures("torch", [case], "float32", wrapped=compiled)


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_gradients_and_weights_equal_the_reference(name: str) -> None:
    options, make_keywords = OPTIONS[name]
    keywords = make_keywords()
    sizes = (3, EMBED), (8, options.get("k_embed", EMBED)), (8, options.get("v_embed", EMBED))

    def ours(dtype: str) -> list[Tensor]:
        layer, x = sized(dtype, **options), [tokens(*size, dtype=dtype).requires_grad_() for size in sizes]
        tensors = {name: converted(value, dtype) for name, value in keywords.items()}
        outputs = [layer(*x, **tensors), layer.attention_weights(*x[:2], **weight_options(tensors))]
        return with_gradients(outputs, [*(layer.params[name] for name in sorted(layer.params)), *x])

    params = {name: parameter.detach().numpy() for name, parameter in sized(**options).params.items()}
    settings = {name: options[name] for name in ("rotary", "norm_epsilon") if name in options}
    expected = by_reference(params, [tokens(*size).numpy() for size in sizes], **settings, **keywords)
    assert_same(ours, [tensor(array) for array in expected])


def converted(option: Any, dtype: str) -> Any:
    """Convert an array to a tensor, of `dtype` if it holds floating-point numbers."""
    if not isinstance(option, numpy.ndarray):
        return option
    return tensor(option, dtype if option.dtype.kind == "f" else None)


@pytest.mark.usefixtures("quiet")
def test_positions_compile() -> None:
    x = tokens(5, 3 * 4).unflatten(2, (3, 4)).transpose(1, 2)

    def encode(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slopes = mha_spec_torch.alibi_slopes(3)
        bias = mha_spec_torch.alibi_bias(slopes, 5, 5, q_offset=positions[:, 0])
        return mha_spec_torch.rotary_embedding(x, positions, interleaved=True), slopes, bias

    positions = torch.arange(5) + torch.tensor([[3], [0]])
    torch.compiler.reset()
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x, positions), encode(x, positions))


def test_linear_biases_equal_the_reference() -> None:
    for heads in (1, 2, 5, 8, 12):
        slopes = mha_spec_torch.alibi_slopes(heads, dtype="float64")
        assert_equal(slopes, tensor(reference.alibi_slopes(heads, dtype="float64")))
        for offset in (2, [1, -4]):
            for argument, plain in ((slopes, slopes.numpy()), (heads, heads)):
                bias = mha_spec_torch.alibi_bias(argument, 3, 7, q_offset=offset)
                assert_equal(bias, tensor(reference.alibi_bias(plain, 3, 7, q_offset=offset)))

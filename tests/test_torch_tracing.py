"""mha_spec_torch with open numbers and sizes: compiled, traced, transformed, and on the meta device."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch
from support.comparisons import assert_equal, assert_near
from support.layers import BATCH, EMBED
from support.torch_world import operands, sized, tokens
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mha_spec_torch
from mha_spec import reference
from mha_spec.errors import ArgumentValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

attention: Callable[..., Any] = mha_spec_torch.attention
weights_of: Callable[..., Any] = mha_spec_torch.attention_weights

NUMBERS: dict[str, tuple[Callable[[Any], dict[str, Any]], list[Any]]] = {
    "q_offset": (lambda number: {"causal": True, "q_offset": number}, [0, 1, 7, 20]),
    "q_offset of each": (lambda number: {"causal": True, "q_offset": [number, 3]}, [0, 1, 7, 20]),
    "window": (lambda number: {"window": (number, 2), "q_offset": 9}, [1, 2, 5, 11]),
    "kv_lengths": (lambda number: {"kv_lengths": [number, 13]}, [0, 2, 21, 5]),
    "q_lengths": (lambda number: {"q_lengths": (3, number)}, [0, 2, 3, 1]),
    "scale": (lambda number: {"scale": number}, [0.5, 0.25, -1.0, 0.75]),
    "softcap": (lambda number: {"softcap": number}, [5.0, 2.5, 0.5, 1.5]),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes(name: str) -> None:
    options, values = NUMBERS[name]
    query, key, value = operands(3, 21)
    for call in (
        lambda **keywords: attention(query, key, value, **keywords),
        lambda **keywords: weights_of(query, key, **keywords),
    ):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for number in values:
            assert_equal(compiled(**options(number)), call(**options(number)))


@pytest.mark.usefixtures("quiet")
def test_a_decoding_step_is_compiled_twice_at_most() -> None:
    """The first offset is compiled as a constant, and the second as a symbol for all others."""
    counter: Any = CompileCounter()
    query, key, value = operands(1, 21)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda offset: attention(query, key, value, causal=True, q_offset=offset), fullgraph=True, backend=counter
    )
    for offset in range(2, 12):
        assert_equal(compiled(offset), attention(query, key, value, causal=True, q_offset=offset))
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("quiet")
def test_a_compiled_call_checks_a_number_that_changes() -> None:
    query, key, value = operands(3, 21)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda bound: attention(query, key, value, window=(bound, 0), q_offset=0), fullgraph=True, backend="aot_eager"
    )
    for bound in (2, 3):
        compiled(bound)
    with pytest.raises(Exception, match="MHA-ARG-3"):
        compiled(-1)


@pytest.mark.usefixtures("quiet")
def test_numbers_of_the_layer_and_of_positions() -> None:
    layer, x = sized(rotary={}), tokens(5)
    heads = torch.ones(BATCH, 3, 5, 4, dtype=torch.float64)

    def call(number: int) -> tuple[Tensor, ...]:
        bias = mha_spec_torch.alibi_bias(5, 5, 7, q_offset=number)
        rotated = mha_spec_torch.rotary_embedding(heads, torch.arange(5) + number, base=1000.0 + number)
        return layer(x, causal=True, q_offset=number), layer.attention_weights(x, q_offset=number), bias, rotated

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (0, 1, 5, 3):
        assert_near(list(compiled(number))[:2], list(call(number))[:2])
        assert_equal(list(compiled(number))[2:], list(call(number))[2:])


SIZED: dict[str, Callable[..., Any]] = {
    "dropout": lambda q, k, v: attention(q, k, v, dropout_rate=0.5).shape,
    "attention": lambda q, k, v: attention(q, k, v, kv_lengths=torch.tensor([3, 2]), return_lse=True),
    "weights": lambda q, k, _: weights_of(q, k, causal=True, q_offset="lower_right"),
    "gradient by a transform": lambda q, k, v: torch.func.grad(lambda q: attention(q, k, v, softcap=2.0).sum())(q),
    "weights by a transform": lambda q, k, _: torch.func.grad(lambda q: weights_of(q, k)[..., 0].sum())(q),
    "mapped": torch.func.vmap(lambda q, k, v: attention(q[None], k[None], v[None])),
    "rotary": lambda q, k, _: (
        mha_spec_torch.rotary_embedding(q, torch.arange(q.shape[2])),
        mha_spec_torch.rotary_embedding(k, torch.arange(k.shape[2]), rotary_dim=2, interleaved=True),
    ),
    "vjp": lambda q, k, v: mha_spec_torch.attention_vjp(attention(q, k, v), q, k, v, window=(1, 2), q_offset=3),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_change(name: str) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(SIZED[name], fullgraph=True, backend=counter, dynamic=True)
    for q_len, kv_len in ((5, 9), (17, 31), (3, 16)):
        arguments = [operand.double() for operand in operands(q_len, kv_len)]
        results, expected = compiled(*arguments), SIZED[name](*arguments)
        if name == "dropout":
            assert results == expected
        else:
            assert_near(*([x for x in tree if x is not None] for tree in map(as_list, (results, expected))))
    assert counter.frame_count == 1


def as_list(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, tuple) else [tree]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_script() -> None:
    arguments = operands(5, 19)
    traced: Any = torch.jit.trace(
        lambda q, k, v: attention(q, k, v, window=(4, 2), q_offset="lower_right"), tuple(arguments)
    )
    assert_equal(traced(*arguments), attention(*arguments, window=(4, 2), q_offset="lower_right"))


def step_of_a_cache(layer: Any, x: Tensor) -> list[Tensor]:
    output, cache = layer(x, cache=layer.empty_cache(BATCH, 13), causal=True)
    return [output, cache.key, cache.value]


CALLS: dict[str, Callable[..., Any]] = {
    "attention": lambda x: attention(
        x[None], x[None], x[None], window=(2, 0), kv_lengths=[5], q_offset=0, return_lse=True
    ),
    "packed": lambda x: mha_spec_torch.varlen_attention(x, x, x, [0, 1, 2], [0, 1, 2], return_lse=True),
    "gradients": lambda x: mha_spec_torch.attention_vjp(x[None], x[None], x[None], x[None])[:3],
    "cache": partial(step_of_a_cache, sized(rotary={})),
}


@pytest.mark.parametrize("name", CALLS)
def test_modes_that_trace_plain_tensors(name: str) -> None:
    call, x = CALLS[name], tokens()
    graph = make_fx(call)(x)
    for numbers in (x, x.flip(0)):
        for result, expected in zip(graph(numbers), call(numbers), strict=True):
            assert_near(result, expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [result.shape for result in call(x)]
    assert shapes == [result.shape for result in call(x)]


def on_meta(tree: Any) -> Any:
    return tree.to("meta") if isinstance(tree, torch.Tensor) else tree


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "q_offset": 1}, {"kv_lengths": [3, 2]}, {"dropout_rate": 0.5}]
)
def test_on_the_meta_device(options: dict[str, Any]) -> None:
    arguments = operands(5, 19)
    leaves = [on_meta(argument).requires_grad_() for argument in arguments]
    output, lse = attention(*leaves, **options, return_lse=True)
    assert (output.device.type, output.shape, lse.shape) == ("meta", (2, 4, 5, 8), (2, 4, 5))
    grads = torch.autograd.grad(output, leaves, output)
    assert [gradient.shape for gradient in grads] == [argument.shape for argument in arguments]
    assert weights_of(*leaves[:2]).shape == (2, 4, 5, 19)
    layer = mha_spec_torch.MultiHeadAttention(EMBED, 5, kv_heads=1, qk_dim=4, device="meta")
    x = torch.empty(BATCH, 3, EMBED, device="meta")
    assert layer(x, causal=True).shape == x.shape
    step, cache = layer(x, cache=layer.empty_cache(BATCH, 7))
    assert (step.shape, cache.key.device.type) == (x.shape, "meta")


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """Create tensors on the meta device where no device is named."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("meta_by_default")
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (2, 1), "q_offset": [1, -2]},
        {"kv_lengths": [7, 32], "q_lengths": [32, 3]},
        {"q_offset": "lower_right", "kv_lengths": [7, 32], "causal": True},
        {"softcap": 2.0, "dropout_rate": 0.5},
    ],
)
def test_results_ignore_the_default_device(options: dict[str, Any]) -> None:
    leaves = [operand.requires_grad_() for operand in operands()]
    output, lse = attention(*leaves, **options, return_lse=True)
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
    weights = weights_of(*leaves[:2], **{name: value for name, value in options.items() if name != "dropout_rate"})
    assert {result.device.type for result in (output, lse, *grads, weights)} == {"cpu"}
    layer = sized(rotary={}, qk_norm=True, device="cpu")
    assert layer(tokens(5), causal=True).device.type == "cpu"


def cached(cache: Any, like: Tensor, **options: Any) -> Tensor:
    """Return the output of a step of decoding with a cache whose integers are arrays of NumPy."""
    layer = mha_spec_torch.MultiHeadAttention(EMBED, 4, kv_heads=2, qk_dim=4, device=like.device).requires_grad_(False)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    return compiled(like.new_empty(2, 3, EMBED), cache=cache, **options)[0]


def test_arrays_of_numpy_are_moved_to_the_device_of_a_compiled_call() -> None:
    """The meta device stands for any that is not the CPU, where a graph has the arrays of NumPy."""
    torch.compiler.reset()
    x, lengths, ids = torch.empty(2, 2, 3, 4, device="meta"), numpy.array([3, 2]), numpy.array([[1, 2, 3], [1, 1, 2]])
    bounds, tokens = numpy.array([0, 1, 3]), x[0].transpose(0, 1)
    table = numpy.array([[3, 1], [2, 0]])
    sizes: dict[str, Any] = {"blocks": 4, "block_size": 4, "kv_heads": 2, "qk_dim": 4}
    calls: list[Callable[[], Any]] = [
        lambda: attention(x, x, x, kv_lengths=lengths),
        lambda: weights_of(x, x, q_segment_ids=ids, kv_segment_ids=ids),
        lambda: mha_spec_torch.attention_vjp(x, x, x, x, kv_starts=lengths),
        lambda: mha_spec_torch.varlen_attention(tokens, tokens, tokens, bounds, bounds, causal=True),
        lambda: mha_spec_torch.varlen_attention_vjp(tokens, tokens, tokens, tokens, bounds, bounds, seqused_kv=lengths),
    ]
    for call in calls:
        results = torch.compile(call, backend="eager", fullgraph=True)()
        assert {result.device.type for result in results if result is not None} == {"meta"}
    contiguous = mha_spec_torch.empty_cache(2, 2, 12, 4, like=x)
    paged = mha_spec_torch.PagedKVCache.empty(table, like=x, **sizes)
    for cache in (paged, contiguous):
        assert cached(cache, x, causal=True, kv_lengths=lengths).device.type == "meta"


# Merging.


def halves() -> list[Tensor]:
    """Return halves with four rows: neither is empty, the first is, the second is, and both are."""
    lses = [0.5, -math.inf, 1.25, -math.inf], [0.25, 1.5, -math.inf, -math.inf]
    outputs = [torch.randn(1, 1, 4, 3, dtype=torch.float64) for _ in range(2)]
    outputs[0][0, 0, 1] = math.nan
    tensors: list[Tensor] = []
    for output, numbers in zip(outputs, lses, strict=True):
        tensors += [output, torch.tensor([[numbers]], dtype=torch.float64)]
    return [tensor.requires_grad_() for tensor in tensors]


def merge(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    output, lse = mha_spec_torch.merge_attention(*arguments)
    return output, torch.where(lse == -math.inf, 0.0, lse)


@pytest.mark.usefixtures("quiet")
def test_gradients_of_merging_equal_the_reference() -> None:
    arguments = halves()
    grad_output, grad_lse = torch.randn(1, 1, 4, 3, dtype=torch.float64), torch.randn(1, 1, 4, dtype=torch.float64)
    grad_lse[..., 3] = 0
    plain = [x.detach().numpy() for x in (grad_output, *arguments)]
    expected = [
        torch.from_numpy(gradient) for gradient in reference.merge_attention_vjp(*plain, grad_lse=grad_lse.numpy())
    ]
    assert_near(mha_spec_torch.merge_attention_vjp(grad_output, *arguments, grad_lse=grad_lse), expected)
    torch.compiler.reset()
    for call in (merge, torch.compile(merge, fullgraph=True, backend="aot_eager")):
        assert_near(torch.autograd.grad(call(*arguments), arguments, (grad_output, grad_lse)), expected)
    transformed: Any = torch.func.vjp(merge, *(argument.detach() for argument in arguments))
    assert_near(transformed[1]((grad_output, grad_lse)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_second_derivatives_and_tangents_of_merging() -> None:
    arguments = [half.detach()[:, :, [0, 2]].requires_grad_() for half in halves()]
    assert torch.autograd.gradgradcheck(merge, arguments)
    assert torch.autograd.gradcheck(merge, arguments, check_forward_ad=True)


def test_an_error_of_merging_names_the_argument() -> None:
    output_a, lse_a, output_b, lse_b = halves()
    with pytest.raises(ArgumentValueError, match="`grad_output`"):
        mha_spec_torch.merge_attention_vjp(output_a[..., 1:], output_a, lse_a, output_b, lse_b)

"""mha_spec_torch where numbers and sizes stay open: compiled, exported, traced, mapped, and without contents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.comparisons import assert_equal, assert_near
from support.layers import BATCH, EMBED
from support.torch_world import operands, sized, tokens
from torch._dynamo.testing import CompileCounter

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
        lambda **given: attention(query, key, value, **given),
        lambda **given: weights_of(query, key, **given),
    ):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for number in values:
            assert_equal(compiled(**options(number)), call(**options(number)))


@pytest.mark.usefixtures("quiet")
def test_a_decoding_step_is_compiled_twice_at_most() -> None:
    """Once for the first offset, and once for all that follow."""
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
def test_a_number_that_turns_wrong_is_refused_by_us() -> None:
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
        turned = mha_spec_torch.rotary_embedding(heads, torch.arange(5) + number, base=1000.0 + number)
        return layer(x, causal=True, q_offset=number), layer.attention_weights(x, q_offset=number), bias, turned

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
    "vjp": lambda q, k, v: mha_spec_torch.attention_vjp(attention(q, k, v), q, k, v, window=(1, 2), q_offset=3),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_change(name: str) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(SIZED[name], fullgraph=True, backend=counter, dynamic=True)
    for q_len, kv_len in ((5, 9), (17, 31), (3, 16)):
        given = [one.double() for one in operands(q_len, kv_len)]
        found, expected = compiled(*given), SIZED[name](*given)
        if name == "dropout":
            assert found == expected
        else:
            assert_near(*([one for one in tree if one is not None] for tree in map(as_list, (found, expected))))
    assert counter.frame_count == 1


def as_list(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, tuple) else [tree]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_script() -> None:
    given = operands(5, 19)
    traced: Any = torch.jit.trace(
        lambda q, k, v: attention(q, k, v, window=(4, 2), q_offset="lower_right"), tuple(given)
    )
    assert_equal(traced(*given), attention(*given, window=(4, 2), q_offset="lower_right"))


def on_meta(tree: Any) -> Any:
    return tree.to("meta") if isinstance(tree, torch.Tensor) else tree


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "q_offset": 1}, {"kv_lengths": [3, 2]}, {"dropout_rate": 0.5}]
)
def test_without_contents(options: dict[str, Any]) -> None:
    given = operands(5, 19)
    leaves = [on_meta(one).requires_grad_() for one in given]
    output, lse = attention(*leaves, **options, return_lse=True)
    assert (output.device.type, output.shape, lse.shape) == ("meta", (2, 4, 5, 8), (2, 4, 5))
    assert [one.shape for one in torch.autograd.grad(output, leaves, output)] == [one.shape for one in given]
    assert weights_of(*leaves[:2]).shape == (2, 4, 5, 19)
    layer = mha_spec_torch.MultiHeadAttention(EMBED, 5, kv_heads=1, qk_dim=4, device="meta")
    x = torch.empty(BATCH, 3, EMBED, device="meta")
    assert layer(x, causal=True).shape == x.shape
    step, cache = layer(x, cache=layer.empty_cache(BATCH, 7))
    assert (step.shape, cache.key.device.type) == (x.shape, "meta")


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    """Tensors that are made without a device have no contents."""
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
def test_a_default_device_is_not_that_of_the_operands(options: dict[str, Any]) -> None:
    leaves = [one.requires_grad_() for one in operands()]
    output, lse = attention(*leaves, **options, return_lse=True)
    found = torch.autograd.grad(output, leaves, torch.ones_like(output))
    given = {name: one for name, one in options.items() if name != "dropout_rate"}
    assert {one.device.type for one in (output, lse, *found, weights_of(*leaves[:2], **given))} == {"cpu"}
    layer = sized(rotary={}, qk_norm=True, device="cpu")
    assert layer(tokens(5), causal=True).device.type == "cpu"


# Merging.


def halves() -> list[Tensor]:
    """Rows of two full halves, an empty one on either side, and two empty ones."""
    lses = [0.5, -math.inf, 1.25, -math.inf], [0.25, 1.5, -math.inf, -math.inf]
    outputs = [torch.randn(1, 1, 4, 3, dtype=torch.float64) for _ in range(2)]
    outputs[0][0, 0, 1] = math.nan
    found: list[Tensor] = []
    for output, numbers in zip(outputs, lses, strict=True):
        found += [output, torch.tensor([[numbers]], dtype=torch.float64)]
    return [one.requires_grad_() for one in found]


def merge(*given: Tensor) -> tuple[Tensor, Tensor]:
    output, lse = mha_spec_torch.merge_attention(*given)
    return output, torch.where(lse == -math.inf, 0.0, lse)


@pytest.mark.usefixtures("quiet")
def test_merging_has_the_gradients_of_the_reference() -> None:
    given = halves()
    grad_output, grad_lse = torch.randn(1, 1, 4, 3, dtype=torch.float64), torch.randn(1, 1, 4, dtype=torch.float64)
    grad_lse[..., 3] = 0
    plain = [one.detach().numpy() for one in (grad_output, *given)]
    expected = [torch.from_numpy(one) for one in reference.merge_attention_vjp(*plain, grad_lse=grad_lse.numpy())]
    assert_near(mha_spec_torch.merge_attention_vjp(grad_output, *given, grad_lse=grad_lse), expected)
    torch.compiler.reset()
    for call in (merge, torch.compile(merge, fullgraph=True, backend="aot_eager")):
        assert_near(torch.autograd.grad(call(*given), given, (grad_output, grad_lse)), expected)
    pulled: Any = torch.func.vjp(merge, *(one.detach() for one in given))
    assert_near(pulled[1]((grad_output, grad_lse)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_merging_has_second_derivatives_and_tangents() -> None:
    given = [one.detach()[:, :, [0, 2]].requires_grad_() for one in halves()]
    assert torch.autograd.gradgradcheck(merge, given)
    assert torch.autograd.gradcheck(merge, given, check_forward_ad=True)


def test_merging_names_what_is_wrong() -> None:
    output_a, lse_a, output_b, lse_b = halves()
    with pytest.raises(ArgumentValueError, match="`grad_output`"):
        mha_spec_torch.merge_attention_vjp(output_a[..., 1:], output_a, lse_a, output_b, lse_b)

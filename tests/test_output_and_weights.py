"""The output and the weights of a single call equal those of separate calls."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.comparisons import assert_equal, assert_near
from support.goldens import cases, cases_with_each, layer_failures
from support.numbers import numbers

import mha_spec
import mha_spec_torch
from mha_spec.arguments import DROPOUT_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec_conformance.suite.cases import Case

LAYER = "multi_head_attention"


def with_weights(some: list[Case] | tuple[Case, ...]) -> list[Case]:
    """Leave out the calls that have no weights: those with a paged cache or a window cache (MHA-CACHE-10)."""
    return [case for case in some if not {"paged_cache", "window_cache"} & set(case.features)]


def both(library: str) -> Callable[..., Any]:
    """Return a function of the output; it takes output and weights in a single call, and checks the weights."""
    backend = import_module(f"mha_spec_{library}")

    def output(query: Any, key: Any, value: Any, params: Any, **options: Any) -> Any:
        result, weights, *cache = backend.multi_head_attention_and_weights(query, key, value, params, **options)
        weight_options = {name: value for name, value in options.items() if name not in DROPOUT_OPTIONS}
        assert_equal(weights, backend.multi_head_attention_weights(query, key, params, **weight_options))
        return (result, *cache) if cache else result

    return output


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_all_goldens_of_the_layer_hold_for_both(library: str) -> None:
    assert not layer_failures(
        library, with_weights(cases(LAYER)), "float32", "float16", wrapped=lambda _: both(library)
    )


@pytest.mark.parametrize("library", ["jax", "tensorflow"])
def test_goldens_with_every_option_hold_for_both(library: str) -> None:
    assert not layer_failures(
        library, with_weights(cases_with_each([LAYER])), "float32", wrapped=lambda _: both(library)
    )


def module() -> mha_spec_torch.MultiHeadAttention:
    torch.manual_seed(3)
    return mha_spec_torch.MultiHeadAttention(7, 6, kv_heads=3, qk_dim=4, v_dim=5, rotary={}, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"kv_lengths": (2, 0), "q_offset": 0}, {"window": (1, 0), "softcap": 2.0}]
)
def test_gradients_of_both_are_those_of_two_calls(options: dict[str, Any]) -> None:
    layer, x = module(), torch.as_tensor(numbers(2, 3, 7)).requires_grad_()
    leaves = [x, *layer.parameters()]

    def gradients(output: torch.Tensor, weights: torch.Tensor) -> Any:
        return torch.autograd.grad((output * output).sum() + (weights * weights).sum(), leaves, allow_unused=True)

    expected = gradients(layer(x, **options), layer.attention_weights(x, **options))
    assert_near(gradients(*layer.output_and_weights(x, **options)), expected)


def test_weights_refuse_dropout() -> None:
    layer, x = module(), torch.as_tensor(numbers(2, 3, 7))
    keep = torch.zeros((2, 6, 3, 3), dtype=torch.bool)
    output, weights = layer.output_and_weights(x, dropout_mask=keep, dropout_rate=0.5)
    assert_equal(output, layer.params["b_o"].expand(2, 3, 7))
    assert_equal(weights, layer.attention_weights(x))


def test_the_backend_is_that_of_the_query() -> None:
    layer, x = module(), torch.as_tensor(numbers(2, 3, 7))
    assert_equal(
        mha_spec.multi_head_attention_and_weights(x, x, x, layer.params, rotary={}), layer.output_and_weights(x)
    )

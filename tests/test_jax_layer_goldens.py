"""The layer functions of JAX under its transformations, compared with the goldens and the reference."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from support.comparisons import assert_equal, assert_near, assert_same
from support.goldens import LAYER, PER_ENTRY, cases_with_each, compiled, layer_failures, layers_alike
from support.jax_world import floats, sized, tokens, with_gradients
from support.layers import BATCH, EMBED, OPTIONS, by_reference, weight_options

import mha_spec_jax
from mha_spec import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

pytestmark = pytest.mark.usefixtures("double", "unoptimized")


def test_goldens_under_jit() -> None:
    assert not layer_failures("jax", layers_alike(), "float32", wrapped=partial(compiled, jax.jit))


def test_goldens_with_numbers_on_the_host() -> None:
    some = cases_with_each(LAYER[:2], *PER_ENTRY)
    assert not layer_failures("jax", some, "float32", wrapped=of_parameters, host=PER_ENTRY)


def of_parameters(call: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a call whose traced arguments are its tokens and parameters alone."""
    return lambda *operands, **keywords: jax.jit(partial(call, **keywords))(*operands)


def test_goldens_in_other_dtypes() -> None:
    some = cases_with_each(LAYER, "q_norm")
    assert not layer_failures("jax", some, "float64", "float16", "bfloat16", wrapped=partial(compiled, jax.jit))


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_gradients_and_weights_equal_those_of_the_reference(name: str) -> None:
    options, make = OPTIONS[name]
    layer, call_options = sized(**options), make()
    inputs = [tokens(3), tokens(8, options.get("k_embed", EMBED)), tokens(8, options.get("v_embed", EMBED), seed=6)]
    arrays = {name: jnp.asarray(array) for name, array in call_options.items() if isinstance(array, numpy.ndarray)}

    def ours(dtype: str) -> list[Array]:
        converted, x, held = floats((layer, inputs, arrays), dtype)

        def call(converted: Any, *x: Array) -> tuple[Array, Array]:
            return converted(*x, **call_options | held), converted.attention_weights(
                *x[:2], **weight_options(call_options | held)
            )

        return jax.jit(partial(with_gradients, call))(converted, *x)

    params = {name: numpy.asarray(array) for name, array in layer.params.items()}
    fixed = {name: options[name] for name in ("rotary", "norm_epsilon") if name in options}
    expected = by_reference(params, [numpy.asarray(array) for array in inputs], **fixed, **call_options)
    assert_same(ours, [jnp.asarray(array) for array in expected])


def test_linear_biases_equal_those_of_the_reference() -> None:
    for heads in (1, 5, 8, 12):
        slopes = mha_spec_jax.alibi_slopes(heads, dtype="float64")
        expected = reference.alibi_slopes(heads, dtype="float64")
        assert_equal(slopes, jnp.asarray(expected))
        for offset in (2, [1, -4], jnp.asarray([1, -4])):
            compiled_bias = jax.jit(
                lambda slopes, offset=offset: mha_spec_jax.alibi_bias(slopes, 3, 7, q_offset=offset)
            )
            host = offset if isinstance(offset, int) else numpy.asarray(offset)
            assert_equal(compiled_bias(slopes), jnp.asarray(reference.alibi_bias(expected, 3, 7, q_offset=host)))


def test_layers_and_caches_side_by_side_under_vmap() -> None:
    layers = [sized(rotary={}), jax.tree.map(lambda array: -array / 2, sized(rotary={}))]
    x = jnp.stack([tokens(4), tokens(4, seed=6)])

    def call(layer: Any, x: Array) -> tuple[Array, Array]:
        first, cache = layer(x[:, :3], causal=True, cache=layer.empty_cache(BATCH, 5))
        second, _ = layer(x[:, 3:], causal=True, cache=cache._replace(lengths=jnp.asarray(cache.lengths)))
        return first, second

    stacked = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    mapped, alone = jax.jit(jax.vmap(call))(stacked, x), jax.jit(call)
    for number, layer in enumerate(layers):
        assert_near([output[number] for output in mapped], alone(layer, x[number]))

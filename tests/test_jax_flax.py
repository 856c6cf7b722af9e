"""The layer of JAX as a module of flax.nnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from flax import nnx
from support.comparisons import assert_equal, assert_near
from support.jax_world import sized, tokens
from support.layers import BATCH, EMBED, HEADS, SIZES

import mha_spec_jax.flax

if TYPE_CHECKING:
    from jax import Array

pytestmark = pytest.mark.usefixtures("double", "unoptimized")


def module_of(**options: Any) -> Any:
    """Make the layer of `sized` as a module of nnx."""
    arguments: dict[str, Any] = SIZES | options
    module = mha_spec_jax.flax.MultiHeadAttention(EMBED, HEADS, rngs=nnx.Rngs(0), param_dtype="float64", **arguments)
    nnx.update(module, nnx.State({name: nnx.Param(array) for name, array in sized(**options).params.items()}))
    return module


def module_call(module: Any, x: Array) -> Array:
    return module(x)


def test_the_module_equals_the_pytree() -> None:
    options: dict[str, Any] = {"qk_norm": True, "rotary": {"base": 5.0}, "norm_epsilon": 0.5}
    module, tree, x = module_of(**options), sized(**options), tokens()
    assert_equal(module(x, causal=True), tree(x, causal=True))
    assert_equal(module.attention_weights(x, causal=True), tree.attention_weights(x, causal=True))
    caches = [layer.empty_cache(BATCH, 12) for layer in (module, tree)]
    assert_equal(module(x, cache=caches[0]), tree(x, cache=caches[1]))


def test_the_state_of_the_module_is_its_parameters() -> None:
    module, x = module_of(qk_norm=True), tokens()
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert {name: array.shape for name, array in state.items()} == module.settings.shapes()
    graph, held = nnx.split(module)
    assert_equal(nnx.merge(graph, held)(x), module(x))
    assert_equal(jax.jit(lambda held, x: nnx.merge(graph, held)(x))(held, x), nnx.jit(module_call)(module, x))
    fresh = module_of(qk_norm=True)
    fresh.w_q = nnx.Param(fresh.w_q[...] * 2)
    assert not numpy.array_equal(fresh(x), module(x))
    nnx.update(fresh, nnx.state(module))
    assert_equal(fresh(x), module(x))


def test_gradients_of_the_module_equal_those_of_the_pytree() -> None:
    module, tree, x = module_of(), sized(), tokens()
    gradients = nnx.to_pure_dict(nnx.jit(nnx.grad(lambda module: jnp.sum(module(x) ** 2)))(module))
    expected = jax.jit(jax.grad(lambda tree: jnp.sum(tree(x) ** 2)))(tree).params
    assert gradients.keys() == expected.keys()
    for name, array in expected.items():
        if name != "b_k":
            assert_near(gradients[name], array)
    assert jnp.abs(gradients["b_k"]).max() < jnp.finfo(jnp.float32).eps * jnp.abs(gradients["b_q"]).max()


def test_the_module_drops_weights_in_training_alone() -> None:
    module, plain, x = module_of(dropout_rate=0.5), module_of(), tokens()
    call = nnx.jit(module_call)
    assert not numpy.array_equal(module(x), module(x))
    assert not numpy.array_equal(call(module, x), call(module, x))
    key = jax.random.key(1)
    assert_equal(module(x, dropout_key=key), module(x, dropout_key=key))
    assert_equal(module(x, dropout_rate=0.0), plain(x))
    module.eval()
    assert_equal(module(x), plain(x))
    module.train()
    assert not numpy.array_equal(module(x), plain(x))
    assert_equal(plain(x), plain(x))

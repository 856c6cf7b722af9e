"""The layer of JAX as a pytree, and the initial parameters of both classes."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from flax import nnx
from support.comparisons import assert_equal, assert_near
from support.jax_world import sized, tokens
from support.layers import BATCH, LENGTH, OUT, assert_drawn_as_in_the_paper
from support.numbers import numbers

import mha_spec
import mha_spec_jax.flax
from mha_spec import ArgumentValueError
from mha_spec.weights import read_safetensors, write_safetensors
from mha_spec_jax import MultiHeadAttention

if TYPE_CHECKING:
    from pathlib import Path

    from jax import Array

pytestmark = pytest.mark.usefixtures("double", "unoptimized")


def test_the_layer_is_a_pytree_of_its_parameters() -> None:
    options: dict[str, Any] = {"qk_norm": True, "dropout_rate": 0.25}
    layer = sized(rotary={"base": 5.0, "interleaved": True}, **options)
    leaves, structure = jax.tree.flatten(layer)
    assert all(array is layer.params[name] for array, name in zip(leaves, sorted(layer.params), strict=True))
    again = jax.tree.unflatten(structure, leaves)
    assert (repr(again), again.settings) == (repr(layer), layer.settings)
    assert_equal(again(tokens()), layer(tokens()))
    other = sized(rotary={"interleaved": True, "base": 5.0}, **options)
    assert structure == jax.tree.structure(other)
    assert hash(structure) == hash(jax.tree.structure(other))
    assert structure != jax.tree.structure(sized(rotary={"base": 5.0}, **options))
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(layer)}
    assert paths == {f".params['{name}']" for name in layer.settings.shapes()}


def test_a_training_step_maps_over_pytrees() -> None:
    layer, x, goal = sized(), tokens(), jnp.asarray(numbers(BATCH, LENGTH, OUT))

    @jax.jit
    def loss(layer: Any) -> Array:
        return jnp.mean((layer(x, causal=True) - goal) ** 2)

    gradient = jax.grad(loss)(layer)
    assert isinstance(gradient, MultiHeadAttention)
    assert loss(jax.tree.map(lambda array, slope: array - 0.01 * slope, layer, gradient)) < loss(layer)


def test_parameters_can_be_replaced() -> None:
    layer, x = sized(), tokens()
    moved = layer.replace(b_o=layer.params["b_o"] + 1)
    assert_equal(moved.params["w_q"], layer.params["w_q"])
    assert_near(moved(x), layer(x) + 1)


def test_the_object_calls_the_function_with_its_parameters() -> None:
    layer = sized(qk_norm=True, rotary={"base": 5.0}, norm_epsilon=0.5)
    x, key = tokens(), tokens(5, seed=7)
    call_options: dict[str, Any] = {"q_offset": 3, "causal": True}
    options = {"rotary": {"base": 5.0}, "norm_epsilon": 0.5, **call_options}
    assert_equal(layer(x, key, **call_options), mha_spec.multi_head_attention(x, key, key, layer.params, **options))
    expected = mha_spec.multi_head_attention_weights(x, key, layer.params, **options)
    assert_equal(layer.attention_weights(x, key, **call_options), expected)
    assert_equal(layer(x), layer(x, x, x))


def test_parameters_can_be_saved_and_loaded(tmp_path: Path) -> None:
    layer, other = sized(qk_norm=True), sized(qk_norm=True, dropout_rate=0.5)
    other = jax.tree.map(lambda array: 2 * array, other)
    arrays = {name: numpy.asarray(array) for name, array in layer.params.items()}
    write_safetensors(tmp_path / "layer.safetensors", arrays)
    loaded_arrays = read_safetensors(tmp_path / "layer.safetensors")
    loaded = other.replace(**{name: jnp.asarray(array) for name, array in loaded_arrays.items()})
    assert_equal(loaded(tokens()), layer(tokens()))
    copied = pickle.loads(pickle.dumps(layer))
    assert_equal(copied(tokens()), layer(tokens()))


def test_dropout_applies_with_a_key() -> None:
    layer, x = sized(dropout_rate=0.5), tokens()
    keys = jax.random.split(jax.random.key(1), 2)
    dropped = [layer(x, dropout_key=key) for key in (*keys, keys[0])]
    assert not numpy.array_equal(*dropped[:2])
    assert_equal(dropped[0], dropped[2])
    assert_equal(layer(x), layer(x, dropout_key=keys[0], dropout_rate=0.0))
    assert not numpy.array_equal(layer(x), dropped[0])
    with pytest.raises(ArgumentValueError, match="dropout_key"):
        layer(x, dropout_rate=0.5)


# Both classes.


def new_layers(**options: Any) -> list[tuple[Any, dict[str, Array]]]:
    """Make a layer of each class, and return its parameters."""
    tree = MultiHeadAttention(64, 4, key=jax.random.key(3), **options)
    module = mha_spec_jax.flax.MultiHeadAttention(64, 4, rngs=nnx.Rngs(3), **options)
    return [(tree, tree.params), (module, module.params)]


def test_initial_weights_are_those_of_the_paper() -> None:
    for _, params in new_layers(qk_dim=24, out=96, qk_norm=True):
        assert_drawn_as_in_the_paper({name: numpy.asarray(array) for name, array in params.items()})


def test_the_repr_names_the_settings() -> None:
    expected = "MultiHeadAttention(embed=64, heads=4, kv_heads=2, rotary={'base': 5.0}, dropout_rate=0.1)"
    for layer, _ in new_layers(kv_heads=2, rotary={"base": 5.0}, dropout_rate=0.1):
        assert repr(layer) == expected
    assert [repr(layer) for layer, _ in new_layers()] == ["MultiHeadAttention(embed=64, heads=4)"] * 2


def test_a_layer_keeps_its_rotation() -> None:
    rotary = {"base": 5.0}
    layers, x = [layer for layer, _ in new_layers(rotary=rotary)], tokens(5, 64).astype("float32")
    before = [layer(x) for layer in layers]
    rotary["base"] = 7.0
    assert_equal([layer(x) for layer in layers], before)

"""Attention layers of other libraries with random weights, with which the layouts of `mha_spec.weights` are compared.

`MODULES` has the layers of torch, Keras, flax and equinox; `weight_models` adds those of the models of transformers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.weights import load_weights
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Array = numpy.ndarray

BATCH, Q_LEN, KV_LEN = 2, 5, 7


@dataclass(frozen=True)
class Module:
    """An attention layer of a library: the arguments that load its weights, the inputs and the output."""

    layout: str
    state: Any
    inputs: tuple[Array, Array, Array]
    output: Array
    heads: int | None = None
    prefix: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> dict[str, Any]:
        return load_weights(self.state, self.layout, heads=self.heads, prefix=self.prefix)


MODULES: dict[str, Callable[[], Module]] = {}
"""The functions that build the modules, by their names."""


def module(build: Callable[..., Module]) -> Callable[..., Module]:
    """Add a function that builds a module to `MODULES`."""
    MODULES[build.__name__] = build
    return build


def numbers(*shape: int, seed: int = 0) -> Array:
    return numpy.random.default_rng([seed, *shape]).normal(scale=0.25, size=shape).astype(numpy.float32)


def sequences(embed: int, k_embed: int | None = None, v_embed: int | None = None) -> tuple[Array, Array, Array]:
    k_embed, v_embed = k_embed or embed, v_embed or k_embed or embed
    return (
        numbers(BATCH, Q_LEN, embed, seed=1),
        numbers(BATCH, KV_LEN, k_embed, seed=2),
        numbers(BATCH, KV_LEN, v_embed, seed=3),
    )


def filled(shapes: Mapping[str, Any]) -> dict[str, Array]:
    return {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def torch_module(layout: str, *, bias: bool = True, **sizes: int) -> Module:
    import torch

    layer = torch.nn.MultiheadAttention(15, 3, bias=bias, batch_first=True, **sizes)
    state = filled({name: tensor.shape for name, tensor in layer.state_dict().items()})
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    inputs = sequences(15, sizes.get("kdim"), sizes.get("vdim"))
    output = layer(*(torch.from_numpy(array) for array in inputs))[0]
    return Module(layout, layer.state_dict(), inputs, to_numpy(output), heads=3)


@module
def torch_packed() -> Module:
    return torch_module("torch")


@module
def torch_packed_without_bias() -> Module:
    return torch_module("torch", bias=False)


@module
def torch_separate() -> Module:
    return torch_module("torch_separate", kdim=7, vdim=11)


def keras_module(layout: str, layer: Any, inputs: tuple[Array, Array, Array], *, listed: bool) -> Module:
    import keras

    layer.build(query_shape=inputs[0].shape, value_shape=inputs[2].shape, key_shape=inputs[1].shape)
    state = filled({weight.path: weight.shape for weight in layer.weights})
    layer.set_weights(list(state.values()))
    output = keras.ops.convert_to_numpy(layer(inputs[0], inputs[2], key=inputs[1]))
    if listed:
        return Module(layout, layer.get_weights(), inputs, output)
    return Module(layout, {weight.path: weight.numpy() for weight in layer.weights}, inputs, output, prefix=layer.name)


@module
def keras_multi_head() -> Module:
    import keras

    layer = keras.layers.MultiHeadAttention(3, 5, 7, output_shape=11)
    return keras_module("keras", layer, sequences(13, 17, 19), listed=True)


@module
def keras_multi_head_without_bias() -> Module:
    import keras

    layer = keras.layers.MultiHeadAttention(3, 5, 7, use_bias=False)
    return keras_module("keras", layer, sequences(13), listed=True)


@module
def keras_group_query() -> Module:
    import keras

    layer = keras.layers.GroupQueryAttention(5, 6, 2, name="grouped")
    return keras_module("keras_grouped", layer, sequences(13, 17, 19), listed=False)


@module
def flax_linen() -> Module:
    import jax
    from flax import linen

    layer = linen.MultiHeadDotProductAttention(num_heads=3, qkv_features=15, out_features=11)
    inputs = sequences(13, 17, 19)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    seeds = iter(range(100))
    state = jax.tree.map(lambda leaf: jax.numpy.asarray(numbers(*leaf.shape, seed=next(seeds))), shapes)
    return Module("flax_linen", state, inputs, to_numpy(layer.apply(state, *inputs)), prefix="params")


@module
def flax_nnx() -> Module:
    import jax
    from flax import nnx

    layer = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(
            6, 13, 30, 11, num_kv_heads=2, in_kv_features=17, decode=False, dropout_rate=0.1, rngs=nnx.Rngs(0)
        )
    )
    seeds = iter(range(100))
    shapes = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    state = jax.tree.map(lambda leaf: jax.numpy.asarray(numbers(*leaf.shape, seed=next(seeds))), shapes)
    nnx.update(layer, state)
    inputs = sequences(13, 17)
    output = layer(*(jax.numpy.asarray(array) for array in inputs), deterministic=True)
    return Module("flax_nnx", nnx.to_pure_dict(nnx.state(layer, nnx.Param)), inputs, to_numpy(output))


@module
def equinox() -> Module:
    import equinox
    import jax

    layer = equinox.filter_eval_shape(
        equinox.nn.MultiheadAttention, 3, 13, 17, 19, 11, 5, 7, True, False, True, True, key=jax.random.key(0)
    )
    shapes, rest = equinox.partition(layer, lambda leaf: hasattr(leaf, "shape"))
    seeds = iter(range(100))
    arrays = jax.tree.map(lambda leaf: jax.numpy.asarray(numbers(*leaf.shape, seed=next(seeds))), shapes)
    layer = equinox.combine(arrays, rest)
    state = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(equinox.filter(layer, equinox.is_array))
    }
    inputs = sequences(13, 17, 19)
    return Module("equinox", state, inputs, to_numpy(jax.vmap(layer)(*inputs)), heads=3)


@cache
def built(name: str) -> Module:
    """Build the module of this name, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries warn when they are imported and constructed
        return MODULES[name]()

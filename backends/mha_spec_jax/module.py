"""The layer as a pytree, for `jax.grad`, `jax.jit` and optimizers."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import numpy

from mha_spec.cache import KVCache, PagedKVCache, WindowKVCache
from mha_spec.layer_object import (
    CallOptions,
    LayerObject,
    LayerOptions,
    LayerSettings,
    check_parameter_dtype,
    expand_layer_options,
)

from . import layer
from .dropout import check_key

if TYPE_CHECKING:
    from typing import Self, Unpack

    from jax import Array
    from jax.typing import DTypeLike

    from mha_spec.cache import Cache

__all__ = ["MultiHeadAttention", "initial"]


def initial(settings: LayerSettings, key: Array, dtype: DTypeLike, label: str = "dtype") -> dict[str, Array]:
    """Draw parameters by name: weights from Xavier's uniform distribution, biases 0, gains 1."""
    check_key("key", key, "MHA-PROJ-4")
    check_parameter_dtype(dtype, partial(numpy.empty, 0), label)
    shapes = settings.shapes()
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params: dict[str, Array] = {}
    for name, shape in shapes.items():
        bound = settings.initial_bound(name)
        if bound is None:
            params[name] = jax.numpy.full(shape, float(name.endswith("_norm")), dtype)
        else:
            params[name] = jax.random.uniform(keys[name], shape, dtype, -bound, bound)
    return params


@jax.tree_util.register_pytree_with_keys_class
class MultiHeadAttention(LayerObject):
    """Multi-head attention with its parameters; see `mha_spec.reference.multi_head_attention`.

    A pytree whose leaves are `params`: it can be an argument of jitted and differentiated functions, and its gradient
    has the same class. `dropout_rate` applies to calls with a `dropout_key`.
    """

    functions = layer

    @expand_layer_options
    def __init__(
        self, embed: int, heads: int, *, key: Array, dtype: DTypeLike = "float32", **options: Unpack[LayerOptions]
    ) -> None:
        self.settings = LayerSettings.of(embed, heads, **options)
        self.params = initial(self.settings, key, dtype)

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        cache: Cache | None = None,
        **options: Unpack[CallOptions],
    ) -> Array | tuple[Array, Cache]:
        """Attend from the query to the key, by default the query itself; the value is by default the key."""
        return self.attend(query, key, value, cache=cache, **options)

    def _in_training(self, options: CallOptions) -> CallOptions:
        if options.get("dropout_key") is not None:
            options.setdefault("dropout_rate", self.settings.dropout_rate)
        return options

    def replace(self, **params: Array) -> Self:
        """Return the same layer with some parameters replaced."""
        return self.tree_unflatten(self.settings, (self.params | params,))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], LayerSettings]:
        """Return the parameters as children, and the settings, which can be compared and hashed."""
        return ((jax.tree_util.GetAttrKey("params"), self.params),), self.settings

    @classmethod
    def tree_unflatten(cls, settings: LayerSettings, children: tuple[Any, ...]) -> Self:
        """Make a layer of settings and parameters."""
        layer = object.__new__(cls)
        layer.settings, (layer.params,) = settings, children
        return layer


# Exported programs can have these types as arguments and results.
for cache in (KVCache, PagedKVCache, WindowKVCache):
    jax.export.register_namedtuple_serialization(cache, serialized_name=f"mha_spec.{cache.__name__}")
jax.export.register_pytree_node_serialization(
    MultiHeadAttention,
    serialized_name="mha_spec_jax.MultiHeadAttention",
    serialize_auxdata=lambda settings: json.dumps(settings.arguments).encode(),
    deserialize_auxdata=lambda text: LayerSettings.of(**json.loads(text)),
)

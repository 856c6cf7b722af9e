"""The layer as a pytree: parameters that `jax.grad` and optimizers walk, and a pure call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from mha_spec.layer_checks import check_rotary
from mha_spec.parameters import LayerSizes

from .layer import empty_cache, multi_head_attention, multi_head_attention_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self, Unpack

    from jax import Array
    from jax.typing import DTypeLike

    from mha_spec.arguments import Options, WeightOptions
    from mha_spec.cache import KVCache

__all__ = ["MultiHeadAttention", "initial"]


def initial(sizes: LayerSizes, key: Array, dtype: DTypeLike) -> dict[str, Array]:
    """Parameters by name: weights from Xavier's uniform distribution, biases 0, gains 1."""
    shapes = sizes.shapes()
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    found: dict[str, Array] = {}
    for name, shape in shapes.items():
        bound = sizes.initial_bound(name)
        if bound is None:
            found[name] = jax.numpy.full(shape, float(name.endswith("_norm")), dtype)
        else:
            found[name] = jax.random.uniform(keys[name], shape, dtype, -bound, bound)
    return found


@jax.tree_util.register_pytree_with_keys_class
class MultiHeadAttention:
    """Multi-head attention with parameters of its own; see `mha_spec.reference.multi_head_attention`.

    A pytree whose leaves are `params`: it can be an argument of jitted and differentiated functions, and what
    `jax.grad` gives of it is one, too. `dropout_rate` holds in calls that are given a `dropout_key`.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        *,
        key: Array,
        kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        k_embed: int | None = None,
        v_embed: int | None = None,
        out: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        rotary: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-6,
        dropout_rate: float = 0.0,
        dtype: DTypeLike = "float32",
    ) -> None:
        self.sizes = LayerSizes.of(
            embed,
            heads,
            kv_heads=kv_heads,
            qk_dim=qk_dim,
            v_dim=v_dim,
            k_embed=k_embed,
            v_embed=v_embed,
            out=out,
            bias=bias,
            qk_norm=qk_norm,
        )
        if rotary is not None:
            check_rotary(rotary, self.sizes.qk_dim)
        self.rotary = None if rotary is None else dict(rotary)
        self.norm_epsilon = norm_epsilon
        self.dropout_rate = dropout_rate
        self.params = initial(self.sizes, key, dtype)

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[Options],
    ) -> Array | tuple[Array, KVCache]:
        """Attend from the query to the key, which is the query unless given; the value is the key unless given."""
        key = query if key is None else key
        value = key if value is None else value
        if options.get("dropout_key") is not None and "dropout_rate" not in options:
            options["dropout_rate"] = self.dropout_rate
        return multi_head_attention(query, key, value, self.params, cache=cache, **self._own(), **options)

    def weights(
        self, query: Array, key: Array | None = None, *, cache: KVCache | None = None, **options: Unpack[WeightOptions]
    ) -> Array:
        """The weights of every head, (batch, heads, q_len, kv_len), before dropout."""
        key = query if key is None else key
        return multi_head_attention_weights(query, key, self.params, cache=cache, **self._own(), **options)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of this layer's sizes without tokens."""
        sizes = self.sizes
        return empty_cache(batch, sizes.kv_heads, capacity, sizes.qk_dim, sizes.v_dim, like=self.params["w_k"])

    def replace(self, **params: Array) -> Self:
        """The same layer with other parameters in place of those of these names."""
        return self.tree_unflatten(self._fixed(), (self.params | params,))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        """The parameters, and what is fixed."""
        return ((jax.tree_util.GetAttrKey("params"), self.params),), self._fixed()

    @classmethod
    def tree_unflatten(cls, fixed: tuple[Any, ...], children: tuple[Any, ...]) -> Self:
        """The layer of parameters and what is fixed."""
        made = object.__new__(cls)
        made.sizes, rotary, made.norm_epsilon, made.dropout_rate = fixed
        made.rotary = None if rotary is None else dict(rotary)
        (made.params,) = children
        return made

    def __repr__(self) -> str:
        """Sizes and options that differ from the defaults."""
        shown = [str(self.sizes)]
        defaults = {"rotary": None, "norm_epsilon": 1e-6, "dropout_rate": 0.0}
        shown += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return f"MultiHeadAttention({', '.join(shown)})"

    def _own(self) -> dict[str, Any]:
        return {"rotary": self.rotary, "norm_epsilon": self.norm_epsilon}

    def _fixed(self) -> tuple[Any, ...]:
        """What can be compared and hashed, as a pytree's structure must be."""
        rotary = None if self.rotary is None else tuple(sorted(self.rotary.items()))
        return self.sizes, rotary, self.norm_epsilon, self.dropout_rate

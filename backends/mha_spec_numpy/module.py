"""The layer as an object for NumPy: sizes, parameters, and a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.layer_checks import check_rotary
from mha_spec.parameters import LayerSizes

from .layer import empty_cache, multi_head_attention, multi_head_attention_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from mha_spec.arguments import Options, WeightOptions
    from mha_spec.arrays import Array
    from mha_spec.cache import KVCache

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention:
    """Multi-head attention with parameters of its own; see `mha_spec.reference.multi_head_attention`.

    Weights begin as Xavier's uniform distribution, biases at 0, gains at 1. `params` holds them by name.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        *,
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
        dtype: Any = "float32",
        rng: numpy.random.Generator | int | None = None,
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
        self.rotary = rotary
        self.norm_epsilon = norm_epsilon
        self.dropout_rate = dropout_rate
        self.training = False
        draw = numpy.random.default_rng(rng)
        self.params = {name: self._initial(name, shape, draw, dtype) for name, shape in self.sizes.shapes().items()}

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
        if self.training and "dropout_rate" not in options:
            options["dropout_rate"] = self.dropout_rate
        return multi_head_attention(query, key, value, self.params, cache=cache, **self._own(), **options)

    def weights(
        self, query: Array, key: Array | None = None, *, cache: KVCache | None = None, **options: Unpack[WeightOptions]
    ) -> Array:
        """The weights of every head, (batch, heads, q_len, kv_len)."""
        key = query if key is None else key
        return multi_head_attention_weights(query, key, self.params, cache=cache, **self._own(), **options)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of this layer's sizes without tokens."""
        sizes = self.sizes
        return empty_cache(batch, sizes.kv_heads, capacity, sizes.qk_dim, sizes.v_dim, like=self.params["w_k"])

    def __repr__(self) -> str:
        """Sizes and options that differ from the defaults."""
        shown = [str(self.sizes)]
        defaults = {"rotary": None, "norm_epsilon": 1e-6, "dropout_rate": 0.0}
        shown += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return f"MultiHeadAttention({', '.join(shown)})"

    def _own(self) -> dict[str, Any]:
        return {"rotary": self.rotary, "norm_epsilon": self.norm_epsilon}

    def _initial(self, name: str, shape: tuple[int, ...], draw: numpy.random.Generator, dtype: Any) -> numpy.ndarray:
        bound = self.sizes.initial_bound(name)
        if bound is None:
            return numpy.full(shape, float(name.endswith("_norm")), dtype=dtype)
        return draw.uniform(-bound, bound, shape).astype(dtype)

"""The layer as a `flax.nnx` module; imported by who has flax: `from mha_spec_jax.flax import MultiHeadAttention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax import nnx

from mha_spec.layer_checks import check_rotary
from mha_spec.parameters import LayerSizes

from .layer import empty_cache, multi_head_attention, multi_head_attention_weights
from .module import initial

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from jax import Array
    from jax.typing import DTypeLike

    from mha_spec.arguments import Options, WeightOptions
    from mha_spec.cache import KVCache

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nnx.Module):
    """Multi-head attention with parameters of its own; see `mha_spec.reference.multi_head_attention`.

    The parameters are `nnx.Param`s called as there. `dropout_rate` holds after `train()`, with keys of the stream
    `dropout` of `rngs`, until `eval()`; a new layer is in training, as flax's own are.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
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
        param_dtype: DTypeLike = "float32",
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
        self.rotary = None if rotary is None else tuple(sorted(rotary.items()))
        self.norm_epsilon = norm_epsilon
        self.dropout_rate = dropout_rate
        self.deterministic = False
        self.rngs = rngs["dropout"].fork() if dropout_rate else None
        for name, array in initial(self.sizes, rngs.params(), param_dtype).items():
            setattr(self, name, nnx.Param(array))

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
        if self.rngs is not None and not self.deterministic and "dropout_rate" not in options:
            options["dropout_rate"] = self.dropout_rate
            options.setdefault("dropout_key", self.rngs())
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

    @property
    def params(self) -> dict[str, Array]:
        """The arrays of the parameters by name, as `multi_head_attention` takes them."""
        return {name: getattr(self, name)[...] for name in self.sizes.shapes()}

    def __repr__(self) -> str:
        """Sizes and options that differ from the defaults; `nnx.display` shows the parameters."""
        own = self._own()
        shown = {"rotary": own["rotary"], "norm_epsilon": self.norm_epsilon, "dropout_rate": self.dropout_rate}
        defaults = {"rotary": None, "norm_epsilon": 1e-6, "dropout_rate": 0.0}
        more = [f"{name}={value}" for name, value in shown.items() if value != defaults[name]]
        return f"MultiHeadAttention({', '.join([str(self.sizes), *more])})"

    def _own(self) -> dict[str, Any]:
        return {"rotary": None if self.rotary is None else dict(self.rotary), "norm_epsilon": self.norm_epsilon}

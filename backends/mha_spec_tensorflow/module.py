"""The layer as a `keras.layers.Layer`, for Keras on TensorFlow."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy

from mha_spec.arguments import spells_options
from mha_spec.arrays import host_integers
from mha_spec.cache import KVCache
from mha_spec.errors import BackendError
from mha_spec.layer_checks import check_rotary
from mha_spec.parameters import LayerSizes

from .layer import empty_cache, multi_head_attention, multi_head_attention_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    import tensorflow as tf

    from mha_spec.arguments import Options, WeightOptions

__all__ = ["MultiHeadAttention"]


COUNTS = ("q_offset", "q_lengths", "kv_lengths")
"""Options that say more where the host can read them."""


@dataclass(frozen=True)
class OnTheHost:
    """A cache whose lengths the host can read, in a form that Keras leaves alone: of NumPy arrays it makes tensors."""

    cache: KVCache


def _spelt(call: Callable[..., Any]) -> Callable[..., Any]:
    """Name every option but `mask`: Keras takes tensors in a mapping for one argument, and `mask` for padding."""
    signature = inspect.signature(spells_options(call))
    parameters = [one for name, one in signature.parameters.items() if name != "mask"]
    vars(call)["__signature__"] = signature.replace(parameters=parameters)
    return call


@keras.saving.register_keras_serializable("mha_spec")
class MultiHeadAttention(keras.layers.Layer):
    """Multi-head attention with parameters of its own; see `mha_spec.reference.multi_head_attention`.

    The parameters are variables called as there. `dropout_rate` holds where `training` is True. Under a policy of mixed
    precision the parameters stay in float32 and the call is computed in the policy's type.
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
        **keywords: Any,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise BackendError(
                f"this layer is one of TensorFlow, and Keras runs on {keras.backend.backend()}: "
                "set KERAS_BACKEND=tensorflow, or take the layer of that backend"
            )
        super().__init__(**keywords)
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
        self.seed_generator = keras.random.SeedGenerator() if dropout_rate else None
        for name, shape in self.sizes.shapes().items():
            setattr(self, name, self.add_weight(shape=shape, initializer=self._initializer(name), name=name))
        self.built = True

    def __call__(self, *operands: Any, **keywords: Any) -> Any:
        """See `call`; what the host can read stays there, and `mask` goes by the name that it has in Keras."""
        for name in COUNTS:
            if isinstance(keywords.get(name), numpy.ndarray):
                keywords[name] = keywords[name].tolist()
        if "mask" in keywords:
            keywords["attention_mask"] = keywords.pop("mask")
        cache = keywords.get("cache")
        if isinstance(cache, KVCache) and host_integers(cache.lengths) is not None:
            keywords["cache"] = OnTheHost(cache)
        return super().__call__(*operands, **keywords)

    @_spelt
    def call(
        self,
        query: tf.Tensor,
        key: tf.Tensor | None = None,
        value: tf.Tensor | None = None,
        *,
        attention_mask: tf.Tensor | None = None,
        cache: KVCache | OnTheHost | None = None,
        training: bool | None = None,
        **options: Unpack[Options],
    ) -> tf.Tensor | tuple[tf.Tensor, KVCache]:
        """Attend from the query to the key, which is the query unless given; the value is the key unless given."""
        key = query if key is None else key
        value = key if value is None else value
        cache = cache.cache if isinstance(cache, OnTheHost) else cache
        options["mask"] = attention_mask
        if training and self.seed_generator is not None and "dropout_rate" not in options:
            options["dropout_rate"] = self.dropout_rate
            options.setdefault("dropout_key", self._next_key(self.seed_generator))
        return multi_head_attention(query, key, value, self.params, cache=cache, **self._own(), **options)

    def attention_weights(
        self,
        query: tf.Tensor,
        key: tf.Tensor | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[WeightOptions],
    ) -> tf.Tensor:
        """The weights of every head, (batch, heads, q_len, kv_len), before dropout; Keras has `weights` for its own."""
        key = query if key is None else key
        return multi_head_attention_weights(query, key, self.params, cache=cache, **self._own(), **options)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of this layer's sizes without tokens, of the type that it computes in."""
        sizes, like = self.sizes, keras.ops.zeros((), self.compute_dtype)
        return empty_cache(batch, sizes.kv_heads, capacity, sizes.qk_dim, sizes.v_dim, like=like)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by name in the type that the layer computes in, as `multi_head_attention` takes them."""
        return {name: keras.ops.cast(getattr(self, name), self.compute_dtype) for name in self.sizes.shapes()}

    def get_config(self) -> dict[str, Any]:
        """What makes this layer again."""
        sizes = {name: getattr(self.sizes, name) for name in self.sizes.__dataclass_fields__}
        own = {name: getattr(self, name) for name in ("rotary", "norm_epsilon", "dropout_rate")}
        return super().get_config() | sizes | own

    def __repr__(self) -> str:
        """Sizes and options that differ from the defaults."""
        shown = [str(self.sizes)]
        defaults = {"rotary": None, "norm_epsilon": 1e-6, "dropout_rate": 0.0}
        shown += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return f"MultiHeadAttention({', '.join(shown)})"

    def _own(self) -> dict[str, Any]:
        return {"rotary": self.rotary, "norm_epsilon": self.norm_epsilon}

    def _next_key(self, generator: keras.random.SeedGenerator) -> Any:
        """The seed and the count of calls, of 32 bits each, as one number."""
        state: Any = keras.ops.cast(generator.next(), "int64")
        seed, count = state[0], state[1]
        return seed * 2**32 + count

    def _initializer(self, name: str) -> keras.initializers.Initializer:
        bound = self.sizes.initial_bound(name)
        if bound is None:
            return keras.initializers.Constant(float(name.endswith("_norm")))
        return keras.initializers.RandomUniform(-bound, bound)

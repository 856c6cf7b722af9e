"""The layer as a `keras.layers.Layer`, for Keras on TensorFlow."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy

from mha_spec.arguments import Options, expand_options
from mha_spec.array_checks import require_array
from mha_spec.arrays import host_integers
from mha_spec.cache import AnyCache
from mha_spec.checks import refuse_unknown
from mha_spec.errors import BackendError
from mha_spec.layer_object import (
    CallOptions,
    CallWeightOptions,
    LayerObject,
    LayerOptions,
    LayerSettings,
    check_parameter_dtype,
    expand_layer_options,
)

from . import layer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Unpack

    import tensorflow as tf

    from mha_spec.cache import KVCache

__all__ = ["MultiHeadAttention"]


OPERANDS = ("query", "key", "value")
COUNTS = ("q_offset", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts", "positions")
"""Options that stay on the host where they are host data."""


@dataclass(frozen=True)
class OnTheHost:
    """A cache with lengths on the host, hidden from Keras, which would convert its NumPy arrays to tensors."""

    cache: AnyCache


def _with_signature(call: Callable[..., Any]) -> Callable[..., Any]:
    """Name every option but `mask` in the signature.

    Keras takes the tensors of `**options` for a single argument, and `mask` for its padding mask.
    """
    signature = inspect.signature(expand_options(call))
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "mask"]
    vars(call)["__signature__"] = signature.replace(parameters=parameters)
    return call


@keras.saving.register_keras_serializable("mha_spec")
class MultiHeadAttention(keras.layers.Layer, LayerObject):
    """Multi-head attention with its parameters; see `mha_spec.reference.multi_head_attention`.

    The parameters are variables with the same names. `dropout_rate` applies if `training` is True. Under a policy of
    mixed precision the parameters stay in float32 and the call is computed in the policy's type.
    """

    functions = layer

    @expand_layer_options
    def __init__(
        self,
        embed: int,
        heads: int,
        *,
        trainable: bool = True,
        name: str | None = None,
        dtype: Any = None,
        autocast: bool = True,
        activity_regularizer: Any = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise BackendError(
                f"This layer needs Keras on TensorFlow, and Keras runs on {keras.backend.backend()}. "
                "Set KERAS_BACKEND=tensorflow, or use the layer of that backend."
            )
        check_parameter_dtype(dtype, lambda dtype: keras.ops.zeros(0, keras.dtype_policies.get(dtype).compute_dtype))
        # Keras would also cast the bias, the sinks and the positions, whose types have a meaning (MHA-BIAS-2).
        super().__init__(
            trainable=trainable, name=name, dtype=dtype, autocast=False, activity_regularizer=activity_regularizer
        )
        self._casts_operands = autocast
        self.settings = LayerSettings.of(embed, heads, **options)
        self.seed_generator = keras.random.SeedGenerator() if self.settings.dropout_rate else None
        for name, shape in self.settings.shapes().items():
            setattr(self, name, self.add_weight(shape=shape, initializer=self._initializer(name), name=name))
        self.built = True

    def __call__(self, *operands: Any, **keywords: Any) -> Any:
        """Call the layer; see `call`. Host data stays on the host, and `mask` gets the name that it has in Keras.

        Unknown options and operands that are no arrays are refused here, because Keras would raise its own errors.
        """
        for name in COUNTS:
            if isinstance(keywords.get(name), numpy.ndarray):
                keywords[name] = keywords[name].tolist()
        if "mask" in keywords:
            keywords["attention_mask"] = keywords.pop("mask")
        cache = keywords.get("cache")
        if isinstance(cache, AnyCache) and host_integers(cache.lengths) is not None:
            keywords["cache"] = OnTheHost(cache)
        named = {name: keywords[name] for name in OPERANDS if name in keywords}
        for name, operand in {**dict(zip(OPERANDS, operands, strict=False)), **named}.items():
            if operand is not None:
                require_array(name, operand, "MHA-LAYER-2")
        if type(self).call is MultiHeadAttention.call:
            known = inspect.signature(self.call).parameters
            refuse_unknown({name: x for name, x in keywords.items() if name not in known}, "multi_head_attention")
        return super().__call__(*operands, **keywords)

    @_with_signature
    def call(
        self,
        query: tf.Tensor,
        key: tf.Tensor | None = None,
        value: tf.Tensor | None = None,
        *,
        attention_mask: tf.Tensor | None = None,
        positions: tf.Tensor | Sequence[Any] | None = None,
        cache: AnyCache | OnTheHost | None = None,
        training: bool | None = None,
        **options: Unpack[Options],
    ) -> tf.Tensor | tuple[tf.Tensor, AnyCache]:
        """Attend from the query to the key, by default the query, and to the value, by default the key."""
        cache = cache.cache if isinstance(cache, OnTheHost) else cache
        options["mask"] = attention_mask
        if training and self.seed_generator is not None and "dropout_rate" not in options:
            options["dropout_rate"] = self.settings.dropout_rate
            options.setdefault("dropout_key", self._next_key(self.seed_generator))
        of_call: CallOptions = {**options, "positions": positions}
        return self.attend(self._cast(query), self._cast(key), self._cast(value), cache=cache, **of_call)

    def attention_weights(
        self,
        query: tf.Tensor,
        key: tf.Tensor | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[CallWeightOptions],
    ) -> tf.Tensor:
        """Compute the weights of every head, (batch, heads, q_len, kv_len), before dropout.

        The name is not `weights`, which Keras uses for the variables.
        """
        return super().attention_weights(self._cast(query), self._cast(key), cache=cache, **options)

    def output_and_weights(
        self,
        query: tf.Tensor,
        key: tf.Tensor | None = None,
        value: tf.Tensor | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[CallOptions],
    ) -> tuple[Any, ...]:
        """Compute the output, the weights of every head and, with a cache, the new cache; `training` has no effect."""
        operands = (self._cast(x) for x in (query, key, value))
        return super().output_and_weights(*operands, cache=cache, **options)

    def _cast(self, x: tf.Tensor | None) -> Any:
        """Convert floating numbers to the type that the layer computes in, as Keras does for its own layers."""
        return self.dtype_policy.convert_input(x, self._casts_operands, self.input_dtype)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters by name in the type that the layer computes in, as `multi_head_attention` takes them."""
        return {name: keras.ops.cast(getattr(self, name), self.compute_dtype) for name in self.settings.shapes()}

    def get_config(self) -> dict[str, Any]:
        """Return the configuration from which `from_config` creates an equal layer."""
        return super().get_config() | self.settings.arguments

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults."""
        return LayerObject.__repr__(self)

    @property
    def _like(self) -> Any:
        return keras.ops.zeros((), self.compute_dtype)

    def _next_key(self, generator: keras.random.SeedGenerator) -> Any:
        """Return the seed and the number of calls, of 32 bits each, as an integer."""
        state: Any = keras.ops.cast(generator.next(), "int64")
        seed, count = state[0], state[1]
        return seed * 2**32 + count

    def _initializer(self, name: str) -> keras.initializers.Initializer:
        bound = self.settings.initial_bound(name)
        if bound is None:
            return keras.initializers.Constant(float(name.endswith("_norm")))
        return keras.initializers.RandomUniform(-bound, bound)

"""The layer for JAX: the specification's order, every step of it an operation that can be traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mha_spec.arguments import spells_options
from mha_spec.arrays import host_integers, softmax_dtype_name
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps, slope_values

from .core import attention, attention_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Unpack

    import numpy
    from jax import Array
    from jaxtyping import Float, Int

    from mha_spec.arguments import Options, WeightOptions
    from mha_spec.cache import KVCache

    Integers = Array | Sequence[int]

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "append_cache",
    "empty_cache",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "multi_head_attention_weights",
    "rotary_embedding",
]


def project(x: Array, weight: Array) -> Array:
    """Every head is a linear map of the embedding, summed in the softmax's type (MHA-PROJ-1)."""
    (batch, length, embed), (_, heads, size) = x.shape, weight.shape
    flat = _product(x, weight.reshape(embed, heads * size))
    return flat.reshape(batch, length, heads, size).transpose(0, 2, 1, 3)


def combine(x: Array, weight: Array) -> Array:
    """The output is a linear map of all heads, summed in the softmax's type (MHA-PROJ-3)."""
    batch, length, heads, size = x.shape
    return _product(x.reshape(batch, length, heads * size), weight.reshape(heads * size, weight.shape[2]))


def _product(x: Array, weight: Array) -> Array:
    wide = jnp.dtype(softmax_dtype_name(x.dtype.name))
    found = jnp.matmul(x.astype(wide), weight.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return found.astype(x.dtype)


def store(buffer: Array, new: Array, start: Integers, stop: Integers) -> Array:
    """A buffer with new tokens at start[b] <= j < stop[b], and no other slot changed (MHA-CACHE-1, MHA-CACHE-4).

    `dynamic_update_slice` moves a start that leaves no room, over tokens that are there: it serves known starts alone.
    """
    length, capacity = new.shape[2], buffer.shape[2]
    first = _common_start(start, stop, length)
    if first is not None:
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, first, axis=2)
    start, stop = (jnp.asarray(one)[:, None] for one in (start, stop))
    slots = start + jnp.arange(length)
    slots = jnp.where((slots >= 0) & (slots < stop), slots, capacity)
    return buffer.at[jnp.arange(new.shape[0])[:, None], :, slots].set(new.transpose(0, 2, 1, 3), mode="drop")


def _common_start(start: Integers, stop: Integers, length: int) -> int | None:
    """Where the tokens of every batch entry begin, if the host knows, and knows that all of them are real."""
    before, after = host_integers(start), host_integers(stop)
    if not before or not after or {*before} != {before[0]} or {*after} != {before[0] + length}:
        return None
    return before[0]


def slopes(heads: int, dtype: str) -> Array:
    """The slopes of all heads (MHA-ALIBI-1)."""
    return jnp.asarray(slope_values(heads), dtype=dtype)


_LAYER = Layer(
    LayerSteps(project=project, combine=combine, store=store, slopes=slopes, attend=attention, weigh=attention_weights)
)

empty_cache = _LAYER.empty_cache
append_cache = _LAYER.append_cache


@spells_options
def multi_head_attention(
    query: Float[Array, "batch q_len embed"],
    key: Float[Array, "batch kv_len k_embed"] | None,
    value: Float[Array, "batch kv_len v_embed"] | None,
    params: Mapping[str, Array],
    *,
    rotary: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-6,
    cache: KVCache | None = None,
    **options: Unpack[Options],
) -> Array | tuple[Array, KVCache]:
    """The layer over this backend's attention; see `mha_spec.reference.multi_head_attention`.

    Traced lengths of a cache are never read: one program serves every step of decoding.
    """
    return _LAYER.multi_head_attention(
        query, key, value, params, rotary=rotary, norm_epsilon=norm_epsilon, cache=cache, **options
    )


@spells_options
def multi_head_attention_and_weights(
    query: Float[Array, "batch q_len embed"],
    key: Float[Array, "batch kv_len k_embed"] | None,
    value: Float[Array, "batch kv_len v_embed"] | None,
    params: Mapping[str, Array],
    *,
    rotary: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-6,
    cache: KVCache | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Array] | tuple[Array, Array, KVCache]:
    """Output and weights of every head; see `mha_spec.reference.multi_head_attention_and_weights`."""
    return _LAYER.multi_head_attention_and_weights(
        query, key, value, params, rotary=rotary, norm_epsilon=norm_epsilon, cache=cache, **options
    )


@spells_options
def multi_head_attention_weights(
    query: Float[Array, "batch q_len embed"],
    key: Float[Array, "batch kv_len k_embed"] | None,
    params: Mapping[str, Array],
    *,
    rotary: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-6,
    cache: KVCache | None = None,
    **options: Unpack[WeightOptions],
) -> Float[Array, "batch heads q_len kv_len"]:
    """The weights of every head; see `mha_spec.reference.multi_head_attention_weights`."""
    return _LAYER.multi_head_attention_weights(
        query, key, params, rotary=rotary, norm_epsilon=norm_epsilon, cache=cache, **options
    )


def rotary_embedding(
    x: Float[Array, "batch heads length size"],
    positions: Array | Sequence[float] | numpy.ndarray,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Float[Array, "batch heads length size"]:
    """Positions as rotations; see `mha_spec.reference.rotary_embedding`."""
    return _LAYER.rotary_embedding(x, positions, base=base, interleaved=interleaved, rotary_dim=rotary_dim)


def alibi_slopes(heads: int, *, dtype: str = "float32") -> Float[Array, "heads"]:
    """The slopes of attention with linear biases; see `mha_spec.reference.alibi_slopes`."""
    return _LAYER.alibi_slopes(heads, dtype=dtype)


def alibi_bias(
    slopes: Float[Array, "heads"] | int,
    q_len: int,
    kv_len: int,
    *,
    q_offset: Int[Array, "batch"] | Sequence[int] | int | None = None,
) -> Float[Array, "batch* heads q_len kv_len"]:
    """Positions as a bias; see `mha_spec.reference.alibi_bias`."""
    return _LAYER.alibi_bias(slopes, q_len, kv_len, q_offset=q_offset)

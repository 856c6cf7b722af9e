"""The layer for JAX: the shared order of steps, each of which can be traced."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mha_spec import layer_steps, paged_steps
from mha_spec.array_checks import check_library
from mha_spec.arrays import host_integers, softmax_dtype_name
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps, slope_values

from . import rotary
from .checks import check_alibi, check_append, check_devices, check_layer
from .core import attention, attention_weights
from .mesh import as_first, partitioned
from .plan import are_known
from .problem import offset_of
from .rotary import positions
from .varlen import varlen_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy
    from jax import Array

    from mha_spec.cache import PagedKVCache
    from mha_spec.layer_checks import LayerArguments

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


def project_in(a: LayerArguments, _: LayerSteps) -> tuple[Array, Array | None, Array | None]:
    """Project query, key and value to heads (MHA-PROJ-1, MHA-PROJ-2)."""
    names = a.params.keys() & {"w_q", "w_k", "w_v", "b_q", "b_k", "b_v"}
    return _projected(a.query, a.key, a.value, {name: a.params[name] for name in sorted(names)})


@jax.jit
def _projected(
    query: Array, key: Array | None, value: Array | None, params: Mapping[str, Array]
) -> tuple[Array, Array | None, Array | None]:
    key, value = (None if x is None else _split(x, name, params) for name, x in (("k", key), ("v", value)))
    return _split(query, "q", params), key, value


def _split(x: Array, name: str, params: Mapping[str, Array]) -> Array:
    weight = params[f"w_{name}"]
    (batch, length, embed), (_, heads, size) = x.shape, weight.shape
    weight = as_first(lambda weight: weight.reshape(embed, heads * size), (0, 1))(weight)
    flat = _product(x, weight)
    split = flat.reshape(batch, length, heads, size).transpose(0, 2, 1, 3)
    return as_first(layer_steps.add_bias)(split, params.get(f"b_{name}"))


def project_out(x: Array, params: Mapping[str, Array], _: LayerSteps) -> Array:
    """Concatenate the heads, multiply them by the output weight, add the bias (MHA-PROJ-3)."""
    return _combined(x, params["w_o"], params.get("b_o"))


@jax.jit
def _combined(x: Array, weight: Array, bias: Array | None) -> Array:
    def call(x: Array, weight: Array) -> tuple[Array]:
        batch, heads, length, size = x.shape
        rows = x.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)
        return (_product(rows, weight.reshape(heads * size, weight.shape[2])),)

    return as_first(layer_steps.add_output_bias, (0, 1, 2))(partitioned(call, x, (0, 2))(x, weight)[0], bias)


def _product(x: Array, weight: Array) -> Array:
    """Multiply in the softmax's type."""
    wide = jnp.dtype(softmax_dtype_name(x.dtype.name))
    product = jnp.matmul(x.astype(wide), weight.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return product.astype(x.dtype)


def store(buffer: Array, new: Array, start: Integers, stop: Integers) -> Array:
    """Write new tokens at start[b] <= j < stop[b], and change no other slot (MHA-CACHE-1, MHA-CACHE-4).

    `dynamic_update_slice` moves a start that is too near the end, which would overwrite old tokens, so it serves only
    starts that the host knows.
    """
    first = _common_start(start, stop, new.shape[2])
    if first is not None:
        return _updated(buffer, new, first)
    return _scattered(buffer, new, *(paged_steps.integers(numbers, new) for numbers in (start, stop)))


@jax.jit
@as_first
def _updated(buffer: Array, new: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, first, axis=2)


@jax.jit
@as_first
def store_pages(pages: Array, new: Array, slots: Array) -> Array:
    """Write new tokens to their slots; those without a slot are dropped (MHA-CACHE-9)."""
    flat = pages.reshape(-1, *pages.shape[2:])
    slots = jnp.where(slots < 0, flat.shape[0], slots)
    return flat.at[slots].set(new.transpose(0, 2, 1, 3), mode="drop").reshape(pages.shape)


def new_slots(cache: PagedKVCache, stop: Integers, new: Array) -> Array:
    """Return the slot of each new token among those of all blocks, (batch, length); see `paged_steps.new_slots`."""
    lengths, stop, table = (paged_steps.integers(x, new) for x in (cache.lengths, stop, cache.block_table))
    return _new_slots(cache._replace(lengths=lengths, block_table=table), stop, new)


@partial(jax.jit, keep_unused=True)  # The new tokens, of which only the sizes are used, name the devices.
def _new_slots(cache: PagedKVCache, stop: Array, new: Array) -> Array:
    def call(*arrays: Any) -> tuple[Array]:
        return (paged_steps.new_slots(*arrays),)

    return partitioned(call, new, (0,))(cache, stop, new)[0]


def store_wrapped(buffer: Array, new: Array, start: Integers, stop: Integers) -> Array:
    """Write new tokens to the slots of the oldest; the last of each slot stays (MHA-CACHE-12)."""
    return _wrapped(buffer, new, *(paged_steps.integers(numbers, new) for numbers in (start, stop)))


@jax.jit
@as_first
def _wrapped(buffer: Array, new: Array, start: Array, stop: Array) -> Array:
    (batch, _, length, _), capacity = new.shape, buffer.shape[2]
    tokens, count = jnp.arange(length), (stop - start)[:, None]
    kept = (tokens < count) & (tokens >= count - capacity)
    # XLA does not say in which order it writes to a slot, so the tokens that do not stay are dropped.
    slots = jnp.where(kept, jnp.remainder(start[:, None] + tokens, capacity), capacity)
    return buffer.at[jnp.arange(batch)[:, None], :, slots].set(new.transpose(0, 2, 1, 3), mode="drop")


def unroll(buffer: Array, lengths: Integers, new: Array | None) -> Array:
    """Put the tokens of each batch entry in their order, the new ones last (MHA-CACHE-13)."""
    return _unrolled(buffer, paged_steps.integers(lengths, buffer), new)


@jax.jit
@partial(as_first, axes=(0, 1))
def _unrolled(buffer: Array, lengths: Array, new: Array | None) -> Array:
    slots = jnp.remainder(lengths[:, None] + jnp.arange(buffer.shape[2]), buffer.shape[2])
    tokens = jnp.take_along_axis(buffer, slots[:, None, :, None], axis=2)
    return tokens if new is None else jnp.concatenate([tokens, new], axis=2)


@jax.jit
@as_first
def _scattered(buffer: Array, new: Array, start: Array, stop: Array) -> Array:
    (batch, _, length, _), capacity = new.shape, buffer.shape[2]
    slots = start[:, None] + jnp.arange(length)
    slots = jnp.where((slots >= 0) & (slots < stop[:, None]), slots, capacity)
    return buffer.at[jnp.arange(batch)[:, None], :, slots].set(new.transpose(0, 2, 1, 3), mode="drop")


def _common_start(start: Integers, stop: Integers, length: int) -> int | None:
    """Return the slot of the first token if it is the same for all entries, on the host, and every token is real."""
    before, after = host_integers(start), host_integers(stop)
    if not before or not after or {*before} != {before[0]} or {*after} != {before[0] + length}:
        return None
    return before[0]


def bounds(batch: int, length: int, like: Array) -> Array | numpy.ndarray:
    """Return the cumulative lengths of sequences of the same length; sizes may be symbolic."""
    if are_known(batch, length):
        return paged_steps.bounds(batch, length, like)
    return jnp.arange(batch + 1, dtype=jnp.int32) * length


def slopes(heads: int, dtype: str) -> Array:
    """Return the slopes of all heads (MHA-ALIBI-1)."""
    return jnp.asarray(slope_values(heads), dtype=dtype)


def distances(offset: Integers | int, q_len: int, kv_len: int, like: Array, _: LayerSteps) -> Array:
    """Return |p - j|, integers (q_len, kv_len) or (batch, 1, q_len, kv_len); sizes may be symbolic (MHA-ALIBI-2)."""
    apart = jnp.abs(positions(offset, q_len, like)[..., None] - jnp.arange(kv_len, dtype=jnp.int32))
    return apart[:, None, :, :] if apart.ndim == 3 else apart


def turns(positions: Array | Sequence[float], frequencies: numpy.ndarray | Array, like: Array) -> tuple[Array, Array]:
    """Compute cosine and sine of position * frequency from arrays on the same devices (MHA-ROTARY-5, MHA-ARG-4)."""
    check_devices({"x": like, "positions": positions, "frequencies": frequencies})
    return rotary.turns(positions, frequencies, like)


def _compiled(step: Callable[..., Array]) -> Callable[..., Array]:
    """Compile a step whose third argument is a constant."""

    @partial(jax.jit, static_argnums=2)
    def compiled(x: Array, other: Any, constant: float) -> Array:
        return as_first(lambda *arrays: step(*arrays, constant))(x, other)

    return compiled


normalise = _compiled(layer_steps.normalise)
normalise_jointly = _compiled(layer_steps.normalise_jointly)
turn = _compiled(layer_steps.turn)


_LAYER = Layer(
    LayerSteps(
        check=check_layer,
        check_library=partial(check_library, "jax"),
        check_append=check_append,
        check_alibi=check_alibi,
        project_in=project_in,
        normalise=normalise,
        normalise_jointly=normalise_jointly,
        offset_of=offset_of,
        positions=positions,
        turns=turns,
        turn=turn,
        store=store,
        attend=attention,
        weigh=attention_weights,
        project_out=project_out,
        slopes=slopes,
        distances=distances,
        store_pages=store_pages,
        store_wrapped=store_wrapped,
        unroll=unroll,
        bounds=bounds,
        new_slots=new_slots,
        varlen=varlen_attention,
    )
)

multi_head_attention = _LAYER.multi_head_attention
multi_head_attention_and_weights = _LAYER.multi_head_attention_and_weights
multi_head_attention_weights = _LAYER.multi_head_attention_weights
rotary_embedding = _LAYER.rotary_embedding
alibi_slopes = _LAYER.alibi_slopes
alibi_bias = _LAYER.alibi_bias
empty_cache = _LAYER.empty_cache
append_cache = _LAYER.append_cache

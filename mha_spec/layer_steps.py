"""The steps of the layer, a small function for each, in the order of the specification.

As in `mha_spec.steps`, every function works on any library of the Python array API, cites the clauses that it
implements, and is a field of `LayerSteps`, where it can be replaced by name: by a backend with a faster operation, by
the conformance suite with a mistake. Arguments and results have the query's dtype, unless a step says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy

from . import layer_checks, paged_steps, rotary_checks, window_steps
from .arguments import DROPOUT_OPTIONS
from .arrays import Array, device_of, dtype_name, host_integers, library_of, namespace_of, native, softmax_dtype_name
from .attention_reference import attention as attend
from .attention_reference import attention_weights as weigh
from .cache import KVCache
from .offsets import named_offset

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .cache import PagedKVCache, WindowKVCache
    from .layer_checks import LayerArguments
    from .rotary_checks import Rotary

__all__ = ["NARROW", "LayerSteps", "are_on_host", "for_each_pair", "narrow", "slope_values", "widen"]


NARROW = ("int8", "uint8", "int16", "uint16")
"""The types that do not hold every length."""


def widen(x: Array) -> Array:
    """Convert an array to the softmax's type, float64 for float64, else float32 (MHA-SOFTMAX-2)."""
    xp = namespace_of(x)
    return xp.astype(x, getattr(xp, softmax_dtype_name(dtype_name(x))), copy=False)


def narrow(x: Array, like: Array) -> Array:
    """Convert an array to the dtype of another."""
    return namespace_of(x).astype(x, like.dtype, copy=False)


def project(x: Array, weight: Array) -> Array:
    """Heads are linear maps of the embedding: (batch, length, embed) to (batch, heads, length, size) (MHA-PROJ-1)."""
    xp = namespace_of(x)
    (batch, length, embed), (_, heads, size) = x.shape, weight.shape
    rows = xp.reshape(widen(x), (batch * length, embed))
    flat = rows @ xp.reshape(widen(weight), (embed, heads * size))
    return narrow(xp.permute_dims(xp.reshape(flat, (batch, length, heads, size)), (0, 2, 1, 3)), x)


def add_bias(x: Array, bias: Array | None) -> Array:
    """Add a bias for each head and component, the same for every token (MHA-PROJ-2)."""
    return x if bias is None else narrow(widen(x) + widen(bias)[:, None, :], x)


def project_in(a: LayerArguments, steps: LayerSteps) -> tuple[Array, Array | None, Array | None]:
    """Project query, key and value to heads; None stays None (MHA-PROJ-1, MHA-PROJ-2, MHA-LAYER-3)."""
    operands = (("q", a.query), ("k", a.key), ("v", a.value))
    q, k, v = (
        None if x is None else steps.add_bias(steps.project(x, a.params[f"w_{name}"]), a.params.get(f"b_{name}"))
        for name, x in operands
    )
    return q, k, v


def normalise(x: Array, gain: Array | None, epsilon: float) -> Array:
    """Divide each head's vector by its root mean square, and multiply by a gain per component (MHA-NORM-1)."""
    if gain is None:
        return x
    xp, wide = namespace_of(x), widen(x)
    mean_square = xp.mean(wide * wide, axis=-1, keepdims=True)
    return narrow(wide / xp.sqrt(mean_square + epsilon) * widen(gain), x)


def normalise_jointly(x: Array, gain: Array, epsilon: float) -> Array:
    """Divide the vectors of all heads of a token by their common root mean square (MHA-NORM-3)."""
    xp, wide = namespace_of(x), widen(x)
    mean_square = xp.mean(wide * wide, axis=(1, 3), keepdims=True)
    return narrow(wide / xp.sqrt(mean_square + epsilon) * widen(gain)[:, None, :], x)


def positions(offset: Array, length: int, like: Array) -> Array:
    """Compute the positions offset + i, (length,), or offset[b] + i, (batch, length) (MHA-POS-1, MHA-ROTARY-4).

    The result is a NumPy array where the offset is host data, else an array of the offset's library.
    """
    if host_integers(offset) is not None:
        host = numpy.asarray(offset, dtype=numpy.int64)
        return host[..., None] + numpy.arange(length)
    starts = paged_steps.integers(offset, offset)
    xp = namespace_of(starts)
    return starts[:, None] + xp.arange(length, dtype=starts.dtype, device=device_of(like))


@lru_cache(maxsize=256)
def frequencies(base: float, rotary_dim: int) -> numpy.ndarray:
    """Pair i turns by base^(-2i / rotary_dim) for each position, in float64 on the host (MHA-ROTARY-1)."""
    values = float(base) ** (numpy.arange(0, rotary_dim, 2) / -rotary_dim)
    values.flags.writeable = False  # The cache returns the same array to every caller.
    return values


def explicit_frequencies(frequencies: tuple[float, ...] | Array) -> numpy.ndarray | Array:
    """Pair i turns by frequencies[i] of the caller, in float64 if they are on the host (MHA-ROTARY-7)."""
    return frequencies if library_of(frequencies) else _on_host(cast("tuple[float, ...]", frequencies))


@lru_cache(maxsize=256)
def _on_host(frequencies: tuple[float, ...]) -> numpy.ndarray:
    values = numpy.asarray(frequencies, dtype=numpy.float64)
    values.flags.writeable = False  # The cache returns the same array to every caller.
    return values


def turns(positions: Array | Sequence[float], frequencies: Array, like: Array) -> tuple[Array, Array]:
    """Cosine and sine of position * frequency, (length, pairs) or (batch, 1, length, pairs) (MHA-ROTARY-5).

    They are in the softmax's type. Positions and frequencies on the host are multiplied in float64, those of an array
    library in the softmax's type.
    """
    xp, device = namespace_of(like), device_of(like)
    wide = getattr(xp, softmax_dtype_name(dtype_name(like)))
    if are_on_host(positions, frequencies):
        angles = for_each_pair(numpy.asarray(positions, dtype=numpy.float64)) * frequencies
        cosine, sine = (xp.asarray(turn, dtype=wide, device=device) for turn in (numpy.cos(angles), numpy.sin(angles)))
    else:
        factors: list[Any] = [
            # A copy can be written to, without which PyTorch warns.
            xp.asarray(numpy.array(factor), dtype=wide, device=device)
            if are_on_host(factor)
            else xp.astype(factor, wide)
            for factor in (positions, frequencies)
        ]
        angles = for_each_pair(factors[0]) * factors[1]
        cosine, sine = xp.cos(angles), xp.sin(angles)
    return (cosine[:, None, :, :], sine[:, None, :, :]) if cosine.ndim == 3 else (cosine, sine)


def for_each_pair(positions: Array) -> Array:
    """Add the axis of pairs, which positions of several sections already have (MHA-ROTARY-17)."""
    return positions if positions.ndim == 3 else positions[..., None]


def spread(positions: Array | Sequence[Any], sections: Sequence[int]) -> Array | Sequence[Any]:
    """Give each pair the positions on its axis: (axes, batch, length) to (batch, length, pairs) (MHA-ROTARY-17).

    Positions of rank 1 or 2 are those on every axis.
    """
    axes = numpy.repeat(numpy.arange(len(sections)), sections)
    if are_on_host(positions):
        host = numpy.asarray(positions)
        return numpy.moveaxis(host, 0, -1)[..., axes] if host.ndim == 3 else positions
    array: Any = positions
    if array.ndim != 3:
        return positions
    xp = namespace_of(array)
    return xp.take(xp.permute_dims(array, (1, 2, 0)), xp.asarray(axes, device=device_of(array)), axis=-1)


def are_on_host(*factors: object) -> bool:
    """Tell whether all are numbers on the host, whose product can be computed in float64."""
    return all(library_of(factor) in (None, "numpy") for factor in factors)


def magnify(turns: tuple[Array, Array], factor: float) -> tuple[Array, Array]:
    """Multiply cosine and sine by a factor, so that it multiplies only components that turn (MHA-ROTARY-8)."""
    return turns if factor == 1 else (turns[0] * factor, turns[1] * factor)


def turn(x: Array, turns: tuple[Array, Array], interleaved: bool) -> Array:
    """Turn each pair of components as a complex number; the others are unchanged (MHA-ROTARY-1 to MHA-ROTARY-3).

    Pair i is (i, i + pairs), or (2i, 2i + 1) if interleaved.
    """
    xp, (cosine, sine) = namespace_of(x), turns
    pairs = cosine.shape[-1]
    turned, rest = widen(x[..., : 2 * pairs]), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    pair = (first * cosine - second * sine, second * cosine + first * sine)
    joined = xp.reshape(xp.stack(pair, axis=-1), turned.shape) if interleaved else xp.concat(pair, axis=-1)
    return xp.concat([narrow(joined, x), rest], axis=-1) if rest.shape[-1] else narrow(joined, x)


def new_lengths(
    lengths: Array | Sequence[int], counts: Array | Sequence[int] | None, length: int, like: Array
) -> Array:
    """Count the tokens of each batch entry after an append of `length`, of which counts[b] are real (MHA-CACHE-5).

    The result is a NumPy array where both are host data, else an array of the library of `like`, whose counts are
    clamped (MHA-LEN-3).
    """
    before = host_integers(lengths)
    more = [length] * len(before or ()) if counts is None else host_integers(counts)
    if before is not None and more is not None:
        return numpy.array([old + new for old, new in zip(before, more, strict=True)], dtype=numpy.int32)
    xp = namespace_of(like)
    old = _as_integers(lengths, like)
    return old + (length if counts is None else xp.astype(xp.clip(_as_integers(counts, like), 0, length), old.dtype))


def _as_integers(lengths: Array | Sequence[int], like: Array) -> Array:
    """Return integers as an array of a type of at least 32 bits, so that sums do not wrap."""
    xp = namespace_of(like)
    numbers = native(cast("Any", lengths)) if library_of(lengths) == "numpy" else lengths
    array = xp.asarray(numbers, device=device_of(like))
    return xp.astype(array, xp.int32) if dtype_name(array) in NARROW else array


def store(buffer: Array, new: Array, start: Array | Sequence[int], stop: Array) -> Array:
    """Write new tokens to the slots start[b] <= j < stop[b] of each batch entry of a buffer (MHA-CACHE-1).

    A token beyond the capacity is dropped (MHA-CACHE-4).
    """
    xp, device = namespace_of(buffer), device_of(buffer)
    batch, _, capacity, _ = buffer.shape
    if 0 in (batch, capacity, new.shape[2]):
        return buffer
    slots = xp.arange(capacity, device=device)
    start, stop = (xp.reshape(xp.astype(xp.asarray(end, device=device), slots.dtype), (-1, 1)) for end in (start, stop))
    taken = xp.clip(slots - start, 0, new.shape[2] - 1)
    moved = xp.stack([xp.take(new[b, ...], taken[b, ...], axis=1) for b in range(batch)])
    written = (slots >= start) & (slots < stop)
    return xp.where(written[:, None, :, None], moved, buffer)


def append(
    cache: KVCache, key: Array, value: Array | None, counts: Array | Sequence[int] | None, steps: LayerSteps
) -> KVCache:
    """Append new tokens to each batch entry; without a value, its buffer is unchanged (MHA-CACHE-1)."""
    stop = steps.new_lengths(cache.lengths, counts, key.shape[2], key)
    stored = cache.value if value is None else steps.store(cache.value, value, cache.lengths, stop)
    return KVCache(steps.store(cache.key, key, cache.lengths, stop), stored, stop)


def empty_cache(shapes: Sequence[tuple[int, ...]], like: Array) -> KVCache:
    """Make buffers of zeros, and lengths of 0 on the host."""
    xp = namespace_of(like)
    key, value = (xp.zeros(shape, dtype=like.dtype, device=device_of(like)) for shape in shapes)
    return KVCache(key, value, numpy.zeros(shapes[0][0], dtype=numpy.int32))


def attend_and_weigh(query: Array, key: Array, value: Array, steps: LayerSteps, **options: Any) -> tuple[Array, Array]:
    """Compute the output, and the weights before dropout (MHA-LAYER-4)."""
    weight_options = {name: value for name, value in options.items() if name not in DROPOUT_OPTIONS}
    return steps.attend(query, key, value, **options), steps.weigh(query, key, **weight_options)


def merge_heads(x: Array) -> Array:
    """Join the outputs of a token's heads in their order: (batch, q_len, heads, v_dim) (MHA-PROJ-3)."""
    return namespace_of(x).permute_dims(x, (0, 2, 1, 3))


def combine(x: Array, weight: Array) -> Array:
    """Map all heads linearly to the output: (batch, q_len, heads, v_dim) to (batch, q_len, out) (MHA-PROJ-3)."""
    xp = namespace_of(x)
    batch, length, heads, size = x.shape
    rows = xp.reshape(widen(x), (batch * length, heads * size))
    flat = rows @ xp.reshape(widen(weight), (heads * size, weight.shape[2]))
    return narrow(xp.reshape(flat, (batch, length, weight.shape[2])), x)


def add_output_bias(x: Array, bias: Array | None) -> Array:
    """Add the output's bias once, also to empty rows (MHA-PROJ-3, MHA-LAYER-5)."""
    return x if bias is None else narrow(widen(x) + widen(bias), x)


def project_out(x: Array, params: Mapping[str, Array], steps: LayerSteps) -> Array:
    """Merge the heads, project, add the bias (MHA-PROJ-3)."""
    return steps.add_output_bias(steps.combine(steps.merge_heads(x), params["w_o"]), params.get("b_o"))


def slope_values(heads: int) -> list[float]:
    """Compute 2^(-8 (h + 1) / m), m the largest power of two <= heads, then every other slope of 2m (MHA-ALIBI-1)."""
    power = 2 ** (heads.bit_length() - 1)
    first = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-8 * (2 * head + 1) / (2 * power)) for head in range(heads - power)]
    return first + between


def slopes(heads: int, dtype: str) -> Array:
    """Return the slopes of all heads in an array of the library (MHA-ALIBI-1)."""
    return numpy.asarray(slope_values(heads), dtype=dtype)


def distances(offset: Array | Sequence[int] | int, q_len: int, kv_len: int, like: Array, steps: LayerSteps) -> Array:
    """|p - j|, integers (q_len, kv_len) or (batch, 1, q_len, kv_len) (MHA-ALIBI-2)."""
    queries = steps.positions(offset, q_len, like)
    xp = namespace_of(queries)
    apart = xp.abs(queries[..., None] - xp.arange(kv_len, dtype=queries.dtype, device=device_of(queries)))
    return namespace_of(like).asarray(apart[:, None, :, :] if apart.ndim == 3 else apart, device=device_of(like))


def alibi(slopes: Array, distances: Array) -> Array:
    """-slope[h] * |p - j|, (batch or 1, heads, q_len, kv_len) in the softmax's type (MHA-ALIBI-2, MHA-ALIBI-3)."""
    xp, wide = namespace_of(slopes), widen(slopes)
    return xp.reshape(-wide, (1, -1, 1, 1)) * xp.astype(distances, wide.dtype)


def take_any_library(array: object, label: str) -> None:
    """Accept arrays of every library; a backend of a framework requires those of its own (MHA-ARG-4)."""


@dataclass(frozen=True)
class LayerSteps:
    """The steps of the layer by name; `dataclasses.replace` exchanges single steps."""

    check: Callable[..., LayerArguments] = layer_checks.check
    check_library: Callable[[object, str], None] = take_any_library
    check_rotary: Callable[..., Rotary] = rotary_checks.check_rotary
    check_positions: Callable[..., None] = layer_checks.check_positions
    check_append: Callable[..., None] = layer_checks.check_append
    check_heads: Callable[..., None] = layer_checks.check_heads
    check_alibi: Callable[..., None] = layer_checks.check_alibi
    project_in: Callable[..., tuple[Array, Array | None, Array | None]] = project_in
    project: Callable[..., Array] = project
    add_bias: Callable[..., Array] = add_bias
    normalise: Callable[..., Array] = normalise
    normalise_jointly: Callable[..., Array] = normalise_jointly
    offset_of: Callable[..., Array | int] = named_offset
    positions: Callable[..., Array] = positions
    frequencies: Callable[..., numpy.ndarray] = frequencies
    explicit_frequencies: Callable[..., Array] = explicit_frequencies
    spread: Callable[..., Array | Sequence[Any]] = spread
    turns: Callable[..., tuple[Array, Array]] = turns
    magnify: Callable[..., tuple[Array, Array]] = magnify
    turn: Callable[..., Array] = turn
    empty_cache: Callable[..., KVCache] = empty_cache
    new_lengths: Callable[..., Array] = new_lengths
    store: Callable[..., Array] = store
    append: Callable[..., KVCache] = append
    new_slots: Callable[..., Array] = paged_steps.new_slots
    store_pages: Callable[..., Array] = paged_steps.store_pages
    append_paged: Callable[..., PagedKVCache] = paged_steps.append_paged
    attend_paged: Callable[..., Array] = paged_steps.attend_paged
    bounds: Callable[..., Array] = paged_steps.bounds
    integers: Callable[..., Array] = paged_steps.integers
    append_window: Callable[..., WindowKVCache] = window_steps.append_window
    store_wrapped: Callable[..., Array] = window_steps.store_wrapped
    unroll: Callable[..., Array] = window_steps.unroll
    capacity_of: Callable[..., int] = window_steps.capacity_of
    start_of_keys: Callable[..., Array] = window_steps.start_of_keys
    window_operands: Callable[..., tuple[Array, Array, dict[str, Any]]] = window_steps.operands
    varlen: Callable[..., Any] | None = None
    """varlen_attention; None is that of the reference, whose module imports this one."""
    attend: Callable[..., Array] = attend
    weigh: Callable[..., Array] = weigh
    attend_and_weigh: Callable[..., tuple[Array, Array]] = attend_and_weigh
    merge_heads: Callable[..., Array] = merge_heads
    combine: Callable[..., Array] = combine
    add_output_bias: Callable[..., Array] = add_output_bias
    project_out: Callable[..., Array] = project_out
    slopes: Callable[..., Array] = slopes
    distances: Callable[..., Array] = distances
    alibi: Callable[..., Array] = alibi

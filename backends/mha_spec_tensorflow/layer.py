"""The layer for TensorFlow: the specification's steps in its order, in operations that can be traced."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy
import tensorflow as tf

from mha_spec import layer_checks, layer_steps, paged_steps, window_steps
from mha_spec.arguments import decorate_method
from mha_spec.arrays import dtype_name, host_integers, library_of, softmax_dtype_name
from mha_spec.cache import AnyCache, KVCache, PagedKVCache
from mha_spec.checks import check_library
from mha_spec.errors import refuse_value
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps, slope_values

from .core import attention, attention_weights
from .packed import in_xla
from .plan import offset_of
from .unknown import (
    ALIBI,
    APPENDED,
    KNOWN,
    LAYER,
    PAGED_CACHE,
    POSITIONS,
    POSITIONS_OF_LAYER,
    ROTATED,
    Layout,
    sizes_of,
    with_known_shapes,
)
from .varlen import varlen_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

    from mha_spec.arrays import Array
    from mha_spec.cache import Cache
    from mha_spec.layer_checks import LayerArguments

    Integers = Array | Sequence[int] | numpy.ndarray

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


def check(a: LayerArguments) -> LayerArguments:
    """Check the arguments of the layer, after the known sizes are set in the shape of each tensor."""
    params = {f"params[{name!r}]": array for name, array in a.params.items()} if isinstance(a.params, Mapping) else {}
    options = {name: value for name, value in a.options.items() if name in LAYER}
    without_offset = a.cache is None and not options.keys() & {"q_offset", "kv_lengths"}
    aligned = a.key is not None and (a.positions is not None or (a.rotary is not None and without_offset))
    operands = {"query": a.query, "key": a.key, "value": a.value, **params, **options, **_of_cache(a.cache)}
    tensors = with_known_shapes(_layouts(a), operands | {"positions": a.positions}, KNOWN, aligned=aligned)
    a.query, a.key, a.value, a.positions = (tensors[name] for name in ("query", "key", "value", "positions"))
    a.params = {name: tensors[f"params[{name!r}]"] for name in a.params} if params else a.params
    a.options |= {name: tensors[name] for name in options}
    a.cache = _cache_of(tensors, a.cache)
    check_library("tensorflow", a.query)
    return layer_checks.check(a)


def _layouts(a: LayerArguments) -> Mapping[str, Layout]:
    """Return the layouts of the arguments; the rank of positions determines their axes (MHA-LAYER-7)."""
    positions: Any = a.positions
    all_layouts = _with_cache(LAYER, a.cache)
    if not tf.is_tensor(positions):
        return all_layouts
    _require_rank(positions, "MHA-LAYER-7")
    layouts = {len(layout.sizes): layout for layout in POSITIONS_OF_LAYER}
    layout = layouts.get(positions.shape.rank)  # The shared checks refuse another rank.
    return all_layouts if layout is None else {**all_layouts, "positions": layout}


def _with_cache(layouts: Mapping[str, Layout], cache: object) -> Mapping[str, Layout]:
    """Return layouts with those of a paged cache, if the cache is one."""
    return {**layouts, **PAGED_CACHE} if isinstance(cache, PagedKVCache) else layouts


def _of_cache(cache: object) -> dict[str, Any]:
    if not isinstance(cache, AnyCache):
        return {}
    return {f"cache.{name}": array for name, array in cache._asdict().items()}


def _cache_of(tensors: Mapping[str, Any], cache: Any) -> Any:
    """Return the cache with the checked buffers; return anything else, which a later check refuses, unchanged."""
    names = _of_cache(cache)
    return type(cache)(*(tensors[name] for name in names)) if names else cache


def widen(x: Array) -> Array:
    """Convert a tensor to the softmax's type (MHA-SOFTMAX-2)."""
    return tf.cast(x, softmax_dtype_name(dtype_name(x)))


def project_in(a: LayerArguments, _: LayerSteps) -> tuple[Array, Array | None, Array | None]:
    """Project query, key and value; projections of the same tensor are a single product (MHA-PROJ-1, MHA-PROJ-2)."""
    operands = {"q": a.query, "k": a.key, "v": a.value}
    projections: dict[str, Array | None] = dict.fromkeys(operands)
    for x in operands.values():
        names = [name for name, operand in operands.items() if operand is x]
        if x is not None and projections[names[0]] is None:
            projections |= zip(names, _projected(x, a.params, names), strict=True)
    return projections["q"], projections["k"], projections["v"]


def _projected(x: Array, params: Mapping[str, Array], names: list[str]) -> list[Array]:
    """Compute linear maps of a tensor, summed in the softmax's type; the bias is added before heads are split."""
    (batch, length, embed), weights = sizes_of(x), [widen(params[f"w_{name}"]) for name in names]
    shapes = [(weight.shape[1], weight.shape[2]) for weight in weights]
    sizes = [heads * size for heads, size in shapes]
    flat = [tf.reshape(weight, (embed, size)) for weight, size in zip(weights, sizes, strict=True)]
    rows = tf.matmul(tf.reshape(widen(x), (-1, embed)), tf.concat(flat, axis=1))
    biases = [params.get(f"b_{name}") for name in names]
    if any(bias is not None for bias in biases):
        flat_biases = [_flat_bias(*triple) for triple in zip(biases, sizes, weights, strict=True)]
        rows = tf.nn.bias_add(rows, tf.concat(flat_biases, 0))
    parts = (
        tf.reshape(part, (batch, length, *shape)) for part, shape in zip(tf.split(rows, sizes, 1), shapes, strict=True)
    )
    return [tf.cast(tf.transpose(part, (0, 2, 1, 3)), x.dtype) for part in parts]


def _flat_bias(bias: Array | None, size: int, like: Array) -> Array:
    return tf.zeros(size, like.dtype) if bias is None else tf.reshape(widen(bias), (size,))


def normalise(x: Array, gain: Array | None, epsilon: float) -> Array:
    """Divide each head's vector by its root mean square, in the softmax's type (MHA-NORM-1)."""
    if gain is None:
        return x
    wide = widen(x)
    mean_square = tf.reduce_mean(wide * wide, axis=-1, keepdims=True)
    return tf.cast(wide / tf.sqrt(mean_square + epsilon) * widen(gain), x.dtype)


def normalise_jointly(x: Array, gain: Array, epsilon: float) -> Array:
    """Divide the vectors of all heads of a token by their common root mean square (MHA-NORM-3)."""
    wide = widen(x)
    mean_square = tf.reduce_mean(wide * wide, axis=(1, 3), keepdims=True)
    return tf.cast(wide / tf.sqrt(mean_square + epsilon) * widen(gain)[:, None, :], x.dtype)


def positions(offset: Integers | int, length: int | None, like: Array) -> numpy.ndarray | Array:
    """Return the positions offset[b] + i, as an array of NumPy if offset and length are known (MHA-POS-1)."""
    if host_integers(offset) is not None and length is not None:
        return layer_steps.positions(offset, length, like)
    starts = integers(offset, like)
    return starts[..., None] + tf.range(sizes_of(like)[2] if length is None else length, dtype=starts.dtype)


def named_offset(
    reading: str, q_lengths: Integers | None, kv_lengths: Integers | None, query: Array, key: Array
) -> Integers | int:
    """Return the offset that an alignment names, an integer, or an integer for each batch entry (MHA-POS-2)."""
    offset = offset_of(reading, q_lengths, kv_lengths, query, key)
    is_scalar = isinstance(offset, tf.Tensor) and offset.shape.rank == 0
    return tf.fill(sizes_of(query)[:1], offset) if is_scalar else offset


def spread(positions: Any, sections: Sequence[int]) -> Any:
    """Give each pair the positions on its axis: (axes, batch, length) to (batch, length, pairs) (MHA-ROTARY-17)."""
    if layer_steps.are_on_host(positions):
        return layer_steps.spread(positions, sections)
    axes = numpy.repeat(numpy.arange(len(sections)), sections)
    return tf.gather(tf.transpose(positions, (1, 2, 0)), axes, axis=-1) if positions.shape.rank == 3 else positions


def turns(
    positions: Array | Sequence[float] | numpy.ndarray, frequencies: numpy.ndarray | Array, like: Array
) -> tuple[Array, Array]:
    """Compute cosine and sine of position * frequency in the softmax's type, the product in float64 (MHA-ROTARY-5)."""
    dtype = softmax_dtype_name(dtype_name(like))
    if layer_steps.are_on_host(positions, frequencies):
        angles = layer_steps.for_each_pair(numpy.asarray(positions, dtype=numpy.float64)) * frequencies
        pair = [tf.constant(turn, dtype) for turn in (numpy.cos(angles), numpy.sin(angles))]
    else:
        angles = layer_steps.for_each_pair(tf.cast(positions, tf.float64)) * tf.cast(frequencies, tf.float64)
        pair = [tf.cast(turn, dtype) for turn in (tf.cos(angles), tf.sin(angles))]
    cosine, sine = (turn[:, None] if turn.shape.rank == 3 else turn for turn in pair)
    return cosine, sine


def turn(x: Array, turns: tuple[Array, Array], interleaved: bool) -> Array:
    """Rotate each pair of components; the others are unchanged (MHA-ROTARY-1 to MHA-ROTARY-3)."""
    cosine, sine = turns
    pairs = cosine.shape[-1]
    turned, rest = widen(x[..., : 2 * pairs]), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    joined = tf.reshape(tf.stack(rotated, axis=-1), sizes_of(turned)) if interleaved else tf.concat(rotated, axis=-1)
    joined = tf.cast(joined, x.dtype)
    return tf.concat([joined, rest], axis=-1) if rest.shape[-1] else joined


def new_lengths(lengths: Integers, counts: Integers | None, length: int | None, like: Array) -> numpy.ndarray | Array:
    """Return the number of tokens of each batch entry after an append of counts[b] real tokens (MHA-CACHE-5)."""
    arrays = [lengths] if counts is None else [lengths, counts]
    if length is not None and all(host_integers(numbers) is not None for numbers in arrays):
        return layer_steps.new_lengths(lengths, counts, length, like)
    before, size = tf.convert_to_tensor(lengths), tf.cast(sizes_of(like)[2], tf.int64)
    before = integers(before, like) if dtype_name(before) in layer_steps.NARROW else before  # Sums do not wrap.
    new = size if counts is None else tf.clip_by_value(tf.cast(counts, tf.int64), 0, size)
    return before + tf.cast(new, before.dtype)


def store(buffer: Array, new: Array, start: Integers, stop: Integers) -> Array:
    """Write new tokens to the slots start[b] <= j < stop[b] of a new buffer (MHA-CACHE-1, MHA-CACHE-4)."""
    if 0 in (buffer.shape[0], buffer.shape[2], new.shape[2]):
        return buffer
    slots = tf.range(sizes_of(buffer)[2])
    start, stop = (tf.cast(bound, tf.int32)[:, None] for bound in (start, stop))
    written = tf.logical_and(slots >= start, slots < stop)
    return tf.where(written[:, None, :, None], _tokens_at(slots - start, new), buffer)


def _tokens_at(places: Array, new: Array) -> Array:
    """Return the new token of each slot, (batch, kv_heads, capacity, size); a slot without a token gets any numbers."""
    # In a graph of unknown sizes there may be no token, and a gather from nothing is an error.
    padded = new if new.shape[2] else tf.pad(new, [[0, 0], [0, 0], [0, 1], [0, 0]])
    return tf.gather(padded, tf.clip_by_value(places, 0, sizes_of(padded)[2] - 1), axis=2, batch_dims=1)


def new_slots(cache: PagedKVCache, stop: Integers, new: Array) -> Array:
    """Return the slot of each new token among those of all blocks, (batch, length); -1 stores it nowhere."""
    start, stop, table = (tf.cast(numbers, tf.int64) for numbers in (cache.lengths, stop, cache.block_table))
    sizes = (*sizes_of(cache.key)[:2], sizes_of(table)[1])
    blocks, size, columns = (tf.cast(number, tf.int64) for number in sizes)
    positions = start[:, None] + tf.range(sizes_of(new)[2], dtype=tf.int64)
    inside = (positions >= 0) & (positions < stop[:, None]) & (positions < columns * size)
    positions = tf.where(inside, positions, tf.zeros((), tf.int64))
    # A row of the table may have no entry.
    numbers = tf.gather(tf.pad(table, [[0, 0], [0, 1]]), positions // size, axis=1, batch_dims=1)
    inside &= (numbers >= 0) & (numbers < blocks)
    return tf.where(inside, numbers * size + tf.math.floormod(positions, size), tf.constant(-1, tf.int64))


def store_pages(pages: Array, new: Array, slots: Array) -> Array:
    """Write new tokens to their slots of new blocks (MHA-CACHE-9)."""
    inside, tokens = slots >= 0, tf.transpose(new, (0, 2, 1, 3))
    sizes = sizes_of(pages)
    flat = tf.reshape(pages, (sizes[0] * sizes[1], *sizes[2:]))
    # A row for the tokens without a slot, whose number XLA does not know.
    flat = tf.pad(flat, [[0, 1], [0, 0], [0, 0]])
    slots = tf.where(inside, slots, tf.cast(sizes[0] * sizes[1], tf.int64))
    stored = tf.tensor_scatter_nd_update(flat, slots[..., None], tokens)
    return tf.reshape(stored[:-1], sizes)


def attend_paged(query: Array, cache: PagedKVCache, options: dict[str, Any], varlen: Any, _: LayerSteps) -> Array:
    """Attend to the tokens of a paged cache by a packed call, a sequence for each batch entry (MHA-CACHE-10)."""
    if in_xla() and (tf.is_tensor(cache.lengths) or tf.is_tensor(cache.block_table)):
        return _attend_to_all_slots(query, cache, options)
    batch, heads, length, size = sizes_of(query)
    tokens = tf.reshape(tf.transpose(query, (0, 2, 1, 3)), (batch * length, heads, size))
    is_known = isinstance(batch, int) and isinstance(length, int)
    bounds = (numpy.arange(batch + 1, dtype=numpy.int32) if is_known else tf.range(batch + 1)) * length
    known = {name: options[name] for name in paged_steps.OPTIONS if name in options}
    output = varlen(
        tokens, cache.key, cache.value, bounds, None, block_table=cache.block_table, seqused_kv=cache.lengths, **known
    )
    return tf.transpose(tf.reshape(output, (batch, length, heads, output.shape[2])), (0, 2, 1, 3))


def _attend_to_all_slots(query: Array, cache: PagedKVCache, options: dict[str, Any]) -> Array:
    """Attend to every slot of the table, the last of which the lengths hide; XLA has no arrays of unknown sizes."""
    key, value = (_slots_of(pages, cache.block_table) for pages in (cache.key, cache.value))
    known = {name: options[name] for name in paged_steps.OPTIONS if name in options}
    return attention(query, key, value, kv_lengths=cache.lengths, **known)


def _slots_of(pages: Array, table: Integers) -> Array:
    """Gather the slots of each batch entry, (batch, kv_heads, slots, size); a number of no block is that of another."""
    blocks, page, heads, size = sizes_of(pages)
    batch, columns = sizes_of(tf.convert_to_tensor(table))
    # Without a block, a table of numbers has no slots.
    columns = columns * tf.minimum(blocks, 1) if tf.is_tensor(blocks) else columns * min(blocks, 1)
    numbers = tf.clip_by_value(tf.cast(table, tf.int64)[:, :columns], 0, tf.cast(blocks, tf.int64) - 1)
    slots = tf.reshape(tf.gather(pages, numbers), (batch, columns * page, heads, size))
    return tf.transpose(slots, (0, 2, 1, 3))


def integers(numbers: Integers | int, _: Array) -> Array:
    """Return integers as a tensor of 32 bits, which hold every position."""
    return tf.cast(tf.convert_to_tensor(numbers), tf.int32)


def store_wrapped(buffer: Array, new: Array, start: Integers, stop: Integers) -> Array:
    """Write new tokens to the slots of the oldest; the last of each slot stays (MHA-CACHE-12)."""
    if 0 in (buffer.shape[0], buffer.shape[2], new.shape[2]):
        return buffer
    capacity = sizes_of(buffer)[2]
    first, end = (integers(ends, buffer)[:, None] for ends in (start, stop))
    last = end - 1 - tf.math.floormod(end - 1 - tf.range(capacity), capacity) - first
    return tf.where((last >= 0)[:, None, :, None], _tokens_at(last, new), buffer)


def unroll(buffer: Array, lengths: Integers, new: Array | None) -> Array:
    """Put the tokens of each batch entry in their order, the new ones last (MHA-CACHE-13)."""
    capacity = sizes_of(buffer)[2]
    slots = tf.math.floormod(integers(lengths, buffer)[:, None] + tf.range(capacity), capacity)
    tokens = tf.gather(buffer, slots, axis=2, batch_dims=1)
    return tokens if new is None else tf.concat([tokens, new], axis=2)


def capacity_of(buffer: Array) -> int | Array:
    """Return the number of slots of each batch entry, a tensor where the trace does not know it."""
    return sizes_of(buffer)[2]


def start_of_keys(starts: Array | numpy.ndarray, chunk: int | None) -> Array | numpy.ndarray:
    """Return the first visible key, from which chunks are counted (MHA-WINDOW-3)."""
    if chunk is None or isinstance(starts, numpy.ndarray):
        return window_steps.start_of_keys(starts, chunk)
    return tf.where(starts < 0, tf.math.floormod(starts, chunk), starts)


def empty(shapes: Sequence[tuple[int, ...]], like: Array) -> KVCache:
    """Create buffers of zeros, and lengths of 0 on the host."""
    key, value = (tf.zeros(shape, like.dtype) for shape in shapes)
    return KVCache(key, value, numpy.zeros(shapes[0][0], dtype=numpy.int32))


def merge_heads(x: Array) -> Array:
    """Place the outputs of a token's heads next to each other, in their order (MHA-PROJ-3)."""
    return tf.transpose(x, (0, 2, 1, 3))


def combine(x: Array, weight: Array) -> Array:
    """Compute the linear map of all heads, summed in the softmax's type (MHA-PROJ-3)."""
    batch, length, heads, size = sizes_of(x)
    flat = tf.matmul(tf.reshape(widen(x), (-1, heads * size)), tf.reshape(widen(weight), (heads * size, -1)))
    return tf.cast(tf.reshape(flat, (batch, length, sizes_of(weight)[2])), x.dtype)


def add_output_bias(x: Array, bias: Array | None) -> Array:
    """Add the output's bias, to empty rows too (MHA-PROJ-3, MHA-LAYER-5)."""
    return x if bias is None else tf.cast(tf.nn.bias_add(widen(x), widen(bias)), x.dtype)


def slopes(heads: int, dtype: str) -> Array:
    """Return the slopes of all heads (MHA-ALIBI-1)."""
    return tf.constant(slope_values(heads), dtype)


def distances(offset: Integers | int, q_len: int, kv_len: int, like: Array, steps: LayerSteps) -> Array:
    """Compute |p - j|, integers (q_len, kv_len) or (batch, 1, q_len, kv_len) (MHA-ALIBI-2)."""
    q_positions = tf.convert_to_tensor(steps.positions(offset, q_len, like))
    distance = tf.abs(tf.expand_dims(q_positions, -1) - tf.range(kv_len, dtype=q_positions.dtype))
    return distance[:, None] if distance.shape.rank == 3 else distance


def alibi(slopes: Array, distances: Array) -> Array:
    """Compute -slope[h] * |p - j|, (batch or 1, heads, q_len, kv_len), as MHA-ALIBI-2 and MHA-ALIBI-3 say."""
    wide = widen(slopes)
    return tf.reshape(-wide, (1, -1, 1, 1)) * tf.cast(distances, wide.dtype)


_LAYER = Layer(
    LayerSteps(
        check=check,
        check_library=partial(check_library, "tensorflow"),
        project_in=project_in,
        normalise=normalise,
        normalise_jointly=normalise_jointly,
        positions=positions,
        offset_of=named_offset,
        spread=spread,
        turns=turns,
        turn=turn,
        empty_cache=empty,
        new_lengths=new_lengths,
        store=store,
        attend=attention,
        weigh=attention_weights,
        merge_heads=merge_heads,
        combine=combine,
        add_output_bias=add_output_bias,
        slopes=slopes,
        distances=distances,
        alibi=alibi,
        new_slots=new_slots,
        store_pages=store_pages,
        attend_paged=attend_paged,
        integers=integers,
        store_wrapped=store_wrapped,
        unroll=unroll,
        capacity_of=capacity_of,
        start_of_keys=start_of_keys,
        varlen=varlen_attention,
    )
)

_unconverted = tf.autograph.experimental.do_not_convert

multi_head_attention = decorate_method(_unconverted, _LAYER.multi_head_attention)
multi_head_attention_and_weights = decorate_method(_unconverted, _LAYER.multi_head_attention_and_weights)
multi_head_attention_weights = decorate_method(_unconverted, _LAYER.multi_head_attention_weights)
alibi_slopes = _LAYER.alibi_slopes
empty_cache = decorate_method(_unconverted, _LAYER.empty_cache)


@_unconverted
def append_cache(
    cache: Cache,
    key: Float[tf.Tensor, "batch kv_heads length qk_dim"],
    value: Float[tf.Tensor, "batch kv_heads length v_dim"],
    lengths: Int[tf.Tensor, "batch"] | Sequence[int] | None = None,
) -> Cache:
    """Return a new cache with new tokens after those of each batch entry; see `mha_spec.reference.append_cache`."""
    operands = {"key": key, "value": value, "lengths": lengths, **_of_cache(cache)}
    tensors = with_known_shapes(_with_cache(APPENDED, cache), operands, ("kv_heads", "qk_dim", "v_dim"))
    checked_cache = _cache_of(tensors, cache)
    return _LAYER.append_cache(checked_cache, tensors["key"], tensors["value"], tensors["lengths"])


@_unconverted
def rotary_embedding(
    x: Float[tf.Tensor, "batch heads length size"],
    positions: tf.Tensor | Sequence[float] | numpy.ndarray,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    frequencies: tf.Tensor | numpy.ndarray | Sequence[float] | None = None,
    attention_factor: float = 1.0,
    sections: Sequence[int] | None = None,
) -> Float[tf.Tensor, "batch heads length size"]:
    """Encode positions as rotations; see `mha_spec.reference.rotary_embedding`."""
    x, positions = _rotation_with_known_shapes(x, positions, sections)
    rotary = {"base": base, "interleaved": interleaved, "rotary_dim": rotary_dim}
    rotary |= {"frequencies": frequencies, "attention_factor": attention_factor, "sections": sections}
    return _LAYER.rotary_embedding(x, positions, **rotary)


def _rotation_with_known_shapes(x: Array, positions: Any, sections: Sequence[int] | None) -> tuple[Array, Any]:
    """Return x and its positions, whose rank determines their axes, with the known sizes set in their shapes."""
    tensors = with_known_shapes({"x": ROTATED}, {"x": x, "positions": positions}, ("size",))
    x, positions = tensors["x"], tensors["positions"]
    check_library("tensorflow", x, "x")
    if tf.executing_eagerly():
        return x, positions
    _require_rank(positions, "MHA-ROTARY-6")
    layer_checks.check_vectors(x)
    layer_checks.check_positions(x, positions, None if sections is None else tuple(sections))
    array = positions if library_of(positions) else numpy.asarray(positions)
    layouts = {"x": ROTATED, "positions": POSITIONS[len(array.shape) - 1]}
    tensors = with_known_shapes(layouts, {"x": x, "positions": array})
    return tensors["x"], tensors["positions"]


def _require_rank(positions: Any, clause: str) -> None:
    """Refuse a tensor of an unknown rank, which determines the axes of positions."""
    if tf.is_tensor(positions) and positions.shape.rank is None:
        fix = "received shape=<unknown>. Set it with tf.ensure_shape."
        refuse_value(clause, f"`positions` must have a known rank when they are traced, {fix}")


@_unconverted
def alibi_bias(
    slopes: Float[tf.Tensor, "heads"] | int,
    q_len: int,
    kv_len: int,
    *,
    q_offset: Int[tf.Tensor, "batch"] | Sequence[int] | int | None = None,
) -> Float[tf.Tensor, "batch* heads q_len kv_len"]:
    """Encode positions as a bias; see `mha_spec.reference.alibi_bias`."""
    tensors = with_known_shapes(ALIBI, {"slopes": slopes, "q_offset": q_offset})
    return _LAYER.alibi_bias(tensors["slopes"], q_len, kv_len, q_offset=tensors["q_offset"])

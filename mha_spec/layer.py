"""Multi-head attention as a layer: projections, positions and a cache around attention, in one order for every backend.

`Layer(steps)` is the order, written once; what touches an array is a step of `mha_spec.layer_steps`. The functions of
this module are those of the reference; a backend replaces steps by what its library does best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from .arguments import offset_of_reading, spells_options
from .arrays import Array, library_of
from .layer_checks import LayerArguments, check_like, check_slope_dtype, empty_shapes
from .layer_steps import LayerSteps
from .scalars import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Unpack

    from jaxtyping import Float, Int

    from .arguments import Options, WeightOptions
    from .cache import KVCache
    from .layer_checks import Rotary

__all__ = [
    "Layer",
    "alibi_bias",
    "alibi_slopes",
    "append_cache",
    "empty_cache",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "multi_head_attention_weights",
    "rotary_embedding",
]


class Operands(NamedTuple):
    """What the layer hands to attention (MHA-CACHE-6)."""

    query: Array
    key: Any
    value: Any
    options: dict[str, Any]
    cache: KVCache | None = None
    """The new one, where there was one."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The functions of the layer over a choice of steps; see the functions of this module for their meaning."""

    steps: LayerSteps = LayerSteps()

    def multi_head_attention(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        params: Mapping[str, Array],
        *,
        rotary: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-6,
        cache: KVCache | None = None,
        **options: Unpack[Options],
    ) -> Array | tuple[Array, KVCache]:
        """The specification's multi_head_attention, over these steps (MHA-LAYER-1)."""
        name = "multi_head_attention"
        a = LayerArguments(name, query, key, value, params, rotary, norm_epsilon, cache, {**options})
        x = self._operands(self.steps.check(a))
        output = self._output(a, self.steps.attend(x.query, x.key, x.value, **x.options))
        return output if x.cache is None else (output, x.cache)

    def multi_head_attention_and_weights(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        params: Mapping[str, Array],
        *,
        rotary: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-6,
        cache: KVCache | None = None,
        **options: Unpack[Options],
    ) -> tuple[Array, Array] | tuple[Array, Array, KVCache]:
        """The specification's multi_head_attention_and_weights, over these steps (MHA-LAYER-4)."""
        name = "multi_head_attention_and_weights"
        a = LayerArguments(name, query, key, value, params, rotary, norm_epsilon, cache, {**options})
        x = self._operands(self.steps.check(a))
        attended, weights = self.steps.attend_and_weigh(x.query, x.key, x.value, self.steps, **x.options)
        output = self._output(a, attended)
        return (output, weights) if x.cache is None else (output, weights, x.cache)

    def multi_head_attention_weights(
        self,
        query: Array,
        key: Array | None,
        params: Mapping[str, Array],
        *,
        rotary: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-6,
        cache: KVCache | None = None,
        **options: Unpack[WeightOptions],
    ) -> Array:
        """The specification's multi_head_attention_weights, over these steps (MHA-LAYER-4)."""
        name = "multi_head_attention_weights"
        a = LayerArguments(name, query, key, None, params, rotary, norm_epsilon, cache, {**options})
        x = self._operands(self.steps.check(a))
        return self.steps.weigh(x.query, x.key, **x.options)

    def rotary_embedding(self, x: Array, positions: Array | Sequence[float], **rotary: Any) -> Array:
        """The specification's rotary_embedding, over these steps."""
        self.steps.check_positions(x, positions)
        options = self.steps.check_rotary(rotary, x.shape[3])
        return self.steps.turn(x, self._turns(positions, options, x), options.interleaved)

    def alibi_slopes(self, heads: int, *, dtype: str = "float32") -> Array:
        """The specification's alibi_slopes, over these steps."""
        heads = plain(heads)
        self.steps.check_heads(heads)
        check_slope_dtype(dtype)
        return self.steps.slopes(heads, dtype)

    def alibi_bias(
        self, slopes: Array | int, q_len: int, kv_len: int, *, q_offset: Array | Sequence[int] | int | str | None = None
    ) -> Array:
        """The specification's alibi_bias, over these steps."""
        slopes, q_len, kv_len, q_offset = (plain(argument) for argument in (slopes, q_len, kv_len, q_offset))
        self.steps.check_alibi(slopes, q_len, kv_len, q_offset)
        of_heads = slopes if library_of(slopes) else self.steps.slopes(slopes, "float32")
        offset = 0 if q_offset is None else q_offset
        offset = offset_of_reading(offset, q_len, kv_len) if isinstance(offset, str) else offset
        return self.steps.alibi(of_heads, self.steps.distances(offset, q_len, kv_len, of_heads, self.steps))

    def empty_cache(
        self, batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None = None, *, like: Array
    ) -> KVCache:
        """The specification's empty_cache, over these steps."""
        key, value = empty_shapes(batch, kv_heads, capacity, qk_dim, v_dim)
        check_like(like)
        return self.steps.empty_cache((key, value), like)

    def append_cache(
        self, cache: KVCache, key: Array, value: Array, lengths: Array | Sequence[int] | None = None
    ) -> KVCache:
        """The specification's append_cache, over these steps."""
        self.steps.check_append(cache, key, value, lengths)
        return self.steps.append(cache, key, value, lengths, self.steps)

    def _operands(self, a: LayerArguments) -> Operands:
        """What attention is given: with a cache all that the new one holds, from where the old one ended on."""
        q, k, v = self._heads(a)
        if a.cache is None:
            return Operands(q, k, v, a.options)
        counts, offset = a.options.get("kv_lengths"), a.options.get("q_offset")
        new = a.cache if k is None else self.steps.append(a.cache, k, v, counts, self.steps)
        options = {"kv_lengths": new.lengths, "q_offset": a.cache.lengths if offset is None else offset}
        return Operands(q, new.key, new.value, a.options | options, new)

    def _heads(self, a: LayerArguments) -> tuple[Array, Array | None, Array | None]:
        """Query, key and value of each head, as attention and the cache take them (MHA-NORM-2)."""
        q, k, v = self.steps.project_in(a, self.steps)
        if "q_norm" in a.params:
            q = self.steps.normalise(q, a.params["q_norm"], a.norm_epsilon)
        if "k_norm" in a.params and k is not None:
            k = self.steps.normalise(k, a.params["k_norm"], a.norm_epsilon)
        if a.rotation is not None:
            q, k = self._rotated(a, a.rotation, q, k)
        return q, k, v

    def _rotated(self, a: LayerArguments, rotary: Rotary, q: Array, k: Array | None) -> tuple[Array, Array | None]:
        """Query i turns by its position, new key i by that of the slot it goes to (MHA-ROTARY-4, MHA-CACHE-6)."""
        start = 0 if a.cache is None else a.cache.lengths
        offset = a.options.get("q_offset")
        if isinstance(offset, str):
            offset = a.options["q_offset"] = self._named_offset(a, offset, q, k)
        offset = start if offset is None else offset
        turns = self._turns(self.steps.positions(offset, a.query.shape[1], q), rotary, q)
        q = self.steps.turn(q, turns, rotary.interleaved)
        if k is None or a.key is None:
            return q, None
        if offset is not start or a.query.shape[1] != a.key.shape[1]:
            turns = self._turns(self.steps.positions(start, a.key.shape[1], k), rotary, k)
        return q, self.steps.turn(k, turns, rotary.interleaved)

    def _named_offset(self, a: LayerArguments, reading: str, q: Array, k: Array | None) -> Array | int:
        """The offset that a reading names, of the tokens that the new cache holds (MHA-POS-2, MHA-CACHE-6)."""
        q_lengths, kv_lengths = a.options.get("q_lengths"), a.options.get("kv_lengths")
        if a.cache is None:
            return self.steps.offset_of(reading, q_lengths, kv_lengths, q, k)
        lengths = a.cache.lengths
        new = lengths if k is None else self.steps.new_lengths(lengths, kv_lengths, k.shape[2], k)
        return self.steps.offset_of(reading, q_lengths, new, q, a.cache.key)

    def _turns(self, positions: Array | Sequence[float], rotary: Rotary, x: Array) -> tuple[Array, Array]:
        rotary_dim = x.shape[3] if rotary.rotary_dim is None else rotary.rotary_dim
        return self.steps.turns(positions, self.steps.frequencies(rotary.base, rotary_dim), x)

    def _output(self, a: LayerArguments, attended: Array) -> Array:
        return self.steps.project_out(attended, a.params, self.steps)


_LAYER = Layer()
_quiet = numpy.errstate(all="ignore")


@spells_options
@_quiet
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
    """Multi-head attention: projections of query, key and value, attention in every head, one projection out.

        Q = rotate(norm(query w_q + b_q)),  K = rotate(norm(key w_k + b_k)),  V = value w_v + b_v
        output = sum_h attention(Q, K, V)[h] w_o[h] + b_o

    With a cache, the new keys and values go behind those that it holds, and attention sees them all: decoding token by
    token, in chunks, or at once gives the same numbers.

    Args:
        query: (batch, q_len, embed), float64, float32, float16 or bfloat16.
        key: (batch, kv_len, k_embed), of the query's dtype; the query itself in self-attention. None with a cache
            appends nothing: attention to keys that were cached before.
        value: (batch, kv_len, v_embed), of the query's dtype; None where key is.
        params: w_q (embed, heads, qk_dim), w_k (k_embed, kv_heads, qk_dim), w_v (v_embed, kv_heads, v_dim) and
            w_o (heads, v_dim, out); optional b_q, b_k, b_v, b_o, q_norm and k_norm. See `mha_spec.parameters.AXES`.
        rotary: The options of `rotary_embedding`, {} for its defaults; None is no rotation.
        norm_epsilon: Added to the mean square where q_norm or k_norm is there.
        cache: Keys and values of the tokens so far. q_offset is its lengths unless given; kv_lengths counts the new
            keys that are real; mask, bias, dropout_mask and kv_segment_ids speak of its whole capacity.
        **options: See `mha_spec.arguments.Options`.

    Returns:
        The output, (batch, q_len, out) in the query's dtype; with a cache also the new one.

    Raises:
        ArgumentValueError: A shape, a range or a combination is wrong, the cache is full, or positions are ambiguous.
        ArgumentTypeError: A dtype, a library, a name of a parameter or a keyword is wrong.

    Differs from others:
        torch `nn.MultiheadAttention` has one size for all heads, packs w_q, w_k and w_v in one matrix (out, in), takes
        masks in which True hides, and gives weights averaged over heads. Keras and flax have (in, heads, size) as here.
        flax's `decode=True` changes its cache in place.

    Source:
        SPEC.md, MHA-LAYER-1; Vaswani et al. 2017, section 3.2.2.
    """
    return _LAYER.multi_head_attention(
        query, key, value, params, rotary=rotary, norm_epsilon=norm_epsilon, cache=cache, **options
    )


@spells_options
@_quiet
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
    """What `multi_head_attention` and `multi_head_attention_weights` give, with one projection for both.

    The arguments and errors are those of `multi_head_attention`; the weights know no dropout. With a cache the new one
    comes third. torch's `nn.MultiheadAttention` with `need_weights` gives the mean over heads unless told otherwise,
    and applies dropout first.

    Source:
        SPEC.md, MHA-LAYER-4.
    """
    return _LAYER.multi_head_attention_and_weights(
        query, key, value, params, rotary=rotary, norm_epsilon=norm_epsilon, cache=cache, **options
    )


@spells_options
@_quiet
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
    """The weights of every head in `multi_head_attention`, before dropout.

    Args:
        query: (batch, q_len, embed).
        key: (batch, kv_len, k_embed), of the query's dtype; None with a cache takes its keys alone.
        params: Those of `multi_head_attention`; those of value and output are not needed.
        rotary: As in `multi_head_attention`.
        norm_epsilon: As in `multi_head_attention`.
        cache: As in `multi_head_attention`; it is not given back.
        **options: Those of `multi_head_attention` less dropout; see `mha_spec.arguments.WeightOptions`.

    Returns:
        The weights, (batch, heads, q_len, kv_len) in the query's dtype; with a cache kv_len is its capacity.

    Raises:
        ArgumentValueError, ArgumentTypeError: As `multi_head_attention`.

    Differs from others:
        torch `nn.MultiheadAttention` gives the mean over heads unless told otherwise, and applies dropout first.

    Source:
        SPEC.md, MHA-LAYER-4 and MHA-WEIGHTS-1.
    """
    return _LAYER.multi_head_attention_weights(
        query, key, params, rotary=rotary, norm_epsilon=norm_epsilon, cache=cache, **options
    )


@_quiet
def rotary_embedding(
    x: Float[Array, "batch heads length size"],
    positions: Array | Sequence[float],
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Float[Array, "batch heads length size"]:
    """Turn pairs of components by angles that grow with the position.

        angle_i = position * base^(-2i / rotary_dim)
        (x_a, x_b) -> (x_a cos - x_b sin, x_b cos + x_a sin)    (a, b) = (i, i + rotary_dim/2), interleaved (2i, 2i + 1)

    Args:
        x: (batch, heads, length, size), float64, float32, float16 or bfloat16.
        positions: (length,) or (batch, length), integers, or floats between them; on the host or of the library of x.
        base: Greater than 0; a larger one turns more slowly.
        interleaved: Whether neighbours are a pair, in place of components half of rotary_dim apart.
        rotary_dim: How many components turn, the first ones; even. None is all of them.

    Returns:
        x with its pairs turned, in its dtype; the other components as they were.

    Raises:
        ArgumentValueError, ArgumentTypeError: size is odd without rotary_dim, or positions do not fit.

    Differs from others:
        The two pairings are those of GPT-NeoX and Llama (halves) and of GPT-J (interleaved); weights of one are wrong
        with the other. ONNX `RotaryEmbedding` takes cosine and sine from the caller.

    Source:
        SPEC.md, MHA-ROTARY-1 to MHA-ROTARY-6; Su et al. 2021.
    """
    return _LAYER.rotary_embedding(x, positions, base=base, interleaved=interleaved, rotary_dim=rotary_dim)


def alibi_slopes(heads: int, *, dtype: str = "float32") -> Float[Array, "heads"]:
    """The slopes of attention with linear biases.

        slope[h] = 2^(-8 (h + 1) / heads)    where heads is a power of two

    For other numbers of heads, the slopes of the next lower power of two m, then slopes 0, 2, 4, ... of those of 2m.

    Args:
        heads: At least 1.
        dtype: "float32", which serves 16-bit attention too, or "float64".

    Returns:
        The slopes, (heads,).

    Raises:
        ArgumentValueError, ArgumentTypeError: heads is no integer >= 1.

    Differs from others:
        mlx and others took the first formula for every number of heads; checkpoints have the paper's.

    Source:
        SPEC.md, MHA-ALIBI-1; Press et al. 2022, and its code for numbers that are no power of two.
    """
    return _LAYER.alibi_slopes(heads, dtype=dtype)


def alibi_bias(
    slopes: Float[Array, "heads"] | int,
    q_len: int,
    kv_len: int,
    *,
    q_offset: Int[Array, "batch"] | Sequence[int] | int | str | None = None,
) -> Float[Array, "batch* heads q_len kv_len"]:
    """The bias that falls linearly with the distance: -slope[h] * |p - j|, with query i at p = q_offset[b] + i.

    Args:
        slopes: (heads,), or a number of heads, whose slopes are then `alibi_slopes(heads)`.
        q_len: Number of queries.
        kv_len: Number of keys; with a cache its capacity.
        q_offset: Position of query 0, as in `attention`, by a name, too; needed where q_len and kv_len differ.

    Returns:
        The bias, (1, heads, q_len, kv_len), with an offset for each batch entry (batch, heads, q_len, kv_len); float64
        for slopes in float64, else float32.

    Raises:
        ArgumentValueError, ArgumentTypeError: As `attention` for an offset that is missing or wrong.

    Differs from others:
        The form slope * j, of which causal attention cannot tell the difference, is another one for keys after the
        query; here the bias is symmetric.

    Source:
        SPEC.md, MHA-ALIBI-2 and MHA-ALIBI-3; Press et al. 2022.
    """
    return _LAYER.alibi_bias(slopes, q_len, kv_len, q_offset=q_offset)


def empty_cache(
    batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None = None, *, like: Array
) -> KVCache:
    """A cache without tokens, of the library, dtype and device of `like`; also `KVCache.empty`.

    Args:
        batch: Number of batch entries.
        kv_heads: Number of key/value heads.
        capacity: Tokens that each batch entry has room for.
        qk_dim: Size of a key.
        v_dim: Size of a value; None is qk_dim.
        like: Any array of the wanted library, dtype and device, such as a parameter.

    Returns:
        The cache, with lengths of 0 on the host.
    """
    return _LAYER.empty_cache(batch, kv_heads, capacity, qk_dim, v_dim, like=like)


def append_cache(
    cache: KVCache,
    key: Float[Array, "batch kv_heads length qk_dim"],
    value: Float[Array, "batch kv_heads length v_dim"],
    lengths: Int[Array, "batch"] | Sequence[int] | None = None,
) -> KVCache:
    """A new cache with new tokens behind those of each batch entry; also `KVCache.append`.

    Args:
        cache: The cache, which still reads as before.
        key: (batch, kv_heads, length, qk_dim), normalised and rotated.
        value: (batch, kv_heads, length, v_dim).
        lengths: How many of the new tokens of each batch entry are real, the first ones; None is all of them.

    Returns:
        The new cache.

    Raises:
        ArgumentValueError: The cache has no room, where lengths are host data; nothing is stored. Where they are not,
            tokens beyond the capacity are dropped, and counted.
        ArgumentTypeError: The cache is of another library or dtype.

    Source:
        SPEC.md, MHA-CACHE-1 to MHA-CACHE-8.
    """
    return _LAYER.append_cache(cache, key, value, lengths)

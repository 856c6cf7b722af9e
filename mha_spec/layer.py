"""Multi-head attention as a layer: projections, positions and a cache around attention.

`Layer` holds the public functions of the reference and of every backend. All of its work on arrays is in the steps of
`mha_spec.layer_steps`, which a backend replaces by faster operations of its library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from .arguments import decorate_method, expand_options, offset_of_reading
from .arrays import Array, library_of
from .cache import PagedKVCache, WindowKVCache
from .layer_checks import LayerArguments, check_like, check_slope_dtype, check_vectors, empty_shapes
from .layer_steps import LayerSteps
from .offsets import for_each_entry
from .scalars import plain
from .varlen_reference import varlen_attention

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Unpack

    from jaxtyping import Float, Int

    from .arguments import Options, WeightOptions
    from .cache import AnyCache, Cache, KVCache
    from .rotary_checks import Rotary

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
    """The arguments of attention within the layer (MHA-CACHE-6)."""

    query: Array
    key: Any
    value: Any
    options: dict[str, Any]
    cache: AnyCache | None = None
    """The new cache; None in a call without a cache."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The functions of the layer as compositions of steps."""

    steps: LayerSteps = LayerSteps()

    @expand_options
    def multi_head_attention(
        self,
        query: Float[Array, "batch q_len embed"],
        key: Float[Array, "batch kv_len k_embed"] | None,
        value: Float[Array, "batch kv_len v_embed"] | None,
        params: Mapping[str, Array],
        *,
        rotary: Mapping[str, Any] | None = None,
        positions: Array | Sequence[Any] | None = None,
        norm_epsilon: float = 1e-6,
        cache: Cache | None = None,
        **options: Unpack[Options],
    ) -> Array | tuple[Array, Cache]:
        """Multi-head attention: project query, key and value, attend in every head, and project the heads.

            Q = rotate(norm(query w_q + b_q)),  K = rotate(norm(key w_k + b_k)),  V = value w_v + b_v
            output = sum_h attention(Q, K, V)[h] w_o[h] + b_o

        With a cache, attention sees its tokens and the new ones; decoding token by token gives the same numbers.

        Args:
            query: (batch, q_len, embed), float64, float32, float16 or bfloat16.
            key: (batch, kv_len, k_embed), of the query's dtype; with a cache, None appends nothing.
            value: (batch, kv_len, v_embed), of the query's dtype; None where key is.
            params: w_q (embed, heads, qk_dim), w_k (k_embed, kv_heads, qk_dim), w_v (v_embed, kv_heads, v_dim) and
                w_o (heads, v_dim, out); optional biases and norms. See `mha_spec.parameters.AXES`.
            rotary: The options of `rotary_embedding`, {} for its defaults; None does not rotate.
            positions: (q_len,) or (batch, q_len), by which query i and new key i turn, as position_ids of transformers;
                with sections also (len(sections), batch, q_len). None counts them from q_offset, and keys from the end
                of the cache. Causal, window and ALiBi always count.
            norm_epsilon: Added to the mean square of the norms.
            cache: The tokens so far. q_offset defaults to its lengths; kv_lengths counts the real new keys; mask, bias,
                dropout_mask and kv_segment_ids cover its whole capacity; kv_starts and prefix_lengths are indices of
                its tokens.
            **options: See `mha_spec.arguments.Options`.

        Returns:
            The output, (batch, q_len, out) in the query's dtype; with a cache also the new cache.

        Raises:
            ArgumentValueError: A shape, range, name or combination is wrong, the cache is full, or q_offset is needed.
            ArgumentTypeError: A dtype, a library or a keyword is wrong.

        Differs from others:
            torch `nn.MultiheadAttention` packs w_q, w_k and w_v in a matrix (out, in) of equal heads, hides where its
            masks are True, and averages weights over heads. flax changes its cache in place where `decode=True`.

        Source:
            SPEC.md, MHA-LAYER-1; Vaswani et al. 2017, section 3.2.2.
        """
        name = "multi_head_attention"
        a = LayerArguments(name, query, key, value, params, rotary, norm_epsilon, cache, {**options}, positions)
        x = self._operands(self.steps.check(a))
        if isinstance(x.cache, PagedKVCache):
            varlen = self.steps.varlen or varlen_attention
            attended = self.steps.attend_paged(x.query, x.cache, x.options, varlen, self.steps)
        else:
            attended = self.steps.attend(x.query, x.key, x.value, **x.options)
        output = self._output(a, attended)
        new: Any = x.cache
        return output if new is None else (output, new)

    @expand_options
    def multi_head_attention_and_weights(
        self,
        query: Float[Array, "batch q_len embed"],
        key: Float[Array, "batch kv_len k_embed"] | None,
        value: Float[Array, "batch kv_len v_embed"] | None,
        params: Mapping[str, Array],
        *,
        rotary: Mapping[str, Any] | None = None,
        positions: Array | Sequence[Any] | None = None,
        norm_epsilon: float = 1e-6,
        cache: KVCache | None = None,
        **options: Unpack[Options],
    ) -> tuple[Array, Array] | tuple[Array, Array, KVCache]:
        """Compute the output of `multi_head_attention` and its weights from the same projections.

        The arguments and errors are those of `multi_head_attention`; the weights are those before dropout. With a cache
        the new cache is the third result. torch's `nn.MultiheadAttention` with `need_weights` returns the mean over
        heads by default, after dropout.

        Source:
            SPEC.md, MHA-LAYER-4.
        """
        name = "multi_head_attention_and_weights"
        a = LayerArguments(name, query, key, value, params, rotary, norm_epsilon, cache, {**options}, positions)
        x = self._operands(self.steps.check(a))
        attended, weights = self.steps.attend_and_weigh(x.query, x.key, x.value, self.steps, **x.options)
        output = self._output(a, attended)
        new: Any = x.cache
        return (output, weights) if new is None else (output, weights, new)

    @expand_options
    def multi_head_attention_weights(
        self,
        query: Float[Array, "batch q_len embed"],
        key: Float[Array, "batch kv_len k_embed"] | None,
        params: Mapping[str, Array],
        *,
        rotary: Mapping[str, Any] | None = None,
        positions: Array | Sequence[Any] | None = None,
        norm_epsilon: float = 1e-6,
        cache: KVCache | None = None,
        **options: Unpack[WeightOptions],
    ) -> Float[Array, "batch heads q_len kv_len"]:
        """Compute the weights of every head in `multi_head_attention`, before dropout.

        Args:
            query: (batch, q_len, embed).
            key: (batch, kv_len, k_embed), of the query's dtype; with a cache, None appends no keys.
            params: Those of `multi_head_attention`; those of value and output may be absent.
            rotary: As in `multi_head_attention`.
            positions: As in `multi_head_attention`.
            norm_epsilon: As in `multi_head_attention`.
            cache: As in `multi_head_attention`; the new cache is not returned.
            **options: Those of `multi_head_attention` without dropout; see `mha_spec.arguments.WeightOptions`.

        Returns:
            The weights, (batch, heads, q_len, kv_len) in the query's dtype; with a cache kv_len is its capacity.

        Raises:
            ArgumentValueError, ArgumentTypeError: As `multi_head_attention`.

        Differs from others:
            torch `nn.MultiheadAttention` returns the mean over heads by default, after dropout.

        Source:
            SPEC.md, MHA-LAYER-4 and MHA-WEIGHTS-1.
        """
        name = "multi_head_attention_weights"
        a = LayerArguments(name, query, key, None, params, rotary, norm_epsilon, cache, {**options}, positions)
        x = self._operands(self.steps.check(a))
        return self.steps.weigh(x.query, x.key, **x.options)

    def rotary_embedding(
        self,
        x: Float[Array, "batch heads length size"],
        positions: Array | Sequence[float],
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int | None = None,
        frequencies: Array | Sequence[float] | None = None,
        attention_factor: float = 1.0,
        sections: Sequence[int] | None = None,
    ) -> Float[Array, "batch heads length size"]:
        """Turn pairs of components by angles that grow with the position.

            angle_i = position * frequencies[i]    by default base^(-2i / rotary_dim)
            (x_a, x_b) -> attention_factor * (x_a cos - x_b sin, x_b cos + x_a sin)
            (a, b) = (i, i + rotary_dim/2), or (2i, 2i + 1) where interleaved

        Args:
            x: (batch, heads, length, size), float64, float32, float16 or bfloat16.
            positions: (length,) or (batch, length), integers or floats, on the host or of the library of x; with
                sections also (len(sections), batch, length).
            base: Greater than 0; a larger base turns more slowly.
            interleaved: True pairs neighbours, False components half of rotary_dim apart.
            rotary_dim: The number of components that turn, from the first on; even. None turns all of them.
            frequencies: (rotary_dim/2,), finite numbers >= 0 on the host or an array of the library of x, which is not
                read; they replace the base. See `mha_spec.rotary_frequencies`. None computes them from the base.
            attention_factor: Greater than 0; multiplies cosines and sines, as YaRN does.
            sections: The number of pairs that turn by the positions on each axis, such as time, height and width, in
                blocks from the first pair on; their sum is rotary_dim/2. None is a single axis.

        Returns:
            x with its pairs turned, in its dtype; the other components are unchanged.

        Raises:
            ArgumentValueError, ArgumentTypeError: size is odd without rotary_dim, positions or frequencies do not fit,
                or both frequencies and a base are given.

        Differs from others:
            GPT-NeoX and Llama pair halves, GPT-J pairs neighbours; weights fit a single pairing.
            ONNX `RotaryEmbedding` takes cosine and sine from the caller.

        Source:
            SPEC.md, MHA-ROTARY-1 to MHA-ROTARY-8 and MHA-ROTARY-17; Su et al. 2021.
        """
        self.steps.check_library(x, "x")
        check_vectors(x)
        rotary = {
            "base": base,
            "interleaved": interleaved,
            "rotary_dim": rotary_dim,
            "frequencies": frequencies,
            "attention_factor": attention_factor,
            "sections": sections,
        }
        options = self.steps.check_rotary(rotary, x.shape[3], x)
        self.steps.check_positions(x, positions, options.sections)
        return self.steps.turn(x, self._turns(positions, options, x), options.interleaved)

    def alibi_slopes(self, heads: int, *, dtype: str = "float32") -> Float[Array, "heads"]:
        """Compute the slopes of attention with linear biases.

            slope[h] = 2^(-8 (h + 1) / heads)    where heads is a power of two

        Other numbers of heads have the slopes of the next lower power of two m, then slopes 0, 2, 4, ... of 2m.

        Args:
            heads: At least 1.
            dtype: "float32", also for 16-bit attention, or "float64".

        Returns:
            The slopes, (heads,).

        Raises:
            ArgumentValueError, ArgumentTypeError: heads is not an integer >= 1.

        Differs from others:
            mlx and others use the first formula for every number of heads; checkpoints use those of the paper.

        Source:
            SPEC.md, MHA-ALIBI-1; Press et al. 2022, and its code for numbers that are not a power of two.
        """
        heads = plain(heads)
        self.steps.check_heads(heads)
        check_slope_dtype(dtype)
        return self.steps.slopes(heads, dtype)

    def alibi_bias(
        self,
        slopes: Float[Array, "heads"] | int,
        q_len: int,
        kv_len: int,
        *,
        q_offset: Int[Array, "batch"] | Sequence[int] | int | str | None = None,
    ) -> Float[Array, "batch* heads q_len kv_len"]:
        """Compute the bias -slope[h] * |p - j|, which falls with the distance; query i is at p = q_offset[b] + i.

        Args:
            slopes: (heads,), or a number of heads, whose slopes are then `alibi_slopes(heads)`.
            q_len: Number of queries.
            kv_len: Number of keys; with a cache its capacity.
            q_offset: Position of query 0, as in `attention`; required where q_len and kv_len differ.

        Returns:
            The bias, (1, heads, q_len, kv_len), or (batch, heads, q_len, kv_len) with an offset for each batch entry;
            float64 for slopes in float64, else float32.

        Raises:
            ArgumentValueError, ArgumentTypeError: As `attention` for an offset that is missing or wrong.

        Differs from others:
            The form slope * j, which gives the same causal attention, differs for keys after the query; here the bias
            is symmetric.

        Source:
            SPEC.md, MHA-ALIBI-2 and MHA-ALIBI-3; Press et al. 2022.
        """
        slopes, q_len, kv_len, q_offset = (plain(argument) for argument in (slopes, q_len, kv_len, q_offset))
        q_offset = for_each_entry(q_offset, 1)
        if library_of(slopes):
            self.steps.check_library(slopes, "slopes")
        self.steps.check_alibi(slopes, q_len, kv_len, q_offset)
        slopes = slopes if library_of(slopes) else self.steps.slopes(slopes, "float32")
        offset = 0 if q_offset is None else q_offset
        offset = offset_of_reading(offset, q_len, kv_len) if isinstance(offset, str) else offset
        return self.steps.alibi(slopes, self.steps.distances(offset, q_len, kv_len, slopes, self.steps))

    def empty_cache(
        self, batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None = None, *, like: Array
    ) -> KVCache:
        """Make a cache without tokens, of the library, dtype and device of `like`; also `KVCache.empty`.

        Args:
            batch: Number of batch entries.
            kv_heads: Number of key/value heads.
            capacity: The most tokens that each batch entry can hold.
            qk_dim: Size of a key.
            v_dim: Size of a value; None is qk_dim.
            like: Any array of the wanted library, dtype and device, such as a parameter.

        Returns:
            The cache, with lengths of 0 on the host.
        """
        key, value = empty_shapes(batch, kv_heads, capacity, qk_dim, v_dim)
        self.steps.check_library(like, "like")
        check_like(like)
        return self.steps.empty_cache((key, value), like)

    def append_cache(
        self,
        cache: Cache,
        key: Float[Array, "batch kv_heads length qk_dim"],
        value: Float[Array, "batch kv_heads length v_dim"],
        lengths: Int[Array, "batch"] | Sequence[int] | None = None,
    ) -> Cache:
        """Make a cache with new tokens after those of each batch entry; also `KVCache.append`.

        Args:
            cache: The cache, which is unchanged.
            key: (batch, kv_heads, length, qk_dim), normalised and rotated.
            value: (batch, kv_heads, length, v_dim).
            lengths: The number of new tokens of each batch entry that are real, from the first on; None is all.

        Returns:
            The new cache.

        Raises:
            ArgumentValueError: Lengths are host data, and the cache has too little room; nothing is stored. Where
                lengths are not host data, tokens beyond the capacity are dropped and counted.
            ArgumentTypeError: The cache is of another library or dtype.

        Source:
            SPEC.md, MHA-CACHE-1 to MHA-CACHE-8, for a `PagedKVCache` also MHA-CACHE-9 to MHA-CACHE-11, for a
            `WindowKVCache` MHA-CACHE-12.
        """
        self.steps.check_library(key, "key")
        self.steps.check_append(cache, key, value, lengths)
        return self._append(cache, key, value, lengths)

    def _operands(self, a: LayerArguments) -> Operands:
        """Make the arguments of attention; with a cache, the keys are all keys of the new cache."""
        q, k, v = self._heads(a)
        if a.cache is None:
            return Operands(q, k, v, a.options)
        counts, offset = a.options.get("kv_lengths"), a.options.get("q_offset")
        new = a.cache if k is None else self._append(a.cache, k, v, counts)
        if isinstance(a.cache, WindowKVCache):
            return Operands(q, *self.steps.window_operands(q, (a.cache, new), (k, v), a.options, self.steps), new)
        options = {"kv_lengths": new.lengths, "q_offset": a.cache.lengths if offset is None else offset}
        return Operands(q, new.key, new.value, a.options | options, new)

    def _append(self, cache: Any, key: Array, value: Any, counts: Any) -> Any:
        append = self.steps.append
        if isinstance(cache, PagedKVCache):
            append = self.steps.append_paged
        elif isinstance(cache, WindowKVCache):
            append = self.steps.append_window
        return append(cache, key, value, counts, self.steps)

    def _heads(self, a: LayerArguments) -> tuple[Array, Array | None, Array | None]:
        """Project, normalise and rotate query, key and value (MHA-NORM-2)."""
        q, k, v = self.steps.project_in(a, self.steps)
        q = self._normalised(a, "q", q)
        k = None if k is None else self._normalised(a, "k", k)
        if a.rotation is not None:
            q, k = self._rotated(a, a.rotation, q, k)
        return q, k, v

    def _normalised(self, a: LayerArguments, name: str, x: Array) -> Array:
        """Normalise queries or keys by the gain that params holds for them, if any (MHA-NORM-1, MHA-NORM-3)."""
        single, joint = a.params.get(f"{name}_norm"), a.params.get(f"{name}_joint_norm")
        if joint is not None:
            return self.steps.normalise_jointly(x, joint, a.norm_epsilon)
        return x if single is None else self.steps.normalise(x, single, a.norm_epsilon)

    def _rotated(self, a: LayerArguments, rotary: Rotary, q: Array, k: Array | None) -> tuple[Array, Array | None]:
        """Rotate query i by its position and new key i by its slot in the cache (MHA-ROTARY-4, MHA-CACHE-6).

        Positions of the caller turn both (MHA-LAYER-7).
        """
        if a.positions is not None:
            turns = self._turns(a.positions, rotary, q)
            q = self.steps.turn(q, turns, rotary.interleaved)
            return q, None if k is None else self.steps.turn(k, turns, rotary.interleaved)
        start = 0 if a.cache is None else a.cache.lengths
        offset = a.options.get("q_offset")
        if isinstance(offset, str):
            offset = a.options["q_offset"] = self._named_offset(a, offset, q, k)
        offset = start if offset is None else offset
        turns = self._turns(self.steps.positions(offset, a.query.shape[1], q), rotary, q)
        q = self.steps.turn(q, turns, rotary.interleaved)
        if k is None or a.key is None:
            return q, None
        if offset is not start or not _equally_long(a.query, a.key):
            turns = self._turns(self.steps.positions(start, a.key.shape[1], k), rotary, k)
        return q, self.steps.turn(k, turns, rotary.interleaved)

    def _named_offset(self, a: LayerArguments, reading: str, q: Array, k: Array | None) -> Array | int:
        """Compute the offset of a named alignment from the lengths of the new cache (MHA-POS-2, MHA-CACHE-6)."""
        q_lengths, kv_lengths = a.options.get("q_lengths"), a.options.get("kv_lengths")
        if a.cache is None:
            return self.steps.offset_of(reading, q_lengths, kv_lengths, q, k)
        lengths = a.cache.lengths
        new = lengths if k is None else self.steps.new_lengths(lengths, kv_lengths, k.shape[2], k)
        return self.steps.offset_of(reading, q_lengths, new, q, a.cache.key)

    def _turns(self, positions: Array | Sequence[float], rotary: Rotary, x: Array) -> tuple[Array, Array]:
        if rotary.frequencies is None:
            rotary_dim = x.shape[3] if rotary.rotary_dim is None else rotary.rotary_dim
            frequencies = self.steps.frequencies(rotary.base, rotary_dim)
        else:
            frequencies = self.steps.explicit_frequencies(rotary.frequencies)
        positions = positions if rotary.sections is None else self.steps.spread(positions, rotary.sections)
        return self.steps.magnify(self.steps.turns(positions, frequencies, x), rotary.attention_factor)

    def _output(self, a: LayerArguments, attended: Array) -> Array:
        return self.steps.project_out(attended, a.params, self.steps)


def _equally_long(query: Array, key: Array) -> bool:
    """Return True if query and key are known to have the same length.

    A trace of TensorFlow may not know it, and one of torch.jit has it in a tensor.
    """
    length = query.shape[1]
    return query is key or (length is not None and library_of(length) is None and length == key.shape[1])


_LAYER = Layer()
_quiet = numpy.errstate(all="ignore")


multi_head_attention = decorate_method(_quiet, _LAYER.multi_head_attention)
multi_head_attention_and_weights = decorate_method(_quiet, _LAYER.multi_head_attention_and_weights)
multi_head_attention_weights = decorate_method(_quiet, _LAYER.multi_head_attention_weights)
rotary_embedding = decorate_method(_quiet, _LAYER.rotary_embedding)
alibi_slopes = decorate_method(_quiet, _LAYER.alibi_slopes)
alibi_bias = decorate_method(_quiet, _LAYER.alibi_bias)
empty_cache = decorate_method(_quiet, _LAYER.empty_cache)
append_cache = decorate_method(_quiet, _LAYER.append_cache)

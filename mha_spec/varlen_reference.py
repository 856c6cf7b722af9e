"""Packed and paged attention as SPEC.md writes it: each sequence is a separate call of attention.

`Varlen(VarlenSteps(...))` holds the same functions over other steps, of packing or of attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from .arguments import expand_options
from .arrays import Array, device_of, dtype_name, namespace_of
from .attention_reference import Reference
from .checks import check_flag
from .layer_steps import LayerSteps, alibi, distances
from .steps import Steps
from .varlen_checks import check_cotangents, varlen_arguments
from .varlen_sequences import sequences_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Unpack

    from jaxtyping import Float, Int

    from .varlen_arguments import VarlenArguments, VarlenOptions
    from .varlen_sequences import PackedSequence

__all__ = ["Call", "Varlen", "VarlenGradients", "VarlenSteps", "varlen_attention", "varlen_attention_vjp"]

VarlenGradients = tuple[Array, Array, Array, Array | None]
"""Gradients of query, key, value and sinks; None for sinks that the call does not have."""


class Call(NamedTuple):
    """The attention of a sequence: operands in the softmax's type, with the axes of a dense call of a single entry."""

    query: Array
    key: Array
    value: Array
    sinks: Array | None
    slopes: Array | None
    sequence: PackedSequence
    a: VarlenArguments

    @property
    def options(self) -> dict[str, Any]:
        """The options of the dense call, without those that are arrays."""
        a = self.a
        options: dict[str, Any] = {"scale": a.scale, "softcap": a.softcap}
        if a.positional:
            options |= {"causal": a.causal, "window": a.window, "q_offset": self.sequence.offset}
        return options


def tokens_of(x: Array, tokens: range) -> Array:
    """Cut the tokens of a sequence, and give them the axes of a dense call: (1, heads, length, size) (MHA-VARLEN-1)."""
    xp = namespace_of(x)
    return xp.permute_dims(x[tokens.start : tokens.stop, ...], (1, 0, 2))[None, ...]


def rows_of(x: Array) -> Array:
    """Return the rows of a dense result (1, heads, length, size) with the axes of packed tokens (MHA-VARLEN-1)."""
    return namespace_of(x).permute_dims(x[0, ...], (1, 0, 2))


def pages_of(x: Array, blocks: Sequence[int], length: int) -> Array:
    """Join the blocks of a sequence in the order of the table, and keep its first keys (MHA-VARLEN-6, MHA-VARLEN-7)."""
    xp = namespace_of(x)
    empty = xp.zeros((0, *x.shape[2:]), dtype=x.dtype, device=device_of(x))
    return xp.concat([empty, *(x[block, ...] for block in blocks)], axis=0)[:length, ...]


def keys_of(x: Array, sequence: PackedSequence, a: VarlenArguments, steps: VarlenSteps) -> Array:
    """Return the keys in use of a sequence, or its values, as operands of a dense call (MHA-VARLEN-4)."""
    if sequence.blocks is None:
        return widened(steps.tokens_of(x, sequence.keys), a, steps)
    return widened(tokens_of(steps.pages_of(x, sequence.block_numbers, len(sequence.keys)), sequence.keys), a, steps)


def widened(x: Array, a: VarlenArguments, steps: VarlenSteps) -> Array:
    """Convert to the softmax's type, so that results are rounded once (MHA-SOFTMAX-2, MHA-VARLEN-11)."""
    xp = namespace_of(x)
    return xp.astype(x, getattr(xp, steps.attention.softmax_dtype(dtype_name(a.query))), copy=False)


def heads_first(lse: Array) -> Array:
    """The lse of packed tokens is (heads, tokens) (MHA-VARLEN-9)."""
    return namespace_of(lse).permute_dims(lse, (1, 0))


def linear_bias(call: Call) -> Array | None:
    """Compute the bias -slope[h] |p - j| of a sequence in the softmax's type (MHA-VARLEN-8)."""
    if call.slopes is None:
        return None
    lengths = len(call.sequence.queries), len(call.sequence.keys)
    return alibi(call.slopes, distances(call.sequence.offset, *lengths, call.slopes, LayerSteps()))


def attend(call: Call, steps: VarlenSteps, *, return_lse: bool) -> tuple[Array, Any]:
    """Compute output and lse of a sequence by a separate call of attention (MHA-VARLEN-1, MHA-VARLEN-12)."""
    bias = steps.linear_bias(call)
    function = Reference(steps.attention).attention
    results = function(*call[:3], bias=bias, sinks=call.sinks, return_lse=return_lse, **call.options)
    return results if return_lse else (results, None)


def differentiate(call: Call, grad_output: Array, grad_lse: Array | None, steps: VarlenSteps) -> VarlenGradients:
    """Compute the gradients of a sequence by a separate call of attention_vjp (MHA-VARLEN-11)."""
    bias = steps.linear_bias(call)
    function = Reference(steps.attention).attention_vjp
    results = function(grad_output, *call[:3], bias=bias, sinks=call.sinks, grad_lse=grad_lse, **call.options)
    query, key, value, _, sinks = results
    return query, key, value, sinks


def rows_outside(like: Array, shape: tuple[int, ...], number: float) -> Array:
    """Return rows of tokens that no sequence has: output and gradients 0, lse -inf (MHA-VARLEN-3)."""
    return namespace_of(like).full(shape, number, dtype=like.dtype, device=device_of(like))


def pack(
    parts: Sequence[tuple[range, Array]], shape: tuple[int, ...], like: Array, number: float, steps: VarlenSteps
) -> Array:
    """Put the rows of each sequence at its tokens, in an array of a shape, of the type of `like` (MHA-VARLEN-1)."""
    pieces: list[Array] = []
    end, tokens = 0, shape[0]
    for place, rows in parts:
        start = max(place.start, end)
        pieces += [steps.rows_outside(like, (start - end, *shape[1:]), number), rows]
        end = start + rows.shape[0]
    pieces.append(steps.rows_outside(like, (tokens - end, *shape[1:]), number))
    return namespace_of(like).concat(pieces, axis=0)


def add_to_pages(parts: Sequence[tuple[Sequence[int], Array]], shape: tuple[int, ...], like: Array) -> Array:
    """Add the gradients of each sequence to its blocks, of which some are used repeatedly (MHA-VARLEN-11)."""
    xp, (blocks, block_size, *row) = namespace_of(like), shape
    pages: list[Any] = [rows_outside(like, (block_size, *row), 0.0) for _ in range(blocks)]
    for numbers, rows in parts:
        for index, block in enumerate(numbers):
            part = rows[index * block_size : min((index + 1) * block_size, rows.shape[0]), ...]
            rest = rows_outside(like, (block_size - part.shape[0], *row), 0.0)
            pages[block] = pages[block] + xp.concat([part, rest], axis=0)
    return xp.stack(pages) if pages else rows_outside(like, shape, 0.0)


def add_sinks(parts: Sequence[Array], like: Array) -> Array:
    """Add the gradients of the sinks over the sequences (MHA-VARLEN-11)."""
    return sum(parts, start=namespace_of(like).zeros_like(like))


@dataclass(frozen=True)
class VarlenSteps:
    """The steps of packed and paged attention by name, and those of the attention of a sequence."""

    arguments: Callable[..., VarlenArguments] = varlen_arguments
    check_cotangents: Callable[..., None] = check_cotangents
    sequences: Callable[..., Sequence[PackedSequence]] = sequences_of
    tokens_of: Callable[..., Array] = tokens_of
    rows_of: Callable[..., Array] = rows_of
    pages_of: Callable[..., Array] = pages_of
    keys_of: Callable[..., Array] = keys_of
    heads_first: Callable[..., Array] = heads_first
    linear_bias: Callable[..., Array | None] = linear_bias
    attend: Callable[..., tuple[Array, Any]] = attend
    differentiate: Callable[..., VarlenGradients] = differentiate
    rows_outside: Callable[..., Array] = rows_outside
    pack: Callable[..., Array] = pack
    add_to_pages: Callable[..., Array] = add_to_pages
    add_sinks: Callable[..., Array] = add_sinks
    attention: Steps = Steps()


@dataclass(frozen=True, slots=True)
class Varlen:
    """The functions of packed and paged attention over a choice of steps."""

    steps: VarlenSteps = VarlenSteps()

    @expand_options
    def varlen_attention(
        self,
        query: Float[Array, "q_tokens heads qk_dim"],
        key: Float[Array, "kv_tokens kv_heads qk_dim"],
        value: Float[Array, "kv_tokens kv_heads v_dim"],
        cu_seqlens_q: Int[Array, "sequences+1"] | Sequence[int],
        cu_seqlens_kv: Int[Array, "sequences+1"] | Sequence[int] | None,
        *,
        return_lse: bool = False,
        **options: Unpack[VarlenOptions],
    ) -> Array | tuple[Array, Array]:
        """Attention of each sequence to itself, for sequences that are packed one after the other, or paged.

            output[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] = attention(query of b, key of b, value of b)

        Sequence b has the queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1], and the keys from cu_seqlens_kv[b] to
        cu_seqlens_kv[b + 1], of which the first seqused_kv[b] are in use. With a block table, key j of sequence b is
        key[block_table[b, j // block_size], j % block_size]. Positions start at 0 in each sequence. A token that no
        sequence has is never read; its output is 0, and its lse -inf.

        Args:
            query: (q_tokens, heads, qk_dim), float64, float32, float16 or bfloat16.
            key: (kv_tokens, kv_heads, qk_dim), of the query's dtype; with a block table (blocks, block_size, kv_heads,
                qk_dim).
            value: (kv_tokens, kv_heads, v_dim), of the query's dtype; with a block table (blocks, block_size,
                kv_heads, v_dim).
            cu_seqlens_q: (sequences + 1,), cumulative lengths, from 0 on.
            cu_seqlens_kv: (sequences + 1,), cumulative lengths; None is allowed with block_table and seqused_kv.
            return_lse: True also returns the log-sum-exp of each row.
            **options: See `mha_spec.varlen_arguments.VarlenOptions`.

        Returns:
            The output, (q_tokens, heads, v_dim) in the query's dtype; with `return_lse` also lse, natural,
            (heads, q_tokens) in float32, for float64 inputs in float64.

        Raises:
            ArgumentValueError: A shape, a bound, a block or a range on the host is wrong, or the diagonal is ambiguous.
            ArgumentTypeError: A dtype, a library or a keyword is wrong.

        Differs from others:
            torch `varlen_attn`, FlashAttention and vLLM put the causal diagonal at the lower right without being asked,
            need max_seqlen, and leave tokens of no sequence unwritten. FlashInfer returns lse in base 2.
            `attention` with segment ids packs sequences into a dense batch, in which positions run on.

        Source:
            SPEC.md, MHA-VARLEN-1 to MHA-VARLEN-12; Kwon et al. 2023 (paged attention).
        """
        a = self.steps.arguments("varlen_attention", options, query, key, value, cu_seqlens_q, cu_seqlens_kv)
        return_lse = check_flag("return_lse", return_lse)
        steps = self.steps
        outputs: list[tuple[range, Array]] = []
        rows_of_lse: list[tuple[range, Array]] = []
        with numpy.errstate(all="ignore"):
            for call in self._calls(a):
                output, lse = steps.attend(call, steps, return_lse=return_lse)
                outputs.append((call.sequence.queries, steps.rows_of(output)))
                if return_lse:
                    rows_of_lse.append((call.sequence.queries, steps.rows_of(lse[..., None])[..., 0]))
            rows, like = a.query.shape[:2], widened(a.query[:0, ...], a, steps)
            output = steps.pack(outputs, (*rows, a.value.shape[-1]), like, 0.0, steps)
            output = steps.attention.round_output(output, dtype_name(query))
            if not return_lse:
                return output
            return output, steps.heads_first(steps.pack(rows_of_lse, rows, like, -math.inf, steps))

    @expand_options
    def varlen_attention_vjp(
        self,
        grad_output: Float[Array, "q_tokens heads v_dim"],
        query: Float[Array, "q_tokens heads qk_dim"],
        key: Float[Array, "kv_tokens kv_heads qk_dim"],
        value: Float[Array, "kv_tokens kv_heads v_dim"],
        cu_seqlens_q: Int[Array, "sequences+1"] | Sequence[int],
        cu_seqlens_kv: Int[Array, "sequences+1"] | Sequence[int] | None,
        *,
        grad_lse: Float[Array, "heads q_tokens"] | None = None,
        **options: Unpack[VarlenOptions],
    ) -> VarlenGradients:
        """Compute the gradients of packed or paged attention: those of the attention of each sequence.

        The gradients of sinks, and of blocks that are used repeatedly, are sums. Tokens and slots that no sequence uses
        have the gradient 0.

        Args:
            grad_output: (q_tokens, heads, v_dim), the cotangent of the output.
            query: As in `varlen_attention`.
            key: As in `varlen_attention`.
            value: As in `varlen_attention`.
            cu_seqlens_q: As in `varlen_attention`.
            cu_seqlens_kv: As in `varlen_attention`.
            grad_lse: (heads, q_tokens), the cotangent of lse; None is 0.
            **options: See `mha_spec.varlen_arguments.VarlenOptions`; alibi_slopes are constants.

        Returns:
            Gradients of query, key, value and sinks, each with the shape and dtype of its operand; None for sinks that
            the call does not have.

        Raises:
            ArgumentValueError, ArgumentTypeError: As `varlen_attention`.

        Differs from others:
            torch `varlen_attn` has no gradient with seqused_k or block_table, and none of lse.

        Source:
            SPEC.md, MHA-VARLEN-11, and MHA-VJP-1 to MHA-VJP-7.
        """
        a = self.steps.arguments("varlen_attention_vjp", options, query, key, value, cu_seqlens_q, cu_seqlens_kv)
        self.steps.check_cotangents(a, grad_output, grad_lse)
        with numpy.errstate(all="ignore"):
            return self._gradients(a, grad_output, grad_lse)

    def _gradients(self, a: VarlenArguments, grad_output: Array, grad_lse: Array | None) -> VarlenGradients:
        steps = self.steps
        parts: list[tuple[PackedSequence, VarlenGradients]] = []
        for call in self._calls(a):
            tokens = call.sequence.queries
            of_lse = None if grad_lse is None else grad_lse[None, :, tokens.start : tokens.stop]
            cotangent = steps.tokens_of(grad_output, tokens)
            parts.append((call.sequence, steps.differentiate(call, cotangent, of_lse, steps)))
        like = widened(a.query[:0, ...], a, steps)
        query = steps.pack([(s.queries, steps.rows_of(part[0])) for s, part in parts], a.query.shape, like, 0.0, steps)
        key = self._grad_keys([(s, steps.rows_of(part[1])) for s, part in parts], a.key.shape, like)
        value = self._grad_keys([(s, steps.rows_of(part[2])) for s, part in parts], a.value.shape, like)
        query, key, value = (steps.attention.round_output(x, dtype_name(a.query)) for x in (query, key, value))
        if a.sinks is None:
            return query, key, value, None
        sinks = steps.add_sinks([part[3] for _, part in parts], widened(a.sinks, a, steps))
        return query, key, value, steps.attention.round_output(sinks, dtype_name(a.sinks))

    def _grad_keys(self, parts: Sequence[tuple[PackedSequence, Array]], shape: tuple[int, ...], like: Array) -> Array:
        """Return the gradient of keys or values in their layout."""
        steps = self.steps
        if len(shape) == 4:
            return steps.add_to_pages([(sequence.block_numbers, rows) for sequence, rows in parts], shape, like)
        return steps.pack([(sequence.keys, rows) for sequence, rows in parts], shape, like, 0.0, steps)

    def _calls(self, a: VarlenArguments) -> Iterator[Call]:
        """Yield the attention of each sequence."""
        steps = self.steps
        sinks, slopes = (None if x is None else widened(x, a, steps) for x in (a.sinks, a.alibi_slopes))
        for sequence in steps.sequences(a):
            query = widened(steps.tokens_of(a.query, sequence.queries), a, steps)
            key, value = (steps.keys_of(x, sequence, a, steps) for x in (a.key, a.value))
            yield Call(query, key, value, sinks, slopes, sequence, a)


_VARLEN = Varlen()

varlen_attention = _VARLEN.varlen_attention
varlen_attention_vjp = _VARLEN.varlen_attention_vjp

"""The steps of attention, a small function for each, in the order of the specification.

Every function works on any library of the Python array API, cites the clauses that it implements, and is a field of
`Steps`, where it can be replaced by name: `dataclasses.replace(Steps(), see_mask=lambda mask: ~mask)` is the
specification with a mistake. Scores have the axes (batch, heads, q_len, kv_len) throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import checks
from .arrays import Array, device_of, dtype_name, namespace_of, softmax_dtype_name
from .offsets import named_offset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .arguments import Arguments, Options

__all__ = ["Steps", "sum_over_visible"]


def check_options(options: Options, function: str) -> Options:
    """Refuse a keyword that the function does not have (MHA-ARG-1, MHA-DROP-3)."""
    checks.refuse_unknown(options, function)
    return options


def check(a: Arguments) -> Arguments:
    """Refuse wrong or ambiguous arguments (MHA-ARG-2 to -4, MHA-SHAPE-1 to -3, MHA-HEAD-2, MHA-LEN-3, MHA-POS-2)."""
    return checks.check(a)


def softmax_dtype(name: str) -> str:
    """Scores, softmax and lse are float32 for 16- and 32-bit inputs, float64 for float64 (MHA-SOFTMAX-2, MHA-LSE-2)."""
    return softmax_dtype_name(name)


def repeat_heads(x: Array, heads: int) -> Array:
    """Query head h reads key/value head h // (heads // kv_heads): each repeated in place, never tiled (MHA-HEAD-1)."""
    xp = namespace_of(x)
    return xp.repeat(x, heads // x.shape[1], axis=1)


def scale_of(scale: float | None, qk_dim: int) -> float:
    """The scale is 1/sqrt(qk_dim) by default; 0 and negative scales are valid (MHA-SCORE-2, MHA-SCORE-3)."""
    return 1 / math.sqrt(qk_dim) if scale is None else scale


def scores(query: Array, key: Array, scale: float) -> Array:
    """Compute S = scale * (Q @ K^T) (MHA-SCORE-1)."""
    xp = namespace_of(query)
    return scale * (query @ xp.matrix_transpose(key))


def soft_cap(scores: Array, softcap: float | None) -> Array:
    """Compute S = softcap * tanh(S / softcap) (MHA-CAP-1)."""
    return scores if softcap is None else softcap * namespace_of(scores).tanh(scores / softcap)


def convert_bias(bias: Array, query_dtype: str, softmax_dtype: str) -> Array:
    """The bias takes the softmax's type, never the query's, whose rounding would change it (MHA-BIAS-2)."""
    xp = namespace_of(bias)
    return xp.astype(bias, getattr(xp, softmax_dtype))


def add_bias(scores: Array, bias: Array | None) -> Array:
    """The bias is added after scale and cap, untouched by either (MHA-BIAS-1)."""
    return scores if bias is None else scores + bias


def logits(scores: Array, softcap: float | None, bias: Array | None, steps: Steps) -> Array:
    """Cap first, then add the bias; both leave visibility unchanged (MHA-CAP-2)."""
    return steps.add_bias(steps.soft_cap(scores, softcap), bias)


def offset_of(a: Arguments) -> Array | Sequence[int] | int:
    """Query 0 of batch entry b is at q_offset[b], by default 0 (MHA-POS-1, MHA-POS-2).

    A named alignment uses the lengths in use, clamped where they cannot be read (MHA-LEN-3).
    """
    if not isinstance(a.q_offset, str):
        return 0 if a.q_offset is None else a.q_offset
    return named_offset(a.q_offset, a.q_lengths, a.kv_lengths, a.query, a.key)


def query_positions(offset: Array, q_len: int) -> Array:
    """Query i of batch entry b is at p = q_offset[b] + i (MHA-POS-1); shape (batch, 1, q_len, 1)."""
    xp = namespace_of(offset)
    steps = xp.arange(q_len, dtype=offset.dtype, device=device_of(offset))
    return xp.reshape(offset, (-1, 1, 1, 1)) + xp.reshape(steps, (1, 1, -1, 1))


def see_mask(mask: Array) -> Array:
    """Return the mask: True means that the query may attend to the key (MHA-MASK-1)."""
    return mask


def see_bias(bias: Array) -> Array:
    """A converted bias of -inf hides its pair, a finite bias never does, however low (MHA-BIAS-2, MHA-BIAS-3)."""
    return bias != -math.inf


def see_causal(distance: Array) -> Array:
    """With causal, position p sees key j where j <= p; distance = j - p (MHA-CAUSAL-1)."""
    return distance <= 0


def see_window_left(distance: Array, left: int) -> Array:
    """The window reaches back to p - left, that key included: j - p >= -left (MHA-WINDOW-1)."""
    return distance >= -left


def see_window_right(distance: Array, right: int) -> Array:
    """The window reaches on to p + right, that key included: j - p <= right (MHA-WINDOW-2)."""
    return distance <= right


def see_chunk(q_positions: Array, kv_positions: Array, chunk: int, kv_starts: Array | int) -> Array:
    """Position p sees the keys of its own chunk; chunks begin at the first key and round down (MHA-WINDOW-3)."""
    return (q_positions - kv_starts) // chunk == (kv_positions - kv_starts) // chunk


def see_prefix(causal: Array, kv_positions: Array, prefix_lengths: Array) -> Array:
    """Causal hides no key of the prefix, j < prefix_lengths[b], from any position (MHA-CAUSAL-2)."""
    return causal | (kv_positions < prefix_lengths)


def see_kv_lengths(kv_positions: Array, kv_lengths: Array) -> Array:
    """Batch entry b has keys j < kv_lengths[b] (MHA-LEN-1)."""
    return kv_positions < kv_lengths


def see_kv_starts(kv_positions: Array, kv_starts: Array) -> Array:
    """Batch entry b has keys j >= kv_starts[b]; their positions stay (MHA-LEN-4)."""
    return kv_positions >= kv_starts


def see_q_lengths(q_indices: Array, q_lengths: Array) -> Array:
    """Query rows at or past q_lengths[b] see no key (MHA-LEN-2)."""
    return q_indices < q_lengths


def see_segments(q_segment_ids: Array, kv_segment_ids: Array) -> Array:
    """Equal ids see each other; no id is special, and positions do not restart at a segment (MHA-SEG-1, MHA-SEG-2)."""
    return q_segment_ids == kv_segment_ids


def all_of(constraints: Sequence[Array]) -> Array:
    """A pair is visible where every constraint holds (MHA-MASK-3)."""
    visible = constraints[0]
    for constraint in constraints[1:]:
        visible = visible & constraint
    return visible


def hide(logits: Array, visible: Array) -> Array:
    """Set the logit of an invisible pair to -inf, whatever it is (MHA-POISON-1, MHA-POISON-2)."""
    return namespace_of(logits).where(visible, logits, -math.inf)


def sink_column(sinks: Array | None, logits: Array) -> Array:
    """Return the sinks as logits, never scaled, capped, biased or masked; -inf without sinks (MHA-SINK-1, -2)."""
    xp = namespace_of(logits)
    shape = (*logits.shape[:3], 1)
    if sinks is None:
        return xp.full(shape, -math.inf, dtype=logits.dtype, device=device_of(logits))
    return xp.broadcast_to(xp.reshape(xp.astype(sinks, logits.dtype), (1, -1, 1, 1)), shape)


def exponentials(logits: Array) -> tuple[Array, Array]:
    """Compute exp(s - m) and m, the largest logit of the row (MHA-SOFTMAX-1, MHA-PURE-3).

    m is 0 for a row that sees no key, and NaN for a row that sees a NaN, which no step removes (MHA-NAN-1).
    """
    xp = namespace_of(logits)
    maximum = xp.max(logits, axis=-1, keepdims=True)
    maximum = xp.where(maximum == -math.inf, 0.0, maximum)
    return xp.exp(logits - maximum), maximum


def normalise(exponentials: Array, total: Array) -> Array:
    """Compute P = exp(s - m) / total; a row that sees no key has weights 0, not NaN (MHA-SOFTMAX-1, MHA-EMPTY-1)."""
    xp = namespace_of(exponentials)
    return exponentials / xp.where(total == 0, 1.0, total)


def sum_exponentials(exponentials: Array) -> Array:
    """Sum exp(s - m) over the keys and the sink (MHA-SOFTMAX-1, MHA-SINK-1)."""
    return namespace_of(exponentials).sum(exponentials, axis=-1, keepdims=True)


def log_sum_exp(total: Array, maximum: Array) -> Array:
    """Compute lse = m + ln(total), where total includes the sink; it is -inf if total is 0 (MHA-LSE-1, MHA-EMPTY-2)."""
    xp = namespace_of(total)
    return xp.where(total == 0, -math.inf, maximum + xp.log(xp.where(total == 0, 1.0, total)))


def drop(x: Array, dropout_mask: Array | None, rate: float) -> Array:
    """Multiply weights by dropout_mask / (1 - rate); a mask also applies at rate 0 (MHA-DROP-1, MHA-DROP-2)."""
    if dropout_mask is None:
        return x
    return x * (namespace_of(x).astype(dropout_mask, x.dtype) / (1 - rate))


def sum_over_visible(weights: Array, values: Array, visible: Array) -> Array:
    """Compute sum_j weights_ij values_jc over visible pairs; it is NaN if a value of a visible pair is not finite.

    A plain product would spread a NaN of invisible pairs, because 0 * NaN is NaN (MHA-POISON-1, MHA-POISON-2,
    MHA-NAN-2).
    """
    xp = namespace_of(weights)
    finite = xp.isfinite(values)
    total = xp.where(visible, weights, 0.0) @ xp.where(finite, values, 0.0)
    seen = xp.astype(visible, weights.dtype) @ xp.astype(~finite, weights.dtype)
    return xp.where(seen > 0, math.nan, total)


def round_output(x: Array, dtype: str) -> Array:
    """Round output and weights to the query's dtype, a gradient to that of its operand (MHA-DTYPE-1, MHA-DTYPE-2)."""
    xp = namespace_of(x)
    return x if dtype_name(x) == dtype else xp.astype(x, _dtype_of(xp, dtype))


def grad_weights(grad_output: Array, value: Array) -> Array:
    """Compute dP = dO @ V^T, the gradient of the weights after dropout (MHA-VJP-1)."""
    return grad_output @ namespace_of(value).matrix_transpose(value)


def row_dot(weights: Array, grad_weights: Array, visible: Array, grad_lse: Array | None) -> Array:
    """Compute D_i = sum_j P_ij dP_ij - grad_lse_i (MHA-VJP-1, MHA-LSE-3)."""
    xp = namespace_of(weights)
    dot = xp.sum(xp.where(visible, weights * grad_weights, 0.0), axis=-1, keepdims=True)
    return dot if grad_lse is None else dot - grad_lse


def grad_logits(weights: Array, grad_weights: Array, row_dot: Array, visible: Array) -> Array:
    """Compute dS = P (dP - D) at visible pairs; a row that sees no key gives no gradient (MHA-VJP-1, MHA-EMPTY-3)."""
    return namespace_of(weights).where(visible, weights * (grad_weights - row_dot), 0.0)


def grad_scores(grad_logits: Array, cap_slope: Array | float, visible: Array) -> Array:
    """Compute dX, which is dS times the slope of the soft cap (MHA-VJP-2)."""
    return namespace_of(grad_logits).where(visible, grad_logits * cap_slope, 0.0)


def cap_slope(scores: Array, softcap: float | None) -> Array | float:
    """Compute the slope of the soft cap, 1 - tanh(S / softcap)^2 (MHA-VJP-2)."""
    return 1.0 if softcap is None else 1.0 - namespace_of(scores).tanh(scores / softcap) ** 2


def grad_query(grad_scores: Array, key: Array, visible: Array, scale: float) -> Array:
    """Compute dQ = scale * dX @ K (MHA-VJP-2)."""
    return scale * sum_over_visible(grad_scores, key, visible)


def grad_key(grad_scores: Array, query: Array, visible: Array, scale: float) -> Array:
    """Compute dK = scale * dX^T @ Q, before the sum over the group (MHA-VJP-2)."""
    xp = namespace_of(query)
    return scale * sum_over_visible(xp.matrix_transpose(grad_scores), query, xp.matrix_transpose(visible))


def grad_value(dropped: Array, grad_output: Array, visible: Array) -> Array:
    """Compute dV = Pt^T @ dO with Pt the weights after dropout, before the sum over the group (MHA-VJP-3)."""
    xp = namespace_of(dropped)
    return sum_over_visible(xp.matrix_transpose(dropped), grad_output, xp.matrix_transpose(visible))


def sum_group(x: Array, kv_heads: int) -> Array:
    """The gradient of a key/value head is the sum over the query heads that read it (MHA-VJP-4)."""
    xp = namespace_of(x)
    batch, heads, length, size = x.shape
    return xp.sum(xp.reshape(x, (batch, kv_heads, heads // kv_heads, length, size)), axis=2)


def grad_bias(grad_logits: Array, shape: Sequence[int]) -> Array:
    """Compute dbias, the sum of dS over the axes along which the bias was broadcast (MHA-VJP-5)."""
    xp = namespace_of(grad_logits)
    axes = tuple(axis for axis in range(4) if shape[axis] == 1 and grad_logits.shape[axis] != 1)
    return xp.sum(grad_logits, axis=axes, keepdims=True) if axes else grad_logits


def grad_sinks(sink_weights: Array, row_dot: Array) -> Array:
    """Compute dsinks_h, the negative sum of P_sink D over batch and rows (MHA-VJP-6)."""
    xp = namespace_of(sink_weights)
    products = xp.where(sink_weights == 0, 0.0, sink_weights * row_dot)
    return -xp.sum(products, axis=(0, 2, 3))


def merge_lse(lse_a: Array, lse_b: Array) -> Array:
    """Compute lse = ln(exp lse_a + exp lse_b); two empty halves give -inf (MHA-MERGE-1, MHA-MERGE-3).

    A NaN gives NaN, and so does +inf where the other half is not empty (MHA-MERGE-3, MHA-MERGE-5).
    """
    xp = namespace_of(lse_a)
    maximum = xp.maximum(lse_a, lse_b)
    anchor = xp.where(maximum == -math.inf, 0.0, maximum)
    joined = log_sum_exp(xp.exp(lse_a - anchor) + xp.exp(lse_b - anchor), anchor)
    return xp.where(lse_a == -math.inf, lse_b, xp.where(lse_b == -math.inf, lse_a, joined))


def merge_share(lse_half: Array, lse: Array) -> Array:
    """Compute the share of a half, exp(lse_half - lse); it is 1 if the other is empty (MHA-MERGE-1, MHA-MERGE-2)."""
    xp = namespace_of(lse)
    return xp.where(lse_half == lse, 1.0, xp.exp(lse_half - lse))


def merge_part(lse_half: Array, share: Array, output: Array) -> Array:
    """Compute share * output; an empty half adds nothing, whatever its output holds (MHA-MERGE-2).

    A non-finite output stays non-finite even where its share is 0, since 0 * inf is NaN (MHA-MERGE-6).
    """
    return namespace_of(output).where(lse_half == -math.inf, 0.0, share * output)


def merge_grad_output(lse_half: Array, share: Array, grad_output: Array) -> Array:
    """The output of a half has the gradient share * dO, and 0 where the half is empty (MHA-MERGE-7)."""
    return namespace_of(grad_output).where(lse_half == -math.inf, 0.0, share * grad_output)


def merge_row_dot(grad_output: Array, output_a: Array, output_b: Array) -> Array:
    """Compute sum_c dO (output_a - output_b), the change of the loss with the share of half a (MHA-MERGE-7)."""
    return namespace_of(grad_output).sum(grad_output * (output_a - output_b), axis=-1)


def merge_grad_share(lse_a: Array, lse_b: Array, share_a: Array, share_b: Array, row_dot: Array) -> Array:
    """Compute t = a b sum_c dO (output_a - output_b); it is 0 if a half is empty (MHA-MERGE-7)."""
    empty = (lse_a == -math.inf) | (lse_b == -math.inf)
    return namespace_of(row_dot).where(empty, 0.0, share_a * share_b * row_dot)


def merge_grad_lse(lse_half: Array, share: Array, grad_lse: Array | None, grad_share: Array) -> Array:
    """The lse of a half has the gradient share * g plus that of its share, 0 where the half is empty (MHA-MERGE-7)."""
    through_lse = 0.0 if grad_lse is None else share * grad_lse
    return namespace_of(lse_half).where(lse_half == -math.inf, 0.0, through_lse + grad_share)


def _dtype_of(xp: object, name: str) -> object:
    """Return the dtype called `name`; NumPy has bfloat16 only through ml-dtypes."""
    dtype = getattr(xp, name, None)
    if dtype is None:
        import ml_dtypes

        dtype = getattr(ml_dtypes, name)
    return dtype


@dataclass(frozen=True)
class Steps:
    """The steps of attention by name; `dataclasses.replace` exchanges single steps."""

    check_options: Callable[..., Options] = check_options
    check: Callable[..., Arguments] = check
    check_dropout_mask: Callable[..., None] = checks.check_dropout_mask
    check_cotangents: Callable[..., None] = checks.check_cotangents
    check_halves: Callable[..., None] = checks.check_halves
    check_merge_cotangents: Callable[..., None] = checks.check_merge_cotangents
    softmax_dtype: Callable[..., str] = softmax_dtype
    repeat_heads: Callable[..., Array] = repeat_heads
    scale_of: Callable[..., float] = scale_of
    scores: Callable[..., Array] = scores
    soft_cap: Callable[..., Array] = soft_cap
    convert_bias: Callable[..., Array] = convert_bias
    add_bias: Callable[..., Array] = add_bias
    logits: Callable[..., Array] = logits
    offset_of: Callable[..., Array | Sequence[int] | int] = offset_of
    query_positions: Callable[..., Array] = query_positions
    see_mask: Callable[..., Array] = see_mask
    see_bias: Callable[..., Array] = see_bias
    see_causal: Callable[..., Array] = see_causal
    see_window_left: Callable[..., Array] = see_window_left
    see_window_right: Callable[..., Array] = see_window_right
    see_chunk: Callable[..., Array] = see_chunk
    see_prefix: Callable[..., Array] = see_prefix
    see_kv_lengths: Callable[..., Array] = see_kv_lengths
    see_kv_starts: Callable[..., Array] = see_kv_starts
    see_q_lengths: Callable[..., Array] = see_q_lengths
    see_segments: Callable[..., Array] = see_segments
    all_of: Callable[..., Array] = all_of
    hide: Callable[..., Array] = hide
    sink_column: Callable[..., Array] = sink_column
    exponentials: Callable[..., tuple[Array, Array]] = exponentials
    normalise: Callable[..., Array] = normalise
    sum_exponentials: Callable[..., Array] = sum_exponentials
    log_sum_exp: Callable[..., Array] = log_sum_exp
    drop: Callable[..., Array] = drop
    sum_over_visible: Callable[..., Array] = sum_over_visible
    round_output: Callable[..., Array] = round_output
    grad_weights: Callable[..., Array] = grad_weights
    row_dot: Callable[..., Array] = row_dot
    grad_logits: Callable[..., Array] = grad_logits
    grad_scores: Callable[..., Array] = grad_scores
    cap_slope: Callable[..., Array | float] = cap_slope
    grad_query: Callable[..., Array] = grad_query
    grad_key: Callable[..., Array] = grad_key
    grad_value: Callable[..., Array] = grad_value
    sum_group: Callable[..., Array] = sum_group
    grad_bias: Callable[..., Array] = grad_bias
    grad_sinks: Callable[..., Array] = grad_sinks
    merge_lse: Callable[..., Array] = merge_lse
    merge_share: Callable[..., Array] = merge_share
    merge_part: Callable[..., Array] = merge_part
    merge_grad_output: Callable[..., Array] = merge_grad_output
    merge_row_dot: Callable[..., Array] = merge_row_dot
    merge_grad_share: Callable[..., Array] = merge_grad_share
    merge_grad_lse: Callable[..., Array] = merge_grad_lse

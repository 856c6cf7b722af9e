"""The functions of attention as compositions of the steps of `mha_spec.steps`, in the order of SPEC.md.

`Reference(steps)` holds the same functions over other steps; the conformance suite states a known mistake that way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from .arguments import Arguments, expand_options
from .arrays import Array, device_of, dtype_name, library_of, namespace_of, segment_ids
from .checks import check_flag
from .steps import Steps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from jaxtyping import Float

    from .arguments import NoOptions, Options, WeightOptions

__all__ = [
    "Gradients",
    "MergeGradients",
    "Reference",
    "Trace",
    "attention",
    "attention_vjp",
    "attention_weights",
    "merge_attention",
    "merge_attention_vjp",
]

Gradients = tuple[Array, Array, Array, Array | None, Array | None]
"""Gradients of query, key, value, bias and sinks; None for a bias or sinks that the call does not have."""

MergeGradients = tuple[Array, Array, Array, Array]
"""Gradients of output_a, lse_a, output_b and lse_b."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The intermediate results of attention in the softmax's type, with repeated heads of key and value."""

    query: Array
    key: Array
    value: Array | None
    scale: float
    scores: Array
    visible: Array
    logits: Array
    weights: Array
    sink_weights: Array
    lse: Array


@dataclass(frozen=True, slots=True)
class Reference:
    """The five functions of attention over a choice of steps; see the functions of this module for their meaning.

    No step writes to an input or to an earlier result, or depends on strides (MHA-PURE-1, -2 and -4).
    """

    steps: Steps = Steps()

    @expand_options
    def attention(
        self,
        query: Float[Array, "batch heads q_len qk_dim"],
        key: Float[Array, "batch kv_heads kv_len qk_dim"],
        value: Float[Array, "batch kv_heads kv_len v_dim"],
        *,
        return_lse: bool = False,
        **options: Unpack[Options],
    ) -> Array | tuple[Array, Array]:
        """Scaled dot-product attention.

            S = softcap * tanh(scale * Q K^T / softcap) + bias        over visible pairs (query i, key j)
            P = exp(S - lse),  lse = ln(sum_j exp S + exp sink)
            output = (P * dropout_mask / (1 - dropout_rate)) V

        Query head h reads key/value head h // (heads // kv_heads). A row that sees no key has output 0 and lse -inf;
        with a sink, its lse is the sink.

        Args:
            query: (batch, heads, q_len, qk_dim), float64, float32, float16 or bfloat16.
            key: (batch, kv_heads, kv_len, qk_dim), of the query's dtype; heads is a multiple of kv_heads.
            value: (batch, kv_heads, kv_len, v_dim), of the query's dtype.
            return_lse: True also returns the log-sum-exp of each row.
            **options: See `mha_spec.arguments.Options`.

        Returns:
            The output, (batch, heads, q_len, v_dim) in the query's dtype; with `return_lse` also lse, natural,
            (batch, heads, q_len) in float32, for float64 inputs in float64.

        Raises:
            ArgumentValueError: A shape, a range or a combination is wrong, or the causal diagonal is ambiguous.
            ArgumentTypeError: A dtype, a library or a keyword is wrong.

        Differs from others:
            Where lengths differ, torch `scaled_dot_product_attention` and `jax.nn.dot_product_attention` silently put
            the causal diagonal at the upper left, FlashAttention and MLX at the lower right; here `q_offset` decides.
            JAX and Keras return the mean of the values for a row that sees nothing, and take the axes
            (batch, length, heads, size). The bias is a float `attn_mask` in ONNX `Attention`.

        Source:
            SPEC.md; Vaswani et al. 2017, section 3.2.1; Ainslie et al. 2023 (grouped heads).
        """
        a = self._arguments("attention", query, key, value, **options)
        return_lse = check_flag("return_lse", return_lse)
        self.steps.check_dropout_mask(a)
        with numpy.errstate(all="ignore"):
            trace = self.trace(a)
            output = self.steps.round_output(self.output(a, trace), dtype_name(query))
            return (output, trace.lse[..., 0]) if return_lse else output

    @expand_options
    def attention_weights(
        self,
        query: Float[Array, "batch heads q_len qk_dim"],
        key: Float[Array, "batch kv_heads kv_len qk_dim"],
        **options: Unpack[WeightOptions],
    ) -> Float[Array, "batch heads q_len kv_len"]:
        """Compute the weights of each query over the keys, before dropout: P = exp(S - lse), 0 at invisible pairs.

        Args:
            query: (batch, heads, q_len, qk_dim).
            key: (batch, kv_heads, kv_len, qk_dim), of the query's dtype.
            **options: Those of `attention` less dropout; see `mha_spec.arguments.WeightOptions`.

        Returns:
            The weights, (batch, heads, q_len, kv_len) in the query's dtype; with sinks a row sums to less than 1.

        Raises:
            ArgumentValueError, ArgumentTypeError: As `attention`.

        Differs from others:
            torch's MultiheadAttention returns them averaged over heads and after dropout; ONNX calls them
            `qk_matmul_output` in mode 3.

        Source:
            SPEC.md, MHA-WEIGHTS-1 and MHA-DROP-3.
        """
        a = self._arguments("attention_weights", query, key, None, **options)
        with numpy.errstate(all="ignore"):
            return self.steps.round_output(self.trace(a).weights, dtype_name(query))

    @expand_options
    def attention_vjp(
        self,
        grad_output: Float[Array, "batch heads q_len v_dim"],
        query: Float[Array, "batch heads q_len qk_dim"],
        key: Float[Array, "batch kv_heads kv_len qk_dim"],
        value: Float[Array, "batch kv_heads kv_len v_dim"],
        *,
        grad_lse: Float[Array, "batch heads q_len"] | None = None,
        **options: Unpack[Options],
    ) -> Gradients:
        """Compute the gradients of attention in closed form.

            dP = dropout(dO V^T),  D = rowsum(P dP) - grad_lse,  dS = P (dP - D),  dX = dS (1 - tanh^2)
            dQ = scale dX K,  dK = scale dX^T Q,  dV = dropout(P)^T dO,  dbias = dS,  dsinks = -sum P_sink D

        Gradients of key and value are summed over the query heads that read them, and the bias gradient over the axes
        along which the bias was broadcast. A row that sees no key has the query gradient 0 and adds to the gradient of
        its sink only.

        Args:
            grad_output: (batch, heads, q_len, v_dim), the cotangent of the output.
            query: (batch, heads, q_len, qk_dim).
            key: (batch, kv_heads, kv_len, qk_dim).
            value: (batch, kv_heads, kv_len, v_dim).
            grad_lse: (batch, heads, q_len), the cotangent of lse; None is 0.
            **options: See `mha_spec.arguments.Options`; dropout needs its mask.

        Returns:
            Gradients of query, key, value, bias and sinks, each with the shape and dtype of its operand; None for a
            bias or sinks that the call does not have.

        Raises:
            ArgumentValueError, ArgumentTypeError: As `attention`.

        Differs from others:
            Most of torch's fused kernels return no gradient of a float mask, and none can differentiate lse;
            jax.nn silently gives lse the gradient 0.

        Source:
            SPEC.md, MHA-VJP-1 to MHA-VJP-7; Dao et al. 2022, appendix B.2.
        """
        a = self._arguments("attention_vjp", query, key, value, **options)
        self.steps.check_dropout_mask(a)
        self.steps.check_cotangents(a, grad_output, grad_lse)
        with numpy.errstate(all="ignore"):
            return self._gradients(a, self.trace(a), grad_output, grad_lse)

    @expand_options
    def merge_attention(
        self,
        output_a: Float[Array, "batch heads q_len v_dim"],
        lse_a: Float[Array, "batch heads q_len"],
        output_b: Float[Array, "batch heads q_len v_dim"],
        lse_b: Float[Array, "batch heads q_len"],
        **options: Unpack[NoOptions],
    ) -> tuple[Float[Array, "batch heads q_len v_dim"], Float[Array, "batch heads q_len"]]:
        """Join attention over two disjoint sets of keys into attention over both.

            lse = ln(exp lse_a + exp lse_b),  output = exp(lse_a - lse) output_a + exp(lse_b - lse) output_b

        A half whose lse is -inf adds nothing, whatever its output holds, and the other is returned unchanged; two such
        halves give 0 and -inf. A NaN lse gives NaN. A sink belongs to a single half.

        Args:
            output_a: (batch, heads, q_len, v_dim), over the first set of keys.
            lse_a: (batch, heads, q_len), its natural log-sum-exp.
            output_b: (batch, heads, q_len, v_dim), over the second set, of the same dtype.
            lse_b: (batch, heads, q_len), its natural log-sum-exp.
            **options: Always empty; any keyword raises an error.

        Returns:
            The output in the dtype of `output_a`, and lse in that of `lse_a`.

        Raises:
            ArgumentValueError, ArgumentTypeError: The shapes or libraries of the halves do not fit, or a keyword is
                passed.

        Differs from others:
            FlashInfer's `merge_state` takes base-2 lse; several kernels return NaN for two empty halves.

        Source:
            SPEC.md, MHA-MERGE-1 to MHA-MERGE-6; Liu et al. 2023 (ring attention).
        """
        self.steps.check_options(options, "merge_attention")
        self.steps.check_halves(output_a, lse_a, output_b, lse_b)
        steps, names = self.steps, (dtype_name(output_a), dtype_name(lse_a))
        output_a, lse_a, output_b, lse_b = self._widened(output_a, lse_a, output_b, lse_b)
        with numpy.errstate(all="ignore"):
            lse = steps.merge_lse(lse_a, lse_b)
            part_a, part_b = (
                steps.merge_part(half[..., None], steps.merge_share(half, lse)[..., None], output)
                for half, output in ((lse_a, output_a), (lse_b, output_b))
            )
            return steps.round_output(part_a + part_b, names[0]), steps.round_output(lse, names[1])

    @expand_options
    def merge_attention_vjp(
        self,
        grad_output: Float[Array, "batch heads q_len v_dim"],
        output_a: Float[Array, "batch heads q_len v_dim"],
        lse_a: Float[Array, "batch heads q_len"],
        output_b: Float[Array, "batch heads q_len v_dim"],
        lse_b: Float[Array, "batch heads q_len"],
        *,
        grad_lse: Float[Array, "batch heads q_len"] | None = None,
        **options: Unpack[NoOptions],
    ) -> MergeGradients:
        """Compute the gradients of merging in closed form.

            a = exp(lse_a - lse),  b = exp(lse_b - lse),  t = a b sum_c dO (output_a - output_b)
            doutput_a = a dO,  dlse_a = a grad_lse + t,  doutput_b = b dO,  dlse_b = b grad_lse - t

        A half whose lse is -inf has gradients of 0, and the other half has dO and grad_lse unchanged. Where an lse is
        NaN or +inf, or a component of an output is not finite, gradients are unspecified.

        Args:
            grad_output: (batch, heads, q_len, v_dim), the cotangent of the merged output; of any floating dtype.
            output_a: As in `merge_attention`.
            lse_a: As in `merge_attention`.
            output_b: As in `merge_attention`.
            lse_b: As in `merge_attention`.
            grad_lse: (batch, heads, q_len), the cotangent of the merged lse; None is 0.
            **options: Always empty; any keyword raises an error.

        Returns:
            Gradients of output_a, lse_a, output_b and lse_b, each of its operand's shape and dtype.

        Raises:
            ArgumentValueError, ArgumentTypeError: As `merge_attention`, and where a cotangent does not fit its result.

        Differs from others:
            Kernels that merge states have no gradient, or give lse the gradient 0; ring attention needs both.

        Source:
            SPEC.md, MHA-MERGE-7; Liu et al. 2023 (ring attention).
        """
        self.steps.check_options(options, "merge_attention_vjp")
        self.steps.check_halves(output_a, lse_a, output_b, lse_b)
        self.steps.check_merge_cotangents(grad_output, grad_lse, output_a)
        with numpy.errstate(all="ignore"):
            return self._merge_gradients((output_a, lse_a, output_b, lse_b), grad_output, grad_lse)

    def _merge_gradients(self, halves: Sequence[Array], grad_output: Array, grad_lse: Array | None) -> MergeGradients:
        steps = self.steps
        output_a, lse_a, output_b, lse_b = self._widened(*halves)
        grad_output, grad_lse = self._widened(grad_output, grad_lse, like=output_a)
        lse = steps.merge_lse(lse_a, lse_b)
        share_a, share_b = steps.merge_share(lse_a, lse), steps.merge_share(lse_b, lse)
        row_dot = steps.merge_row_dot(grad_output, output_a, output_b)
        grad_share = steps.merge_grad_share(lse_a, lse_b, share_a, share_b, row_dot)
        gradients = (
            steps.merge_grad_output(lse_a[..., None], share_a[..., None], grad_output),
            steps.merge_grad_lse(lse_a, share_a, grad_lse, grad_share),
            steps.merge_grad_output(lse_b[..., None], share_b[..., None], grad_output),
            steps.merge_grad_lse(lse_b, share_b, grad_lse, -grad_share),
        )
        of_output_a, of_lse_a, of_output_b, of_lse_b = (
            steps.round_output(gradient, dtype_name(half)) for gradient, half in zip(gradients, halves, strict=True)
        )
        return of_output_a, of_lse_a, of_output_b, of_lse_b

    def _widened(self, *arrays: Array | None, like: Array | None = None) -> list[Any]:
        """Return arrays in the type in which halves are merged: that of `like`, or the widest softmax's type of all."""
        xp = namespace_of(arrays[0])
        names = [dtype_name(array) for array in arrays if array is not None]
        name = self.steps.softmax_dtype("float64" if "float64" in names else "float32")
        wide = getattr(xp, name) if like is None else like.dtype
        return [None if array is None else xp.astype(array, wide) for array in arrays]

    def trace(self, a: Arguments) -> Trace:
        """Take the steps of the specification from the arguments to weights and log-sum-exp."""
        xp, steps = namespace_of(a.query), self.steps
        name = steps.softmax_dtype(dtype_name(a.query))
        query = xp.astype(a.query, getattr(xp, name))
        key = steps.repeat_heads(xp.astype(a.key, query.dtype), a.heads)
        value = None if a.value is None else steps.repeat_heads(xp.astype(a.value, query.dtype), a.heads)
        bias = None if a.bias is None else steps.convert_bias(a.bias, dtype_name(a.query), name)

        scale = steps.scale_of(a.scale, a.query.shape[3])
        scores = steps.scores(query, key, scale)
        logits = steps.logits(scores, a.softcap, bias, steps)
        visible = xp.broadcast_to(self.visible(a), scores.shape)
        hidden = steps.hide(logits, visible)

        exponentials, maximum = steps.exponentials(xp.concat([hidden, steps.sink_column(a.sinks, hidden)], axis=-1))
        total = steps.sum_exponentials(exponentials)
        weights = steps.normalise(exponentials, total)
        lse = steps.log_sum_exp(total, maximum)
        return Trace(query, key, value, scale, scores, visible, logits, weights[..., :-1], weights[..., -1:], lse)

    def visible(self, a: Arguments) -> Array:
        """Tell which pairs are visible: boolean, broadcastable to (batch, heads, q_len, kv_len)."""
        xp, steps, device = namespace_of(a.query), self.steps, device_of(a.query)
        indices = xp.arange(a.q_len, device=device)
        positions = xp.arange(a.kv_len, device=device)
        constraints = [xp.ones((1, 1, a.q_len, a.kv_len), dtype=xp.bool, device=device)]
        if a.mask is not None:
            constraints.append(steps.see_mask(a.mask))
        if a.bias is not None:
            query_dtype = dtype_name(a.query)
            converted = steps.convert_bias(a.bias, query_dtype, steps.softmax_dtype(query_dtype))
            constraints.append(steps.see_bias(converted))
        constraints += self._see_positions(a, positions)
        if a.kv_lengths is not None:
            constraints.append(steps.see_kv_lengths(positions, self._integers(a.kv_lengths, positions)))
        if a.kv_starts is not None:
            constraints.append(steps.see_kv_starts(positions, self._integers(a.kv_starts, positions)))
        if a.q_lengths is not None:
            constraints.append(steps.see_q_lengths(indices[:, None], self._integers(a.q_lengths, positions)))
        if a.q_segment_ids is not None and a.kv_segment_ids is not None:
            for q_ids, kv_ids in segment_ids(a.q_segment_ids, a.kv_segment_ids, positions):
                constraints.append(steps.see_segments(q_ids[:, None, :, None], kv_ids[:, None, None, :]))
        return steps.all_of(constraints)

    def _see_positions(self, a: Arguments, positions: Array) -> list[Array]:
        if not a.positional:
            return []
        xp, steps = namespace_of(positions), self.steps
        queries = steps.query_positions(self._integers(steps.offset_of(a), positions), a.q_len)
        distance = positions - queries
        constraints = [self._see_causal(a, distance, positions)] if a.causal else []
        left, right = a.bounded_window or (None, None)
        if left is not None:
            constraints.append(steps.see_window_left(distance, left))
        if right is not None:
            constraints.append(steps.see_window_right(distance, right))
        if a.chunk is not None:
            starts = 0 if a.kv_starts is None else xp.clip(self._integers(a.kv_starts, positions), 0, a.kv_len)
            constraints.append(steps.see_chunk(queries, positions, a.chunk, starts))
        return constraints

    def _see_causal(self, a: Arguments, distance: Array, positions: Array) -> Array:
        causal = self.steps.see_causal(distance)
        if a.prefix_lengths is None:
            return causal
        return self.steps.see_prefix(causal, positions, self._integers(a.prefix_lengths, positions))

    def _integers(self, value: Array | Sequence[int] | int, like: Array) -> Array:
        """Return an integer per batch entry, (batch or 1, 1, 1, 1), in the type of `like`."""
        xp = namespace_of(like)
        array = (
            value
            if library_of(value) == library_of(like)
            else xp.asarray(value, dtype=like.dtype, device=device_of(like))
        )
        return xp.reshape(xp.astype(array, like.dtype), (-1, 1, 1, 1))

    def output(self, a: Arguments, trace: Trace) -> Array:
        """Compute the output in the softmax's type, after dropout and before it is rounded to the query's dtype."""
        dropped = self.steps.drop(trace.weights, a.dropout_mask, a.dropout_rate)
        return self.steps.sum_over_visible(dropped, trace.value, trace.visible)

    def _gradients(self, a: Arguments, t: Trace, grad_output: Array, grad_lse: Array | None) -> Gradients:
        xp, steps = namespace_of(a.query), self.steps
        grad_output = xp.astype(grad_output, t.query.dtype)
        grad_lse = None if grad_lse is None else xp.astype(grad_lse, t.query.dtype)[..., None]
        dropped = steps.drop(t.weights, a.dropout_mask, a.dropout_rate)

        grad_weights = steps.drop(steps.grad_weights(grad_output, t.value), a.dropout_mask, a.dropout_rate)
        row_dot = steps.row_dot(t.weights, grad_weights, t.visible, grad_lse)
        grad_logits = steps.grad_logits(t.weights, grad_weights, row_dot, t.visible)
        grad_scores = steps.grad_scores(grad_logits, steps.cap_slope(t.scores, a.softcap), t.visible)

        grad_query = steps.grad_query(grad_scores, t.key, t.visible, t.scale)
        grad_key = steps.sum_group(steps.grad_key(grad_scores, t.query, t.visible, t.scale), a.kv_heads)
        grad_value = steps.sum_group(steps.grad_value(dropped, grad_output, t.visible), a.kv_heads)
        grad_bias = None if a.bias is None else steps.grad_bias(grad_logits, a.bias.shape)
        grad_sinks = None if a.sinks is None else steps.grad_sinks(t.sink_weights, row_dot)
        operands = (
            (grad_query, a.query),
            (grad_key, a.key),
            (grad_value, a.value),
            (grad_bias, a.bias),
            (grad_sinks, a.sinks),
        )
        rounded = [
            None if gradient is None else steps.round_output(gradient, dtype_name(operand))
            for gradient, operand in operands
        ]
        return rounded[0], rounded[1], rounded[2], rounded[3], rounded[4]

    def _arguments(
        self, function: str, query: Array, key: Array, value: Array, /, **options: Unpack[Options]
    ) -> Arguments:
        known = self.steps.check_options(options, function)
        return self.steps.check(Arguments(query, key, value, function=function, **known))


_REFERENCE = Reference()

attention = _REFERENCE.attention
attention_weights = _REFERENCE.attention_weights
attention_vjp = _REFERENCE.attention_vjp
merge_attention = _REFERENCE.merge_attention
merge_attention_vjp = _REFERENCE.merge_attention_vjp

"""The specification of multi-head attention: the same call has the same meaning on every array library.

The backend of the query's array type computes the functions of attention and of the layer around it;
`mha_spec.reference` holds the same functions as SPEC.md writes them. Importing this package imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arguments import expand_options
from .cache import KVCache, PagedKVCache, WindowKVCache
from .errors import ArgumentTypeError, ArgumentValueError, BackendError, MhaSpecError
from .rotary_scaling import rotary_frequencies
from .scalars import plain
from .selection import backend, backend_for, backend_names, backend_of_numbers, function_for, function_of

if TYPE_CHECKING:
    from .reference import (
        alibi_bias,
        alibi_slopes,
        attention,
        attention_vjp,
        attention_weights,
        merge_attention,
        merge_attention_vjp,
        multi_head_attention,
        multi_head_attention_and_weights,
        multi_head_attention_weights,
        rotary_embedding,
        varlen_attention,
        varlen_attention_vjp,
    )
else:

    @expand_options
    def attention(query, key, value, *, return_lse=False, **options):
        """Compute scaled dot-product attention with the query's backend; see `mha_spec.reference.attention`."""
        return function_for("attention", query)(query, key, value, return_lse=return_lse, **options)

    @expand_options
    def attention_weights(query, key, **options):
        """Compute the normalised weights with the query's backend; see `mha_spec.reference.attention_weights`."""
        return function_for("attention_weights", query)(query, key, **options)

    @expand_options
    def attention_vjp(grad_output, query, key, value, *, grad_lse=None, **options):
        """Compute the gradients with the query's backend; see `mha_spec.reference.attention_vjp`."""
        return function_for("attention_vjp", query)(grad_output, query, key, value, grad_lse=grad_lse, **options)

    @expand_options
    def merge_attention(output_a, lse_a, output_b, lse_b, **options):
        """Join two halves of a softmax with the operands' backend; see `mha_spec.reference.merge_attention`."""
        return function_for("merge_attention", output_a, "output_a")(output_a, lse_a, output_b, lse_b, **options)

    @expand_options
    def merge_attention_vjp(grad_output, output_a, lse_a, output_b, lse_b, *, grad_lse=None, **options):
        """Compute the gradients of merging with the operands' backend; see `mha_spec.reference.merge_attention_vjp`."""
        function = function_for("merge_attention_vjp", output_a, "output_a")
        return function(grad_output, output_a, lse_a, output_b, lse_b, grad_lse=grad_lse, **options)

    @expand_options
    def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_kv, *, return_lse=False, **options):
        """Compute packed or paged attention with the query's backend; see `mha_spec.reference.varlen_attention`."""
        function = function_for("varlen_attention", query)
        return function(query, key, value, cu_seqlens_q, cu_seqlens_kv, return_lse=return_lse, **options)

    @expand_options
    def varlen_attention_vjp(grad_output, query, key, value, cu_seqlens_q, cu_seqlens_kv, *, grad_lse=None, **options):
        """Compute the gradients with the query's backend; see `mha_spec.reference.varlen_attention_vjp`."""
        function = function_for("varlen_attention_vjp", query)
        return function(grad_output, query, key, value, cu_seqlens_q, cu_seqlens_kv, grad_lse=grad_lse, **options)

    @expand_options
    def multi_head_attention(
        query, key, value, params, *, rotary=None, positions=None, norm_epsilon=1e-6, cache=None, **options
    ):
        """Compute the layer with the query's backend; see `mha_spec.reference.multi_head_attention`."""
        settings = {"rotary": rotary, "positions": positions, "norm_epsilon": norm_epsilon, "cache": cache}
        return function_for("multi_head_attention", query)(query, key, value, params, **settings, **options)

    @expand_options
    def multi_head_attention_and_weights(
        query, key, value, params, *, rotary=None, positions=None, norm_epsilon=1e-6, cache=None, **options
    ):
        """Compute output and weights; see `mha_spec.reference.multi_head_attention_and_weights`."""
        settings = {"rotary": rotary, "positions": positions, "norm_epsilon": norm_epsilon, "cache": cache}
        return function_for("multi_head_attention_and_weights", query)(query, key, value, params, **settings, **options)

    @expand_options
    def multi_head_attention_weights(
        query, key, params, *, rotary=None, positions=None, norm_epsilon=1e-6, cache=None, **options
    ):
        """Compute the layer's weights; see `mha_spec.reference.multi_head_attention_weights`."""
        settings = {"rotary": rotary, "positions": positions, "norm_epsilon": norm_epsilon, "cache": cache}
        return function_for("multi_head_attention_weights", query)(query, key, params, **settings, **options)

    def rotary_embedding(
        x,
        positions,
        *,
        base=10000.0,
        interleaved=False,
        rotary_dim=None,
        frequencies=None,
        attention_factor=1.0,
        sections=None,
    ):
        """Rotate by positions with the operands' backend; see `mha_spec.reference.rotary_embedding`."""
        settings = {"base": base, "interleaved": interleaved, "rotary_dim": rotary_dim}
        settings |= {"frequencies": frequencies, "attention_factor": attention_factor, "sections": sections}
        return function_for("rotary_embedding", x, "x")(x, positions, **settings)

    def alibi_slopes(heads, *, dtype="float32"):
        """Compute slopes with the fixed backend or NumPy; see `mha_spec.reference.alibi_slopes`."""
        return function_of(backend_of_numbers(), "alibi_slopes")(heads, dtype=dtype)

    def alibi_bias(slopes, q_len, kv_len, *, q_offset=None):
        """Compute the bias with the slopes' backend; see `mha_spec.reference.alibi_bias`."""
        chosen = backend_of_numbers() if isinstance(plain(slopes), int) else backend_for(slopes, "slopes")
        return function_of(chosen, "alibi_bias")(slopes, q_len, kv_len, q_offset=q_offset)


__all__ = [
    "SPEC_VERSION",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BackendError",
    "KVCache",
    "MhaSpecError",
    "PagedKVCache",
    "WindowKVCache",
    "alibi_bias",
    "alibi_slopes",
    "attention",
    "attention_vjp",
    "attention_weights",
    "backend",
    "backend_names",
    "merge_attention",
    "merge_attention_vjp",
    "multi_head_attention",
    "multi_head_attention_and_weights",
    "multi_head_attention_weights",
    "rotary_embedding",
    "rotary_frequencies",
    "varlen_attention",
    "varlen_attention_vjp",
]

SPEC_VERSION = "1.1"
"""The version of SPEC.md; no clause changes its meaning within a version."""

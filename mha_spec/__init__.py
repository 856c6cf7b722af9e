"""The specification of multi-head attention: one call, with one meaning, on every array library.

`attention`, `attention_weights`, `attention_vjp` and `merge_attention` are answered by the backend of the query's array
type; `mha_spec.reference` holds the same names as SPEC.md writes them. Importing this imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arguments import spells_options
from .errors import ArgumentTypeError, ArgumentValueError, BackendError, MhaSpecError
from .selection import backend, backend_for, backend_names

if TYPE_CHECKING:
    from .reference import attention, attention_vjp, attention_weights, merge_attention
else:

    @spells_options
    def attention(query, key, value, *, return_lse=False, **options):
        """Scaled dot-product attention, by the backend of the query's type; see `mha_spec.reference.attention`."""
        return backend_for(query).attention(query, key, value, return_lse=return_lse, **options)

    @spells_options
    def attention_weights(query, key, **options):
        """The normalised weights, by the backend of the query's type; see `mha_spec.reference.attention_weights`."""
        return backend_for(query).attention_weights(query, key, **options)

    @spells_options
    def attention_vjp(grad_output, query, key, value, *, grad_lse=None, **options):
        """The gradients, by the backend of the query's array type; see `mha_spec.reference.attention_vjp`."""
        return backend_for(query).attention_vjp(grad_output, query, key, value, grad_lse=grad_lse, **options)

    def merge_attention(output_a, lse_a, output_b, lse_b):
        """Two halves of one softmax, by the backend of the type; see `mha_spec.reference.merge_attention`."""
        return backend_for(output_a, "output_a").merge_attention(output_a, lse_a, output_b, lse_b)


__all__ = [
    "SPEC_VERSION",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BackendError",
    "MhaSpecError",
    "attention",
    "attention_vjp",
    "attention_weights",
    "backend",
    "backend_names",
    "merge_attention",
]

SPEC_VERSION = "1.0"
"""The version of SPEC.md; a clause never changes its meaning within one."""

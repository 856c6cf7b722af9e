"""Tell in which cases a kernel that multiplies whole tiles may let a hidden operand show (the profile fused)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec import arguments
from mha_spec.reference import Reference
from mha_spec_conformance.suite.functions import OF_ATTENTION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from mha_spec_conformance.suite.cases import Case

    Arguments = Mapping[str, Any]

__all__ = ["hidden_by_dense_alone"]

DENSE = ("mask", "bias")
OPERANDS = ("grad_output", "query", "key", "value", "grad_lse")


def hidden_by_dense_alone(case: Case) -> bool:
    """Tell whether a mask or a bias alone hides a non-finite operand of a pair (MHA-POISON-1)."""
    if case.function not in OF_ATTENTION or case.expect == "error" or set(DENSE).isdisjoint(case.input_names):
        return False
    options = {**case.inputs(case.dtypes[0]), **case.options}
    queries, others = _queries(options), _keys_and_bias(options)
    if not queries.any() and not others.any():
        return False
    with numpy.errstate(all="ignore"):
        visible, otherwise = _visible(options), _visible({n: v for n, v in options.items() if n not in DENSE})
    # A row that sees a key is NaN if its query is, so what is hidden in it matters only to gradients.
    queries = queries & (~visible.any(axis=3, keepdims=True) | (case.function == "attention_vjp"))
    return bool((otherwise & ~visible & (others | queries)).any())


def _visible(options: Arguments) -> numpy.ndarray:
    """Return the visible pairs, (batch, heads, q_len, kv_len)."""
    query, key, reference = options["query"], options["key"], Reference()
    rest = {name: value for name, value in options.items() if name not in OPERANDS}
    checked = reference.steps.check(arguments.Arguments(query, key, options.get("value", key), **rest))
    return numpy.broadcast_to(reference.visible(checked), (*query.shape[:3], key.shape[2]))


def _not_finite(options: Arguments, names: tuple[str, ...]) -> numpy.ndarray:
    """Mark the tokens of which an array holds a number that is not finite, (batch, heads, length)."""
    arrays = [options[name] for name in names if name in options]
    return numpy.logical_or.reduce([~numpy.isfinite(array.astype(numpy.float64)).all(axis=3) for array in arrays])


def _queries(options: Arguments) -> numpy.ndarray:
    return _not_finite(options, ("query", "grad_output"))[:, :, :, None]


def _keys_and_bias(options: Arguments) -> numpy.ndarray:
    """Mark the pairs of which the key, the value or the bias is not finite; a bias of -inf only hides."""
    keys = _not_finite(options, ("key", "value"))
    group = options["query"].shape[1] // options["key"].shape[1]
    marked = numpy.repeat(keys, group, axis=1)[:, :, None, :]
    bias = options.get("bias", numpy.zeros((1, 1, 1, 1))).astype(numpy.float64)
    return marked | numpy.isnan(bias) | (bias == numpy.inf)

"""Check the form of an answer: the shape and the dtype that each output must have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.arrays import dtype_name, softmax_dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy

    from mha_spec_conformance.asking.selection import Ask

__all__ = ["dtype_clause", "dtype_fault", "expected_dtypes", "form_clauses", "form_fault", "wrong_dtype"]

INTEGERS = ("int32", "int64", "int16", "int8", "uint32", "uint64", "uint16", "uint8")
"""The dtypes that the lengths of a cache may have."""


def form_fault(ask: Ask, outputs: Mapping[str, numpy.ndarray]) -> str | None:
    """Describe a wrong shape of an output, or a wrong dtype that no convention explains."""
    for name in ask.outputs:
        shape, expected = tuple(outputs[name].shape), tuple(ask.case.expected[name].shape)
        if shape != expected:
            return f"`{name}` must have shape={expected}, received shape={shape}"
        if dtype_name(outputs[name]) not in (*expected_dtypes(ask, name), "float32", "float64"):
            return dtype_fault(ask, name, outputs)
    return None


def form_clauses(ask: Ask, outputs: Mapping[str, numpy.ndarray]) -> tuple[str, ...]:
    """Return the clause that a wrong form breaks: the clause of shapes, else that of the first wrong dtype."""
    if any(outputs[name].shape != tuple(ask.case.expected[name].shape) for name in ask.outputs):
        return ("MHA-SHAPE-1",)
    name = wrong_dtype(ask, outputs)
    return () if name is None else (dtype_clause(name),)


def dtype_fault(ask: Ask, name: str, outputs: Mapping[str, numpy.ndarray]) -> str:
    """Describe the wrong dtype of an output."""
    return f"`{name}` must have dtype={expected_dtypes(ask, name)[0]}, received {dtype_name(outputs[name])}"


def dtype_clause(name: str) -> str:
    """Return the clause about the dtype of an output."""
    return "MHA-LSE-2" if name == "lse" else "MHA-DTYPE-2" if name.startswith("grad_") else "MHA-DTYPE-1"


def expected_dtypes(ask: Ask, name: str) -> tuple[str, ...]:
    """Return the dtypes that an output may have.

    An lse and the bias of ALiBi have the dtype of the softmax, a merged lse that of the halves, and a gradient that of
    its operand. The lengths of a cache are integers of any width. All other outputs have the dtype of the run.
    """
    operand = "lse_a" if name == "lse" else name.removeprefix("grad_")
    if operand != name and operand in ask.case.input_names:
        return (ask.case.dtype_of(operand, ask.dtype),)
    if name in ("lse", "bias"):
        return (softmax_dtype_name(ask.dtype),)
    return INTEGERS if name == "cache_lengths" else (ask.dtype,)


def wrong_dtype(ask: Ask, outputs: Mapping[str, numpy.ndarray]) -> str | None:
    """Name the first output that has a wrong dtype."""
    return next((name for name in ask.outputs if dtype_name(outputs[name]) not in expected_dtypes(ask, name)), None)

"""Find the offset of a case and the causal alignments that imply it, for targets without q_offset or its names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from mha_spec.arguments import offset_of_reading
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec_conformance.suite.conventions import CONVENTIONS
from mha_spec_conformance.suite.functions import OF_ATTENTION

if TYPE_CHECKING:
    from typing import Any

    from mha_spec_conformance.suite.cases import Case

__all__ = ["ALIGNMENTS", "alignments", "has_positions", "offset_in_numbers"]

ALIGNMENTS = CONVENTIONS["causal_alignment"]


def has_positions(case: Case) -> bool:
    """Tell whether the case compares positions; only functions of query and key do."""
    if case.function in VARLEN_FUNCTIONS:
        return not {"causal", "window", "q_offset", "alibi_slopes"}.isdisjoint(_arguments(case))
    return case.function in OF_ATTENTION and not {"causal", "window", "chunk", "q_offset"}.isdisjoint(_arguments(case))


def alignments(case: Case) -> tuple[str, ...]:
    """Name the causal alignments that imply the offset of a case; without q_offset, the offset is 0."""
    q_len, kv_len = _sizes(case)
    q_lengths, kv_lengths = _lengths(case)
    q_offset = case.options.get("q_offset", _array(case, "q_offset", 0))
    if isinstance(q_offset, str):
        q_offset = offset_of_reading(q_offset, q_lengths, kv_lengths)
    readings = {
        "upper_left": 0,
        "lower_right": kv_len - q_len,
        "lower_right_of_kv_lengths": kv_lengths - q_len,
        "lower_right_of_lengths": kv_lengths - q_lengths,
    }
    return tuple(name for name in ALIGNMENTS if numpy.all(numpy.equal(q_offset, readings[name])))


def offset_in_numbers(case: Case) -> numpy.ndarray:
    """Return the offset that a case names (MHA-POS-2) as an integer for each batch entry or sequence."""
    offset = offset_of_reading(case.options["q_offset"], *_lengths(case))
    packed = case.function in VARLEN_FUNCTIONS
    count = case.shape_of("cu_seqlens_q")[0] - 1 if packed else case.shape_of("query")[0]
    return numpy.broadcast_to(offset, (count,)).astype(numpy.int32)


def _lengths(case: Case) -> tuple[Any, Any]:
    """Return the numbers of queries and of keys in use, of each batch entry if the case has lengths."""
    q_len, kv_len = _sizes(case)
    if case.function in VARLEN_FUNCTIONS:
        return q_len, _array(case, "seqused_kv", kv_len)
    return _array(case, "q_lengths", q_len), _array(case, "kv_lengths", kv_len)


def _sizes(case: Case) -> tuple[Any, Any]:
    """Return the numbers of queries and of keys, of each sequence in a packed case."""
    if case.function not in VARLEN_FUNCTIONS:
        return case.shape_of("query")[2], case.shape_of("key")[2]
    q_len = numpy.diff(_array(case, "cu_seqlens_q", ()))
    if "cu_seqlens_kv" not in case.input_names:
        return q_len, _array(case, "seqused_kv", ())
    return q_len, numpy.diff(_array(case, "cu_seqlens_kv", ()))


def _arguments(case: Case) -> tuple[str, ...]:
    return (*case.options, *case.input_names)


def _array(case: Case, name: str, otherwise: Any) -> Any:
    """Return the lengths or offsets of a case as wide integers, or `otherwise` if the case has none."""
    return case.input(name, case.dtypes[0]).astype(numpy.int64) if name in case.input_names else otherwise

"""The arguments of a call that a test makes, as NumPy arrays in the layout of the specification, after our checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arguments import Arguments
from mha_spec.array_checks import require_array
from mha_spec.arrays import dtype_name, library_of, softmax_dtype_name
from mha_spec.checks import check, check_cotangents, check_dropout_mask, refuse_unknown
from mha_spec.constraints import key_range
from mha_spec.errors import ArgumentValueError, refuse_type, refuse_value
from mha_spec.offsets import named_offset
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.arrays import Array

__all__ = ["Problem", "read_array", "read_problem", "read_result", "read_tensor", "rows_of_result"]

LAYOUTS = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3)}
"""The axes of (batch, heads, length, size) in each layout of query, key, value, output and their gradients."""


@dataclass(frozen=True)
class Problem:
    """A checked call of attention or attention_vjp; the cotangents are None in a forward call."""

    arguments: Arguments
    grad_output: numpy.ndarray | None = None
    grad_lse: numpy.ndarray | None = None

    @property
    def dtype(self) -> str:
        """The dtype of query, key and value."""
        return dtype_name(self.arguments.query)

    @cached_property
    def bad_keys(self) -> numpy.ndarray:
        """The keys whose vector, or whose value, is not finite: (batch, kv_heads, kv_len)."""
        a = self.arguments
        return ~(numpy.isfinite(a.key).all(axis=-1) & numpy.isfinite(a.value).all(axis=-1))

    def used_keys(self, entry: int) -> numpy.ndarray:
        """Mark the keys of a batch entry that positions and lengths let some row use, (kv_len,)."""
        a, used = self.arguments, numpy.zeros(self.arguments.kv_len, bool)
        lengths = [None if x is None else [int(numpy.asarray(x)[entry])] for x in (a.q_lengths, a.kv_lengths)]
        offsets = [self.offset(entry)] if a.positional else None
        start, stop = key_range(a.bounds if a.positional else (None, None), range(a.q_len), a.kv_len, offsets, *lengths)
        used[start:stop] = True
        return used

    def offset(self, entry: int) -> int:
        """Return the position of query 0 of a batch entry."""
        a = self.arguments
        offset: Any = a.q_offset
        if isinstance(offset, str):
            offset = named_offset(offset, a.q_lengths, a.kv_lengths, a.query, a.key)
        offsets = numpy.asarray(0 if offset is None else offset).reshape(-1)
        return int(offsets[entry if len(offsets) > 1 else 0])


def read_problem(
    operands: Mapping[str, Array], options: Mapping[str, Any], layout: str, function: str = "attention"
) -> Problem:
    """Convert and check the arguments of a call.

    Args:
        operands: Query, key and value, and for attention_vjp grad_output; arrays of any library.
        options: The options of the function, and for attention_vjp grad_lse.
        layout: The layout of the operands.
        function: The name of the function that was called.

    Raises:
        ArgumentValueError, ArgumentTypeError: An argument is wrong, as for the function itself.
    """
    tensors = {name: read_tensor(name, array, layout) for name, array in operands.items()}
    converted = {name: read_array(value) for name, value in options.items() if value is not None}
    grad_output, grad_lse = tensors.pop("grad_output", None), converted.pop("grad_lse", None)
    refuse_unknown(converted, function)
    arguments = check(Arguments(**tensors, **converted, function=function))
    check_dropout_mask(arguments)
    if function == "attention_vjp":
        check_cotangents(arguments, grad_output, grad_lse)
    return Problem(arguments, grad_output, grad_lse)


def read_array(value: Any) -> Any:
    """Convert an array to a NumPy array that cannot be written to, as a known mistake would; keep other values."""
    if library_of(value) is None:
        return value
    array = to_numpy(value).view()
    array.flags.writeable = False
    return array


def read_tensor(name: str, array: Array, layout: str) -> numpy.ndarray:
    """Convert an array of rank 4 to NumPy, with the axes (batch, heads, length, size)."""
    if layout not in LAYOUTS:
        raise ArgumentValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, received layout={layout!r}.")
    require_array(name, array, "MHA-SHAPE-3")
    converted = read_array(array)
    if converted.ndim != 4:
        refuse_value("MHA-SHAPE-1", f"`{name}` must have rank 4, {layout}, received shape={converted.shape}.")
    return converted.transpose(LAYOUTS[layout])


def read_result(name: str, array: Array, like: numpy.ndarray, shape: tuple[int, ...], layout: str) -> numpy.ndarray:
    """Convert a result to NumPy; require its shape, and the dtype of its operand `like`, for lse that of the softmax.

    Raises:
        ArgumentValueError: The shape is wrong.
        ArgumentTypeError: The result is not an array, or its dtype is wrong.
    """
    received = read_tensor(name, array, layout) if len(shape) == 4 and name != "grad_bias" else read_array(array)
    require_array(name, received, "MHA-SHAPE-3")
    if received.shape != shape:
        refuse_value("MHA-SHAPE-1", f"`{name}` must have shape={shape}, received shape={received.shape}.")
    expected = softmax_dtype_name(dtype_name(like)) if name == "lse" else dtype_name(like)
    clause = "MHA-LSE-2" if name == "lse" else "MHA-DTYPE-2" if name.startswith("grad_") else "MHA-DTYPE-1"
    if dtype_name(received) != expected:
        refuse_type(clause, f"`{name}` must have dtype={expected}, received dtype={dtype_name(received)}.")
    return received


def rows_of_result(name: str) -> str:
    """Name the axis of a result that counts its rows."""
    return "key" if name in ("grad_key", "grad_value") else "row"

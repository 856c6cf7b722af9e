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
from mha_spec.constraints import Structure, key_range
from mha_spec.errors import ArgumentValueError, refuse_type, refuse_value
from mha_spec.offsets import named_offset
from mha_spec_conformance.targets.conversion import to_numpy

from .packing import DENSE, Dense, Sides, sides_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mha_spec.arrays import Array

    from .packing import Storage

__all__ = ["Problem", "read_array", "read_problem", "read_result", "read_tensor", "rows_of_result"]


BHSD = Sides(Dense(DENSE["bhsd"]), Dense(DENSE["bhsd"]), {})


@dataclass(frozen=True)
class Problem:
    """A checked call of attention or attention_vjp; the cotangents are None in a forward call."""

    arguments: Arguments
    grad_output: numpy.ndarray | None = None
    grad_lse: numpy.ndarray | None = None
    sides: Sides = BHSD

    def rows_of(self, entry: int) -> int:
        """Return the number of rows that the layout has in a batch entry."""
        length = self.sides.queries.length(entry)
        return self.arguments.q_len if length is None else length

    def keys_of(self, entry: int) -> int:
        """Return the number of keys that the layout has in a batch entry."""
        length = self.sides.keys.length(entry)
        return self.arguments.kv_len if length is None else length

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
        q_lengths, kv_lengths, starts, prefixes = (
            None if x is None else [int(numpy.asarray(x)[entry])]
            for x in (a.q_lengths, a.kv_lengths, a.kv_starts, a.prefix_lengths)
        )
        offsets = [self.offset(entry)] if a.positional else None
        bounds = a.bounds if a.positional else (None, None)
        structure = Structure(a.chunk, starts or (0,), prefixes or (0,), a.unlifted_right)
        start, stop = key_range(bounds, range(a.q_len), a.kv_len, offsets, q_lengths, kv_lengths, structure)
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
        layout: The layout of the operands, whose arguments are among the options.
        function: The name of the function that was called.

    Raises:
        ArgumentValueError, ArgumentTypeError: An argument is wrong, as for the function itself.
    """
    stored = {name: _read_operand(name, array) for name, array in operands.items()}
    converted = {name: read_array(value) for name, value in options.items() if value is not None}
    sides = sides_of(layout, stored, converted, function)
    tensors = {name: _dense(name, array, sides.of(name), layout, 4) for name, array in stored.items()}
    grad_output, grad_lse = tensors.pop("grad_output", None), converted.pop("grad_lse", None)
    refuse_unknown(converted, function)
    arguments = check(Arguments(**tensors, **converted, **sides.lengths, function=function))
    if grad_lse is not None:
        require_array("grad_lse", grad_lse, "MHA-VJP-7")
        grad_lse = _dense("grad_lse", grad_lse, sides.of("grad_lse"), layout, 3)
    check_dropout_mask(arguments)
    if function == "attention_vjp":
        check_cotangents(arguments, grad_output, grad_lse)
    return Problem(arguments, grad_output, grad_lse, sides)


def _read_operand(name: str, array: Array) -> numpy.ndarray:
    require_array(name, array, "MHA-SHAPE-3")
    return read_array(array)


def _dense(name: str, stored: numpy.ndarray, storage: Storage, layout: str, rank: int) -> numpy.ndarray:
    """Convert an array from a layout to the axes (batch, heads, length) or (batch, heads, length, size)."""
    if not storage.fits(stored, rank):
        wanted = f"rank {rank}" if layout in DENSE else "the tokens of its side"
        refuse_value("MHA-SHAPE-1", f"`{name}` must have {wanted}, {layout}, received shape={stored.shape}.")
    return storage.dense(stored)


def read_array(value: Any) -> Any:
    """Convert an array to a NumPy array that cannot be written to, as a known mistake would; keep other values."""
    if library_of(value) is None:
        return value
    array = to_numpy(value).view()
    array.flags.writeable = False
    return array


def read_tensor(name: str, array: Array, layout: str) -> numpy.ndarray:
    """Convert an array of rank 4 in a dense layout to NumPy, with the axes (batch, heads, length, size)."""
    if layout not in DENSE:
        raise ArgumentValueError(f"`layout` must be one of {', '.join(DENSE)}, received layout={layout!r}.")
    return _dense(name, _read_operand(name, array), Dense(DENSE[layout]), layout, 4)


def read_result(
    name: str, array: Array, like: numpy.ndarray, shape: tuple[int, ...], storage: Storage | None
) -> numpy.ndarray:
    """Convert a result to a dense NumPy array.

    Args:
        name: The name of the result.
        array: The result, an array of any library.
        like: The operand whose dtype the result must have; an lse has that of its softmax.
        shape: The shape of the dense array.
        storage: The storage of the result; None if it is not stored in a layout.

    Raises:
        ArgumentValueError: The shape is wrong.
        ArgumentTypeError: The result is not an array, or its dtype is wrong.
    """
    received = _read_operand(name, array)
    wanted = shape if storage is None else storage.shape(shape)
    if received.shape != wanted:
        refuse_value("MHA-SHAPE-1", f"`{name}` must have shape={wanted}, received shape={received.shape}.")
    expected = softmax_dtype_name(dtype_name(like)) if name == "lse" else dtype_name(like)
    clause = "MHA-LSE-2" if name == "lse" else "MHA-DTYPE-2" if name.startswith("grad_") else "MHA-DTYPE-1"
    if dtype_name(received) != expected:
        refuse_type(clause, f"`{name}` must have dtype={expected}, received dtype={dtype_name(received)}.")
    return received if storage is None else storage.dense(received)


def rows_of_result(name: str) -> str:
    """Name the axis of a result that counts its rows."""
    return "key" if name in ("grad_key", "grad_value") else "row"

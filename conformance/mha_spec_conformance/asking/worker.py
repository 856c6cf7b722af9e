"""Make the calls of a question, and turn whatever the target does into an answer."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy

from mha_spec.arrays import dtype_name, library_of
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.suite.text import name_of, one_line, repr_of, text_of
from mha_spec_conformance.targets.conversion import (
    ConversionError,
    lay_out,
    on_host,
    same_bits,
    some_rows,
    to_library,
    to_numpy,
)
from mha_spec_conformance.targets.declarations import flag_of
from mha_spec_conformance.targets.loading import line_in_target

from .calls import MalformedResult, arranged, joined, layer_answers, named, stacked_operand
from .question import AGAIN, NEGATED, Answer, Further, Question, Raised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mha_spec.arrays import Array
    from mha_spec_conformance.targets.loading import Target

__all__ = ["answer"]


class Malformed(Exception):
    """The target did not return the arrays that were asked for."""


class Failed(Exception):
    """The target, or its library, raised `error`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(text_of(error))
        self.error = error


def answer(target: Target, question: Question) -> Answer:
    """Ask the target the question; whatever the target does becomes an answer, unless it ends the process."""
    start = time.perf_counter()
    try:
        if (reason := _unsupported(target, question)) is not None:
            return Answer("unsupported", reason=reason)
        return _ask(target, question)
    except Malformed as error:
        return Answer("malformed", reason=str(error), seconds=time.perf_counter() - start)
    except Failed as failed:
        if isinstance(failed.error, NotImplementedError):
            reason = text_of(failed.error) or "NotImplementedError"
            return Answer("unsupported", reason=reason, seconds=time.perf_counter() - start)
        raised = _raised(failed.error)
        return Answer("raised", reason=str(raised), raised=raised, seconds=time.perf_counter() - start)


def _unsupported(target: Target, question: Question) -> str | None:
    supported = True if target.supports is None else flag_of(_guarded(target.supports, question))
    if supported is True:
        return None
    return text_of(supported) if isinstance(supported, str) else f"supports(question) returned {repr_of(supported)}"


@dataclass(frozen=True)
class _Called:
    """One call: its arguments, and the results of each call of a sequence, as returned and as NumPy arrays."""

    arguments: dict[str, object]
    parts: list[dict[str, Array]]
    read: list[dict[str, numpy.ndarray]]
    outputs: dict[str, numpy.ndarray]
    written: tuple[str, ...]
    foreign: str | None

    @property
    def overwritten(self) -> tuple[str, ...]:
        """The outputs that have changed since they were returned."""
        pairs = zip(self.parts, self.read, strict=True)
        return tuple(name for part, read in pairs for name in part if not _holds(part[name], read[name]))


def _ask(target: Target, question: Question) -> Answer:
    start = time.perf_counter()
    first = _call(target, question)
    seconds = time.perf_counter() - start
    calls, further = [first], dict[str, Further]()
    for name in question.further:
        if name == NEGATED:
            _call_with_other_numbers(target, question)
        else:
            further[name] = _further(target, question, "plain" if name == AGAIN else name, calls)
    return Answer(
        "returned",
        first.outputs,
        written=first.written,
        further=further,
        foreign=first.foreign,
        seconds=seconds,
        overwritten=tuple(dict.fromkeys(name for call in calls for name in call.overwritten))
        if question.further
        else (),
    )


def _further(target: Target, question: Question, layout: str, calls: list[_Called]) -> Further:
    """Make a further call of the question, and add it to the calls."""
    try:
        # The same arrays are passed again, unless the target has written to them.
        arguments = calls[0].arguments if layout == "plain" and not calls[0].written else None
        call = _call(target, question, layout, arguments)
    except Malformed as error:
        return Further("malformed", reason=str(error))
    except Failed as failed:
        refused = isinstance(failed.error, NotImplementedError)
        return Further("unsupported" if refused else "raised", reason=str(_raised(failed.error)))
    calls.append(call)
    return Further("returned", call.outputs, written=call.written)


def _call_with_other_numbers(target: Target, question: Question) -> None:
    """Call with negated numbers; the results do not matter."""
    arrays = {name: array if array.dtype.kind in "biu" else -array for name, array in question.arrays.items()}
    with suppress(Failed, Malformed):
        _call(target, replace(question, arrays=arrays))


def _guarded(function: Callable[..., object], *arguments: object, **keywords: object) -> Array:
    """Call the target, or its library on its behalf; an exception becomes `Failed`."""
    try:
        return function(*arguments, **keywords)
    except BaseException as error:
        raise Failed(error) from error


def _raised(error: BaseException) -> Raised:
    return Raised(tuple(map(name_of, type(error).__mro__)), text_of(error), line_in_target(error))


def _call(
    target: Target, question: Question, layout: str = "plain", arguments: dict[str, object] | None = None
) -> _Called:
    """Call once, by default with new arrays."""
    if arguments is None:
        arguments = {
            name: _argument(target, question, name, question.placed.get(name, layout)) for name in question.arrays
        }
    checked = [name for name in question.arrays if _is_checked(question, name, arguments[name])]
    function = partial(_guarded, target.functions[question.function])
    parts = _answers(function, question, {**arguments, **question.options})
    read = [{name: _read(name, value, question) for name, value in part.items()} for part in parts]
    on_device = [name for name in question.arrays if name not in question.host]
    libraries = {_library(value) for part in parts for value in part.values() if on_device} - {target.claims.arrays}
    changed = tuple(name for name in checked if not _holds(arguments[name], question.arrays[name]))
    return _Called(arguments, parts, read, _joined(read), changed, next(iter(libraries), None))


def _is_checked(question: Question, name: str, argument: Array) -> bool:
    """Tell whether an argument is read after the call, to see whether the target wrote to it.

    On an accelerator this is a transfer, so it is done only in the questions that are asked in every memory layout.
    """
    if name in question.host:
        return question.host[name] != "list"
    # JAX without its 64-bit mode has converted 64-bit numbers before the call.
    if _guarded(dtype_name, argument) != dtype_name(question.arrays[name]):
        return False
    return bool(question.further) or _guarded(on_host, argument)


def _argument(target: Target, question: Question, name: str, layout: str) -> object:
    """Convert an array to the library of the target, or to the form of host data that the question asks for."""
    array, host = question.arrays[name], question.host.get(name)
    if host is not None:
        return array.tolist() if host == "list" else array.copy()
    return _guarded(to_library, array, target.claims.arrays, target.claims.device, layout)


def _library(value: Array) -> str | None:
    """Name the library of an output; an exception of its class becomes `Failed`."""
    return _guarded(library_of, value)


def _joined(read: list[dict[str, numpy.ndarray]]) -> dict[str, numpy.ndarray]:
    try:
        return joined(read)
    except MalformedResult as error:
        raise Malformed(str(error)) from None


def _holds(argument: Array, array: numpy.ndarray) -> bool:
    """Tell whether an argument or result still holds the elements of the array; a deleted array does not."""
    try:
        return _is_stand_in(array) or same_bits(_guarded(to_numpy, argument), array)
    except Failed:
        return False


def _answers(
    function: Callable[..., object], question: Question, arguments: Mapping[str, object]
) -> list[dict[str, Array]]:
    """Return the outputs by name, for each call if the question is a sequence of calls."""
    try:
        results = list(_results(function, question.function, arguments))
    except MalformedResult as error:
        raise Malformed(str(error)) from None
    except Failed:
        raise
    except Exception as error:
        raise Malformed(f"{question.function} returned an object that cannot be read: {one_line(error)}") from error
    return _asked_outputs(question, results)


def _results(function: Callable[..., object], name: str, arguments: Mapping[str, object]) -> Iterator[dict[str, Array]]:
    """Call the function as often as the question requires, and name the results of each call."""
    if FUNCTIONS[name].of_layer:
        yield from layer_answers(function, name, arguments)
        return
    operands, keywords = arranged(name, arguments)
    yield named(name, keywords, function(*operands, **keywords), stacked_operand(arguments))


def _asked_outputs(question: Question, results: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Keep the outputs that the question asks for; an output that the target did not return is None."""
    if len(results) == 1:
        return [{name: results[0].get(name) for name in question.outputs}]
    return [{name: part[name] for name in question.outputs if name in part} for part in results]


def _read(name: str, value: Array, question: Question) -> numpy.ndarray:
    """Copy an output to NumPy, of a sampled output only the rows that are compared.

    An output that exceeds the limit is replaced by an array of its shape without memory.
    """
    try:
        if (shape := _too_large(value, question.most_bytes)) is not None:
            return _stand_in(name, value, shape)
        sample = question.sampled.get(name)
        if sample is not None and _library(value) and _guarded(lambda: tuple(value.shape)) == sample.shape:
            return sample.spread(_guarded(lambda: to_numpy(some_rows(value, sample.rows, sample.width))))
        return lay_out(_guarded(to_numpy, value), "plain")
    except Failed as failed:
        if isinstance(failed.error, ConversionError):
            raise Malformed(f"`{name}` must be an array: {text_of(failed.error)}") from None
        raise


def _too_large(value: Array, most_bytes: int) -> tuple[int, ...] | None:
    """Return the shape of an array that has more elements than an answer may have bytes."""
    if _library(value) is None:
        return None
    shape = _guarded(lambda: tuple(map(int, value.shape)))
    return shape if math.prod(shape) > most_bytes else None


def _stand_in(name: str, value: Array, shape: tuple[int, ...]) -> numpy.ndarray:
    try:
        return numpy.broadcast_to(numpy.zeros((), dtype_name(value)), shape)
    except (ValueError, TypeError) as error:
        raise Malformed(f"`{name}` must be an array, received shape={one_line(shape, 200)}: {error}") from None


def _is_stand_in(array: numpy.ndarray) -> bool:
    return array.size > 1 and not any(array.strides)

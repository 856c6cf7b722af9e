"""The process of the target: it loads the target, sends its claims, and answers questions until the runner ends.

Messages through the pipe are small: the claims or the name of a file. Questions and answers lie in files, so that
neither side waits for the other to read. The output that the target prints also goes to a file.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mha_spec.arrays import library_of
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.conversion import (
    ConversionError,
    lay_out,
    layouts_of,
    same_bits,
    to_library,
    to_numpy,
)
from mha_spec_conformance.targets.loading import Target, TargetError, line_in_target, load

from .calls import MalformedResult, arranged, joined, layer_answers, named
from .question import AGAIN, NEGATED, Answer, Further, Question, Raised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.connection import Connection

    import numpy

    from mha_spec.arrays import Array

__all__ = ["answer", "serve"]


class Malformed(Exception):
    """The target did not return the arrays that were asked for."""


class Failed(Exception):
    """The target, or its library, raised `error`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def serve(connection: Connection, name: str, printed: str, load: Callable[[str], Target] = load) -> None:
    """Send the claims, or the reason why the target cannot be loaded; then answer questions until the runner ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _print_to(printed)
    os.environ.setdefault("JAX_ENABLE_X64", "1")
    try:
        target = load(name)
    except TargetError as error:
        connection.send(str(error))
        return
    connection.send(target.claims)
    while True:
        try:
            path = Path(connection.recv())
        except EOFError:
            return
        question = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(_reply(target, question), protocol=5))
        connection.send(str(path))


def _print_to(file: str) -> None:
    """Send all output, including that of C code, to a file, because the terminal shows the report."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _reply(target: Target, question: Question) -> Answer:
    """Answer the question; report an exception of this package as a fault of the suite, not of the target."""
    try:
        return answer(target, question)
    except Exception as error:
        return Answer("internal", reason=f"{question.id}: {_raised(error)}")


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
            reason = str(failed.error) or "NotImplementedError"
            return Answer("unsupported", reason=reason, seconds=time.perf_counter() - start)
        raised = _raised(failed.error)
        return Answer("raised", reason=str(raised), raised=raised, seconds=time.perf_counter() - start)


def _unsupported(target: Target, question: Question) -> str | None:
    supported = True if target.supports is None else _guarded(target.supports, question)
    if supported is True:
        return None
    return supported if isinstance(supported, str) else f"supports(question) returned {supported!r}"


@dataclass(frozen=True)
class _Called:
    """The results of one call: as the target returned them, call by call of a sequence, and as NumPy arrays."""

    parts: list[dict[str, Array]]
    read: list[dict[str, numpy.ndarray]]
    written: tuple[str, ...]
    foreign: str | None

    @property
    def overwritten(self) -> tuple[str, ...]:
        """The outputs that have changed since they were returned."""
        pairs = [(part, read) for part, read in zip(self.parts, self.read, strict=True)]
        return tuple(name for part, read in pairs for name in part if not _holds(part[name], read[name]))


def _ask(target: Target, question: Question) -> Answer:
    start = time.perf_counter()
    first = _call(target, question)
    seconds = time.perf_counter() - start
    calls, further = [first], dict[str, Further]()
    for name in question.further:
        if name == NEGATED:
            _call_with_other_numbers(target, question)
        elif name == AGAIN or name in layouts_of(target.claims.arrays):
            further[name] = _further(target, question, "plain" if name == AGAIN else name, calls)
    return Answer(
        "returned",
        joined(first.read),
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
        call = _call(target, question, layout)
        outputs = joined(call.read)
    except Malformed as error:
        return Further("malformed", reason=str(error))
    except Failed as failed:
        refused = isinstance(failed.error, NotImplementedError)
        return Further("unsupported" if refused else "raised", reason=str(_raised(failed.error)))
    calls.append(call)
    return Further("returned", outputs, written=call.written)


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
    return Raised(tuple(cls.__name__ for cls in type(error).__mro__), str(error), line_in_target(error))


def _call(target: Target, question: Question, layout: str = "plain") -> _Called:
    """Call once, with new arrays."""
    claims = target.claims
    arguments = {
        name: _guarded(to_library, array, claims.arrays, claims.device, question.placed.get(name, layout))
        for name, array in question.arrays.items()
    }
    function = partial(_guarded, target.functions[question.function])
    parts = _answers(function, question, {**arguments, **question.options})
    read = [{name: _read(name, value) for name, value in part.items()} for part in parts]
    libraries = {library_of(value) for part in parts for value in part.values() if arguments} - {claims.arrays}
    changed = tuple(name for name, array in question.arrays.items() if not _holds(arguments[name], array))
    return _Called(parts, read, changed, next(iter(libraries), None))


def _holds(argument: Array, array: numpy.ndarray) -> bool:
    """Tell whether an argument still holds the elements of the array; an argument that was deleted does not."""
    try:
        return same_bits(_guarded(to_numpy, argument), array)
    except Failed:
        return False


def _answers(
    function: Callable[..., object], question: Question, arguments: Mapping[str, object]
) -> list[dict[str, Array]]:
    """Give the outputs by name, for each call if the question is a sequence of calls."""
    try:
        results = list(_results(function, question.function, arguments))
    except MalformedResult as error:
        raise Malformed(str(error)) from None
    return _asked_outputs(question, results)


def _results(function: Callable[..., object], name: str, arguments: Mapping[str, object]) -> Iterator[dict[str, Array]]:
    """Call the function as often as the question requires, and name the results of each call."""
    if FUNCTIONS[name].of_layer:
        yield from layer_answers(function, name, arguments)
        return
    operands, keywords = arranged(name, arguments)
    yield named(name, keywords, function(*operands, **keywords))


def _asked_outputs(question: Question, results: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Keep the outputs that the question asks for; an output that the target did not return is None."""
    if len(results) == 1:
        return [{name: results[0].get(name) for name in question.outputs}]
    return [{name: part[name] for name in question.outputs if name in part} for part in results]


def _read(name: str, value: Array) -> numpy.ndarray:
    try:
        return lay_out(_guarded(to_numpy, value), "plain")
    except Failed as failed:
        if isinstance(failed.error, ConversionError):
            raise Malformed(f"`{name}` must be an array: {failed.error}") from None
        raise

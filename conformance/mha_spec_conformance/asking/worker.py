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
from dataclasses import replace
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
from .question import Answer, Question, Raised

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


def _ask(target: Target, question: Question) -> Answer:
    start = time.perf_counter()
    outputs, written, foreign, overwritten = _call(target, question)
    seconds = time.perf_counter() - start
    repeated = _call(target, question)[0] if question.repeat else None
    deterministic = None if repeated is None else all(same_bits(outputs[name], repeated[name]) for name in outputs)
    layouts = {} if written else _layouts(target, question)
    return Answer(
        "returned",
        outputs,
        written=written,
        layouts=layouts,
        deterministic=deterministic,
        foreign=foreign,
        seconds=seconds,
        overwritten=overwritten,
    )


def _layouts(target: Target, question: Question) -> dict[str, Mapping[str, numpy.ndarray] | str]:
    """Give the outputs for each other layout of the inputs, or the error; a layout that is unsupported is left out."""
    answers: dict[str, Mapping[str, numpy.ndarray] | str] = {}
    for layout in question.layouts:
        if layout not in layouts_of(target.claims.arrays):
            continue
        try:
            answers[layout] = _call(target, question, layout)[0]
        except Malformed as error:
            answers[layout] = str(error)
        except Failed as failed:
            if not isinstance(failed.error, NotImplementedError):
                answers[layout] = str(_raised(failed.error))
    return answers


def _guarded(function: Callable[..., object], *arguments: object, **keywords: object) -> Array:
    """Call the target, or its library on its behalf; an exception becomes `Failed`."""
    try:
        return function(*arguments, **keywords)
    except BaseException as error:
        raise Failed(error) from error


def _raised(error: BaseException) -> Raised:
    return Raised(tuple(cls.__name__ for cls in type(error).__mro__), str(error), line_in_target(error))


def _call(
    target: Target, question: Question, layout: str = "plain"
) -> tuple[dict[str, numpy.ndarray], tuple[str, ...], str | None, tuple[str, ...]]:
    """Call once; give the outputs, the changed inputs, the library of foreign outputs, and the overwritten outputs."""
    claims = target.claims
    arguments = {
        name: _guarded(to_library, array, claims.arrays, claims.device, question.placed.get(name, layout))
        for name, array in question.arrays.items()
    }
    function = partial(_guarded, target.functions[question.function])
    parts = _answers(function, question, {**arguments, **question.options})
    read = [{name: _read(name, value) for name, value in part.items()} for part in parts]
    outputs = joined(read)
    overwritten = _overwritten(target, question, parts, read) if question.reused else ()
    libraries = {library_of(value) for part in parts for value in part.values() if arguments} - {claims.arrays}
    changed = [name for name, array in question.arrays.items() if not same_bits(to_numpy(arguments[name]), array)]
    return outputs, tuple(changed), next(iter(libraries), None), overwritten


def _overwritten(
    target: Target, question: Question, parts: list[dict[str, Array]], read: list[dict[str, numpy.ndarray]]
) -> tuple[str, ...]:
    """Name the outputs that change after they were returned, when the target is called with other numbers."""
    arrays = {name: array if array.dtype.kind in "biu" else -array for name, array in question.arrays.items()}
    with suppress(Failed, Malformed):
        _call(target, replace(question, arrays=arrays, reused=False))
    again = [{name: _read(name, value) for name, value in part.items()} for part in parts]
    pairs = [(name, part[name], now[name]) for part, now in zip(read, again, strict=True) for name in part]
    return tuple(name for name, before, after in pairs if not same_bits(before, after))


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

"""The program of a target in Python: `python -m mha_spec_conformance.asking.serving TARGET` speaks the protocol.

It loads the target, sends its claims, and answers questions until the runner closes the pipe. Its standard input and
output are the pipe of the protocol; what the target prints goes to the standard error instead.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import array_api_compat.numpy  # noqa: F401  # otherwise imported at the first call, when a target may have changed the path

from mha_spec_conformance.suite.text import one_line
from mha_spec_conformance.targets.conversion import layouts_of
from mha_spec_conformance.targets.loading import Target, TargetError

from . import files
from .protocol import PROTOCOL, answer_message, claims_message, line_of, message_from, question_from
from .question import AGAIN, NEGATED, Answer
from .worker import answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

__all__ = ["main"]

LOADER = "mha_spec_conformance.targets.loading:load"
"""The function that loads a target, if the arguments name no other."""

MOST_BYTES_OF_QUESTION = 2**40

LEAST_RECURSION = 1000
"""The depth of recursion that the suite needs; a target may set another limit while it is imported."""


class Channel:
    """The pipe of the protocol, under descriptors that the target does not know."""

    def __init__(self) -> None:
        self._reader, self._writer = os.dup(0), os.dup(1)
        self._process = os.getpid()
        self._buffer = b""
        silent = os.open(os.devnull, os.O_RDONLY)
        os.dup2(silent, 0)
        os.dup2(2, 1)

    def send(self, message: dict[str, Any]) -> None:
        """Write a message."""
        self._end_of_fork()
        line = line_of(message)
        while line:
            line = line[os.write(self._writer, line) :]

    def messages(self) -> Iterator[dict[str, Any]]:
        """Read messages until the runner closes the pipe."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                yield message_from(line)
                continue
            self._end_of_fork()
            read = os.read(self._reader, 2**16)
            if not read:
                return
            self._buffer += read

    def _end_of_fork(self) -> None:
        """End a process that the target forked and that returned from the call: it must not answer."""
        if os.getpid() != self._process:
            os._exit(0)


def main() -> None:
    """Answer the questions about the target that the arguments name."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m mha_spec_conformance.asking.serving TARGET [LOADER [ARGUMENT ...]]")
    name, *loading = sys.argv[1:]
    sys.argv[:] = [name]
    channel = Channel()
    messages = channel.messages()
    if (hello := next(messages, None)) is None:
        return
    try:
        target = _loaded(name, hello, *loading)
    except TargetError as error:
        channel.send({"message": "refusal", "reason": one_line(error)})
        return
    further = (AGAIN, *layouts_of(target.claims.arrays), NEGATED)
    channel.send(claims_message(replace(target.claims, further=further)))
    for message in messages:
        channel.send(_reply(target, message))


def _loaded(name: str, hello: dict[str, Any], loader: str = LOADER, *arguments: str) -> Target:
    """Load the target, and prepare the process for its calls."""
    if hello.get("protocol") != PROTOCOL:
        raise TargetError(f"the program speaks {PROTOCOL}, received {one_line(hello.get('protocol'), 200)}")
    module, _, function = loader.partition(":")
    load: Callable[..., Target] = getattr(import_module(module), function)
    target = load(name, *arguments)
    sys.setrecursionlimit(max(sys.getrecursionlimit(), LEAST_RECURSION))
    _enable_float64(target)
    return target


def _enable_float64(target: Target) -> None:
    """Switch on the 64-bit mode of JAX, without which it gives float32 for float64."""
    if target.claims.arrays == "jax" and "float64" in target.claims.dtypes:
        import jax

        jax.config.update("jax_enable_x64", True)


def _reply(target: Target, message: dict[str, Any]) -> dict[str, Any]:
    """Answer a question; a fault of this package is `internal`, and a file that is gone is `lost`.

    A process that can no longer write files ends, because a target has used up or limited what the process may do.
    """
    number, path = message["number"], Path(message["answer"])
    try:
        arrays = files.read(Path(message["arrays"]), MOST_BYTES_OF_QUESTION)
    except files.FileError as error:
        return {"message": "answer", "number": number, "kind": "lost", "reason": one_line(f"the question {error}")}
    try:
        question = question_from(message, arrays)
        return answer_message(answer(target, question), number, path, question.most_bytes, question.sampled)
    except OSError as error:
        reason = f"the answer cannot be written: {error.strerror}"
        if error.errno != errno.ENOSPC:
            _end(reason)
        return answer_message(Answer("internal", reason=reason), number, path, 0)
    except Exception as error:
        reason = one_line(f"{message['id']}: {type(error).__name__}: {one_line(error, 1000)}")
        return answer_message(Answer("internal", reason=reason), number, path, 0)


def _end(reason: str) -> NoReturn:
    """End the process at once; handlers of the target might wait."""
    with suppress(OSError):
        os.write(2, f"{reason}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    main()

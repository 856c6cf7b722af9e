"""Worker processes, which answer questions; a crash or a timeout is also an answer."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from mha_spec_conformance.targets.loading import TargetError

from . import files
from .layouts import in_layout
from .memory import MemoryLimit, half_of_the_machine
from .process import LAUNCH, PREPARE, Process, maps_of
from .protocol import (
    MOST_LINE_BYTES,
    ProtocolError,
    answer_from,
    claims_from,
    hello_message,
    line_of,
    message_from,
    number_of,
    question_message,
)
from .question import Answer, Question
from .scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Any, Self

    from mha_spec_conformance.targets.claims import Claims

__all__ = ["Pool"]

AHEAD = 4
"""The number of questions that a worker holds, so that it does not wait while the parent process compares."""

LONGEST_START, SHORTEST_START = 300.0, 60.0
"""The limits of the time in which a program must send its claims; it may import a whole framework."""

STARTS = 5
"""The time in which a program must start, in time limits of a question, between the limits above."""

MOST_STARTS = 3
"""The number of times in a row that a program may fail to start, before it is not started again."""

MOST_MAPS = 16_384
"""The number of memory maps above which a process is replaced.

A compiler such as XLA's keeps some 30 maps for each call of new shapes, and fails when Linux refuses the 65,531st.
"""

ANSWERS_BETWEEN_COUNTS = 10
"""The number of answers between two counts of the memory maps, because a count takes some milliseconds."""

BOOTSTRAP = PREPARE + "; sys.path[:] = {path!r}; from mha_spec_conformance.asking.serving import main; main()"

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Worker:
    """One process of the target, the questions that it holds by number, and the group of its next questions."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool = pool
        self.folder = folder
        self.held: dict[int, Question] = {}
        self.group: Iterator[Question] = iter(())
        self.number = 0
        self.answers_since_count = 0
        self.failed_starts = 0
        self.lost: set[int] = set()
        self.unwritten: dict[int, Answer] = {}
        self.process: Process | None = None
        self.ready = False
        self.reason_of_no_process = ""
        self.since = time.monotonic()

    def launch(self) -> None:
        """Start the process, and ask it for its claims.

        Raises:
            TargetError: The process does not start.
        """
        self.stop()
        try:
            self._prepare_folder()
            self.process = Process(self.pool.command, self.folder)
        except OSError as error:
            raise TargetError(f"target {self.pool.target} cannot be started: {error.strerror}") from error
        self.since = time.monotonic()
        self.pool.memory.watch(self.process.id)
        self.process.send(line_of(hello_message()))

    def claims(self) -> Claims:
        """Wait for the claims of the process that was launched.

        Raises:
            TargetError: The process does not send claims, or the target cannot be judged.
        """
        assert self.process is not None
        while (claims := self._claims_that_arrived(self.process)) is None:
            wait([self.process.waited_for], timeout=0.1)
        return claims

    def _claims_that_arrived(self, process: Process) -> Claims | None:
        """Return the claims as soon as they have arrived; see `claims`."""
        if (message := self._first_message(process)) is None:
            return None
        claims = claims_from(message, self.pool.target, trusted=self.pool.python)
        self.ready = True
        self.failed_starts = 0
        self.since = time.monotonic()
        return claims

    def _first_message(self, process: Process) -> dict[str, Any] | None:
        limit = min(LONGEST_START, max(SHORTEST_START, STARTS * self.pool.limit))
        ended = process.ended
        if lines := process.lines(MOST_LINE_BYTES):
            try:
                return message_from(lines[0])
            except ProtocolError as error:
                raise TargetError(f"target {self.pool.target} {error}") from error
        if ended:
            failure = "ended the process while it was imported" if self.pool.python else "did not send claims"
            raise TargetError(f"target {self.pool.target} {failure}: {self._how_it_ended(process)}")
        if time.monotonic() > self.since + limit:
            raise TargetError(f"target {self.pool.target} did not load in {limit:.0f} s")
        return None

    def _how_it_ended(self, process: Process) -> str:
        return self.pool.memory.forget(process.id) or process.ending()

    def ask(self, question: Question) -> None:
        """Hold a question, and send it if the process is ready; otherwise it is sent when a process is ready again."""
        if not self.held:
            self.since = time.monotonic()
        self.number += 1
        self.held[self.number] = question
        self._send(self.number)

    def _resume(self) -> None:
        """Start the process again, and ask it the held questions when it is ready; if it does not start, say why."""
        try:
            if self.process is None and self.failed_starts < MOST_STARTS:
                self.launch()
            if self.process is None or self._claims_that_arrived(self.process) is None:
                return
        except TargetError as error:
            self.stop()
            self.failed_starts += 1
            self.reason_of_no_process = f"the target could not be started again: {error}"
            return
        for number in list(self.held):
            self.ask(self._drop(number))

    def _send(self, number: int) -> None:
        if self.process is None or not self.ready:
            return
        question = self.held[number]
        message = question_message(question, number, self.folder, self.pool.claims.further)
        try:
            self._write(self.folder / f"{number}.question", question)
        except OSError as error:
            self.unwritten[number] = Answer("internal", reason=f"the question cannot be written: {error.strerror}")
        else:
            self.process.send(line_of(message))

    def _write(self, path: Path, question: Question) -> None:
        try:
            files.write(path, question.arrays)
        except OSError:
            self._prepare_folder()
            files.write(path, question.arrays)

    def _prepare_folder(self) -> None:
        """Make the folder again if the target removed it, replaced it or changed its permissions."""
        if not self.folder.is_dir():
            self.folder.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def arrived(self, limit: float) -> list[tuple[Question, Answer]]:
        """Return the answers that have arrived; replace a process that ended, hangs, or breaks the protocol."""
        if not self.held:
            return []
        if self.unwritten:
            return [(self._drop(number), answer) for number, answer in list(self.unwritten.items())]
        if not self.ready:
            self._resume()
        if self.process is None:
            return self._blamed(Answer("crash", reason=self.reason_of_no_process))
        if not self.ready:
            return []
        ended = self.process.ended
        answers: list[tuple[Question, Answer]] = []
        for line in self.process.lines(MOST_LINE_BYTES):
            try:
                answers += self._read(line)
            except ProtocolError as error:
                return [*answers, *self._replaced("crash", f"the process {error}")]
        if answers or not self.held:
            self._stop_before_maps_run_out(len(answers))
            return answers
        if ended:
            return self._replaced("crash", self._how_it_ended(self.process))
        if time.monotonic() - self.since > limit:
            return self._replaced("timeout", f"no answer in {limit:g} s")
        return []

    def _stop_before_maps_run_out(self, answers: int) -> None:
        """Stop a process that holds many memory maps; a new process is asked the questions that are held."""
        self.answers_since_count += answers
        if self.answers_since_count < ANSWERS_BETWEEN_COUNTS or self.process is None:
            return
        self.answers_since_count = 0
        if maps_of(self.process.id) > MOST_MAPS:
            self.stop()

    def _read(self, line: bytes) -> list[tuple[Question, Answer]]:
        """Read the answer in a line; an answer to a question that is not held, for example from a fork, is dropped."""
        message = message_from(line)
        number = number_of(message, "answer")
        if number not in self.held:
            return []
        path = self.folder / f"{number}.answer"
        answer = answer_from(message, self.held[number], path)
        lost = answer.kind == "lost" or (message["kind"] == "returned" and not path.exists())
        if lost and number not in self.lost:
            self.lost.add(number)
            self._send(number)
            return []
        self.since = time.monotonic()
        if answer.kind == "lost":
            answer = Answer("internal", reason=answer.reason)
        return [(self._drop(number), answer)]

    def _drop(self, number: int) -> Question:
        """Stop holding a question, and remove its files."""
        for kind in ("question", "answer"):
            with suppress(OSError):
                (self.folder / f"{number}.{kind}").unlink(missing_ok=True)
        self.lost.discard(number)
        self.unwritten.pop(number, None)
        return self.held.pop(number)

    def _blamed(self, answer: Answer) -> list[tuple[Question, Answer]]:
        """Return the answer to the oldest question; a process may also end when no question is held."""
        return [(self._drop(number), answer) for number in list(self.held)[:1]]

    def _replaced(self, kind: str, reason: str) -> list[tuple[Question, Answer]]:
        """Stop the process and blame the oldest question; a new process is asked those that follow."""
        self.stop()
        return self._blamed(Answer(kind, reason=reason, seconds=time.monotonic() - self.since))

    def take(self, waiting: Iterator[Iterator[Question]]) -> None:
        """Ask the next question of the group of the worker, or of a new group if that group has ended."""
        question = next(self.group, None)
        while question is None and (group := next(waiting, None)) is not None:
            self.group = group
            question = next(group, None)
        if question is not None:
            self.ask(question)

    def forget(self) -> None:
        """Drop the questions that are held, and stop the process, because it would still answer them."""
        self.group = iter(())
        if self.held:
            self.stop()
        for number in list(self.held):
            self._drop(number)

    def stop(self) -> None:
        """Kill the process; the next question starts another process."""
        if self.process is not None:
            self.pool.memory.forget(self.process.id)
            self.process.stop()
        self.process = None
        self.ready = False


class Pool:
    """Runs `jobs` workers of a target; use it as a context manager, which ends all processes."""

    def __init__(
        self,
        target: str,
        jobs: int = 1,
        limit: float = 60.0,
        *,
        loading: Sequence[str] = (),
        command: Sequence[str] | None = None,
        memory: int | None = None,
    ) -> None:
        """Start the workers.

        Args:
            target: The name of the target.
            jobs: The number of processes.
            limit: The time limit of a question in seconds.
            loading: The function that loads a target in Python, as `module:function`, and its further arguments; by
                default, the target is loaded by its name.
            command: The program of a target that is not in Python, with its arguments.
            memory: The most bytes of memory of a process; by default, all of them have half of the machine's.
        """
        self.target = target
        self.limit = limit
        self.memory = MemoryLimit(half_of_the_machine() // jobs if memory is None else memory)
        self.python = command is None
        bootstrap = BOOTSTRAP.format(path=list(sys.path))
        worker = [sys.executable, "-P", "-c", bootstrap, target, *loading]
        self.command = worker if command is None else [sys.executable, "-I", "-S", "-c", LAUNCH, *command]
        self._scratch = Scratch()
        self._workers = [Worker(self, self._scratch.folder(str(number))) for number in range(jobs)]
        try:
            for worker in self._workers:
                worker.launch()
            for worker in self._workers:
                self.claims = worker.claims()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove the files."""
        with _undisturbed():
            for worker in self._workers:
                worker.stop()
            self._workers.clear()
            self.memory.close()
            self._scratch.remove()

    def answers(self, *groups: Iterable[Question]) -> Generator[tuple[Question, Answer], None, None]:
        """Ask all questions; yield each with its answer, in the order in which the answers arrive.

        The questions of a group go to the same worker, so that its framework compiles once for them. The remaining
        answers are dropped if the caller stops early.
        """
        try:
            yield from in_layout(self.claims, self._answers, groups)
        finally:
            for worker in self._workers:
                worker.forget()

    def _answers(self, *groups: Iterable[Question]) -> Generator[tuple[Question, Answer], None, None]:
        waiting = map(iter, groups)
        self._hand_out(waiting)
        while any(worker.held for worker in self._workers):
            arrived = [pair for worker in self._workers for pair in worker.arrived(self.limit)]
            self._hand_out(waiting)
            yield from arrived
            if not arrived:
                processes = [worker.process for worker in self._workers if worker.held]
                wait([p.waited_for for p in processes if p is not None], timeout=min(0.05, self.limit / 4))

    def _hand_out(self, waiting: Iterator[Iterator[Question]]) -> None:
        for _ in range(AHEAD):
            for worker in self._workers:
                if len(worker.held) < AHEAD:
                    worker.take(waiting)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back the signals that end a run, so that the cleaning is not interrupted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

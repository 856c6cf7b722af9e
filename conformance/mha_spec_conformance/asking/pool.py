"""Worker processes, which answer questions; a crash or a timeout is also an answer."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections import deque
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import TargetError
from mha_spec_conformance.targets.loading import load as load_target

from .question import Answer, Question
from .worker import serve

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from mha_spec_conformance.targets.loading import Target

__all__ = ["Pool"]

AHEAD = 4
"""The number of questions that a worker holds, so that it does not wait while the parent process compares."""

STARTUP_SECONDS = 300.0
"""Time limit for importing a target, which may import a whole framework."""

MEMORY = Path("/dev/shm")
"""A folder in memory for questions and answers, used if it has enough space."""

ENOUGH_MEMORY = 2**28


def _fast_folder() -> str | None:
    """Give the folder for questions and answers; None means the temporary folder of the system."""
    usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ENOUGH_MEMORY
    return str(MEMORY) if usable else None


class Worker:
    """One process of the target, the questions that it holds, oldest first, and the group of its next questions."""

    def __init__(self, target: str, folder: Path, load: Callable[[str], Target]) -> None:
        self.target = target
        self.load = load
        self.folder = folder
        self.held: deque[Question] = deque()
        self.group: Iterator[Question] = iter(())
        self.count = 0
        self.start()

    def start(self) -> None:
        """Start the process, load the target in it, and keep its claims."""
        context = multiprocessing.get_context("spawn")
        self.connection, process_end = context.Pipe()
        self.printed = self.folder / "printed"
        self.process = context.Process(target=serve, args=(process_end, self.target, str(self.printed), self.load))
        self.process.start()
        process_end.close()
        self.claims = self._claims()
        self.since = time.monotonic()
        self.stopped = False

    def _claims(self) -> Claims:
        try:
            received = (
                self.connection.recv()
                if self.connection.poll(STARTUP_SECONDS)
                else f"target {self.target} did not load in {STARTUP_SECONDS:.0f} s"
            )
        except EOFError:
            received = f"target {self.target} ended the process while it was imported: {self._ending()}"
        if isinstance(received, Claims):
            return received
        self.stop()
        raise TargetError(str(received))

    def ask(self, question: Question) -> None:
        """Send a question; start the process if it is not running."""
        if self.stopped:
            self.start()
        if not self.held:
            self.since = time.monotonic()
        self.held.append(question)
        self._send(question)

    def _send(self, question: Question) -> None:
        self.count += 1
        path = self.folder / f"{self.count}.pickle"
        path.write_bytes(pickle.dumps(question, protocol=5))
        try:
            self.connection.send(str(path))
        except OSError:
            return

    def answer(self, limit: float) -> Answer | None:
        """Give the answer to the oldest question, or None if there is none; replace a process that ended or hangs."""
        try:
            if self.connection.poll():
                path = Path(self.connection.recv())
                self.since = time.monotonic()
                reply: Answer = pickle.loads(path.read_bytes())
                path.unlink()
                return _checked(reply)
        except (EOFError, OSError):
            return self._replace(Answer("crash", reason=self._ending(), seconds=time.monotonic() - self.since))
        if time.monotonic() - self.since > limit:
            return self._replace(Answer("timeout", reason=f"no answer in {limit:g} s", seconds=limit))
        return None

    def take(self, waiting: Iterator[Iterator[Question]]) -> None:
        """Ask the next question of the group of the worker, or of a new group if that group has ended."""
        question = next(self.group, None)
        while question is None and (group := next(waiting, None)) is not None:
            self.group = group
            question = next(group, None)
        if question is not None:
            self.ask(question)

    def forget(self) -> None:
        """Drop the questions that are held, and stop the process, because its answers would otherwise arrive later."""
        self.group = iter(())
        if self.held:
            self.held.clear()
            self.stop()

    def _replace(self, answer: Answer) -> Answer:
        """Start a new process for the questions that follow; without any, it starts with the next question."""
        self.stop()
        following = list(self.held)[1:]
        if following:
            self.start()
        for question in following:
            self._send(question)
        return answer

    def _ending(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        how = (
            "still running"
            if code is None
            else f"exit status {code}"
            if code >= 0
            else f"signal {signal.Signals(-code).name}"
        )
        lines = self.printed.read_text(errors="replace").strip().splitlines() if self.printed.exists() else []
        return f"the process ended with {how}" + (f"; last printed: {lines[-1][:200]}" if lines else "")

    def stop(self) -> None:
        """Kill the process; the next question starts another process."""
        self.stopped = True
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.printed.unlink(missing_ok=True)


def _checked(answer: Answer) -> Answer:
    """Return the answer, but raise if it reports a fault of the suite."""
    if answer.kind == "internal":
        raise RuntimeError(answer.reason)
    return answer


class Pool:
    """Runs `jobs` workers of a target; use it as a context manager, which ends all processes."""

    def __init__(
        self, target: str, jobs: int = 1, limit: float = 60.0, load: Callable[[str], Target] = load_target
    ) -> None:
        """Start the workers; each loads the target by calling `load`, which must be a function of a module."""
        self.limit = limit
        self._folder = TemporaryDirectory(prefix="mha-spec-", dir=_fast_folder(), ignore_cleanup_errors=True)
        self._workers: list[Worker] = []
        try:
            for number in range(jobs):
                folder = Path(self._folder.name) / str(number)
                folder.mkdir()
                self._workers.append(Worker(target, folder, load))
        except BaseException:
            self.close()
            raise

    @property
    def claims(self) -> Claims:
        """The claims of the target."""
        return self._workers[0].claims

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove the files."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        self._folder.cleanup()

    def answers(self, *groups: Iterable[Question]) -> Generator[tuple[Question, Answer], None, None]:
        """Ask all questions; yield each with its answer, in the order in which the answers arrive.

        The questions of a group go to the same worker, so that its framework compiles once for them. The remaining
        answers are dropped if the caller stops early.
        """
        try:
            yield from self._answers(iter(groups))
        finally:
            for worker in self._workers:
                worker.forget()

    def _answers(self, groups: Iterator[Iterable[Question]]) -> Iterator[tuple[Question, Answer]]:
        waiting = map(iter, groups)
        self._hand_out(waiting)
        while any(worker.held for worker in self._workers):
            arrived = [
                (worker, reply)
                for worker in self._workers
                if worker.held and (reply := worker.answer(self.limit)) is not None
            ]
            done = [(worker.held.popleft(), reply) for worker, reply in arrived]
            self._hand_out(waiting)
            yield from done
            if not done:
                wait([worker.connection for worker in self._workers if worker.held], timeout=min(0.2, self.limit / 4))

    def _hand_out(self, waiting: Iterator[Iterator[Question]]) -> None:
        for _ in range(AHEAD):
            for worker in self._workers:
                if len(worker.held) < AHEAD:
                    worker.take(waiting)

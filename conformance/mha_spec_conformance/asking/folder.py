"""Questions and answers in a folder, for machines without Python: a program answers there, and the answers are read.

The folder has these files; `docs/protocol.md` describes them:

    export.json        the claims and the selection, with the version of the suite
    questions.jsonl    `hello`, then the questions, in the order in which a run asks them
    answers.jsonl      the standard output of the program
    files/             the arrays
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.suite.text import one_line

from . import files
from .layouts import in_layout
from .protocol import (
    ProtocolError,
    answer_from,
    claims_from,
    claims_message,
    hello_message,
    line_of,
    message_from,
    number_of,
    question_message,
)
from .question import Answer
from .selection import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from typing import Any

    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

    from .question import Question

    Message = dict[str, Any]

__all__ = ["FolderError", "Recorded", "Recorder"]

FORMAT = "mha-spec-export/1"
EXPORT, QUESTIONS, ANSWERS = "export.json", "questions.jsonl", "answers.jsonl"
FILES = Path("files")
"""The folder of the arrays; the paths in the messages are relative, so that the folder can be moved."""

MOST_BYTES = 2**30
"""The size of a file of messages."""


class FolderError(MhaSpecError, ValueError):
    """The folder cannot be written, or is not an export, or its answers cannot be read."""


def _identity(message: Message) -> str:
    """Name a question by all that it asks, without its number and paths."""
    return json.dumps({name: message[name] for name in sorted(message.keys() - {"number", "arrays", "answer"})})


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FolderError(f"{folder}: cannot be written: {error.strerror}") from error


class Recorder:
    """Writes every question that it is asked to a folder; its answers are empty."""

    def __init__(self, folder: Path, claims: Claims, selection: Selection, suite: Suite) -> None:
        """Make the folder.

        Raises:
            FolderError: The folder has contents already, or cannot be made.
        """
        self.claims = claims
        self.folder = folder
        self.count = 0
        self._written: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise FolderError(f"{folder}: the folder must be empty; name another")
            (folder / FILES).mkdir()
            (folder / EXPORT).write_text(json.dumps(_export(claims, selection, suite), indent=1) + "\n")
            (folder / QUESTIONS).write_bytes(line_of(hello_message()))

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """Write all questions.

        Raises:
            FolderError: The folder cannot be written.
        """
        return in_layout(self.claims, self._write, groups)

    def repeat(self, claims: Claims) -> None:
        """Begin another run, with other claims; questions that an earlier run wrote are not written again."""
        self.claims = claims
        self._asked.clear()

    def _write(self, *groups: Iterable[Question]) -> Generator[tuple[Question, Answer], None, None]:
        with _writing(self.folder), (self.folder / QUESTIONS).open("ab") as questions:
            for question in chain(*groups):
                message = question_message(question, self.count + 1, FILES, self.claims.further)
                identity = _identity(message)
                self._asked[identity] += 1
                if self._asked[identity] > self._written[identity]:
                    self._written[identity] += 1
                    self.count += 1
                    files.write(self.folder / message["arrays"], question.arrays)
                    questions.write(line_of(message))
                yield question, Answer("returned")


def _export(claims: Claims, selection: Selection, suite: Suite) -> Message:
    return {
        "format": FORMAT,
        "spec_version": suite.spec_version,
        "goldens_sha256": suite.goldens_sha256,
        "claims": claims_message(claims),
        "selection": {"only": list(selection.only), "dtypes": list(selection.dtypes)},
    }


class Recorded:
    """Answers questions from the files that a program wrote to a folder."""

    def __init__(self, folder: Path, suite: Suite) -> None:
        """Read the folder, but no arrays.

        Raises:
            FolderError: The folder is not an export of this version of the suite, or has no answers.
        """
        self.folder = folder
        self.claims, self.selection = self._exported(suite)
        self._asked: defaultdict[str, list[int]] = defaultdict(list)
        self._take_all(QUESTIONS, self._take_question)
        self._numbers = {identity: deque(numbers) for identity, numbers in self._asked.items()}
        self._answers: dict[int, Message] = {}
        self._take_all(ANSWERS, self._take_answer)
        if not self._answers:
            raise FolderError(f"{folder / ANSWERS}: has no answer; run `./program < {QUESTIONS} > {ANSWERS}` there")

    def _take_question(self, message: Message) -> None:
        if message["message"] != "hello":
            self._asked[_identity(message)].append(number_of(message, "question"))

    def _take_answer(self, message: Message) -> None:
        """Keep an answer, or the versions and the hardware of the reply to `hello`."""
        if message["message"] in ("claims", "refusal"):
            program = claims_from(message, str(self.folder), trusted=False)
            self.claims = replace(self.claims, versions=program.versions, hardware=program.hardware)
        else:
            self._answers[number_of(message, "answer")] = message

    @property
    def missing(self) -> tuple[int, ...]:
        """The numbers of the questions without an answer."""
        numbers = (number for numbers in self._asked.values() for number in numbers)
        return tuple(sorted(number for number in numbers if number not in self._answers))

    def _exported(self, suite: Suite) -> tuple[Claims, Selection]:
        """Read the description of the export."""
        expected = {"format": FORMAT, "spec_version": suite.spec_version, "goldens_sha256": suite.goldens_sha256}
        text = self._read(EXPORT)
        try:
            export = json.loads(text)
            received = {name: export[name] for name in expected}
            claims = claims_from(export["claims"], str(self.folder), trusted=False)
            only, dtypes = (tuple(map(str, export["selection"][name])) for name in ("only", "dtypes"))
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise FolderError(f"{self.folder / EXPORT}: `mha-spec export` did not write this: {error!r}") from error
        for name, value in expected.items():
            if received[name] != value:
                shown = one_line(received[name], 200)
                raise FolderError(
                    f"{self.folder / EXPORT}: must have {name}={value}, received {name}={shown}; "
                    "export the questions again, with the version of the suite that verifies them"
                )
        return claims, Selection(only, dtypes)

    def _read(self, name: str) -> bytes:
        try:
            return files.content(self.folder / name, MOST_BYTES)
        except files.FileError as error:
            raise FolderError(f"{self.folder / name}: {error}") from error
        except OSError as error:
            raise FolderError(f"{self.folder / name}: cannot be read: {error.strerror}") from error

    def _take_all(self, name: str, take: Callable[[Message], None]) -> None:
        """Take every message of a file."""
        for number, line in enumerate(self._read(name).splitlines(), 1):
            try:
                take(message_from(line))
            except ProtocolError as error:
                raise FolderError(f"{self.folder / name}: line {number}: the program {error}") from error

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """Return all questions with their answers."""
        return in_layout(self.claims, self._read_answers, groups)

    def _read_answers(self, *groups: Iterable[Question]) -> Generator[tuple[Question, Answer], None, None]:
        for question in chain(*groups):
            yield question, self._answer(question)

    def _answer(self, question: Question) -> Answer:
        """Read the answer to a question; a question that was exported several times needs all of its answers."""
        identity = _identity(question_message(question, 0, FILES, self.claims.further))
        numbers = self._numbers.get(identity)
        if not numbers:
            return Answer("raised", reason="the export does not have this question")
        number = numbers.popleft() if len(numbers) > 1 else numbers[0]
        missing = next((number for number in self._asked[identity] if number not in self._answers), None)
        if missing is not None:
            return Answer("raised", reason=f"missing: {ANSWERS} has no answer to question {missing}")
        try:
            answer = answer_from(self._answers[number], question, self.folder / FILES / f"{number}.answer")
        except ProtocolError as error:
            return Answer("crash", reason=f"the process {error}")
        return replace(answer, kind="raised") if answer.kind == "lost" else answer

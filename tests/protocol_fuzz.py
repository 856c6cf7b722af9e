"""Damage messages and files of the protocol, and read them: only errors of the protocol may be raised.

    python tests/protocol_fuzz.py 1000000

prints how the inputs were read, each of which is a message with a file. The same seed draws the same inputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec_conformance.asking import files
from mha_spec_conformance.asking.protocol import (
    ProtocolError,
    answer_from,
    answer_message,
    claims_from,
    claims_message,
    hello_message,
    message_from,
    number_of,
    question_message,
)
from mha_spec_conformance.asking.question import FURTHER, Answer, Further, Question, Raised
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Fuzzer"]

ARRAYS = {name: numpy.zeros((1, 2, 3, 5), numpy.float32) for name in ("query", "key", "value")}
QUESTION = Question("a/b", "attention", "float32", ARRAYS, {"scale": 2.0}, ("output", "lse"), further=FURTHER)
OUTPUTS = {"output": numpy.ones((1, 2, 3, 5), numpy.float32), "lse": numpy.ones((1, 2, 3))}
CALLS = {"again": Further("returned", OUTPUTS, written=("query",)), "strided": Further("raised", reason="no")}
CLAIMS = Claims("x", {"attention": ("mask", "causal")}, ("float64", "float32"), further=FURTHER)

MOST_BYTES = 2**20
LARGEST_REASON = 2100

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "7",
        "output",
        "lse",
        "again/output",
        "query",
        "returned",
        "raised",
        "lost",
        "float32",
        "F32",
        "bfloat16",
    ),
    *(
        "complex64",
        "O",
        "V8",
        "(2,)f4",
        "f4,f4",
        "m8[s]",
        "attention",
        "\x1b[2J",
        "\ud800",
        "\u2028",
        "é" * 50,
        "x" * 5000,
    ),
    *([], [[]], {}, [None], [0], [-1], [2**62, 2], ["x"], [["output"]], [1, 2, 3], {"x": {}}, {"number": "nan"}),
    *({"output": None}, {"shape": [2], "dtype": "float32"}, {"output": {"shape": [-1], "dtype": "complex128"}}),
    *({"kind": "returned"}, {"classes": []}, {"classes": [7], "message": []}, {"classes": ["E"], "where": {}}),
)
SYMBOLS = b'\x00\xff\n\r\t {}[]":,\\0179-eE.truefalsn\x80\xc3\x1b'


class Fuzzer:
    """Draws damaged messages and files from a seed, reads them, and counts how they were read."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.path = folder / "7.answer"
        self.counts: Counter[str] = Counter()
        answers = (
            Answer("returned", OUTPUTS, written=("query",), further=CALLS, foreign="torch", overwritten=("output",)),
            Answer("returned", {"output": numpy.zeros((2, 3), complex), "lse": OUTPUTS["lse"]}),
            Answer("raised", reason="no", raised=Raised(("ValueError", "Exception"), "no\nmore", "x.py:3")),
            Answer("unsupported", reason="no"),
        )
        self.messages = [answer_message(answer, 7, self.path, MOST_BYTES) for answer in answers]
        self.messages += [claims_message(CLAIMS), hello_message(), {"message": "refusal", "reason": "no"}]
        self.messages += [question_message(QUESTION, 7, folder, FURTHER)]
        answer_message(answers[0], 7, self.path, MOST_BYTES)
        self.file = self.path.read_bytes()

    def read(self, count: int) -> Counter[str]:
        """Read damaged inputs; an error that is not of the protocol is raised.

        Raises:
            AssertionError: A result breaks a promise of the reader.
        """
        for _ in range(count):
            self.path.write_bytes(self.damaged_file())
            for outcome in self._outcomes(self.damaged_line()):
                self.counts[outcome] += 1
        return self.counts

    def _outcomes(self, line: bytes) -> Iterator[str]:
        yield "file: " + self._read_file()
        try:
            message = message_from(line)
        except ProtocolError as error:
            yield "line: " + _printable(error)
            return
        yield "number: " + self._read_number(message)
        for trusted in (False, True):
            yield "claims: " + self._read_claims(message, trusted)
        yield "answer: " + self._read_answer(message)

    def _read_file(self) -> str:
        try:
            arrays = files.read(self.path, MOST_BYTES)
        except files.FileError:
            return "FileError"
        assert sum(array.nbytes for array in arrays.values()) <= MOST_BYTES + files.HEADER_BYTES
        return "read"

    def _read_number(self, message: dict[str, Any]) -> str:
        try:
            assert type(number_of(message, "answer")) is int
        except ProtocolError as error:
            return _printable(error)
        return "read"

    def _read_claims(self, message: dict[str, Any], trusted: bool) -> str:
        try:
            claims = claims_from(message, "x", trusted=trusted)
        except TargetError as error:
            return _printable(error)
        assert trusted or not claims.registered
        assert claims.hardware.isprintable()
        return "read"

    def _read_answer(self, message: dict[str, Any]) -> str:
        try:
            answer = answer_from(message, QUESTION, self.path)
        except ProtocolError as error:
            return _printable(error)
        assert set(answer.outputs) <= {"output", "lse"}
        assert set(answer.further) <= set(FURTHER)
        assert set(answer.written) <= set(ARRAYS)
        for reason in (answer.reason, *(call.reason for call in answer.further.values())):
            assert reason is None or (reason.isprintable() and len(reason) <= LARGEST_REASON)
        return answer.kind

    def damaged_line(self) -> bytes:
        """Draw a line that is no longer a message, or has other members."""
        message = json.loads(json.dumps(self.random.choice(self.messages)))
        for _ in range(self.random.choice((0, 1, 1, 2, 3))):
            self._change(message)
        line = json.dumps(message).encode()
        return self._cut(line) if self.random.random() < 0.3 else line

    def damaged_file(self) -> bytes:
        """Draw a file whose header has other members, or whose bytes are others."""
        length = int.from_bytes(self.file[:8], "little")
        header = json.loads(self.file[8 : 8 + length])
        for _ in range(self.random.choice((0, 0, 1, 2))):
            self._change(header)
        text = json.dumps(header).encode()
        size = self.random.choice((*([len(text)] * 20), len(text) + 1, 0, 2**63, 2**64 - 1, 100))
        file = size.to_bytes(8, "little") + text + self.file[8 + length :]
        return self._cut(file) if self.random.random() < 0.2 else file

    def _change(self, tree: dict[str, Any]) -> None:
        """Replace, remove or rename a member somewhere in a tree of JSON."""
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                return
            key = self.random.choice(keys)
            if not isinstance(node[key], (dict, list)) or self.random.random() < 0.3:
                break
            node = node[key]
        action = self.random.randrange(4)
        if action == 0 and isinstance(node, dict):
            node[str(self._odd_value())] = node.pop(key)
        elif action == 1:
            del node[key]
        else:
            node[key] = self._odd_value()

    def _odd_value(self) -> Any:
        """Draw a value; lists and objects are new ones, because they may be changed in turn."""
        value = self.random.choice(ODD_VALUES)
        return copy.deepcopy(value) if isinstance(value, (list, dict)) else value

    def _cut(self, data: bytes) -> bytes:
        """Change, insert or remove some bytes, or cut the end."""
        damaged = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            start = self.random.randrange(len(damaged) + 1)
            stop = start + self.random.choice((0, 0, 1, 1, 2, 40))
            damaged[start:stop] = bytes(self.random.choices(SYMBOLS, k=self.random.choice((0, 1, 1, 3))))
        return bytes(damaged[: self.random.choice((None, None, None, self.random.randrange(len(data))))])


def _printable(error: Exception) -> str:
    assert str(error).isprintable()
    return type(error).__name__


def main() -> None:
    """Read as many inputs as the arguments say."""
    parser = argparse.ArgumentParser(description="Read damaged messages and files of the protocol.")
    parser.add_argument("count", type=int, help="the number of inputs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = Fuzzer(arguments.seed, Path(folder)).read(arguments.count)
    sys.stdout.writelines(f"{counts[outcome]:>9}  {outcome}\n" for outcome in sorted(counts))


if __name__ == "__main__":
    main()

"""Arrays of a target on an accelerator are placed once, and only compared rows come back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mha_spec_conformance.asking import worker
from mha_spec_conformance.asking.protocol import answer_from, answer_message, question_from, question_message
from mha_spec_conformance.asking.question import AGAIN, Question, Sample
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.conversion import LIBRARIES, on_host, some_rows, to_library, to_numpy
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (2, 3, 5, 7)
SAMPLE = Sample(SHAPE, numpy.array([0, 11, 29]), 7)


class Moved:
    """Counts the arrays that are placed on the device, and those that are read from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.placed: list[str] = []
        self.read: list[int] = []
        monkeypatch.setattr(worker, "to_library", self._to_library)
        monkeypatch.setattr(worker, "to_numpy", self._to_numpy)
        monkeypatch.setattr(worker, "on_host", lambda _: False)

    def _to_library(self, array: numpy.ndarray, *where: Any) -> Any:
        self.placed.append(where[-1])
        return to_library(array, *where)

    def _to_numpy(self, array: Any) -> numpy.ndarray:
        self.read.append(array.size)
        return to_numpy(array)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Moved:
    """Treat the memory of the processor as that of a device."""
    return Moved(monkeypatch)


def target(function: Any) -> Target:
    """Make a target of an attention."""
    return Target({"attention": function}, Claims("device", {"attention": ()}, ("float32",)))


def question(**fields: Any) -> Question:
    """Ask for attention to three arrays of the same shape."""
    arrays = {name: numpy.full(SHAPE, n, numpy.float32) for n, name in enumerate(("query", "key", "value"))}
    return Question("case", "attention", "float32", arrays, {}, ("output",), **fields)


def add(query: Any, key: Any, value: Any) -> Any:
    """Return an output of the right shape."""
    return query + key + value


def test_inputs_do_not_come_back(moved: Moved) -> None:
    assert worker.answer(target(add), question()).kind == "returned"
    assert moved.placed == ["plain"] * 3
    assert moved.read == [210]


def test_only_the_rows_that_are_compared_come_back(moved: Moved) -> None:
    counted = target(lambda *_: numpy.arange(210.0, dtype=numpy.float32).reshape(SHAPE))
    answer = worker.answer(counted, question(sampled={"output": SAMPLE}))
    assert moved.read == [21]
    expected = numpy.zeros((30, 7))
    expected[[0, 11, 29]] = numpy.arange(210).reshape(30, 7)[[0, 11, 29]]
    numpy.testing.assert_array_equal(answer.outputs["output"].reshape(30, 7), expected)


def test_an_output_of_a_wrong_shape_comes_back_whole(moved: Moved) -> None:
    answer = worker.answer(target(lambda query, *_: query[:, :, :4]), question(sampled={"output": SAMPLE}))
    assert answer.outputs["output"].shape == (2, 3, 4, 7)
    assert moved.read == [168]


def test_the_same_call_again_gets_the_same_arrays(moved: Moved) -> None:
    received: list[tuple[int, ...]] = []

    def attention(query: Any, key: Any, value: Any) -> Any:
        received.append((id(query), id(key), id(value)))
        return query + key + value

    answer = worker.answer(target(attention), question(further=(AGAIN, "strided")))
    assert received[0] == received[1] != received[2]
    assert moved.placed == ["plain"] * 3 + ["strided"] * 3
    assert answer.further[AGAIN].kind == "returned"


def test_arrays_that_were_written_to_are_placed_again(moved: Moved) -> None:
    def attention(query: Any, key: Any, value: Any) -> Any:
        result = query + key + value
        query += 1
        return result

    answer = worker.answer(target(attention), question(further=(AGAIN,)))
    assert answer.written == ("query",)
    assert (answer.further[AGAIN].outputs["output"] == answer.outputs["output"]).all()
    assert moved.placed == ["plain"] * 6


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_are_taken_in_every_library(library: str) -> None:
    array = numpy.arange(210, dtype=numpy.float32).reshape(SHAPE)
    placed = to_library(array, library)
    assert on_host(placed)
    numpy.testing.assert_array_equal(to_numpy(some_rows(placed, SAMPLE.rows, 7)), SAMPLE.of(array))
    numpy.testing.assert_array_equal(to_numpy(some_rows(placed, numpy.array([3]), 1)), [[3]])


def test_an_array_of_another_device_is_not_on_the_host() -> None:
    torch = pytest.importorskip("torch")
    assert not on_host(torch.zeros(3, device="meta"))


@pytest.mark.parametrize("rows_alone", [True, False])
def test_an_answer_may_hold_the_rows_alone_or_the_whole_output(tmp_path: Path, rows_alone: bool) -> None:
    asked = question(sampled={"output": SAMPLE})
    message = question_message(asked, 7, tmp_path, ())
    received = question_from(message, asked.arrays)
    assert received.sampled["output"].rows.tolist() == [0, 11, 29]
    answer = worker.answer(target(add), replace(received, sampled=received.sampled if rows_alone else {}))
    path = tmp_path / "7.answer"
    reply = answer_message(answer, 7, path, 2**20, received.sampled if rows_alone else None)
    assert (path.stat().st_size < 300) == rows_alone
    output = answer_from(reply, asked, path).outputs["output"]
    assert output.shape == SHAPE
    assert (SAMPLE.of(output) == 3).all()

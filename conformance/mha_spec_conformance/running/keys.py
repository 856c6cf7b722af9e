"""Find which keys have wrong weights, by asking failing cases again with values that tell the keys apart.

With v_jc = 1 where c = j, and 0 elsewhere, component c of the output is the weight of key c. If there are more keys
than components, several calls ask for the weights of all keys; if these would be too many, for the sums of small tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy

from mha_spec_conformance.judging.bounds import SPECIFICATION, precision
from mha_spec_conformance.judging.bounds.forward import ForwardBounds
from mha_spec_conformance.judging.causes import WrongKeys
from mha_spec_conformance.judging.keys import Weights, wrong_keys
from mha_spec_conformance.judging.places import WrongElements

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mha_spec_conformance.asking.question import Question, Source
    from mha_spec_conformance.judging.causes import Cause
    from mha_spec_conformance.judging.result import Result

    from .run import Run

__all__ = ["MOST_CALLS", "MOST_CAUSES", "with_wrong_keys"]

MOST_CAUSES = 5
"""The number of causes for which a case is asked again."""

MOST_CALLS = 8
"""The number of further calls for a cause."""

MOST_PAIRS = 2**19
"""The largest number of pairs of a case that is asked again."""

MANY_KEYS = 257
"""More keys than this are not needed to tell the places of tiles apart."""

MANY_ROWS = 4

MOST_TRIED = 8
"""The number of failures of a cause in which a wrong output is looked for."""


def with_wrong_keys(source: Source, run: Run) -> Run:
    """Ask a failure of each of the largest causes again, and add the keys that have wrong weights to the findings."""
    keys: dict[int, WrongKeys] = {}
    asked = 0
    for number, cause in enumerate(run.findings.causes):
        result = _example(cause, run.claims.profile) if asked < MOST_CAUSES else None
        if result is not None:
            asked += 1
            if (text := _Further(result).text(source, run.claims.profile)) is not None:
                keys[number] = WrongKeys(text, *result.ask.key)
    return replace(run, located=run.findings.with_keys(keys)) if keys else run


def _example(cause: Cause, profile: str) -> Result | None:
    """Choose a failure whose output is wrong; a case with many keys and several rows tells more places apart."""
    if cause.kind not in ("mistake", "rounding", "unknown"):
        return None
    able = sorted((result for result in cause.results if _can_ask(result)), key=_preference)
    for result in able[:MOST_TRIED]:
        if result.wrong is not None and "output" in WrongElements(result.wrong, profile).outputs:
            return result
    return None


def _can_ask(result: Result) -> bool:
    """Tell whether a failure of attention has its answer, two keys, not too many pairs, and finite operands."""
    case = result.ask.case
    if case.function != "attention" or result.wrong is None or "output" not in result.ask.expected:
        return False
    keys, components = case.shape_of("value")[2:]
    if keys < 2 or not components or not 0 < _pairs(result) <= MOST_PAIRS:
        return False
    operands = (case.input(name, result.ask.dtype) for name in ("query", "key"))
    return all(numpy.isfinite(array.astype(numpy.float64)).all() for array in operands)


def _pairs(result: Result) -> int:
    return int(numpy.prod(result.ask.case.shape_of("query")[:3]) * result.ask.case.shape_of("key")[2])


def _preference(result: Result) -> tuple[object, ...]:
    """Return the key by which failures are sorted: wide dtypes, single keys, several rows, many keys, small cases."""
    case, dtype = result.ask.case, result.ask.dtype
    (batch, _, rows, _), (keys, components) = case.shape_of("query"), case.shape_of("value")[2:]
    single = _width(keys, components) == 1
    wide = dtype in ("float32", "float64")
    plenty = not single, rows < MANY_ROWS, -min(keys, MANY_KEYS), "generic" not in case.tags, batch < 2
    return not wide, *plenty, _pairs(result), case.id, dtype


def _width(keys: int, components: int) -> int:
    """Return the smallest power of two of keys whose sums can be asked for in the allowed number of calls."""
    width = 1
    while -(-keys // width) > MOST_CALLS * components:
        width *= 2
    return width


@dataclass(frozen=True)
class _Further:
    """The further questions about a failure: the same call, with values that tell keys apart."""

    result: Result

    def text(self, source: Source, profile: str) -> str | None:
        """Ask, and describe which keys have wrong weights; None if the target gives no output, or without a pattern."""
        outputs: dict[str, numpy.ndarray] = {}
        values = self._values()
        for question, answer in source.answers(self._questions(values)):
            output = answer.outputs.get("output")
            if answer.kind != "returned" or output is None or output.shape != self._shape:
                return None
            outputs[question.id] = output.astype(numpy.float64)
        received = [outputs[self._id(number)] for number in range(len(values))]
        return wrong_keys(self._weights(values, received, profile))

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.result.ask.expected["output"].shape)

    @property
    def _width(self) -> int:
        return _width(*self.result.ask.case.shape_of("value")[2:])

    def _id(self, number: int) -> str:
        return f"{self.result.ask.case.id}/keys-{number}"

    def _values(self) -> list[numpy.ndarray]:
        """Return the values of each call: component c of the output is the weight of the next column of keys."""
        value = self.result.ask.case.input("value", self.result.ask.dtype)
        keys, components = value.shape[2:]
        columns = numpy.arange(keys).reshape(-1, 1) // self._width
        starts = range(0, int(columns[-1, 0]) + 1, components)
        masks = (columns == start + numpy.arange(components) for start in starts)
        return [numpy.broadcast_to(ones, value.shape).astype(value.dtype) for ones in masks]

    def _questions(self, values: Sequence[numpy.ndarray]) -> Iterator[Question]:
        question = replace(self.result.ask, every_layout=False).question()
        for number, value in enumerate(values):
            yield replace(question, id=self._id(number), arrays={**question.arrays, "value": value}, sampled={})

    def _weights(self, values: Sequence[numpy.ndarray], received: Sequence[numpy.ndarray], profile: str) -> Weights:
        """Join the weights of all calls, and those of the specification with their allowances."""
        case, dtype = self.result.ask.case, self.result.ask.dtype
        run, arrays = precision(dtype, profile), case.inputs(dtype)
        calls = [ForwardBounds({**arrays, "value": value}, case.options, SPECIFICATION) for value in values]
        first = calls[0].evaluation
        columns = -(-first.arguments.kv_len // self._width)
        expected = [call.values["output"] for call in calls]
        allowance = [call.allowances(run)["output"] for call in calls]
        offset = numpy.asarray(SPECIFICATION.offset_of(first.arguments), numpy.int64)
        return Weights(
            *(numpy.concatenate(parts, axis=3)[..., :columns] for parts in (received, expected, allowance)),
            visible=numpy.broadcast_to(first.trace.visible, first.weights.shape),
            offset=offset.reshape(-1, 1, 1, 1),
            arguments=first.arguments,
            width=self._width,
        )

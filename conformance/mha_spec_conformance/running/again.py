"""Ask a part of the cases a second time at the end of a run: in another order, and with inputs of stride 0.

The first time, a case is asked among others of its shapes. A target that carries state from case to case answers
differently in another order (MHA-PURE-3). Few cases have inputs that are constant along an axis, so such cases are made
here from others (MHA-PURE-2).
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import dtype_name
from mha_spec_conformance.asking.calls import is_parameter
from mha_spec_conformance.judging.bounds import SPECIFICATION
from mha_spec_conformance.judging.bounds.evaluation import in_float64
from mha_spec_conformance.judging.prediction import answer as answer_of
from mha_spec_conformance.judging.result import WITHOUT_ARRAYS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mha_spec_conformance.asking.question import Answer, Source
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.judging.judge import Judge
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Case

    Key = tuple[str, str]

__all__ = ["SecondTime"]

SEED = 0
ONE_IN, MOST = 8, 96
"""The share of the cases that is asked again, and the largest number of them."""

SETTLED = ("pass", "deviation")
"""The outcomes of cases that are asked a second time."""


class SecondTime:
    """Chooses the cases, remembers their first answers, and judges the second ones."""

    def __init__(self, asked: Sequence[Ask]) -> None:
        """Choose a seeded part of the cases that must not raise, in a seeded order."""
        drawn = random.Random(SEED)
        candidates = [ask for ask in asked if ask.case.expect != "error"]
        self._chosen = drawn.sample(candidates, min(MOST, -(-len(candidates) // ONE_IN)))
        self._marked = [ask for ask in asked if ask.every_layout]
        self._digests: dict[Key, bytes] = {ask.key: b"" for ask in self._chosen}

    def remember(self, result: Result, answer: Answer) -> None:
        """Keep a digest of the first answer, if it is settled."""
        if result.ask.key in self._digests and result.outcome in SETTLED:
            self._digests[result.ask.key] = _digest(answer.outputs)

    def amended(self, source: Source, judge: Judge, results: Mapping[Key, Result]) -> Iterator[Result]:
        """Ask the second time, and return the results that differ from the first ones."""
        yield from self._in_another_order(source, judge, results)
        yield from self._with_stride_0(source, judge, results)

    def _in_another_order(self, source: Source, judge: Judge, results: Mapping[Key, Result]) -> Iterator[Result]:
        asked = {ask.key: ask for ask in self._chosen if results[ask.key].outcome in SETTLED}
        for question, answer in source.answers(
            *([replace(ask, every_layout=False).question()] for ask in asked.values())
        ):
            first, second = (
                results[question.id, question.dtype],
                judge.result(asked[question.id, question.dtype], answer),
            )
            if second.outcome != first.outcome and not (judge.accepts(first) and judge.accepts(second)):
                yield _failed(first, second, "asked again at the end of the run, the call is wrong", "MHA-PURE-3")
            elif _digest(answer.outputs) != self._digests[first.ask.key] and self._digests[first.ask.key]:
                yield replace(first, deterministic=False)

    def _with_stride_0(self, source: Source, judge: Judge, results: Mapping[Key, Result]) -> Iterator[Result]:
        if "expanded" not in source.claims.further:
            return
        asked = {}
        for ask in self._marked:
            dtype = ask.dtype if ask.dtype != "float64" else "float32"
            if (ask.case.id, dtype) not in results or results[ask.case.id, dtype].outcome != "pass":
                continue
            if (constant := _constant(ask.case, dtype)) is not None:
                asked[ask.case.id, dtype] = replace(ask, case=constant, dtype=dtype, every_layout=False)
        questions = [
            replace(question, placed=dict.fromkeys(question.arrays, "expanded"))
            for question in (ask.question() for ask in asked.values())
        ]
        for question, answer in source.answers(*([question] for question in questions)):
            key = question.id, question.dtype
            second = judge.result(asked[key], answer)
            if second.outcome == "unsupported":
                yield replace(results[key], refused=tuple(dict.fromkeys((*results[key].refused, "expanded"))))
            elif not judge.accepts(second):
                yield _failed(results[key], second, "the call with inputs of stride 0 is wrong", "MHA-PURE-2")


def _failed(first: Result, second: Result, fault: str, clause: str) -> Result:
    """Return the failure of a case whose first answer was right and whose second answer is not."""
    outcome = second.outcome if second.outcome in WITHOUT_ARRAYS else "fail"
    reason = f"the first answer is right, but {fault}: {second.reason or second.outcome}"
    return replace(first, outcome=outcome, reason=reason, clauses=(clause,), diagnosis=(), conventions=())


def _digest(outputs: Mapping[str, numpy.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(outputs.items()):
        digest.update(f"{name} {dtype_name(array)} {array.shape}".encode() + array.tobytes())
    return digest.digest()


def _constant(case: Case, dtype: str) -> Case | None:
    """Make every array the same in all batch entries, and keys and values in all heads; expect what the formula gives.

    The expected values are those of the reference in float64, which is exact enough for narrower dtypes. A case with a
    NaN or an infinity gives None: once repeated, these reach rows of other entries, which have no allowance.
    """
    arrays = {name: _repeated(name, array) for name, array in case.inputs(dtype).items()}
    wide = in_float64(arrays)
    values = answer_of(SPECIFICATION, case.function, wide, case.options)
    expected = {name: numpy.asarray(values[name], numpy.float64) for name in case.expected}
    if not all(numpy.isfinite(array).all() for array in (*wide.values(), *expected.values())):
        return None

    def entries(part: str, named: Mapping[str, numpy.ndarray]) -> dict[str, dict[str, Any]]:
        return {
            name: {"shape": array.shape, "dtype": dtype_name(array), "file": part, "tensor": name}
            | {"kinds": None, "rows": None}
            for name, array in named.items()
        }

    tensors = {
        (part, name): array for part, named in (("in", arrays), ("out", expected)) for name, array in named.items()
    }
    return replace(case, input_entries=entries("in", arrays), output_entries=entries("out", expected), tensors=tensors)


def _repeated(name: str, array: numpy.ndarray) -> numpy.ndarray:
    """Repeat the first batch entry of an array, and the first head of keys and values."""
    if array.ndim < 3 or is_parameter(name) or not array.size:
        return array
    first = array[:1, :1] if array.ndim == 4 and name in ("key", "value") else array[:1]
    return numpy.broadcast_to(first, array.shape).copy()

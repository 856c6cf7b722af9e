"""Find which laws a target keeps, bit by bit or within the allowance: properties of it, which no verdict counts.

A law relates the answers to two questions. The first is a case that the target passes; the second has another batch,
hidden data with other numbers, fewer rows, or keys in two parts. A law that is to be added is a function in `LAWS`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy

from mha_spec.reference import merge_attention
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.judging.properties import visible_pairs
from mha_spec_conformance.targets.conversion import same_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mha_spec_conformance.asking.question import Question, Source
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.judging.result import Result

    Outputs = Mapping[str, numpy.ndarray]

__all__ = ["LAWS", "Law", "laws_of"]

CASES = 4
"""The number of cases that each law is asked with."""

OF_BATCH = (
    *("query", "key", "value", "q_offset", "q_lengths", "kv_lengths", "kv_starts", "prefix_lengths"),
    *("q_segment_ids", "kv_segment_ids"),
)
BROADCAST = ("mask", "bias", "dropout_mask")
"""Arguments with an axis of batch entries, and those in which the axis may have a single entry for all."""

WITHOUT_POSITIONS = frozenset({"mask", "bias", "scale", "softcap", "return_lse"})
"""The options of a call whose keys can be split into two calls."""

UNITS = 4
"""Close answers differ by at most this multiple of the allowance: each of them may have an error, and a merge too."""


@dataclass(frozen=True)
class Law:
    """The number of cases in which a law held: with the same bits, within the allowance, or not at all."""

    name: str
    same: int = 0
    close: int = 0
    broken: tuple[str, ...] = ()
    """The cases in which the answers differ by more than the allowance."""

    @property
    def asked(self) -> int:
        """The number of cases that were asked."""
        return self.same + self.close + len(self.broken)


@dataclass(frozen=True)
class _Pair:
    """Questions whose joined answers must be a part of the answer to the case."""

    questions: tuple[Question, ...]
    part: Callable[[numpy.ndarray], numpy.ndarray] = field(default=lambda array: array)
    """The part of each output of the case that is compared."""
    join: Callable[[Sequence[Outputs]], Outputs] = field(default=lambda answers: answers[0])
    """Combines the answers to the questions."""


def _another_batch_size(ask: Ask, question: Question) -> _Pair | None:
    """Ask the first batch entry alone."""
    if not _has_batch(ask, question):
        return None
    return _Pair((_with_batch(question, lambda array: array[:1]),), lambda array: array[:1])


def _another_place(ask: Ask, question: Question) -> _Pair | None:
    """Ask the batch entries in the reverse order."""
    if not _has_batch(ask, question):
        return None
    return _Pair((_with_batch(question, lambda array: array[::-1].copy()),), lambda array: array[::-1])


def _another_table(ask: Ask, question: Question) -> _Pair | None:
    """Ask the same under another name, for which the conversion to pages chooses another table."""
    if ask.case.function != "attention" or not question.arrays["key"].size:
        return None
    return _Pair((question,))


def _has_batch(ask: Ask, question: Question) -> bool:
    return ask.case.function == "attention" and len(question.arrays["query"]) > 1


def _with_batch(question: Question, change: Callable[[numpy.ndarray], numpy.ndarray]) -> Question:
    changed = {
        name: change(array)
        for name, array in question.arrays.items()
        if name in OF_BATCH or (name in BROADCAST and len(array) > 1)
    }
    return replace(question, arrays={**question.arrays, **changed})


def _hidden_data(ask: Ask, question: Question) -> _Pair | None:
    """Change the keys and values that no row sees."""
    seen = _seen_keys(ask)
    if seen is None or seen.all() or not seen.any():
        return None
    return _Pair((_overwritten(question, ~seen),))


def _future_data(ask: Ask, question: Question) -> _Pair | None:
    """Change the keys and values that only later rows see; the results of earlier rows must not change."""
    rows = question.arrays["query"].shape[2] // 2 if ask.case.function == "attention" else 0
    seen, early = _seen_keys(ask), _seen_keys(ask, rows)
    if not rows or seen is None or early is None or not (seen & ~early).any():
        return None

    def first(array: numpy.ndarray) -> numpy.ndarray:
        return array[:, :, :rows]

    return _Pair(
        (_overwritten(question, ~early),),
        first,
        join=lambda answers: {name: first(array) for name, array in answers[0].items()},
    )


def _seen_keys(ask: Ask, rows: int | None = None) -> numpy.ndarray | None:
    """Mark the keys, (batch, kv_heads, kv_len), that any of the first rows sees."""
    if ask.case.function != "attention":
        return None
    arrays = ask.case.inputs(ask.dtype)
    visible, kv_heads = visible_pairs(ask.case, arrays), arrays["key"].shape[1]
    if visible is None or not visible.size:
        return None
    batch, _, _, keys = visible.shape
    grouped = visible[:, :, :rows].reshape(batch, kv_heads, -1, keys)
    return numpy.asarray(grouped.any(axis=2))


def _overwritten(question: Question, where: numpy.ndarray) -> Question:
    """Write 0.75 into keys and -0.5 into values."""
    arrays = dict(question.arrays)
    for name, number in (("key", 0.75), ("value", -0.5)):
        arrays[name] = arrays[name].copy()
        arrays[name][where] = number
    return replace(question, arrays=arrays)


def _decoding(ask: Ask, question: Question) -> _Pair | None:
    """Ask the last row alone, as a decode step does."""
    arrays, options = dict(question.arrays), dict(question.options)
    if ask.case.function != "attention" or "q_lengths" in arrays or arrays["query"].shape[2] < 2:
        return None
    before = arrays["query"].shape[2] - 1
    positional = any(options.get(name) for name in ("causal", "window", "chunk")) or "q_offset" in arrays
    if positional and "q_offset" in ask.omitted:
        return None
    if positional and "q_offset" in arrays:
        arrays["q_offset"] = arrays["q_offset"] + before
    elif positional and not isinstance(options.get("q_offset"), int):
        return None
    elif positional:
        options["q_offset"] += before
    for name in ("query", *BROADCAST):
        if name in arrays and arrays[name].shape[2] > 1:
            arrays[name] = arrays[name][:, :, before:].copy()
    if "q_segment_ids" in arrays:
        arrays["q_segment_ids"] = arrays["q_segment_ids"][:, before:].copy()
    return _Pair((replace(question, arrays=arrays, options=options),), lambda array: array[:, :, before:])


def _splitting(ask: Ask, question: Question) -> _Pair | None:
    """Ask both halves of the keys, and merge the answers."""
    names = {*question.arrays, *question.options} - {"query", "key", "value"}
    if ask.case.function != "attention" or "lse" not in ask.outputs or not names <= WITHOUT_POSITIONS:
        return None
    keys = question.arrays["key"].shape[2]
    if keys < 2:
        return None
    halves = (slice(0, keys // 2), slice(keys // 2, keys))
    return _Pair(tuple(_with_keys(question, half) for half in halves), join=_merged)


def _with_keys(question: Question, keys: slice) -> Question:
    arrays = dict(question.arrays)
    for name, axis in (("key", 2), ("value", 2), ("mask", 3), ("bias", 3)):
        if name in arrays and arrays[name].shape[axis] > 1:
            index = (slice(None),) * axis + (keys,)
            arrays[name] = arrays[name][index].copy()
    return replace(question, arrays=arrays)


def _merged(answers: Sequence[Outputs]) -> Outputs:
    """Merge two answers by the reference, in the types of the answers."""
    (a, b) = answers
    output, lse = merge_attention(a["output"], a["lse"], b["output"], b["lse"])
    return {"output": numpy.asarray(output), "lse": numpy.asarray(lse)}


def _chunking(ask: Ask, question: Question) -> _Pair | None:
    """Append each token to the cache in a separate call."""
    chunks = question.options.get("chunks")
    if not isinstance(chunks, (list, tuple)):
        return None
    return _Pair((replace(question, options={**question.options, "chunks": (1,) * sum(chunks)}),))


PAGES = "another page table"
"""The law of targets that take keys in pages."""

LAWS: Mapping[str, Callable[[Ask, Question], _Pair | None]] = {
    "another batch size": _another_batch_size,
    "another place in the batch": _another_place,
    PAGES: _another_table,
    "other numbers in hidden keys and values": _hidden_data,
    "other numbers in keys and values of later rows": _future_data,
    "another chunking": _chunking,
    "decode = prefill": _decoding,
    "split and merge = whole": _splitting,
}
"""The laws by name; each gives the questions that belong to a case, or None if the case is not about the law."""


def laws_of(source: Source, results: Iterable[Result]) -> tuple[Law, ...]:
    """Ask a few cases that passed for each law; a law that no case is about is left out."""
    passed = [r for r in results if r.outcome == "pass" and r.must and r.ask.case.expect != "error" and _plain(r)]
    passed.sort(key=lambda result: (result.ask.dtype != "float32", "generic" not in result.ask.case.tags))
    kept = {name: law for name, law in LAWS.items() if name != PAGES or source.claims.layout == "paged"}
    laws = (Law(name, *_counts(source, list(_chosen(passed, law)))) for name, law in kept.items())
    return tuple(law for law in laws if law.asked)


def _plain(result: Result) -> bool:
    """Tell whether all outputs are known and finite, so that bits can be compared."""
    golden = [result.ask.case.expected[name] for name in result.ask.outputs]
    return all(wanted.rows is None and numpy.isfinite(wanted.values).all() for wanted in golden)


def _chosen(passed: Iterable[Result], law: Callable[[Ask, Question], _Pair | None]) -> Iterator[tuple[Result, _Pair]]:
    """Choose cases of different features."""
    features: set[tuple[str, ...]] = set()
    for result in passed:
        if len(features) == CASES:
            return
        if result.ask.features in features:
            continue
        ask = replace(result.ask, every_layout=False)
        if (pair := law(ask, ask.question())) is not None:
            features.add(result.ask.features)
            yield result, pair


def _counts(source: Source, chosen: Sequence[tuple[Result, _Pair]]) -> tuple[int, int, tuple[str, ...]]:
    """Ask, and count the cases in which the law holds."""
    questions: dict[str, Question] = {}
    for number, (result, pair) in enumerate(chosen):
        whole = replace(result.ask, every_layout=False).question()
        for part, question in enumerate((whole, *pair.questions)):
            name = f"{question.id}/law-{number}-{part}"
            questions[name] = replace(question, id=name)
    answers = {asked.id: answer for asked, answer in source.answers(*([question] for question in questions.values()))}
    count: Counter[str] = Counter()
    broken: list[str] = []
    for number, (result, pair) in enumerate(chosen):
        names = [f"{result.ask.case.id}/law-{number}-{part}" for part in range(1 + len(pair.questions))]
        outputs = [answers[name].outputs for name in names if name in answers and answers[name].kind == "returned"]
        if len(outputs) < len(names) or not all(set(result.ask.outputs) <= set(named) for named in outputs):
            continue
        verdict = _verdict(result, pair, outputs)
        count[verdict] += 1
        broken += [result.ask.case.id] if verdict == "broken" else []
    return count["same"], count["close"], tuple(broken)


def _verdict(result: Result, pair: _Pair, outputs: Sequence[Outputs]) -> str:
    """Compare the answer to a case with the joined answers to the other questions."""
    joined = pair.join(outputs[1:])
    compared = [(name, pair.part(outputs[0][name]), joined[name]) for name in result.ask.outputs]
    if any(whole.shape != other.shape for _, whole, other in compared):
        return "broken"
    if all(same_bits(whole, other) for _, whole, other in compared):
        return "same"
    case, dtype = result.ask.case, result.ask.dtype
    allowed = bounds(case.function, case.inputs(dtype), case.options).allowances(precision(dtype))
    alike = (
        (abs(whole.astype(numpy.float64) - other) <= UNITS * pair.part(allowed[name])).all()
        for name, whole, other in compared
    )
    return "close" if all(alike) else "broken"

"""Mistakes that appear only beyond some size are refused by several cases each; the same answer without them passes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy
import pytest

from mha_spec.steps import Steps
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.judging.bounds.evaluation import in_float64
from mha_spec_conformance.judging.compare import judge
from mha_spec_conformance.judging.prediction import answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mha_spec_conformance.suite.cases import Case, Suite

    Arrays = Mapping[str, numpy.ndarray]
    Options = Mapping[str, Any]
    Outputs = dict[str, numpy.ndarray]
    Change = Callable[[Arrays, Options], tuple[Arrays, Options]]

TILE = 64
"""The place from which most mistakes begin."""

ENOUGH = 3
"""The fewest cases that must refuse a mistake."""

ASKED = 5
"""The number of cases that are asked for each mistake, at most."""


@dataclass(frozen=True)
class Wrong:
    """A mistake, with the cases in which it shows: a pattern of their ids, and an argument that they have."""

    pattern: str
    argument: str
    answer: Callable[[Case, Arrays], Outputs]


def right(case: Case, arrays: Arrays, options: Options | None = None) -> Outputs:
    """Return the answer of the reference in float64."""
    with numpy.errstate(all="ignore"):
        return answer(Steps(), case.function, arrays, case.options if options is None else options)


def without(mapping: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the mapping without some names."""
    return {name: value for name, value in mapping.items() if name not in names}


def forgets(*names: str) -> Change:
    """Leave out arguments."""
    return lambda arrays, options: (without(arrays, *names), without(options, *names))


def late_keys(change: Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray], name: str, first: int = TILE) -> Change:
    """Change a pairwise array at the keys from `first` on."""

    def changed(arrays: Arrays, options: Options) -> tuple[Arrays, Options]:
        array = arrays[name]
        return {**arrays, name: change(array, numpy.arange(array.shape[3]) >= first)}, options

    return changed


def called(change: Change) -> Callable[[Case, Arrays], Outputs]:
    """Return the answer to a changed call."""
    return lambda case, arrays: right(case, *change(arrays, case.options))


def rows_of(change: Change, first: int = TILE) -> Callable[[Case, Arrays], Outputs]:
    """Return an answer whose rows from `first` on are those of a changed call."""

    def joined(case: Case, arrays: Arrays) -> Outputs:
        outputs, changed = right(case, arrays), right(case, *change(arrays, case.options))
        return {name: _from(first, changed[name], array) for name, array in outputs.items()}

    return joined


def gradients_of(change: Change, first: int = TILE) -> Callable[[Case, Arrays], Outputs]:
    """Return gradients that are those of a changed call for the keys and values from `first` on."""

    def joined(case: Case, arrays: Arrays) -> Outputs:
        outputs, changed = right(case, arrays), right(case, *change(arrays, case.options))
        late = {name: _from(first, changed[name], outputs[name]) for name in ("grad_key", "grad_value")}
        return {**outputs, **late}

    return joined


def _from(first: int, late: numpy.ndarray, early: numpy.ndarray) -> numpy.ndarray:
    """Join two arrays along the third axis."""
    place = (numpy.arange(early.shape[2]) >= first).reshape((-1,) + (1,) * (early.ndim - 3))
    return numpy.where(place, late, early)


def below_the_diagonal(arrays: Arrays, options: Options) -> tuple[Arrays, Options]:
    """Lose the mask in the tiles that a causal kernel takes to be whole."""
    rows, keys = (numpy.arange(arrays["mask"].shape[axis]) // TILE for axis in (2, 3))
    return {**arrays, "mask": arrays["mask"] | (keys < rows[:, None])}, options


def blind_to_slots(first: int) -> Change:
    """Hide the slots of a cache from `first` on."""

    def changed(arrays: Arrays, options: Options) -> tuple[Arrays, Options]:
        seen = (numpy.arange(arrays["cache_key"].shape[2]) < first).reshape(1, 1, 1, -1)
        return {**arrays, "mask": arrays.get("mask", numpy.True_) & seen}, options

    return changed


def clamped(most: int) -> Change:
    """Read the last row of a table of rotations for every later position."""
    return lambda arrays, options: ({**arrays, "positions": numpy.minimum(arrays["positions"], most)}, options)


def rounded_positions(arrays: Arrays, options: Options) -> tuple[Arrays, Options]:
    """Round positions from 262,144 on to multiples of 32."""
    places = arrays["positions"]
    return {**arrays, "positions": numpy.where(abs(places) >= 262_144, (places + 16) // 32 * 32, places)}, options


def weights_end(case: Case, arrays: Arrays) -> Outputs:
    """Return weights that are 0 from key 16 on."""
    weights = right(case, arrays)["weights"]
    return {"weights": numpy.where(numpy.arange(weights.shape[3]) < 16, weights, 0)}


def merges_few_rows(case: Case, arrays: Arrays) -> Outputs:
    """Return the first half from row 8 on."""
    return {name: _from(8, arrays[f"{name}_a"], array) for name, array in right(case, arrays).items()}


def _keys_of_later_heads(arrays: Arrays, options: Options) -> tuple[Arrays, Options]:
    """Read key and value heads in 16-head steps: the heads from 16 on read those of the first ones."""
    heads = numpy.arange(arrays["key"].shape[1]) % 16
    return {**arrays, "key": arrays["key"][:, heads], "value": arrays["value"][:, heads]}, options


def _one_split(arrays: Arrays, options: Options) -> tuple[Arrays, Options]:
    """Read at most 512 keys."""
    return {**arrays, "kv_lengths": numpy.minimum(arrays["kv_lengths"], 512)}, options


TILES, GRADIENTS = "attention/tiles/*", "attention_vjp/tiles/*"
FORGOTTEN = (
    *((name,) for name in ("mask", "bias", "scale", "softcap", "sinks", "window", "causal")),
    ("q_segment_ids", "kv_segment_ids"),
    ("dropout_mask", "dropout_rate"),
)
"""The options that are forgotten, alone or with those that they need."""
WRONG: dict[str, Wrong] = {
    "mask lost from key 64 on": Wrong(TILES, "mask", called(late_keys(lambda mask, late: mask | late, "mask"))),
    "mask lost in tiles below the diagonal": Wrong(TILES, "mask", called(below_the_diagonal)),
    "bias lost from key 64 on": Wrong(
        TILES, "bias", called(late_keys(lambda bias, late: numpy.where(late, 0, bias), "bias"))
    ),
    "dropout lost from key 64 on": Wrong(
        TILES, "dropout_mask", called(late_keys(lambda keep, late: keep | late, "dropout_mask"))
    ),
    "lengths of keys lost from row 64 on": Wrong(TILES, "kv_lengths", rows_of(forgets("kv_lengths"))),
    "lengths of queries lost": Wrong(TILES, "q_lengths", rows_of(forgets("q_lengths"))),
    **{f"{names[0]} lost from row 64 on": Wrong(TILES, names[0], rows_of(forgets(*names))) for names in FORGOTTEN},
    **{
        f"gradients without {names[0]} from key 64 on": Wrong(GRADIENTS, names[0], gradients_of(forgets(*names)))
        for names in (*FORGOTTEN, ("kv_lengths",))
    },
    "merged rows from 8 on are those of the first half": Wrong("merge_attention/many-rows/*", "lse_a", merges_few_rows),
    "positions clamped at 4,095": Wrong("rotary_embedding/far/*", "positions", called(clamped(4095))),
    "positions from 262,144 on are rounded": Wrong(
        "rotary_embedding/far/*/[1-9]??????*", "positions", called(rounded_positions)
    ),
    "slots of a cache from 16 on are not seen": Wrong(
        "multi_head_attention/cache/many/*", "cache_key", called(blind_to_slots(16))
    ),
    "weights 0 from key 16 on": Wrong("attention_weights/tiles/*", "query", weights_end),
    "one split of the keys read": Wrong("attention/decode/*", "kv_lengths", called(_one_split)),
    "heads from 16 on read those of the first": Wrong(
        "attention/heads/*-over-[17][12]*", "query", called(_keys_of_later_heads)
    ),
}
"""The mistakes by name."""


def _cases(suite: Suite, wrong: Wrong) -> Iterator[Case]:
    """Yield the cases of a mistake, from all parts of those that its pattern matches."""
    matching = [
        case
        for case in suite.cases
        if fnmatchcase(case.id, wrong.pattern) and wrong.argument in {*case.options, *case.input_names}
    ]
    for start in range(3):
        yield from matching[start::3]


def _judged(case: Case, outputs: Callable[[Arrays], Outputs]) -> bool:
    """Return True if the outputs pass, in the first dtype of the case."""
    dtype = case.dtypes[0]
    arrays, run = case.inputs(dtype), precision(dtype)
    allowed = bounds(case.function, arrays, case.options, rows=case.sampled_rows).allowances(run)
    return judge(case, case.expected, outputs(in_float64(arrays)), allowed, run).passed


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_beyond_a_size_is_refused(name: str, suite: Suite) -> None:
    wrong = WRONG[name]
    asked = list(islice(_cases(suite, wrong), ASKED))
    refusing = [case for case in asked if not _judged(case, lambda arrays, case=case: wrong.answer(case, arrays))]
    assert len(refusing) >= ENOUGH
    assert all(_judged(case, lambda arrays, case=case: right(case, arrays)) for case in refusing[:1])

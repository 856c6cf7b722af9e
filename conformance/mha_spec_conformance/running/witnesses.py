"""Choose the questions that tell the readings of a convention apart: a few small cases for each reading."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from mha_spec import steps
from mha_spec_conformance.asking.selection import Selection, asks, probes
from mha_spec_conformance.asking.sharding import elements
from mha_spec_conformance.judging.form import expected_dtypes
from mha_spec_conformance.judging.prediction import can_show
from mha_spec_conformance.judging.recognition import Recognition
from mha_spec_conformance.mistakes import MISTAKES, Compared, Mistake
from mha_spec_conformance.mistakes.mistake import replacing
from mha_spec_conformance.mistakes.precision import to_bits
from mha_spec_conformance.suite.conventions import CONVENTIONS, Convention

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.suite.cases import Suite
    from mha_spec_conformance.targets.claims import Claims

__all__ = ["Group", "Questions", "questions_of", "readings_of"]

MOST = 3
"""The number of cases that are asked to tell a reading from that of the specification."""

SMALL = 2**14
"""The number of elements of inputs and scores up to which a case is small."""

MOST_LARGE = 32
"""The number of cases that are tried if none of those that a target can be asked is small."""

MOST_OF_PRECISION = 48
"""The number of cases that are tried for a reading of precision: rounding shows in most of them, or in none."""

FEATURES = {
    "causal_alignment": {"causal", "window"},
    "group_order": {"groups"},
    "nonfinite": {"nonfinite", "poison"},
}
"""A case is about a convention only if it has any of these features."""

OF_LSE = ("lse_base", "empty_row_lse")
OF_EMPTY_ROWS = ("fully_masked_row", "empty_row_lse")

BITS = {"float16": 11, "bfloat16": 8}


@dataclass(frozen=True, eq=False)
class Group:
    """The asks that tell the readings of a convention apart; a precision is that of a single dtype."""

    convention: str
    dtype: str
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class Questions:
    """The asks about all conventions."""

    recognition: Recognition
    """Knows which mistakes the asks show."""
    groups: tuple[Group, ...]
    probes: Mapping[str, Sequence[Ask]]
    """Causal calls without an offset, by the alignment that passes them."""
    dtypes: Sequence[Ask]
    """An ask in each dtype."""
    strict: Sequence[Ask]
    """Asks that an attention with rounded weights fails in the profile `strict`."""

    @property
    def asks(self) -> list[Ask]:
        """All asks; some occur more than once."""
        of_groups = (ask for group in self.groups for ask in group.asks)
        return [*of_groups, *(ask for of_name in self.probes.values() for ask in of_name), *self.dtypes, *self.strict]


def _rounded_weights(dtype: str) -> Mistake:
    """Return the weights that the profile `standard` allows as a mistake in the profile `strict`."""
    bits = BITS[dtype]
    return Mistake(
        f"weights-in-{dtype}",
        f"rounds the weights to {dtype}",
        ("MHA-ACC-1",),
        replacing(
            sum_over_visible=lambda weights, values, visible: steps.sum_over_visible(
                to_bits(weights, bits), values, visible
            )
        ),
        functions=("attention",),
        convention=Convention("precision", "standard"),
        native=True,
        dtypes=(dtype,),
        compared=Compared.BY_SIZE_OF_ERRORS,
    )


def readings_of(convention: str) -> dict[str, tuple[Mistake, ...]]:
    """Return the mistakes that are a reading other than that of the specification, by variant."""
    mistakes = [m for m in MISTAKES if m.convention is not None and m.convention.name == convention]
    by_variant = {
        variant: tuple(m for m in mistakes if m.convention == (convention, variant))
        for variant in CONVENTIONS[convention]
    }
    return {variant: of_variant for variant, of_variant in by_variant.items() if of_variant}


def questions_of(suite: Suite, claims: Claims) -> Questions:
    """Choose the asks about every convention; there are none if the target does not take what a convention needs."""
    recognition = Recognition(claims.profile, shards=claims.shards)
    asked = [ask for ask in asks(suite.cases, claims, Selection()) if ask.case.expect != "error"]
    asked.sort(key=lambda ask: (len(ask.features), elements(ask)))
    usual = "float32" if "float32" in claims.dtypes else claims.dtypes[0]
    groups = tuple(
        Group(convention, dtype, tuple(_witnesses(convention, dtype, asked, recognition)))
        for convention in CONVENTIONS
        if readings_of(convention) and convention != "output_dtype"
        for dtype in (claims.dtypes if convention == "precision" else (usual,))
    )
    return Questions(recognition, groups, _probes(suite, claims), _of_dtypes(asked, claims), list(_strict(asked)))


def _witnesses(convention: str, dtype: str, asked: Sequence[Ask], recognition: Recognition) -> Iterator[Ask]:
    """Yield different asks that the readings of a convention fail, a few for each reading."""
    about = [narrow for ask in asked if ask.dtype == dtype and (narrow := _about(convention, ask)) is not None]
    chosen: dict[tuple[str, str], Ask] = {}
    sources = [about, _with_full_row(about)] if convention in OF_EMPTY_ROWS else [about]
    for mistake in (m for of_variant in readings_of(convention).values() for m in of_variant):
        chosen |= {ask.key: ask for source in sources for ask in _showing(mistake, source, recognition)}
    yield from chosen.values()


def _with_full_row(about: Sequence[Ask]) -> list[Ask]:
    """Return small asks with a mask that shows a row all keys, so that this row is empty if True hides."""
    masked = [ask for ask in about if "mask" in ask.case.input_names and elements(ask) <= SMALL]
    return [ask for ask in masked if ask.case.input("mask", ask.dtype).all(axis=-1).any()]


def _strict(asked: Sequence[Ask]) -> Iterator[Ask]:
    """Yield a few asks in each dtype of 16 bits that rounded weights fail in the profile `strict`."""
    recognition = Recognition("strict")
    about = [narrow for ask in asked if ask.dtype in BITS and (narrow := _about("precision", ask)) is not None]
    for dtype in BITS:
        yield from _showing(_rounded_weights(dtype), about, recognition)


def _about(convention: str, ask: Ask) -> Ask | None:
    """Return an ask for the only output that the convention is about; None if the case is not about it."""
    if convention in FEATURES and FEATURES[convention].isdisjoint(ask.features):
        return None
    if ask.case.function != "attention":
        return ask
    output = "lse" if convention in OF_LSE else "output"
    return replace(ask, outputs=(output,)) if output in ask.outputs else None


def _showing(mistake: Mistake, about: Sequence[Ask], recognition: Recognition) -> Iterator[Ask]:
    able = [ask for ask in about if can_show(mistake, ask.case, ask.dtype)]
    tried = [ask for ask in able if elements(ask) <= SMALL] or able[:MOST_LARGE]
    if mistake.compared is Compared.BY_SIZE_OF_ERRORS:
        tried = tried[:MOST_OF_PRECISION]
    return islice((ask for ask in tried if recognition.shows(mistake, ask)), MOST)


def _of_dtypes(asked: Sequence[Ask], claims: Claims) -> list[Ask]:
    """Choose a small ask in every dtype whose output has the dtype of the inputs."""
    plain = [ask for ask in asked if "output" in ask.outputs and expected_dtypes(ask, "output") == (ask.dtype,)]
    firsts = (next((ask for ask in plain if ask.dtype == dtype), None) for dtype in claims.dtypes)
    return [replace(ask, outputs=("output",)) for ask in firsts if ask is not None]


def _probes(suite: Suite, claims: Claims) -> dict[str, list[Ask]]:
    """Choose causal calls without an offset, by the alignment that passes them; see `probes`.

    A target that takes an offset does not receive it, so that its default shows.
    """
    without: Mapping[str, tuple[str, ...]] = {
        function: tuple(word for word in words if word != "q_offset") for function, words in claims.keywords.items()
    }
    conventions = {name: v for name, v in claims.conventions.items() if name != "causal_alignment"}
    by_name = probes(suite.cases, replace(claims, keywords=without, conventions=conventions), Selection())
    keys = {name: {ask.key for ask in of_name} for name, of_name in by_name.items()}
    chosen: set[tuple[str, str]] = set()
    for name, of_name in by_name.items():
        of_name.sort(key=lambda ask: (len(ask.features), elements(ask)))
        for other in keys.keys() - {name}:
            chosen |= {ask.key for ask in islice((ask for ask in of_name if ask.key not in keys[other]), MOST)}
    return {name: [ask for ask in of_name if ask.key in chosen] for name, of_name in by_name.items()}

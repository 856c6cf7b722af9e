"""Tell from answers which reading of a convention a target follows, where it may follow others as well."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mha_spec_conformance.judging.pairs import together
from mha_spec_conformance.judging.recognition import Recognition

from .witnesses import readings_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mha_spec_conformance.asking.question import Answer
    from mha_spec_conformance.asking.selection import Ask
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.mistakes import Mistake

    from .witnesses import Group

__all__ = ["Answered", "Evidence", "conventions_followed"]


@dataclass(frozen=True, eq=False)
class Answered:
    """An ask with its answer, judged without any convention."""

    ask: Ask
    answer: Answer
    result: Result

    @property
    def right(self) -> bool:
        """True if the values are those of the specification."""
        return self.result.outcome in ("pass", "deviation")

    def anew(self) -> Answered:
        """Return the same answer, not yet compared with any mistake."""
        wrong = self.result.wrong
        return self if wrong is None else replace(self, result=replace(self.result, wrong=replace(wrong, verdicts={})))

    def shows(self, mistake: Mistake, recognition: Recognition) -> bool:
        """Tell whether the answer is that of a mistake."""
        return self.result.wrong is not None and recognition.explains(mistake, self.result.wrong)


@dataclass(frozen=True, eq=False)
class Evidence:
    """The answers to the questions about a convention; `others` are other conventions that the target follows."""

    convention: str
    answers: Sequence[Answered]
    recognition: Recognition
    others: Sequence[Mistake] = ()

    @cached_property
    def judged(self) -> list[Answered]:
        """The answers that can be compared."""
        return [answered for answered in self.answers if answered.result.compared]

    @cached_property
    def silent(self) -> list[Answered]:
        """The calls that returned no result that can be compared, which says nothing about the convention."""
        return [a for a in self.answers if not a.result.compared and a.result.outcome != "unsupported"]

    @cached_property
    def wrong(self) -> list[Answered]:
        """The answers that neither the specification nor another convention alone explains."""
        return [a for a in self.judged if not a.right and not any(a.shows(o, self.recognition) for o in self.others)]

    def allowing_for(self, chosen: Mapping[str, Sequence[Mistake]]) -> Evidence:
        """Return the evidence that allows for other conventions; a lower precision is allowed its errors."""
        others = [mistake for name, mistakes in chosen.items() if name != self.convention for mistake in mistakes]
        lower = frozenset(m.convention for m in others if m.convention is not None and m.convention.name == "precision")
        if not lower:
            return replace(self, others=others)
        answers = [answered.anew() for answered in self.answers]
        recognition = Recognition(self.recognition.profile, lower, self.recognition.shards)
        return replace(self, answers=answers, recognition=recognition, others=others)

    def variants(self) -> list[str]:
        """Return the variants that explain all wrong answers and that no other answer refutes, the likeliest first."""
        if not self.wrong:
            return []
        variants = [
            variant
            for variant, mistakes in readings_of(self.convention).items()
            if all(any(self._explains(mistake, a) for mistake in mistakes) for a in self.wrong)
            and any(self.stands(mistake) for mistake in mistakes)
        ]
        return sorted(variants, key=self._distance) if self.convention == "precision" else variants

    def stands(self, mistake: Mistake) -> bool:
        """Tell whether a mistake explains an answer and none refutes it."""
        return any(self._explains(mistake, a) for a in self.wrong) and not self.refuting(mistake)

    def _explains(self, mistake: Mistake, answered: Answered) -> bool:
        """Tell whether a mistake gives an answer, by itself or together with another convention."""
        made = (mistake, *(pair for other in self.others if (pair := together(mistake, other)) is not None))
        return any(answered.shows(mistake, self.recognition) for mistake in made)

    def refuting(self, mistake: Mistake) -> list[Answered]:
        """Return the answers that an attention with the mistake would not give."""
        wrong = set(map(id, self.wrong))
        return [a for a in self.judged if id(a) not in wrong and self._refutes(a, mistake)]

    def _refutes(self, answered: Answered, mistake: Mistake) -> bool:
        if answered.right:
            return self.recognition.shows(mistake, answered.ask)
        shown = (other for other in self.others if answered.shows(other, self.recognition))
        pairs = [pair for other in shown if (pair := together(mistake, other)) is not None]
        return bool(pairs) and not any(answered.shows(m, self.recognition) for m in (mistake, *pairs))

    def refuted(self) -> dict[str, int]:
        """Count the answers that refute each variant, that is each of its mistakes that the questions show."""
        return {
            variant: min((len(self.refuting(mistake)) for mistake in mistakes if self._asked(mistake)), default=0)
            for variant, mistakes in readings_of(self.convention).items()
        }

    def _asked(self, mistake: Mistake) -> bool:
        return any(self.recognition.shows(mistake, answered.ask) for answered in self.answers)

    def following(self) -> list[Mistake]:
        """Return the mistakes of other conventions that an answer shows."""
        return [other for other in self.others if any(a.shows(other, self.recognition) for a in self.judged)]

    def shared_out(self) -> tuple[dict[str, int], list[Answered]]:
        """Count the wrong answers that each variant explains, and return those that none explains."""
        explained = {
            variant: {id(a) for a in self.wrong if any(self._explains(mistake, a) for mistake in mistakes)}
            for variant, mistakes in readings_of(self.convention).items()
        }
        some = set[int]().union(*explained.values())
        counts = {variant: len(answers) for variant, answers in explained.items() if answers}
        return counts, [answered for answered in self.wrong if id(answered) not in some]

    def _distance(self, variant: str) -> float:
        """Return the distance of the sizes of the errors from those of a variant, as the mean of a logarithm."""
        return min(self._mean_distance(mistake) for mistake in readings_of(self.convention)[variant])

    def _mean_distance(self, mistake: Mistake) -> float:
        shares = ((a.result.allowance_used, self.recognition.share(mistake, a.ask)) for a in self.wrong)
        distances = [abs(math.log(received / share)) for received, share in shares if received and share]
        return sum(distances) / len(distances) if distances else math.inf


def conventions_followed(groups: Mapping[Group, Evidence]) -> dict[str, list[Mistake]]:
    """Choose the conventions that a target follows: by value, and then the precision of the usual dtype."""
    usual = next((group.dtype for group in groups if group.convention != "precision"), None)
    chosen = _by_value([evidence for group, evidence in groups.items() if group.convention != "precision"])
    for group, evidence in groups.items():
        if group.convention == "precision" and group.dtype == usual:
            relative = evidence.allowing_for(chosen)
            names = relative.variants()[:1]
            lower = [m for name in names for m in readings_of("precision")[name] if relative.stands(m)]
            return chosen | ({"precision": lower} if lower else {})
    return chosen


def _by_value(evidence: Sequence[Evidence]) -> dict[str, list[Mistake]]:
    """Choose the conventions that explain the most wrong answers, each only if it explains an answer that is left."""
    answers = [(answered, of.recognition) for of in evidence for answered in of.wrong]
    candidates = {of.convention: _candidates(of) for of in evidence}
    explained = {
        name: {id(a) for a, recognition in answers if any(a.shows(mistake, recognition) for mistake in mistakes)}
        for name, mistakes in candidates.items()
    }
    left = {id(answered) for answered, _ in answers}
    chosen: dict[str, list[Mistake]] = {}
    while explained:
        name = max(explained, key=lambda name: len(explained[name] & left))
        if not explained[name] & left:
            break
        left -= explained.pop(name)
        chosen[name] = candidates[name]
    return chosen


def _candidates(evidence: Evidence) -> list[Mistake]:
    """Return the mistakes that explain an answer and that no answer refutes."""
    mistakes = (mistake for of_variant in readings_of(evidence.convention).values() for mistake in of_variant)
    return [mistake for mistake in mistakes if evidence.stands(mistake)]

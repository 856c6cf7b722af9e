"""Ask and judge a drawn call, with the same questions, answers and judgements as `mha-spec check`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.question import NEGATED
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.judging.naming import wherever_it_can_be
from mha_spec_conformance.judging.result import INTERNAL
from mha_spec_conformance.mistakes import MISTAKES

from .case import case_of
from .expected import NotAdmitted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.conventions import Convention
    from mha_spec_conformance.targets.claims import Claims

    from .call import Call

__all__ = ["Asker"]

STRICT = ("numpy", "mha_spec.reference")
"""The targets for which MHA-POISON-2 is a MUST."""


class Asker:
    """Asks a target drawn calls and judges its answers."""

    def __init__(
        self,
        claims: Claims,
        answer: Callable[[Question], Answer],
        accepted: frozenset[Convention] = frozenset(),
    ) -> None:
        self.claims = claims
        self.answer = answer
        self._accepted = accepted
        self._judge = Judge(claims, accepted)
        self.suspect(())

    def suspect(self, names: Iterable[str] | None) -> None:
        """Diagnose only with these mistakes and the accepted conventions, which is fast; None means all mistakes."""
        suspects = None if names is None else set(names)
        self._judge.mistakes = [
            wherever_it_can_be(m)
            for m in MISTAKES
            if suspects is None or m.name in suspects or m.convention in self._accepted
        ]

    def excused(self, result: Result) -> bool:
        """Tell whether every convention that a wrong answer follows is accepted."""
        return bool(result.conventions) and self._accepted.issuperset(result.conventions)

    def result(self, call: Call, name: str = "fuzz/call") -> Result | None:
        """Judge the answer to a call; None if the target does not claim the call, or it cannot be a case."""
        try:
            case = case_of(call, name)
        except NotAdmitted:
            return None
        if self.claims.name in STRICT:
            case = replace(case, level="MUST")
        asked = asks([case], self.claims, Selection())
        if not asked:
            return None
        question = asked[0].question()
        answer = self.answer(as_passed(call, question))
        result = self._judge.result(asked[0], answer)
        if result.outcome == INTERNAL:
            raise RuntimeError(result.reason)
        return result


def as_passed(call: Call, question: Question) -> Question:
    """Return the question with arrays as the call passes them: on the host, outside their range, in another layout."""
    beyond = {name: recipe.array() for name, recipe in call.beyond.items() if name in question.arrays}
    return replace(
        question,
        arrays={**question.arrays, **beyond},
        host={name: form for name, form in call.host.items() if name in question.arrays},
        placed=call.layouts,
        further=(NEGATED,) if call.reused else (),
    )

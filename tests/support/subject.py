"""A target in this process: the reference with a replaced step, which shows that a case can fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.selection import Ask
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.layer_steps import LayerSteps
    from mha_spec.steps import Steps
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.suite.cases import Case

__all__ = ["Subject"]


class Subject:
    """An attention in this process that claims every feature, with the suite's judge."""

    def __init__(self, functions: Mapping[str, Callable[..., object]]) -> None:
        keywords = {name: function.claims for name, function in FUNCTIONS.items()}
        claims = Claims("reference", keywords, FLOATING, registered=True)
        self.target = Target(functions, claims)
        self.judge = Judge(claims, mistakes=MISTAKES)

    @classmethod
    def over(cls, steps: Steps | LayerSteps) -> Subject:
        """Make the reference over these steps, of attention or of the layer."""
        return cls({name: function_over(steps, name) for name in FUNCTIONS})

    def outcome(self, case: Case, dtype: str, *, every_layout: bool = False) -> Result:
        """Judge the answer to a case."""
        ask = Ask(case, dtype, tuple(case.expected) or ("output",), every_layout=every_layout)
        return self.judge.result(ask, answer(self.target, ask.question()))

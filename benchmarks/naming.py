"""Plant each known mistake in the reference, judge it by the whole suite, and count how often its name comes first.

    python benchmarks/naming.py                      # every mistake in every dtype: hours
    python benchmarks/naming.py --one-dtype --one-large-in 16   # every mistake in one dtype: about half an hour
    python benchmarks/naming.py --one-in 20          # a part of them
    python benchmarks/naming.py --only mask --dtypes float32,float16

A mistake is named if it is the name of the largest named cause, or if the cases do not distinguish it from that name. A
wrong name is that of any other cause.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.selection import Selection, asks
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.causes import find_causes
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.judging.naming import named
from mha_spec_conformance.judging.prediction import can_show, scores_of
from mha_spec_conformance.judging.result import Result
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mha_spec_conformance.mistakes import Mistake
    from mha_spec_conformance.suite.cases import Case


LARGE = 2**12
"""The number of scores from which a case is large."""


@dataclass(frozen=True)
class Named:
    """The names that a planted mistake received in a dtype, the largest cause first."""

    failures: int
    compared: int
    names: tuple[tuple[str, ...], ...]

    def right(self, mistake: Mistake) -> bool:
        """Tell whether the mistake is named first."""
        return bool(self.names) and mistake.variant in self.names[0]

    def wrong(self, mistake: Mistake) -> list[str]:
        """Return the names of causes that are not the mistake."""
        return [names[0] for names in self.names if mistake.variant not in names]


def planted(mistake: Mistake, cases: Iterable[Case], dtype: str) -> Named:
    """Judge the functions of a mistake by the cases in a dtype; cases in which it cannot show are taken as passed."""
    keywords = {name: FUNCTIONS[name].claims for name in mistake.functions}
    claims = Claims("reference", keywords, (dtype,), registered=True)
    functions = {name: function_over(mistake.steps, name) for name in mistake.functions}
    target, judge = Target(functions, claims), Judge(claims)
    results: list[Result] = []
    for ask in asks(cases, claims, Selection(dtypes=(dtype,))):
        able = ask.case.expect != "error" and can_show(mistake, ask.case, dtype)
        results.append(judge.result(ask, answer(target, ask.question())) if able else Result(ask, "pass"))
    wrong = [result.wrong for result in results if result.outcome == "fail" and result.wrong is not None]
    names = named(wrong, [result.ask for result in results if result.outcome == "pass"], judge.recognition)
    results = [judge.explained(r, names[r.ask.key]) if r.ask.key in names else r for r in results]
    causes = find_causes(results).causes
    mistaken = tuple((cause.name or "", *cause.others) for cause in causes if cause.kind == "mistake")
    return Named(sum(result.outcome != "pass" for result in results), len(wrong), mistaken)


def sampled(cases: Iterable[Case], one_large_in: int) -> list[Case]:
    """Choose all small cases, and one of so many large ones."""
    asked = [case for case in cases if case.expect != "error"]
    small = [case for case in asked if scores_of(case) <= LARGE]
    large = [case for case in asked if scores_of(case) > LARGE]
    return [*small, *large[::one_large_in]]


def planted_dtypes(mistake: Mistake, dtypes: list[str], number: int | None) -> list[str]:
    """Choose the dtypes in which the mistake can show, or the one of this number if it is given."""
    able = [dtype for dtype in dtypes if dtype in (mistake.dtypes or dtypes)]
    return able if number is None or not able else [able[number % len(able)]]


def main() -> None:
    """Print the mistakes that are not named or named wrongly, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one-in", type=int, default=1, help="plant one in so many mistakes")
    parser.add_argument("--first", type=int, default=0, help="the index of the first mistake")
    parser.add_argument("--one-large-in", type=int, default=1, help="ask one in so many large cases")
    parser.add_argument("--one-dtype", action="store_true", help="plant each mistake in one of the dtypes, in turn")
    parser.add_argument("--only", default="", help="plant mistakes whose name contains this")
    parser.add_argument("--dtypes", default=",".join(FLOATING))
    options = parser.parse_args()
    cases = sampled(load().cases, options.one_large_in)
    chosen = [mistake for mistake in MISTAKES if options.only in mistake.name][options.first :: options.one_in]
    first = shown = 0
    wrong: list[str] = []
    dtypes = options.dtypes.split(",")
    for number, mistake in enumerate(chosen):
        for dtype in planted_dtypes(mistake, dtypes, number if options.one_dtype else None):
            start = time.process_time()
            result = planted(mistake, cases, dtype)
            if not result.compared:
                continue
            shown += 1
            first += result.right(mistake)
            wrong += result.wrong(mistake)
            verdict = "right" if result.right(mistake) and not result.wrong(mistake) else "WRONG"
            names = "; ".join(f"{names[0]} (+{len(names) - 1})" for names in result.names)
            seconds = time.process_time() - start
            print(
                f"{verdict} {mistake.name} {dtype}: {result.failures} fail, {names or 'no name'}, {seconds:.0f} s",
                flush=True,
            )
    print(f"named first: {first} of {shown} (mistake, dtype); wrong names: {len(wrong)}")


if __name__ == "__main__":
    main()

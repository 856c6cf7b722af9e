"""The search: rounds of drawn calls until the time is over, each fault shrunk and reported once.

Hypothesis draws and shrinks. What it found is kept here, so that the end of the time, in the middle of shrinking too,
loses nothing.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import HypothesisException

from mha_spec_conformance.judging.result import FAILING

from .draw import calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypothesis.strategies import SearchStrategy

    from mha_spec_conformance.judging.result import Result

    from .asking import Asker
    from .call import Call
    from .worlds import World

__all__ = ["Finding", "Outcome", "RoundIsOver", "Search"]

CALLS_OF_ROUND = 200
"""Drawn calls between two fresh starts of the generator."""

SHRINKING_SHARE, SHRINKING_SECONDS = 0.25, 20.0
"""The part of the time that shrinking one fault may take, and its upper limit."""


HEALTH_CHECKS: Any = tuple(HealthCheck)
"""What hypothesis checks of tests: a search is slow and draws much on purpose."""


class Wrong(Exception):
    """A call that the target answers wrongly."""


class RoundIsOver(KeyboardInterrupt):
    """No time is left for the round: the one exception class that hypothesis hands on at once."""


@dataclass(frozen=True)
class Finding:
    """A fault: the smallest call that shows it, and how its answer was judged."""

    call: Call
    result: Result

    @property
    def needs(self) -> frozenset[str]:
        """Give what the smallest call has and a simpler call has not."""
        call = self.call
        dtype = () if call.dtype == "float32" else (call.dtype,)
        passed = (f"{form} {name}" for passed in (call.host, call.layouts) for name, form in passed.items())
        marks = (f"{value} {name}" for name, recipe in call.recipes.items() for _, value in recipe.marks)
        return frozenset(
            [call.function, *call.recipes, *call.options, *dtype, *passed, *marks, *["reused"] * call.reused]
        )

    @property
    def kind(self) -> int:
        """Give the kind of the place where the answer is worst."""
        worst = self.result.worst
        assert worst is not None
        kinds = self.result.ask.case.expected[worst.output].kinds
        return 0 if kinds is None else int(kinds[worst.index])

    def covers(self, other: Finding) -> bool:
        """Whether the other is most likely the same fault: of one diagnosis or error, or with whatever this needs."""
        mine, its = self.result, other.result
        if mine.compared != its.compared or (not mine.compared and mine.outcome != its.outcome):
            return False
        if its.diagnosis:
            return bool({*mine.diagnosis} & {*its.diagnosis})
        if mine.outcome == "error":
            return _without_numbers(mine.reason) == _without_numbers(its.reason)
        return not mine.diagnosis and self.needs <= other.needs


def _without_numbers(reason: str | None) -> str:
    return re.sub(r"[0-9]+", "", reason or "")


@dataclass
class Outcome:
    """What a search has seen so far."""

    seed: int
    judged: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The judged calls by function and dtype."""
    unsupported: int = 0
    should: int = 0
    """Failing calls of which the specification demands nothing (SHOULD)."""
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status: 0 nothing found, 1 something found, 2 nothing judged."""
        return 1 if self.findings else 0 if self.judged else 2


class Search:
    """A search for wrong answers of one target."""

    def __init__(
        self,
        asker: Asker,
        seed: int,
        seconds: float,
        *,
        functions: tuple[str, ...] = (),
        world: World | None = None,
        most: int | None = None,
        progress: Callable[[Outcome], None] = lambda outcome: None,
        found: Callable[[Finding], None] = lambda finding: None,
    ) -> None:
        """Prepare a search.

        Args:
            asker: Asks and judges.
            seed: The same seed draws the same calls.
            seconds: How long to search.
            functions: The functions to draw; all that the target claims where empty.
            world: Where the target runs: how many calls share a compilation, and whether their numbers differ.
            most: The number of faults after which to stop.
            progress: Is told after each call what has been seen.
            found: Is told each fault, shrunk.
        """
        self.asker = asker
        self.outcome = Outcome(seed)
        self.calls = calls(asker.claims, functions)
        self.world = world
        self.most = most
        self.progress = progress
        self.found = found
        self.seconds = seconds
        self._start = time.monotonic()
        self._smallest: Finding | None = None
        self._shrinking_since = 0.0

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self._start + self.seconds - time.monotonic()

    def run(self) -> Outcome:
        """Search until the time is over or `most` faults are found."""
        self._start = time.monotonic()
        number = 0
        while self.left > 0 and (self.most is None or len(self.outcome.findings) < self.most):
            self._round(number)
            number += 1
        self.outcome.seconds = time.monotonic() - self._start
        return self.outcome

    def _round(self, number: int) -> None:
        """Draw calls until one is wrong; shrink it and keep it."""
        self._smallest = None
        self.asker.suspect(name for finding in self.outcome.findings for name in finding.result.diagnosis)
        with suppress(Wrong, RoundIsOver, HypothesisException):
            _test(self.calls, self.outcome.seed * 2**32 + number, self._try)()
        if self._smallest is not None:
            finding = self._diagnosed(self._smallest)
            self.outcome.findings.append(finding)
            self.found(finding)

    def _try(self, drawn: Call) -> None:
        """Ask a drawn call; raise where it is wrong and, while shrinking, wrong in the same way."""
        self._check_time()
        for call in self._variants(drawn):
            finding = self._wrong(call)
            if finding is None:
                continue
            if self._smallest is None:
                self._shrinking_since = time.monotonic()
                self.asker.suspect(())
            if self._smallest is None or finding.call.size <= self._smallest.call.size:
                self._smallest = finding
            raise Wrong

    def _variants(self, drawn: Call) -> Iterator[Call]:
        """The calls that share shapes and options with a drawn one, and so a compilation."""
        count, numbers = (1, False) if self.world is None else (self.world.reuse, self.world.numbers)
        return (drawn.varied(step, numbers=numbers) for step in range(count))

    def _check_time(self) -> None:
        allowed = min(SHRINKING_SECONDS, SHRINKING_SHARE * self.seconds)
        late = self._smallest is not None and time.monotonic() - self._shrinking_since > allowed
        if self.left <= 0 or late:
            raise RoundIsOver

    def _wrong(self, call: Call) -> Finding | None:
        """Ask one call; give the fault, unless it is found already or another than the one that is shrunk."""
        result = self.asker.result(call)
        if result is None or result.outcome == "unsupported":
            self.outcome.unsupported += result is not None
            return None
        self.outcome.judged[call.function, call.dtype] += 1
        self.outcome.seconds = time.monotonic() - self._start
        self.progress(self.outcome)
        if result.outcome not in FAILING or self.asker.excused(result):
            return None
        if not result.must:
            self.outcome.should += 1
            return None
        finding = Finding(call, result)
        if self._smallest is not None:
            return finding if self._is_pursued(finding) else None
        return None if any(known.covers(finding) for known in self.outcome.findings) else finding

    def _is_pursued(self, finding: Finding) -> bool:
        """Whether a call that is tried while shrinking shows the fault that is shrunk."""
        assert self._smallest is not None
        first, other = self._smallest.result, finding.result
        if first.outcome == other.outcome == "error":
            return _without_numbers(first.reason) == _without_numbers(other.reason)
        return first.compared == other.compared and (first.compared or first.outcome == other.outcome)

    def _diagnosed(self, finding: Finding) -> Finding:
        """Judge the smallest call once more with every known mistake; keep the judgement where it does not repeat."""
        if not finding.result.compared:
            return finding
        self.asker.suspect(None)
        result = self.asker.result(finding.call)
        return Finding(finding.call, result) if result is not None and result.outcome in FAILING else finding


def _test(strategy: SearchStrategy[Call], seed: int, attempt: Callable[[Call], None]) -> Callable[[], None]:
    """Give the test that hypothesis runs."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=CALLS_OF_ROUND,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=HEALTH_CHECKS,
    )
    @hypothesis.given(strategy)
    def test(call: Call) -> None:
        attempt(call)

    return test

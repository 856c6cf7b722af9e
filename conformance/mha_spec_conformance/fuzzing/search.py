"""Search for wrong answers: draw calls in rounds until the time is over, and shrink and report each fault once.

Hypothesis draws and shrinks. This module keeps the faults, so that none is lost if the time ends during shrinking.
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
"""The number of calls of a round; each round starts the generator again."""

SHRINKING_SHARE, SHRINKING_SECONDS = 0.25, 20.0
"""The share of the time that shrinking a fault may take, and its upper limit."""

HEALTH_CHECKS: Any = tuple(HealthCheck)
"""The checks of hypothesis that are disabled, because a search is slow and draws large data on purpose."""


class Wrong(Exception):
    """The target answered the call wrongly."""


class RoundIsOver(KeyboardInterrupt):
    """The round has no time left. Hypothesis re-raises a KeyboardInterrupt at once, but no other exception."""


@dataclass(frozen=True)
class Finding:
    """A fault: the smallest call that shows it, and the result of that call."""

    call: Call
    result: Result

    @property
    def needs(self) -> frozenset[str]:
        """Name the properties by which the smallest call differs from the simplest call."""
        call = self.call
        dtype = () if call.dtype == "float32" else (call.dtype,)
        passed = (f"{form} {name}" for passed in (call.host, call.layouts) for name, form in passed.items())
        beyond = (f"{name} beyond" for name in call.beyond)
        marks = (f"{value} {name}" for name, recipe in call.recipes.items() for _, value in recipe.marks)
        return frozenset(
            [call.function, *call.recipes, *call.options, *dtype, *passed, *beyond, *marks, *["reused"] * call.reused]
        )

    @property
    def kind(self) -> int:
        """Return the kind of the worst element."""
        worst = self.result.worst
        assert worst is not None
        kinds = self.result.ask.case.expected[worst.output].kinds
        return 0 if kinds is None else int(kinds[worst.index])

    def covers(self, other: Finding) -> bool:
        """Tell whether the other fault is probably the same: same diagnosis, same error, or at least the same needs."""
        a, b = self.result, other.result
        if b.diagnosis:
            return bool({*a.diagnosis} & {*b.diagnosis})
        if a.compared != b.compared or (not a.compared and a.outcome != b.outcome):
            return False
        if a.outcome == "error":
            return _without_numbers(a.reason) == _without_numbers(b.reason)
        return not a.diagnosis and self.needs <= other.needs


def _without_numbers(reason: str | None) -> str:
    return re.sub(r"[0-9]+", "", reason or "")


@dataclass
class Outcome:
    """The results of a search so far."""

    seed: int
    judged: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The judged calls by function and dtype."""
    unsupported: int = 0
    should: int = 0
    """The number of failing calls that break only a SHOULD clause."""
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status: 0 without a fault, 1 with faults, 2 if no call was judged."""
        return 1 if self.findings else 0 if self.judged else 2


class Search:
    """Searches for wrong answers of a target."""

    def __init__(
        self,
        asker: Asker,
        seed: int,
        seconds: float,
        *,
        functions: tuple[str, ...] = (),
        world: World | None = None,
        most: int | None = None,
        most_calls: int | None = None,
        progress: Callable[[Outcome], None] = lambda outcome: None,
        report: Callable[[Finding], None] = lambda finding: None,
    ) -> None:
        """Prepare a search.

        Args:
            asker: Asks the target and judges its answers.
            seed: The same seed draws the same calls.
            seconds: The time of the search.
            functions: The functions to draw; if empty, all that the target claims.
            world: The world in which the target runs.
            most: The number of faults after which the search stops.
            most_calls: The number of judged calls after which the search stops; a fault is still shrunk.
            progress: Called after each call with the results so far.
            report: Called with each fault after it is shrunk.
        """
        self.asker = asker
        self.outcome = Outcome(seed)
        self.calls = calls(asker.claims, functions)
        self.world = world
        self.most = most
        self.most_calls = most_calls
        self.progress = progress
        self.report = report
        self.seconds = seconds
        self._start = time.monotonic()
        self._smallest: Finding | None = None
        self._shrinking_since = 0.0

    @property
    def left(self) -> float:
        """The remaining time in seconds."""
        return self._start + self.seconds - time.monotonic()

    @property
    def _has_all_calls(self) -> bool:
        return self.most_calls is not None and self.outcome.judged.total() >= self.most_calls

    def run(self) -> Outcome:
        """Search until the time is over, or until there are `most` faults or `most_calls` judged calls."""
        self._start = time.monotonic()
        number = 0
        while self.left > 0 and not self._has_all_calls and len(self.outcome.findings) != self.most:
            self._round(number)
            number += 1
        self.outcome.seconds = time.monotonic() - self._start
        return self.outcome

    def _round(self, number: int) -> None:
        """Draw calls until an answer is wrong; then shrink the call and keep the fault."""
        self._smallest = None
        self.asker.suspect(name for finding in self.outcome.findings for name in finding.result.diagnosis)
        with suppress(Wrong, RoundIsOver, HypothesisException):
            _test(self.calls, self.outcome.seed * 2**32 + number, self._try)()
        if self._smallest is not None:
            finding = self._diagnosed(self._smallest)
            # A large call may have no diagnosis, and its smallest form that of an earlier fault.
            if not self._is_known(finding):
                self.outcome.findings.append(finding)
                self.report(finding)

    def _try(self, drawn: Call) -> None:
        """Ask a drawn call; raise if the answer is wrong and, while shrinking, wrong in the same way."""
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
        """Return the calls that have the shapes and options of the drawn call, so that they share its compilation."""
        count, numbers = (1, False) if self.world is None else (self.world.reuse, self.world.numbers)
        return (drawn.varied(step, numbers=numbers) for step in range(count))

    def _check_time(self) -> None:
        if self._smallest is None:
            over = self._has_all_calls
        else:
            allowed = min(SHRINKING_SECONDS, SHRINKING_SHARE * self.seconds)
            over = time.monotonic() - self._shrinking_since > allowed
        if self.left <= 0 or over:
            raise RoundIsOver

    def _wrong(self, call: Call) -> Finding | None:
        """Ask a call; return its fault, unless that is already kept or differs from the fault that is shrunk."""
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
        return None if self._is_known(finding) else finding

    def _is_known(self, finding: Finding) -> bool:
        return any(known.covers(finding) for known in self.outcome.findings)

    def _is_pursued(self, finding: Finding) -> bool:
        """Tell whether a call that is tried while shrinking shows the fault that is shrunk."""
        assert self._smallest is not None
        first, other = self._smallest.result, finding.result
        if first.outcome == other.outcome == "error":
            return _without_numbers(first.reason) == _without_numbers(other.reason)
        return first.compared == other.compared and (first.compared or first.outcome == other.outcome)

    def _diagnosed(self, finding: Finding) -> Finding:
        """Judge the smallest call again with every known mistake; keep the first result if the fault does not recur."""
        if not finding.result.compared:
            return finding
        self.asker.suspect(None)
        result = self.asker.result(finding.call)
        return Finding(finding.call, result) if result is not None and result.outcome in FAILING else finding


def _test(strategy: SearchStrategy[Call], seed: int, attempt: Callable[[Call], None]) -> Callable[[], None]:
    """Return the test that hypothesis runs."""

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

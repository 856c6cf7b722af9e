"""Ask and judge the cases of a run in any order, each by itself, as the items of a test runner."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.judging.result import FAILING, INTERNAL
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.reporting.terminal import details
from mha_spec_conformance.running.alignment import find_alignment
from mha_spec_conformance.running.known import excuse, read_known
from mha_spec_conformance.running.runner import asks_of
from mha_spec_conformance.running.smoke import try_smoke_cases
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.suite.conventions import parse_convention

from .check import selection_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mha_spec_conformance.judging.result import Result

__all__ = ["Asker", "Outcome"]

MOST_NAMES = 3
"""The number of mistakes from which a failure gets no name, because it does not tell them apart."""

SECONDS_OF_NAMES = 60.0
"""The time after which further failures of a run get no names."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test: "pass", "fail", "skip" or "expected", with the reason."""

    kind: str
    reason: str = ""


class Asker:
    """The process of a target, and all asks of the target by case and dtype."""

    def __init__(
        self,
        target: str,
        *,
        only: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        dtypes: tuple[str, ...] = (),
        accepted: Iterable[str] = (),
        known: Path | None = None,
    ) -> None:
        """Start the process, and try the smoke cases.

        Raises:
            MhaSpecError: The target cannot be loaded or judged, or an option has an invalid value.
        """
        self._known = read_known(known) if known else ()
        self._accepted = frozenset(parse_convention(text) for text in accepted)
        suite = load()
        selection = selection_of(suite, only, dtypes, exclude)
        self._pool = Pool(target)
        try:
            self._judge = Judge(self._pool.claims, self._accepted)
            try_smoke_cases(suite, self._pool, self._judge)
            alignment = find_alignment(self._pool, suite, selection, self._judge)
            asked = asks_of(suite, alignment.declared_by(self._pool.claims), selection)
        except BaseException:
            self._pool.close()
            raise
        self._asks = {ask.key: ask for ask in asked}
        self._seconds_of_names = 0.0

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """The case and dtype of each ask."""
        return tuple(self._asks)

    def judge(self, identity: str, dtype: str) -> Outcome:
        """Ask the target a case in a dtype, and judge the answer."""
        ask = self._asks[identity, dtype]
        ((_, answer),) = self._pool.answers([ask.question()])
        return self._outcome(self._with_names(self._judge.result(ask, answer)))

    def _with_names(self, result: Result) -> Result:
        """Name the known mistakes that explain a failure, unless the case does not tell many of them apart."""
        if result.outcome != "fail" or result.wrong is None or self._seconds_of_names > SECONDS_OF_NAMES:
            return result
        begin = time.monotonic()
        mistakes = self._judge.recognition.explaining(MISTAKES, result.wrong)
        self._seconds_of_names += time.monotonic() - begin
        return self._judge.explained(result, mistakes) if len(mistakes) <= MOST_NAMES else result

    def _outcome(self, result: Result) -> Outcome:
        covering = [entry for entry in self._known if entry.covers(result)]
        if result.outcome == "unsupported":
            return Outcome("skip", f"unsupported: {result.reason}")
        if result.outcome == "pass" and covering:
            return Outcome("fail", f"this known failure did not fail, remove it from the file: {covering[0].reason}")
        if result.outcome not in (*FAILING, INTERNAL):
            return Outcome("pass")
        why = None if result.outcome == INTERNAL else excuse(result, self._accepted, self._known)
        if why == "accepted":
            return Outcome("pass")
        if why == "known":
            return Outcome("expected", covering[0].reason)
        # Pytest shows the first line in its summary.
        title = f"{result.outcome.upper()}: {' or '.join(result.diagnosis) or result.reason}"
        text = "\n".join([title, *details(result, "--mha-accept")])
        return Outcome("fail" if result.must else "expected", text if result.must else f"SHOULD: {result.reason}")

    def close(self) -> None:
        """End the process of the target."""
        self._pool.close()

"""Measure the cost of asking a target in another process, and the gain of a second process.

Three runs of the suite are made in turns: calls in this process, calls in one worker, and calls in two workers. The
times are those of the clock, and those of the processors, which hardly depend on other programs.

    python benchmarks/isolation.py [TARGET] [--only PATTERN] [--turns N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.question import AGAIN, NEGATED
from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.judging.judge import Judge
from mha_spec_conformance.running.runner import Settings, judge_all, run
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.targets.conversion import layouts_of
from mha_spec_conformance.targets.loading import load as load_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.running.run import Run


class InProcess:
    """Answers questions by calls in this process."""

    def __init__(self, target: str) -> None:
        self.target = load_target(target)
        further = (AGAIN, *layouts_of(self.target.claims.arrays), NEGATED)
        self.claims = replace(self.target.claims, further=further)

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """Make the calls of all questions."""
        for question in chain(*groups):
            yield question, answer(self.target, replace(question, further=self._further(question)))

    def _further(self, question: Question) -> tuple[str, ...]:
        return tuple(name for name in question.further if name in self.claims.further)


def timed(make_run: Callable[[], Run]) -> tuple[float, float, int]:
    """Return the time of a run in seconds, the processor time of all processes that ended, and the passed cases."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    done = make_run()
    passed = sum(result.outcome == "pass" for result in done.results)
    return time.perf_counter() - start, sum(os.times()[:4]) - before, passed


def main() -> None:
    """Print the medians, and their ratios to the calls in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", default="numpy")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    suite, settings = load(), Settings(Selection(tuple(options.only)))
    in_process = InProcess(options.target)

    runs: dict[str, Callable[[], Run]] = {
        "in this process": lambda: judge_all(in_process, Judge(in_process.claims), suite, settings),
        "one worker": lambda: run(options.target, suite, settings),
        "two workers": lambda: run(options.target, suite, replace(settings, jobs=2)),
    }
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    runs["in this process"]()  # reads the cases
    for _ in range(options.turns):
        for name, make_run in runs.items():
            times[name].append(timed(make_run))
    clock, processors = (
        {name: statistics.median(turn[part] for turn in turns) for name, turns in times.items()} for part in (0, 1)
    )
    first = "in this process"
    for name, turns in times.items():
        print(
            f"{name:16} {clock[name]:6.1f} s ({clock[name] / clock[first]:.2f}), "
            f"processors {processors[name]:6.1f} s ({processors[name] / processors[first]:.2f}), {turns[-1][2]} passed"
        )


if __name__ == "__main__":
    main()

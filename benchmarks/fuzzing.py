"""Measure how soon the fuzzer finds each known mistake: calls and seconds until the first wrong answer.

    python benchmarks/fuzzing.py                          every mistake of the catalogue, a minute each at most
    python benchmarks/fuzzing.py --seconds 20 --seed 3    another limit, other calls
    python benchmarks/fuzzing.py causal rotary            the mistakes whose names contain any of these words
    python benchmarks/fuzzing.py --one-in 10              a part of the catalogue, evenly
    python benchmarks/fuzzing.py --jobs 2 --csv docs/fuzzing.csv    the table of the documentation

The mistaken reference answers in this process, so the figures do not depend on any backend. Seconds are those of the
processor, drawing and judging included.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mha_spec.arrays import FLOATING
from mha_spec_conformance.asking.calls import function_over
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.fuzzing.asking import Asker
from mha_spec_conformance.fuzzing.search import Search
from mha_spec_conformance.judging.result import FAILING
from mha_spec_conformance.mistakes import MISTAKES
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from mha_spec_conformance.fuzzing.call import Call
    from mha_spec_conformance.fuzzing.search import Outcome
    from mha_spec_conformance.judging.result import Result
    from mha_spec_conformance.mistakes import Mistake

REFUSALS = ("unchecked", "swallowed", "guessed", "empty-input-refused", "dropout-rate-without-mask-ignored")
"""Mistakes in refusing illegal calls, which the fuzzer does not draw."""


class FirstFault(KeyboardInterrupt):
    """The first wrong answer; hypothesis hands this class of exceptions on at once."""


class Watching(Asker):
    """An asker that counts the calls and stops at the first wrong answer."""

    calls = 0

    def result(self, call: Call, name: str = "fuzz/call") -> Result | None:
        """Judge a call."""
        result = super().result(call, name)
        self.calls += 1
        if result is not None and result.outcome in FAILING:
            raise FirstFault
        return result


class Measured(Search):
    """A search limited by processor time, so that a loaded machine finds as much as an idle machine."""

    def run(self) -> Outcome:
        """Search, and start the clock."""
        self._started = time.process_time()
        return super().run()

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self._started + self.seconds - time.process_time()


def target_of(mistake: Mistake) -> Target:
    """Return the mistaken reference as a target that claims everything."""
    keywords = {name: function.claims for name, function in FUNCTIONS.items()}
    claims = Claims("mha_spec.reference", keywords, FLOATING, registered=True)
    return Target({name: function_over(mistake.steps, name) for name in FUNCTIONS}, claims)


def first_fault(mistake: Mistake, seed: int, seconds: float) -> tuple[int, float] | None:
    """Return the calls and seconds until the first wrong answer; None if there was none in time."""
    target = target_of(mistake)
    asker = Watching(target.claims, lambda question: answer(target, question))
    asker.suspect(())
    start = time.process_time()
    search = Measured(asker, seed, seconds)
    try:
        search.run()
    except FirstFault:
        return asker.calls, time.process_time() - start
    return None


def measured(options: argparse.Namespace, name: str) -> tuple[int, float] | None:
    """Measure the mistake of this name, in any process."""
    (mistake,) = [mistake for mistake in MISTAKES if mistake.name == name]
    return first_fault(mistake, options.seed, options.seconds)


def keep(path: Path, measurements: dict[str, tuple[int, float] | None]) -> None:
    """Write measurements to a table of the whole catalogue, in which those of other mistakes stay."""
    rows: dict[str, list[str]] = {}
    if path.exists():
        rows = {row[0]: row for row in csv.reader(path.read_text().splitlines()[1:])}
    for name, first in measurements.items():
        rows[name] = [name, *(("", "") if first is None else (str(first[0]), f"{first[1]:.1f}"))]
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["mistake", "calls", "seconds"])
        table.writerows(rows[mistake.name] for mistake in MISTAKES if mistake.name in rows)


def summary(detections: list[tuple[int, float]], asked: int) -> str:
    """Return how many mistakes the fuzzer finds, and how soon."""
    lines = [f"{len(detections)} of {asked} found"]
    if detections:
        calls, seconds = zip(*detections, strict=True)
        lines += [f"median {statistics.median(calls):.0f} calls, {statistics.median(seconds):.1f} s"]
        nine = int(0.9 * len(detections))
        lines += [f"nine in ten within {sorted(calls)[nine]} calls and {sorted(seconds)[nine]:.1f} s"]
    return "\n".join(lines)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Measure how soon the fuzzer finds each known mistake.")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--one-in", type=int, default=1, help="measure one in so many mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="measure so many mistakes at the same time")
    parser.add_argument("--csv", type=Path, help="write the figures to this table")
    options = parser.parse_args()
    chosen = [m.name for m in MISTAKES if not options.words or any(word in m.name for word in options.words)]
    drawn = [name for name in chosen[:: options.one_in] if not any(word in name for word in REFUSALS)]
    measurements: dict[str, tuple[int, float] | None] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        for name, first in zip(drawn, pool.map(partial(measured, options), drawn), strict=True):
            cost = "not found" if first is None else f"{first[0]:6d} calls {first[1]:7.1f} s"
            print(f"{name:45} {cost}", flush=True)
            measurements[name] = first
    if options.csv:
        keep(options.csv, measurements)
    print(summary([first for first in measurements.values() if first], len(drawn)))


if __name__ == "__main__":
    main()

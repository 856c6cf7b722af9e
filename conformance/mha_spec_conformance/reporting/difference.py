"""Compare two reports of a target: regressions, mends and other changes, grouped by their cause."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .stored import ReportError, require_same_suite
from .terminal import title_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .stored import Key, StoredReport, StoredResult

__all__ = ["KINDS", "Change", "Difference", "Group", "difference"]

KINDS = ("regression", "mend", "other change")
"""The kinds of changes, in the order in which they are shown."""

ENDED = ("crash", "timeout")
"""The outcomes of calls that did not end by themselves."""

SEVERITY = ("pass", "not asked", "unsupported", "internal", "error", "deviation", "fail", "timeout", "crash")
"""The outcomes of a case, the worst last."""


@dataclass(frozen=True)
class Change:
    """A case in a dtype whose outcome or cause differs; a result is None if its run did not ask the case."""

    old: StoredResult | None
    new: StoredResult | None
    excuse: str | None = None
    """The reason why the new result does not count: accepted, known or SHOULD."""

    @property
    def key(self) -> Key:
        """The id and dtype of the case."""
        return self.latest.key

    @property
    def latest(self) -> StoredResult:
        """The new result, or the old result of a case that is no longer asked."""
        latest = self.new or self.old
        assert latest is not None
        return latest

    @property
    def transition(self) -> str:
        """The outcomes, as in "pass → fail"."""
        before, after = (result.outcome if result else "not asked" for result in (self.old, self.new))
        excuse = f" ({self.excuse})" if self.excuse else ""
        return f"{before} → {after}{excuse}" if before != after else f"still {after}, for another cause{excuse}"

    @property
    def kind(self) -> str:
        """One of KINDS.

        A regression is a pass that is lost, a refused call that now fails, or a failure that now ends the process. A
        case that only the new run asked has nothing to be compared with.
        """
        if self.old is None or self.excuse is not None:
            return "other change"
        before, after = self.old.outcome, self.new.outcome if self.new else "not asked"
        wrong = before == "unsupported" and after not in ("pass", "not asked")
        ended = after in ENDED and before not in ENDED
        if before == "pass" or wrong or ended:
            return "regression"
        return "mend" if after == "pass" else "other change"


@dataclass(frozen=True)
class Group:
    """Changes with the same outcomes and the same cause."""

    kind: str
    transition: str
    title: str
    """The cause; for results without a cause, the reason."""
    clauses: tuple[str, ...]
    changes: tuple[Change, ...]

    @property
    def severity(self) -> int:
        """The place of the new outcome in SEVERITY."""
        new = self.changes[0].new
        return SEVERITY.index("not asked" if new is None else new.outcome)

    @property
    def cases(self) -> dict[str, list[Change]]:
        """The changes of each case."""
        by_case: dict[str, list[Change]] = defaultdict(list)
        for change in self.changes:
            by_case[change.key[0]].append(change)
        return dict(by_case)


@dataclass(frozen=True)
class Difference:
    """Two reports of a target, and what changed from the old to the new one."""

    old: StoredReport
    new: StoredReport
    changes: tuple[Change, ...]

    @property
    def status(self) -> int:
        """The exit status: 1 with a regression, else 0."""
        return int(bool(self.count("regression")))

    def count(self, kind: str) -> int:
        """Count the changes of a kind."""
        return sum(change.kind == kind for change in self.changes)

    @property
    def unchanged(self) -> int:
        """The number of results that are the same in both reports."""
        return len(self.old.results.keys() & self.new.results.keys()) - sum(
            change.old is not None and change.new is not None for change in self.changes
        )

    @property
    def summary(self) -> str:
        """The numbers of changes in a line."""
        counts = [_counted(self.count(kind), kind) for kind in KINDS]
        return f"{', '.join(counts)}; {_counted(self.unchanged, 'result')} unchanged"

    @cached_property
    def groups(self) -> list[Group]:
        """The changes by kind and cause: the worst new outcomes of a kind first, and of these the largest group."""
        by_cause: dict[tuple[str, str, str, tuple[str, ...]], list[Change]] = defaultdict(list)
        for change in self.changes:
            by_cause[change.kind, change.transition, *self._cause(change)].append(change)
        groups = [Group(*named, tuple(changes)) for named, changes in by_cause.items()]
        return sorted(groups, key=lambda group: (KINDS.index(group.kind), -group.severity, -len(group.changes)))

    def _cause(self, change: Change) -> tuple[str, tuple[str, ...]]:
        """Return the cause of the new failure, or else of the old failure, and the clauses that it breaks."""
        sides = (self.new, self.old, change.new), (self.old, self.new, change.old)
        for report, other, result in sides:
            if result is None:
                return _not_claimed(report, other, change.latest), ()
            if result.failing:
                cause = report.causes.get(change.key)
                return (title_of(cause), cause.clauses) if cause else (result.reason or "", tuple(result.clauses[:1]))
        return change.latest.reason or "", tuple(change.latest.clauses[:1])

    @property
    def remarks(self) -> Iterator[str]:
        """Yield what differs between the runs apart from the results."""
        old, new = self.old.data, self.new.data
        if self.old.name != self.new.name:
            yield f"The targets have different names: {self.old.name} and {self.new.name}."
        for name in ("profile", "conventions"):
            if old["target"][name] != new["target"][name]:
                yield f"The targets declare different {name}: {old['target'][name]} and {new['target'][name]}."
        for name in ("accepted", "known"):
            if old[name] != new[name]:
                yield f"The runs have different {name} failures; those of the new run are not regressions."
        for label, report in (("old", self.old), ("new", self.new)):
            if not report.data["complete"]:
                yield f"The {label} run is partial."
        shares = [_largest_share(report) for report in (self.old, self.new)]
        if None not in shares and shares[0] != shares[1]:
            yield f"The results that passed use at most {shares[0]} of their allowance before, and {shares[1]} now."


def _not_claimed(report: StoredReport, other: StoredReport, result: StoredResult) -> str:
    """Return the reason why a report does not have a result of another report: a claim of the other target alone."""
    names = [result.key[1], *result.data["features"]]
    claimed, others = ([*r.data["target"]["features"], *r.data["target"]["dtypes"]] for r in (report, other))
    lacking = next((name for name in names if name in others and name not in claimed), None)
    return f"{report.name} does not claim {lacking}" if lacking else f"the run of {report.name} did not ask it"


def _largest_share(report: StoredReport) -> str | None:
    shares = [r.share for r in report.results.values() if r.outcome == "pass" and r.share is not None]
    return f"{max(shares):.2f}" if shares else None


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def difference(old: StoredReport, new: StoredReport) -> Difference:
    """Compare two reports.

    Raises:
        ReportError: The reports are of different suites or of different selections.
    """
    require_same_suite([old, new])
    if old.data["selection"] != new.data["selection"]:
        selections = " and ".join(f"{report.path} of {_options(report)}" for report in (old, new))
        raise ReportError(f"the reports are of different selections: {selections}; judge both with the same options")
    keys = dict.fromkeys([*old.results, *new.results])
    return Difference(old, new, tuple(change for key in keys if (change := _change(old, new, key)) is not None))


def _options(report: StoredReport) -> str:
    """Write a selection as the options of `check`."""
    selection = report.data["selection"]
    options = [f"--{name} {value}" for name in ("only", "exclude", "dtypes") for value in selection[name]]
    shard = selection["shard"]
    options += [f"--shard {shard[0]}/{shard[1]}"] if shard else []
    return " ".join(options) or "the whole suite"


def _change(old: StoredReport, new: StoredReport, key: Key) -> Change | None:
    """Return the change of a case in a dtype; None if its outcome and cause are the same."""
    before, after = old.results.get(key), new.results.get(key)
    if before is None or after is None:
        return Change(before, after, _excuse(new, after) if after else _excuse(old, before) if before else None)
    same = before.outcome == after.outcome and (not after.failing or _reading(old, before) == _reading(new, after))
    return None if same else Change(before, after, _excuse(new, after))


def _excuse(report: StoredReport, result: StoredResult) -> str | None:
    """Return the reason why a result does not count: accepted, known or SHOULD."""
    return (report.excuse(result) if result.failing else None) or (None if result.must else "SHOULD")


def _reading(report: StoredReport, result: StoredResult) -> object:
    """Return what tells two failures of a case apart: the name of the cause, or the conventions."""
    cause = report.causes.get(result.key)
    return result.conventions, None if cause is None else cause.title

"""The commands that list clauses, backends and cases."""

from __future__ import annotations

import textwrap
from difflib import get_close_matches
from typing import TYPE_CHECKING

from mha_spec.errors import MhaSpecError
from mha_spec.selection import backend_names, backend_origin
from mha_spec_conformance.targets.loading import TargetError
from mha_spec_conformance.targets.loading import load as load_target

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mha_spec_conformance.asking.kinds import AttentionKind, Count, LayerKind
    from mha_spec_conformance.suite.cases import Case

    Kind = AttentionKind | LayerKind

__all__ = ["UnknownName", "all_backends", "all_cases", "all_clauses", "all_kinds", "case_called", "clause_text"]


class UnknownName(MhaSpecError):
    """No clause or case has the name."""


def clause_text(name: str) -> str:
    """Return the text of a clause."""
    from mha_spec_conformance.suite.spec import clauses

    by_id = clauses()
    if name.upper() not in by_id:
        raise UnknownName(_no_such("clause", name, get_close_matches(name.upper(), list(by_id), 3), "spec"))
    clause = by_id[name.upper()]
    return f"{clause.id}  {clause.level}  {clause.title}\n\n{clause.text.strip()}"


def case_called(name: str) -> Case:
    """Return the case with this id.

    Raises:
        UnknownName: No case has this id.
    """
    from mha_spec_conformance.suite.cases import load

    cases = {case.id: case for case in load().cases}
    if name not in cases:
        near = get_close_matches(name, list(cases), 3) or [other for other in cases if name in other][:3]
        raise UnknownName(_no_such("case", name, near, "cases"))
    return cases[name]


def _no_such(kind: str, name: str, near: Sequence[str], command: str) -> str:
    fix = f"similar ids are {', '.join(near)}" if near else f"`mha-spec {command}` lists all"
    return f"there is no {kind} {name!r}; {fix}"


def all_clauses() -> str:
    """Return a line for each clause."""
    from mha_spec_conformance.suite.spec import clauses

    return "\n".join(f"{clause.id:<16} {clause.level:<7} {clause.title}" for clause in clauses().values())


def all_backends() -> str:
    """Describe every registered backend: its origin, whether it can be used here, and what it supports."""
    return "\n".join(line for name in backend_names() for line in _backend_lines(name))


def _backend_lines(name: str) -> Iterator[str]:
    module, distribution = backend_origin(name)
    yield f"{name:<12} {module}{f' of {distribution}' if distribution else ''}"
    try:
        claims = load_target(name).claims
    except TargetError as error:
        facts = {"not usable": str(error)}
    else:
        versions = [f"{library} {version}" for library, version in claims.versions.items() if library != "mha-spec"]
        facts = {
            "installed": ", ".join(versions),
            "functions": ", ".join(claims.keywords),
            "features": ", ".join(claims.features),
            "dtypes": ", ".join(claims.dtypes),
            "device": claims.hardware,
        }
    for label, fact in facts.items():
        yield f"{'':<12} {label:<10} {fact}"


def all_cases(pattern: str | None = None) -> str:
    """Return a line for each case."""
    cases = _selected(pattern)
    width = max(len(case.id) for case in cases)
    lines = [f"{case.id:<{width}}  {case.level:<6} {textwrap.shorten(case.title, 120)}" for case in cases]
    return "\n".join([*lines, f"{len(cases)} cases"])


def _selected(pattern: str | None) -> list[Case]:
    from mha_spec_conformance.asking.selection import Selection
    from mha_spec_conformance.suite.cases import load

    selection = Selection(only=(pattern,) if pattern else ())
    cases = [case for case in load().cases if selection.takes(case)]
    if not cases:
        raise UnknownName(f"no case matches {pattern!r}")
    return cases


def all_kinds(pattern: str | None = None) -> str:
    """Describe each kind of real attention, with the number of cases that it can be asked for each of its options."""
    from mha_spec_conformance.asking.kinds import counted, kinds

    counts = counted(_selected(pattern))
    return "\n\n".join("\n".join(_kind_lines(kind, counts)) for kind in kinds())


def _kind_lines(kind: Kind, counts: Sequence[Count]) -> Iterator[str]:
    yield f"{kind.name}: {kind.like}"
    for direction in kind.functions:
        numbers = [
            f"{count.option} {count.cases}"
            for count in counts
            if (count.kind, count.direction) == (kind.name, direction)
        ]
        yield textwrap.fill("; ".join(numbers), 120, initial_indent=f"  {direction:<10}", subsequent_indent=" " * 12)

"""What there is: clauses, backends, cases."""

from __future__ import annotations

import textwrap
from difflib import get_close_matches

from mha_spec.errors import BackendError, MhaSpecError
from mha_spec.selection import backend, backend_names

__all__ = ["UnknownName", "all_backends", "all_cases", "all_clauses", "one_clause"]


class UnknownName(MhaSpecError):
    """There is no clause or case of that name."""


def one_clause(name: str) -> str:
    """The text of one clause."""
    from .spec import clauses

    known = clauses()
    if name.upper() not in known:
        near = get_close_matches(name.upper(), list(known), 3)
        raise UnknownName(
            f"there is no clause {name!r}"
            + (f"; there are {', '.join(near)}" if near else "; `mha-spec spec` lists all")
        )
    clause = known[name.upper()]
    return f"{clause.id}  {clause.level}  {clause.title}\n\n{clause.text.strip()}"


def all_clauses() -> str:
    """Every clause in a line."""
    from .spec import clauses

    return "\n".join(f"{clause.id:<16} {clause.level:<7} {clause.title}" for clause in clauses().values())


def all_backends() -> str:
    """Every registered backend, its module, and whether it can be loaded here."""
    return "\n".join(f"{name:<12} {_state(name)}" for name in backend_names())


def _state(name: str) -> str:
    try:
        return f"{backend(name).__name__}"
    except BackendError as error:
        return str(error)


def all_cases(pattern: str | None = None) -> str:
    """Every case in a line."""
    from .asking import Selection
    from .cases import load

    selection = Selection(only=(pattern,) if pattern else ())
    found = [case for case in load().cases if selection.takes(case)]
    if not found:
        raise UnknownName(f"no case matches {pattern!r}")
    width = max(len(case.id) for case in found)
    lines = [f"{case.id:<{width}}  {case.level:<6} {textwrap.shorten(case.title, 120)}" for case in found]
    return "\n".join([*lines, f"{len(found)} cases"])

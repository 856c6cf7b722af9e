"""Searches of the fuzzer in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.fuzzing.asking import Asker
from mha_spec_conformance.fuzzing.search import Finding, Search
from mha_spec_conformance.mistakes import MISTAKES

from .subject import Subject

if TYPE_CHECKING:
    from mha_spec_conformance.targets.loading import Target

__all__ = ["LONG", "asker_of", "first_finding", "mistaken"]

LONG = 60.0
"""More seconds than a search needs that stops at its first fault; a quarter of them bounds the shrinking."""


def asker_of(target: Target) -> Asker:
    """Return what asks a target in this process."""
    return Asker(target.claims, lambda question: answer(target, question))


def first_finding(target: Target, **options: Any) -> Finding:
    """Return the first fault that a search finds."""
    (finding,) = Search(asker_of(target), 0, LONG, most=1, **options).run().findings
    return finding


def mistaken(name: str) -> Target:
    """Return the reference with a known mistake."""
    (mistake,) = [mistake for mistake in MISTAKES if mistake.name == name]
    return Subject.over(mistake.steps).target

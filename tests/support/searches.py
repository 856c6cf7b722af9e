"""Searches of the fuzzer in this process."""

from __future__ import annotations

from typing import Any

from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.fuzzing.asking import Asker
from mha_spec_conformance.fuzzing.search import Finding, Search
from mha_spec_conformance.mistakes import MISTAKES

from .subject import Subject

__all__ = ["LONG", "asker_of", "first_finding", "mistaken"]

LONG = 60.0
"""More seconds than a search needs that stops at its first fault; a quarter of them bounds the shrinking."""


def asker_of(subject: Subject) -> Asker:
    """Return what asks an attention in this process."""
    return Asker(subject.target.claims, lambda question: answer(subject.target, question))


def first_finding(subject: Subject, **options: Any) -> Finding:
    """Return the first fault that a search finds."""
    (finding,) = Search(asker_of(subject), 0, LONG, most=1, **options).run().findings
    return finding


def mistaken(name: str) -> Subject:
    """Return the reference with a known mistake."""
    (mistake,) = [mistake for mistake in MISTAKES if mistake.name == name]
    return Subject.over(mistake.steps)

"""The data that pass between the runner and the process of the target.

A `Question` goes to the process and an `Answer` comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy

from mha_spec_conformance.targets.conversion import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mha_spec_conformance.targets.claims import Claims

__all__ = ["AGAIN", "FURTHER", "NEGATED", "Answer", "Further", "Question", "Raised", "Sample", "Source"]

AGAIN, NEGATED = "again", "negated"

FURTHER = (AGAIN, *LAYOUTS, NEGATED)
"""The further calls of a question, in order: again, in each memory layout, and with other numbers.

The results of the last call are not judged, but it must leave those of all earlier calls as they were (MHA-PURE-4).
"""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """The rows of an output that are compared: indices over all axes that a row does not have, int64."""

    shape: tuple[int, ...]
    rows: numpy.ndarray
    width: int
    """The number of elements of a row."""

    def of(self, array: numpy.ndarray) -> numpy.ndarray:
        """Take the rows of an output."""
        return array.reshape(-1, self.width)[self.rows]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether an array of this shape can be the rows alone."""
        return shape == (len(self.rows), self.width)

    def spread(self, rows: numpy.ndarray) -> numpy.ndarray:
        """Return the output with these rows; all others are 0, and take no memory until they are read."""
        whole = numpy.zeros(self.shape, rows.dtype)
        whole.reshape(-1, self.width)[self.rows] = rows
        return whole


@dataclass(frozen=True, slots=True)
class Question:
    """One call: the function, its arrays as NumPy arrays and its options; the other fields describe the case."""

    id: str
    function: str
    dtype: str
    arrays: Mapping[str, numpy.ndarray]
    options: Mapping[str, object]
    outputs: tuple[str, ...]
    features: tuple[str, ...] = ()
    clauses: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    """The calls that follow the first; a target makes those that it can make."""
    host: Mapping[str, str] = field(default_factory=dict)
    """The arrays that are passed as host data, with their form: "list" or "numpy"."""
    placed: Mapping[str, str] = field(default_factory=dict)
    """The layouts of single arrays; all other arrays have the plain layout."""
    sampled: Mapping[str, Sample] = field(default_factory=dict)
    """The outputs of which only rows are compared, so that the others need not come back."""
    most_bytes: int = 2**26
    """The size of the arrays of an answer; an output that is larger is described only by its shape and dtype."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array by name."""
        return {name: array.shape for name, array in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception of the target: its classes, the most derived first, its message and the line of the target."""

    classes: tuple[str, ...]
    message: str
    where: str | None = None

    def __str__(self) -> str:
        first = self.message.strip().splitlines()[:1]
        return ": ".join([self.classes[0], *first]) + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True)
class Further:
    """The answer to a further call of a question; `kind` is "returned", "raised", "unsupported" or "malformed"."""

    kind: str
    outputs: Mapping[str, numpy.ndarray] = field(default_factory=dict)
    reason: str | None = None
    written: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question.

    `kind` is "returned", "raised", "unsupported", "malformed" (the results are not arrays that can be compared),
    "crash", "timeout", "internal" (a fault of the suite) or "lost" (the program could not read the question); `reason`
    explains all but the first. `written` names the inputs that the call wrote to, and `overwritten` the outputs that a
    further call changed. `foreign` is the library of the outputs if it is not that of the inputs.
    """

    kind: str
    outputs: Mapping[str, numpy.ndarray] = field(default_factory=dict)
    reason: str | None = None
    raised: Raised | None = None
    written: tuple[str, ...] = ()
    further: Mapping[str, Further] = field(default_factory=dict)
    foreign: str | None = None
    seconds: float = 0.0
    overwritten: tuple[str, ...] = ()


class Source(Protocol):
    """Gives the answers of a target, which come from its processes or from files."""

    claims: Claims

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        """Ask all questions; yield each with its answer."""
        ...

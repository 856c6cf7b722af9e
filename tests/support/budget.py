"""Choose the cases that a test has time for: a prediction on a case of real size takes a hundred times as long."""

from __future__ import annotations

import math
import os
import zlib
from typing import TYPE_CHECKING

from mha_spec_conformance.suite.functions import OF_ATTENTION

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mha_spec_conformance.suite.cases import Case

__all__ = ["affordable", "is_small"]

SMALL = 2**14
"""The largest number of scores of a small case, or of the elements of its largest input."""


def is_small(case: Case) -> bool:
    """Tell whether a case has few scores, and small inputs."""
    shapes = case.input_shapes
    elements = max((math.prod(shape) for shape in shapes.values()), default=0)
    scores = math.prod(shapes["query"][:3]) * shapes["key"][2] if _has_scores(case) else 0
    return max(elements, scores) <= SMALL


def _has_scores(case: Case) -> bool:
    ranks = [len(case.input_shapes.get(name, ())) for name in ("query", "key")]
    return case.function in OF_ATTENTION and ranks == [4, 4]


def affordable(cases: Iterable[Case], one_in: int) -> list[Case]:
    """Return all small cases, and 1 / one_in of the others by their ids; with ALL_CASES=1 in the environment, all."""
    everything = os.environ.get("ALL_CASES") == "1"
    return [case for case in cases if everything or is_small(case) or zlib.crc32(case.id.encode()) % one_in == 0]

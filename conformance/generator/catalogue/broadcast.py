"""Every shape of a mask and of a bias, sixteen each; `pairs` has more cases with only one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .build import vary
from .sizes import EQUAL, PAIRWISE_AXES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description


def descriptions() -> Iterator[Description]:
    """Yield a mask of each shape with a bias of the axes that the mask lacks; a mask of one element hides all."""
    for mask, bias in zip(PAIRWISE_AXES, reversed(PAIRWISE_AXES), strict=True):
        variants = [("generic", 0), ("coded", 1), ("levels", 3)] if "k" in mask else [("generic", 0), ("random", 1)]
        spec = {"mask": mask} if mask == "1111" else {"mask": mask, "bias": bias}
        name = "-".join(f"{option}-{axes}" for option, axes in spec.items())
        yield from vary(f"broadcast/{name}", EQUAL, spec, variants, clauses=("MHA-MASK-2",), lse=True)

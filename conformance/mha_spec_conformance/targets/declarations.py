"""Check what a target declares, as the names of a module or in a message of the protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mha_spec.arrays import dtype_name
from mha_spec.errors import MhaSpecError
from mha_spec.scalars import plain
from mha_spec.sharding import LAYOUTS as RANK_LAYOUTS
from mha_spec_conformance.suite.conventions import CONVENTIONS, ConventionError, check_convention
from mha_spec_conformance.suite.functions import STACKED
from mha_spec_conformance.suite.text import repr_of

from .layouts import LAYOUTS, LSE_LAYOUTS, NEEDED, PACKED

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OF_LAYOUT", "TargetError", "declared_conventions", "declared_layout", "flag_of", "one_of"]

OF_LAYOUT = {
    "layout": "bhsd",
    "lse_layout": "tokens_first",
    "block_size": 16,
    "groups": True,
    "stacked": None,
    "ranks": 1,
    "rank_layout": "contiguous",
}
"""The declarations of the layout of arrays, and of the ranks that share the keys of a call, with their defaults."""

MOST_RANKS = 64
"""The largest number of ranks; the allowance of a call has a term for each."""

MOST_SLOTS = 2**16
"""The largest size of a page."""


class TargetError(MhaSpecError):
    """A target cannot be judged: it does not exist, its import fails, or a declaration is invalid."""


def flag_of(value: object) -> object:
    """Return the bool that a scalar or an array without axes holds, and any other value unchanged."""
    try:
        holds_a_bool = getattr(value, "shape", None) == () and dtype_name(value) == "bool"
        return bool(value) if holds_a_bool else value
    except Exception:  # an object of the target, whose attributes may raise
        return value


def one_of(declaration: str, value: object, allowed: tuple[str, ...], target: str | None = None) -> str:
    """Return a declared name.

    Raises:
        TargetError: The value is not an allowed name.
    """
    if not isinstance(value, str) or value not in allowed:
        where = "" if target is None else f"target {target}: "
        raise TargetError(f"{where}`{declaration}` must be one of {', '.join(allowed)}, received {repr_of(value)}")
    return str.__str__(value)


def declared_conventions(conventions: object) -> dict[str, str]:
    """Check the declared conventions, of which only the causal alignment can differ from the specification.

    Raises:
        TargetError: A convention or variant does not exist, or is not judged but accepted.
    """
    if not isinstance(conventions, dict):
        raise TargetError(f"`conventions` must be a dict, received {conventions!r}")
    try:
        declared = [check_convention(name, variant) for name, variant in conventions.items()]
    except ConventionError as error:
        raise TargetError(f"`conventions`: {error}") from error
    for convention in declared:
        if convention.name != "causal_alignment" and convention.variant != CONVENTIONS[convention.name][0]:
            raise TargetError(
                f"`conventions` may declare only causal_alignment, received {convention}: convert in the target file, "
                f"or pass --accept {convention}"
            )
    return dict(declared)


def declared_layout(
    of_layout: Mapping[str, object], keywords: Mapping[str, tuple[str, ...]], target: str | None = None
) -> dict[str, Any]:
    """Check the layout and the ranks that a target declares, and return them as fields of the claims.

    Raises:
        TargetError: A declaration has a value that is not allowed, or a function lacks an argument of the layout.
    """
    where = "" if target is None else f"target {target}: "
    of_layout = {**of_layout, "groups": flag_of(of_layout["groups"]), "block_size": plain(of_layout["block_size"])}
    layout, stacked, block_size = (of_layout[name] for name in ("layout", "stacked", "block_size"))
    one_of("layout", layout, LAYOUTS, target)
    one_of("lse_layout", of_layout["lse_layout"], LSE_LAYOUTS, target)
    one_of("rank_layout", of_layout["rank_layout"], RANK_LAYOUTS, target)
    if stacked is not None:
        one_of("stacked", stacked, tuple(STACKED) if layout != "paged" else ("kv",), target)
    if type(block_size) is not int or not 1 <= block_size <= MOST_SLOTS:
        received = repr_of(block_size)
        raise TargetError(f"{where}`block_size` must be an integer from 1 to {MOST_SLOTS}, received {received}")
    if not isinstance(of_layout["groups"], bool):
        raise TargetError(f"{where}`groups` must be True or False, received {repr_of(of_layout['groups'])}")
    for function in (name for name in ("attention", "attention_vjp") if name in keywords):
        if missing := [word for word in NEEDED[str(layout)] if word not in keywords[function]]:
            raise TargetError(f"{where}{function} must take {', '.join(missing)} in the layout {layout}")
    return of_layout | {"ranks": _ranks(of_layout["ranks"], layout, where)}


def _ranks(declared: object, layout: object, where: str) -> int:
    """Check the number of ranks, which is 1 if the arrays are packed."""
    ranks = plain(declared)
    if type(ranks) is not int or not 1 <= ranks <= MOST_RANKS:
        raise TargetError(f"{where}`ranks` must be an integer from 1 to {MOST_RANKS}, received {repr_of(ranks)}")
    if ranks > 1 and layout in PACKED:
        raise TargetError(
            f"{where}`ranks` must be 1 in the layout {layout}, received {ranks}: ranks share dense arrays"
        )
    return ranks

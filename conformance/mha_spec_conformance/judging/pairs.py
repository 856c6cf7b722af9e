"""Combine two mistakes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from mha_spec.layer_steps import LayerSteps
from mha_spec.steps import Steps
from mha_spec_conformance.mistakes import Compared

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec_conformance.mistakes import Mistake

__all__ = ["together"]


def together(first: Mistake, second: Mistake) -> Mistake | None:
    """Combine both mistakes; None if they replace the same step, other than the checks, which follow each other."""
    if type(first.steps) is not type(second.steps) or not isinstance(first.steps, (Steps, LayerSteps)):
        return None
    changed = _replaced(first), _replaced(second)
    if (changed[0].keys() & changed[1].keys()) - {"check"}:
        return None
    steps = changed[0] | changed[1]
    if "check" in changed[0].keys() & changed[1].keys():
        steps["check"] = lambda a: changed[1]["check"](changed[0]["check"](a))
    return replace(
        first,
        name=f"{first.name} + {second.name}",
        title=f"{first.title}, and {second.title}",
        clauses=tuple(dict.fromkeys((*first.clauses, *second.clauses))),
        steps=replace(first.steps, **steps),
        needs=(),
        functions=tuple(dict.fromkeys((*first.functions, *second.functions))),
        convention=None,
        bugs=(),
        native=first.native or second.native,
        compared=next((m.compared for m in (first, second) if m.compared is not Compared.BY_VALUE), Compared.BY_VALUE),
    )


def _replaced(mistake: Mistake) -> dict[str, Callable[..., Any]]:
    """Return the steps that a mistake replaces."""
    default = LayerSteps() if isinstance(mistake.steps, LayerSteps) else Steps()
    steps = {field.name: getattr(mistake.steps, field.name) for field in fields(default)}
    return {name: step for name, step in steps.items() if step is not getattr(default, name)}

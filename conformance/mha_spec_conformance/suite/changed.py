"""A composition of steps whose results are changed afterwards: the form of a mistake in how results are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .functions import FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy

    from mha_spec.steps import Steps

__all__ = ["Changed"]


@dataclass(frozen=True)
class Changed:
    """The results of `steps` after `change`, which takes the name of a result, the result, and the call's arguments."""

    steps: Steps
    change: Callable[[str, numpy.ndarray, Mapping[str, Any]], numpy.ndarray]

    def of(self, results: Mapping[str, numpy.ndarray], arguments: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
        """Return the changed results, or the allowances at their new places, by name."""
        return {name: self.change(name, array, arguments) for name, array in results.items()}

    def function(self, name: str, over: Callable[[Steps, str], Callable[..., Any]]) -> Callable[..., Any]:
        """Return a function of the specification; `over` returns it for steps alone."""
        unchanged = over(self.steps, name)

        def call(*operands: Any, **keywords: Any) -> Any:
            arguments = {**dict(zip(FUNCTIONS[name].operands, operands, strict=False)), **keywords}
            names = FUNCTIONS[name].returned(keywords)
            returned = unchanged(*operands, **keywords)
            if len(names) == 1:
                return self.change(names[0], returned, arguments)
            return tuple(
                array if array is None else self.change(output, array, arguments)
                for output, array in zip(names, returned, strict=False)
            )

        return call

"""A drawn call as plain data: NumPy expressions for its arrays, and Python values for everything else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Call", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """An array as the NumPy expression that makes it, so that a reproduction script can print the same expression.

    `random` is a generator seeded with `seed`. `marks` puts NaN or infinities into single elements or vectors.
    """

    expression: str
    dtype: str
    seed: int = 0
    marks: tuple[tuple[tuple[int, ...], str], ...] = ()

    def array(self) -> numpy.ndarray:
        """Evaluate the expression and convert the result to `dtype`."""
        names = {"numpy": numpy, "random": numpy.random.default_rng(self.seed)}
        with numpy.errstate(all="ignore"):
            array = numpy.array(eval(self.expression, names)).astype(
                ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
            )
        for place, value in self.marks:
            array[place] = float(value)
        return array

    @property
    def source(self) -> str:
        """Return the Python expression of the array without its marks."""
        random = f"numpy.random.default_rng({self.seed})"
        return f'numpy.array({self.expression.replace("random.", f"{random}.")}).astype("{self.dtype}")'


@dataclass(frozen=True)
class Call:
    """A call of a function of the specification in a dtype.

    Attributes:
        function: The function, by its name.
        dtype: The dtype of the run.
        recipes: The arrays by argument name.
        options: The Python arguments by name.
        lse: True if the call also returns the log-sum-exp.
        host: Names of arrays that are passed as host data, with their form: "list" or "numpy".
        layouts: Names of arrays that do not have the plain memory layout, with their layout.
        reused: True if a second call with other numbers follows, which must not change the results of the first.
    """

    function: str
    dtype: str
    recipes: Mapping[str, Recipe]
    options: Mapping[str, Any] = field(default_factory=dict)
    lse: bool = False
    host: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    reused: bool = False

    @cached_property
    def arrays(self) -> dict[str, numpy.ndarray]:
        """The arrays by argument name."""
        return {name: recipe.array() for name, recipe in self.recipes.items()}

    @property
    def size(self) -> tuple[int, int]:
        """Return the numbers of arguments and of elements; a smaller call shows a fault better."""
        names = len(self.recipes) + len(self.options) + len(self.host) + len(self.layouts) + self.reused + self.lse
        return names, sum(array.size for array in self.arrays.values())

    def varied(self, step: int, *, numbers: bool = False) -> Call:
        """Return a call of the same shapes and options over other random numbers; with `numbers`, other options too."""
        recipes = {name: replace(recipe, seed=recipe.seed + 1000 * step) for name, recipe in self.recipes.items()}
        options = {**self.options, **self._other_numbers(step)} if numbers else self.options
        return replace(self, recipes=recipes, options=options) if step else self

    def _other_numbers(self, step: int) -> dict[str, Any]:
        """Return other legal numbers for the options that are numbers; an offset moves towards 0, within its limits."""
        offset = self.options.get("q_offset")
        towards_zero = -step if isinstance(offset, int) and offset > 0 else step
        changes = {"q_offset": towards_zero, "scale": step / 4, "softcap": step / 2}
        return {
            name: self.options[name] + change
            for name, change in changes.items()
            if isinstance(self.options.get(name), (int, float))
        }

"""merge_attention_vjp: gradients of halves with unlike shares, some of them empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import ALL_DTYPES, Input

from .merges import RELATIONS, SHAPES, describe_merge, halves, halves_of, one_empty
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from description import Description

    Inputs = dict[str, Input]

FUNCTION = "merge_attention_vjp"
SHARED = (
    *("unlike", "unlike-swapped", "equal", "far-apart", "low", "high", "one-empty", "one-empty-garbage", "both-empty"),
    *("nan", "nan-beside-empty", "infinite", "infinite-beside-empty", "underflow", "underflow-garbage", "lse-float32"),
)
"""Relations of the halves in `merges` whose gradients are asked for."""

COARSE = ("far-apart", "underflow", "underflow-garbage")
"""Relations for which the gradients of lse are too inaccurate in bfloat16."""


def descriptions() -> Iterator[Description]:
    """Yield each relation of the halves at three shapes, then cases of the cotangents."""
    for label, shape in SHAPES.items():
        for name in SHARED:
            title, clauses, change = RELATIONS[name]
            inputs = {**_cotangents(shape), **halves_of(name, change(halves(shape)))}
            dtypes = ALL_DTYPES[:3] if name in COARSE else ALL_DTYPES
            yield _case(f"{name}/{label}", title, clauses, inputs, dtypes)
        for name, (title, clauses, change_inputs) in _COTANGENTS.items():
            inputs = {**_cotangents(shape), **halves_of("unlike", halves(shape))}
            yield _case(f"{name}/{label}", title, clauses, change_inputs(inputs))


def _case(
    name: str, title: str, clauses: tuple[str, ...], inputs: Inputs, dtypes: tuple[str, ...] = ALL_DTYPES
) -> Description:
    return describe_merge(FUNCTION, name, title, ("MHA-MERGE-7", *clauses), inputs, dtypes)


def _cotangents(shape: tuple[int, ...]) -> Inputs:
    """Return a pattern over the components plus smaller data of each row, so that sums over components stay large."""
    pattern = bell(shape[-1:], 2.0**-4, "merged cotangent")
    grad_output = bell(shape, 2.0**-5, "grad of merged output") + pattern
    return {"grad_output": Input(grad_output), "grad_lse": Input(bell(shape[:-1], 2.0**-3, "grad of lse"), "softmax")}


def _without_grad_lse(inputs: Inputs) -> Inputs:
    return {name: item for name, item in inputs.items() if name != "grad_lse"}


def _in_dtype(dtype: str) -> Callable[[Inputs], Inputs]:
    """Return a cotangent of one dtype in every run; a wide one has digits that a narrow operand rounds."""

    def change(inputs: Inputs) -> Inputs:
        values = inputs["grad_output"].values + {"float64": 2.0**-40, "float32": 2.0**-19}.get(dtype, 0.0)
        return {**inputs, "grad_output": Input(values, dtype)}

    return change


def _wide_beside_empty(inputs: Inputs) -> Inputs:
    """Yield float64 cotangents of both results, which are rounded if the other half is empty."""
    arrays = {name: item.values for name, item in inputs.items() if not name.startswith("grad_")}
    emptied = halves_of("one-empty", one_empty(numpy.nan)(arrays))
    cotangents = {name: Input(inputs[name].values + 2.0**-40, "float64") for name in ("grad_output", "grad_lse")}
    return {**inputs, **emptied, **cotangents}


def _alone(name: str) -> Callable[[Inputs], Inputs]:
    """Yield cases with only this cotangent in every other row."""

    def change(inputs: Inputs) -> Inputs:
        other = "grad_lse" if name == "grad_output" else "grad_output"
        values = inputs[other].values.copy()
        values[:, :, ::2] = 0
        return {**inputs, other: Input(values, inputs[other].dtype)}

    return change


_COTANGENTS: dict[str, tuple[str, tuple[str, ...], Callable[[Inputs], Inputs]]] = {
    "without-grad-lse": ("No cotangent of the lse: it counts as 0.", (), _without_grad_lse),
    "grad-output-alone": ("Rows whose lse has a cotangent of 0.", (), _alone("grad_output")),
    "grad-lse-alone": ("Rows whose output has a cotangent of 0.", (), _alone("grad_lse")),
    "grad-output-float64": ("A float64 cotangent, whose digits the gradients round.", (), _in_dtype("float64")),
    "grad-output-float32": ("A float32 cotangent beside outputs of every dtype.", (), _in_dtype("float32")),
    "grad-output-bfloat16": ("A bfloat16 cotangent beside outputs of every dtype.", (), _in_dtype("bfloat16")),
    "wide-beside-empty": ("Float64 cotangents come back rounded beside an empty half.", (), _wide_beside_empty),
}

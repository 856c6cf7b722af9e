"""merge_attention: two halves of a softmax, with unlike shares, either or both of which may be empty.

`merge_gradients` uses the same relations of the halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import ALL_DTYPES, Description, Input

from .sizes import PRIME, head_size
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RELATIONS", "SHAPES", "describe_merge", "descriptions", "halves", "halves_of", "one_empty"]

Halves = dict[str, numpy.ndarray]

SHAPES = {"prime": PRIME.output, "size-64": head_size(64).output, "size-128": head_size(128).output}
"""The shapes of the outputs."""

FEATURES = {"merge_attention": ("merge",), "merge_attention_vjp": ("merge", "vjp")}


def descriptions() -> Iterator[Description]:
    """Yield each relation of the two halves at three shapes."""
    for label, shape in SHAPES.items():
        for name, (title, clauses, change) in RELATIONS.items():
            inputs = halves_of(name, change(halves(shape)))
            yield describe_merge("merge_attention", f"{name}/{label}", title, ("MHA-MERGE-1", *clauses), inputs)


def describe_merge(
    function: str,
    name: str,
    title: str,
    clauses: tuple[str, ...],
    inputs: dict[str, Input],
    dtypes: tuple[str, ...] = ALL_DTYPES,
) -> Description:
    """Describe one case of merging or of its gradients."""
    return Description(
        id=f"{function}/{name}",
        title=title,
        function=function,
        clauses=tuple(dict.fromkeys(clauses)),
        features=FEATURES[function],
        inputs=inputs,
        tags=("generic",) if name.startswith("unlike") else ("structured",),
        dtypes=dtypes,
    )


def halves_of(name: str, arrays: Halves) -> dict[str, Input]:
    """Return the halves of a relation as inputs; an lse has the softmax's type unless the relation names another."""
    type_of_lse = "float32" if name == "lse-float32" else "softmax"
    return {part: Input(array, type_of_lse if part.startswith("lse") else "case") for part, array in arrays.items()}


def halves(shape: tuple[int, ...]) -> Halves:
    """Return two halves of random data, of which the second has the larger share."""
    return {
        "output_a": bell(shape, 2.0**-3, "output a"),
        "lse_a": bell(shape[:-1], 2.0**-3, "lse a"),
        "output_b": bell(shape, 2.0**-3, "output b"),
        "lse_b": bell(shape[:-1], 2.0**-3, "lse b") + 0.5,
    }


def _every(array: numpy.ndarray, step: int, start: int = 0) -> numpy.ndarray:
    return (numpy.arange(array.size).reshape(array.shape) + start) % step == 0


def _unlike(h: Halves) -> Halves:
    return h


def _far_apart(h: Halves) -> Halves:
    return {
        **h,
        "lse_b": h["lse_a"]
        + 2.0 ** (numpy.arange(h["lse_a"].size).reshape(h["lse_a"].shape) % 9)
        * numpy.where(_every(h["lse_a"], 2), -1, 1),
    }


def _shifted(by: float) -> Callable[[Halves], Halves]:
    return lambda h: {**h, "lse_a": h["lse_a"] + by, "lse_b": h["lse_b"] + by}


def one_empty(garbage: float) -> Callable[[Halves], Halves]:
    """Empty half a of every third row and half b of every third row; an empty half holds garbage."""

    def change(h: Halves) -> Halves:
        empty = {"a": _every(h["lse_a"], 3), "b": _every(h["lse_b"], 3, 1)}
        emptied = {f"lse_{half}": numpy.where(where, -numpy.inf, h[f"lse_{half}"]) for half, where in empty.items()}
        outputs = {
            f"output_{half}": numpy.where(where[..., None], garbage, h[f"output_{half}"])
            for half, where in empty.items()
        }
        return {
            "output_a": outputs["output_a"],
            "lse_a": emptied["lse_a"],
            "output_b": outputs["output_b"],
            "lse_b": emptied["lse_b"],
        }

    return change


def _both_empty(h: Halves) -> Halves:
    where = _every(h["lse_a"], 4)
    return {
        "output_a": numpy.where(where[..., None], numpy.nan, h["output_a"]),
        "lse_a": numpy.where(where, -numpy.inf, h["lse_a"]),
        "output_b": h["output_b"],
        "lse_b": numpy.where(where, -numpy.inf, h["lse_b"]),
    }


def _nan(h: Halves) -> Halves:
    return {
        **h,
        "lse_a": numpy.where(_every(h["lse_a"], 5), numpy.nan, h["lse_a"]),
        "lse_b": numpy.where(_every(h["lse_b"], 7), numpy.nan, h["lse_b"]),
    }


def _sink(h: Halves) -> Halves:
    return {**h, "output_b": 0 * h["output_b"], "lse_b": h["lse_b"] + 1}


def _equal(h: Halves) -> Halves:
    return {**h, "lse_b": h["lse_a"].copy()}


def _marked(value: float, *, beside_empty: bool) -> Callable[[Halves], Halves]:
    """Set lse to `value` in half a of every third row and in half b of every third; the other half may be empty."""

    def change(h: Halves) -> Halves:
        lses = {"lse_a": h["lse_a"].copy(), "lse_b": h["lse_b"].copy()}
        for start, (marked, other) in enumerate((("lse_a", "lse_b"), ("lse_b", "lse_a"))):
            where = _every(h["lse_a"], 3, start)
            lses[marked][where] = value
            if beside_empty:
                lses[other][where] = -numpy.inf
        return {**h, **lses}

    return change


def _underflow(h: Halves) -> Halves:
    """Lower the lse of every other row so far that its share underflows in float64."""
    where = _every(h["lse_a"], 2)
    return {**h, "lse_a": numpy.where(where, h["lse_a"] - 1000.0, h["lse_a"])}


def _underflow_garbage(h: Halves) -> Halves:
    """Make some components infinite or NaN, in a row whose share underflows and in an ordinary row."""
    far = _underflow(h)
    output_a, output_b = h["output_a"].copy(), h["output_b"].copy()
    output_a[:, 0, :, 1] = numpy.nan
    output_a[0, :, 0, 2] = numpy.inf
    output_b[0, 1, 0, 0] = -numpy.inf
    return {**far, "output_a": output_a, "output_b": output_b}


RELATIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Halves], Halves]]] = {
    "unlike": ("Two halves of unlike weight.", ("MHA-LSE-1",), _unlike),
    "unlike-swapped": (
        "The same halves in the other order.",
        (),
        lambda h: dict(zip(h, [*list(h.values())[2:], *list(h.values())[:2]], strict=True)),
    ),
    "equal": ("Two halves of the same weight.", (), _equal),
    "far-apart": ("Halves whose lse differ by 1 to 256, either way.", (), _far_apart),
    "low": ("Halves whose lse lie near -1000, where exp underflows.", (), _shifted(-1000.0)),
    "high": ("Halves whose lse lie near 1000, where exp overflows.", (), _shifted(1000.0)),
    "one-empty": (
        "Rows of which one half is empty: the other comes back unchanged.",
        ("MHA-MERGE-2",),
        one_empty(0.0),
    ),
    "one-empty-garbage": ("An empty half whose output is NaN adds nothing.", ("MHA-MERGE-2",), one_empty(numpy.nan)),
    "both-empty": ("Two empty halves give 0 and -inf.", ("MHA-MERGE-3",), _both_empty),
    "nan": ("A NaN lse gives NaN.", ("MHA-MERGE-3",), _nan),
    "nan-beside-empty": (
        "A NaN lse beside an empty half gives NaN too.",
        ("MHA-MERGE-3",),
        _marked(numpy.nan, beside_empty=True),
    ),
    "infinite": (
        "An lse of +inf beside a half that is not empty gives NaN.",
        ("MHA-MERGE-5",),
        _marked(numpy.inf, beside_empty=False),
    ),
    "infinite-beside-empty": (
        "An lse of +inf beside an empty half is returned as it is.",
        ("MHA-MERGE-2", "MHA-MERGE-5"),
        _marked(numpy.inf, beside_empty=True),
    ),
    "underflow": ("Halves of which one has a share that underflows to 0.", (), _underflow),
    "underflow-garbage": (
        "A component that is not finite makes its component non-finite, though its share underflows to 0.",
        ("MHA-MERGE-6",),
        _underflow_garbage,
    ),
    "lse-float32": ("Both lse in float32, beside outputs of every dtype.", ("MHA-MERGE-4",), _unlike),
    "sink": ("A sink is a half of output 0.", ("MHA-SINK-1",), _sink),
}

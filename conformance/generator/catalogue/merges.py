"""merge_attention: two halves of one softmax, of unlike weight, of which one or both may be empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from description import Description, Input

from .sizes import PRIME, head_size
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Halves = dict[str, numpy.ndarray]


def descriptions() -> Iterator[Description]:
    """Each relation of the two halves at three shapes."""
    for label, shape in (
        ("prime", PRIME.output),
        ("size-64", head_size(64).output),
        ("size-128", head_size(128).output),
    ):
        for name, (title, clauses, change) in _RELATIONS.items():
            halves = change(_halves(shape))
            yield Description(
                id=f"merge_attention/{name}/{label}",
                title=title,
                function="merge_attention",
                clauses=("MHA-MERGE-1", *clauses),
                features=("merge",),
                inputs={
                    part: Input(array, "softmax" if part.startswith("lse") else "case")
                    for part, array in halves.items()
                },
                tags=("generic",) if name.startswith("unlike") else ("structured",),
            )


def _halves(shape: tuple[int, ...]) -> Halves:
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


def _one_empty(garbage: float) -> Callable[[Halves], Halves]:
    """Every third row lacks half a, every third half b; an empty half holds garbage."""

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


_RELATIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Halves], Halves]]] = {
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
        _one_empty(0.0),
    ),
    "one-empty-garbage": ("An empty half whose output is NaN adds nothing.", ("MHA-MERGE-2",), _one_empty(numpy.nan)),
    "both-empty": ("Two empty halves give 0 and -inf.", ("MHA-MERGE-3",), _both_empty),
    "nan": ("A NaN lse gives NaN.", ("MHA-MERGE-3",), _nan),
    "sink": ("A sink is a half of output 0.", ("MHA-SINK-1",), _sink),
}

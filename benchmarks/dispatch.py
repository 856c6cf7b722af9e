"""Measure the time that `mha_spec.attention` adds to a call of the backend.

The checks of library, dtype, rank and device of the three tensors, which every backend must make, are printed too.

Run `python -P benchmarks/dispatch.py`. It prints the minima of many short runs, and never fails.
"""

from __future__ import annotations

import timeit
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import numpy

import mha_spec
from mha_spec import selection
from mha_spec.arguments import Arguments
from mha_spec.checks import check_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

CALLS = 2000
RUNS = 400


def microseconds(function: Callable[[], object]) -> float:
    """Return the least time of a call, over many runs."""
    return min(timeit.repeat(function, number=CALLS, repeat=RUNS)) / CALLS * 1e6


def idle() -> ModuleType:
    """Make a backend that does nothing."""

    def attention(query: object, key: object, value: object, *, return_lse: bool = False, **options: object) -> None:
        """Do nothing."""

    module = ModuleType("idle")
    vars(module)["attention"] = attention
    return module


def tensors() -> dict[str, object]:
    """Make a small tensor of each library that is installed."""
    x = numpy.zeros((1, 1, 1, 1), dtype=numpy.float32)
    makers = {"torch": "torch", "jax": "jax.numpy", "tensorflow": "tensorflow"}
    arrays: dict[str, object] = {"numpy": x}
    for name, module in makers.items():
        if find_spec(name) is not None:
            library = import_module(module)
            arrays[name] = (library.convert_to_tensor if name == "tensorflow" else library.asarray)(x)
    return arrays


def main() -> None:
    """Print the times of every library, whose class has been looked up before."""
    backend, nothing = idle(), microseconds(lambda: None)
    selection._LOADED[backend.__name__] = backend
    for name, x in tensors().items():
        selection._NAME_OF_CLASS[type(x)] = backend.__name__
        alone = microseconds(lambda x=x: backend.attention(x, x, x, causal=True))
        dispatch = microseconds(lambda x=x: mha_spec.attention(x, x, x, causal=True)) - alone
        arguments = Arguments(x, x, x)
        check = microseconds(lambda a=arguments: check_tensors(a)) - nothing
        print(
            f"{name:<10} dispatch {dispatch:.2f} us, <= 1; "
            f"with the checks of library, dtype, rank and device {dispatch + check:.2f} us"
        )


if __name__ == "__main__":
    main()

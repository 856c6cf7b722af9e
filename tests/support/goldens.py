"""Select goldens, call a library with them, and list the faults of its results."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mha_spec import KVCache
from mha_spec.arrays import Array, device_of, dtype_name, library_of
from mha_spec_conformance.asking.calls import arranged, joined, layer_answers
from mha_spec_conformance.asking.selection import Ask
from mha_spec_conformance.judging.bounds import allowances, precision
from mha_spec_conformance.judging.compare import judge
from mha_spec_conformance.judging.form import dtype_fault, expected_dtypes
from mha_spec_conformance.suite.cases import load
from mha_spec_conformance.targets.conversion import to_library, to_numpy

from .budget import is_small

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy

    from mha_spec_conformance.judging.bounds import Precision
    from mha_spec_conformance.suite.cases import Case
    from mha_spec_conformance.targets.claims import Shards

__all__ = [
    "DIFFERENTIABLE",
    "ENOUGH",
    "LAYER",
    "PER_ENTRY",
    "Arguments",
    "alike",
    "arguments_of",
    "cases",
    "cases_with_each",
    "compiled",
    "failures",
    "layer_failures",
    "layers_alike",
    "names",
    "split_arguments",
    "spread",
]

Arguments = dict[str, Any]
ENOUGH = 50
"""The least number of goldens that are asked in each world."""
MOST_ALIKE = 6
"""The largest number of cases of the same signature."""
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
PER_ENTRY = (
    *("q_offset", "prefix_lengths", "q_lengths", "kv_lengths", "kv_starts"),
    *("q_segment_ids", "kv_segment_ids", "cache_lengths", "positions"),
)
"""Integers that may lie on the host."""
HOST = {None, "numpy"}
"""The libraries of arguments that no framework traces."""
LAYER = ("multi_head_attention", "multi_head_attention_weights", "rotary_embedding")


@lru_cache
def cases(*functions: str) -> tuple[Case, ...]:
    """Return the small cases of these functions that have an answer."""
    return tuple(case for case in _suite() if case.function in functions and case.expect == "values" and is_small(case))


@lru_cache(maxsize=1)
def _suite() -> tuple[Case, ...]:
    return load().cases


def names(case: Case) -> set[str]:
    """Return the names of the inputs and options of a case."""
    return {*case.options, *case.input_names}


def spread(function: str, at_least: int = ENOUGH) -> list[Case]:
    """Choose cases of a function, evenly spread, so that every input and option occurs."""
    everything = cases(function)
    some = list(everything[:: max(1, len(everything) // at_least)])
    missing = set().union(*map(names, everything)).difference(*map(names, some))
    some += [next(case for case in everything if name in names(case)) for name in sorted(missing)]
    assert len(some) >= at_least
    return some


def cases_with_each(functions: Iterable[str], *wanted: str) -> list[Case]:
    """Choose for each of these inputs and options, by default for all, a case of every function that has it."""
    choices = [cases(function) for function in functions]
    asked = wanted or sorted({name for some in choices for case in some for name in names(case)})
    firsts = (next((case for case in some if name in names(case)), None) for name in asked for some in choices)
    return list({case.id: case for case in firsts if case is not None}.values())


def alike(function: str, at_least: int = ENOUGH, *, without: Iterable[str] = ()) -> list[Case]:
    """Choose cases of a function, ordered by signature, so that every name occurs.

    They have few signatures, because a framework compiles for each.
    """
    left = [group for group in _groups(function) if not names(group[0]).intersection(without)]
    missing = {name for group in left for name in names(group[0])}
    some: list[Case] = []
    while left and (missing or len(some) < at_least):
        best = max(left, key=lambda group: (len(names(group[0]) & missing), len(group)))
        left.remove(best)
        some += best
        missing -= names(best[0])
    return some


def layers_alike(at_least: int = ENOUGH) -> list[Case]:
    """Choose cases of the layer's functions by `alike`."""
    some = [case for function in LAYER for case in alike(function, at_least // len(LAYER))]
    assert len(some) >= at_least
    return some


@lru_cache
def _groups(function: str) -> list[list[Case]]:
    """Group the cases of a function by signature, except those without batch entries or queries to map over."""
    groups: dict[object, list[Case]] = {}
    for case in cases(function):
        first = next(name for name in ("query", "x", "output_a") if name in case.input_names)
        if 0 not in case.inputs(case.dtypes[0])[first].shape:
            groups.setdefault(case.signature, []).append(case)
    return sorted((group[:MOST_ALIKE] for group in groups.values()), key=len)


def arguments_of(case: Case, dtype: str, library: str, host: Iterable[str] = ()) -> Arguments:
    """Return the arrays and options of a case; the arrays named in `host` stay NumPy arrays."""
    options = {name: tuple(value) if name == "window" else value for name, value in case.options.items()}
    arrays = case.inputs(dtype).items()
    return {name: array if name in host else to_library(array, library) for name, array in arrays} | options


def split_arguments(arguments: Mapping[str, Any]) -> tuple[Arguments, Arguments]:
    """Separate the arguments that a framework traces, its arrays and caches, from the rest."""
    traced = {name for name, value in arguments.items() if isinstance(value, KVCache) or library_of(value) not in HOST}
    arrays = {name: value for name, value in arguments.items() if name in traced}
    return arrays, {name: value for name, value in arguments.items() if name not in traced}


def compiled(compiler: Callable[[Callable[..., Any]], Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a call once for each set of plain options; the arrays are arguments of the program."""
    programs: dict[str, Callable[..., Any]] = {}

    def asked(*operands: Any, **keywords: Any) -> Any:
        arrays, rest = split_arguments(keywords)
        if repr(rest) not in programs:
            programs[repr(rest)] = compiler(lambda operands, arrays: call(*operands, **arrays, **rest))
        return programs[repr(rest)](operands, arrays)

    return asked


def failures(
    library: str,
    some: Iterable[Case],
    ask: Callable[..., Mapping[str, Array]],
    *dtypes: str,
    host: Iterable[str] = (),
    shards: Shards | None = None,
) -> list[str]:
    """Call `ask` with the arguments of each case as keywords, and list the faults of the results."""
    return _failures(library, some, dtypes, host, lambda _, arguments: [ask(**arguments)], shards)


def layer_failures(
    library: str,
    some: Sequence[Case],
    *dtypes: str,
    wrapped: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
    host: Iterable[str] = (),
) -> list[str]:
    """Call the functions of a backend's layer, each wrapped, and list the faults of the results."""
    backend = import_module(f"mha_spec_{library}")
    calls = {function: wrapped(getattr(backend, function)) for function in {case.function for case in some}}

    def ask(function: str, arguments: Arguments) -> list[dict[str, Array]]:
        if function != "rotary_embedding":
            return list(layer_answers(calls[function], function, arguments))
        operands, keywords = arranged(function, arguments)
        return [{"output": calls[function](*operands, **keywords)}]

    return _failures(library, some, dtypes, host, ask)


def _failures(
    library: str,
    some: Iterable[Case],
    dtypes: Sequence[str],
    host: Iterable[str],
    ask: Callable[[str, Arguments], Sequence[Mapping[str, Array]]],
    shards: Shards | None = None,
) -> list[str]:
    asked = [(case, dtype) for case in some for dtype in dtypes if dtype in case.dtypes]
    assert asked
    faults: list[str] = []
    for case, dtype in asked:
        arguments = arguments_of(case, dtype, library, host)
        fault = _fault(case, precision(dtype, shards=shards), library, arguments, ask(case.function, arguments))
        faults += [] if fault is None else [f"{case.id} {dtype}: {fault}"]
    return faults


def _fault(
    case: Case, run: Precision, library: str, arguments: Arguments, parts: Sequence[Mapping[str, Array]]
) -> str | None:
    """Describe the first fault, or return None; check library, device and dtype of each output before its values."""
    ask = Ask(case, run.dtype, ())
    first = next(value for value in arguments.values() if library_of(value) == library)
    for name, output in (item for part in parts for item in part.items()):
        allowed = (library, device_of(first)), (library_of(arguments.get(name)), device_of(arguments.get(name)))
        if (library_of(output), device_of(output)) not in allowed:
            return f"`{name}` is an array of {library_of(output)} on {device_of(output)}"
        if dtype_name(output) not in expected_dtypes(ask, name):
            return dtype_fault(ask, name, {name: output})
    outputs = joined([{name: to_numpy(output) for name, output in part.items()} for part in parts])
    wanted = {name: expected for name, expected in case.expected.items() if name in outputs or name != "lse"}
    judgement = judge(case, wanted, outputs, _allowed(case, run), run)
    return None if judgement.passed else str(judgement.reason)


_ALLOWED: dict[tuple[str, Precision], Mapping[str, numpy.ndarray]] = {}


def _allowed(case: Case, run: Precision) -> Mapping[str, numpy.ndarray]:
    """Compute the allowances of a case, once for all worlds."""
    if (case.id, run) not in _ALLOWED:
        _ALLOWED[case.id, run] = allowances(case.function, case.inputs(run.dtype), case.options, run)
    return _ALLOWED[case.id, run]

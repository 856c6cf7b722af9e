"""The goldens as questions to one library: which are asked, as what arrays, and what is wrong with the answers."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy

    from mha_spec_conformance.suite.cases import Case

__all__ = [
    "DIFFERENTIABLE",
    "ENOUGH",
    "LAYER",
    "PER_ENTRY",
    "Arguments",
    "alike",
    "arguments_of",
    "cases",
    "compiled",
    "failures",
    "layer_failures",
    "layers_alike",
    "names",
    "one_of_each",
    "parted",
    "spread",
]

Arguments = dict[str, Any]
ENOUGH = 50
"""How many goldens are asked in each world at least."""
MOST_ALIKE = 6
"""How many cases of one signature are chosen at most."""
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
PER_ENTRY = ("q_offset", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids", "cache_lengths", "positions")
"""Integers that may lie on the host."""
HOST = {None, "numpy"}
"""The libraries of what no framework traces."""
LAYER = ("multi_head_attention", "multi_head_attention_weights", "rotary_embedding")


@lru_cache
def cases(*functions: str) -> tuple[Case, ...]:
    """The cases of some functions that have an answer."""
    return tuple(case for case in _suite() if case.function in functions and case.expect == "values")


@lru_cache(maxsize=1)
def _suite() -> tuple[Case, ...]:
    return load().cases


def names(case: Case) -> set[str]:
    """The inputs and options of a case."""
    return {*case.options, *case.input_names}


def spread(function: str, at_least: int = ENOUGH) -> list[Case]:
    """Some cases of a function, evenly spread, with every input and option among them."""
    found = cases(function)
    some = list(found[:: max(1, len(found) // at_least)])
    missing = set().union(*map(names, found)).difference(*map(names, some))
    some += [next(case for case in found if name in names(case)) for name in sorted(missing)]
    assert len(some) >= at_least
    return some


def one_of_each(functions: Iterable[str], *wanted: str) -> list[Case]:
    """For each name of an input or option, or for each that there is, a case of every function that has it."""
    given = {function: cases(function) for function in functions}
    asked = wanted or sorted({name for some in given.values() for case in some for name in names(case)})
    firsts = (next((case for case in some if name in names(case)), None) for name in asked for some in given.values())
    return list({case.id: case for case in firsts if case is not None}.values())


def alike(function: str, at_least: int = ENOUGH, *, without: Iterable[str] = ()) -> list[Case]:
    """Some cases of a function, those of one signature side by side, with every name among them.

    There are few signatures, each of which a framework compiles for.
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
    """Some cases of the layer's functions, as `alike` has them."""
    some = [case for function in LAYER for case in alike(function, at_least // len(LAYER))]
    assert len(some) >= at_least
    return some


@lru_cache
def _groups(function: str) -> list[list[Case]]:
    """The cases of a function by signature, less those without queries, where there is nothing to map over."""
    groups: dict[object, list[Case]] = {}
    for case in cases(function):
        first = next(name for name in ("query", "x", "output_a") if name in case.input_names)
        if 0 not in case.inputs(case.dtypes[0])[first].shape:
            groups.setdefault(case.signature, []).append(case)
    return sorted((group[:MOST_ALIKE] for group in groups.values()), key=len)


def arguments_of(case: Case, dtype: str, library: str, host: Iterable[str] = ()) -> Arguments:
    """The arguments of a case, some of them as NumPy arrays, with its options."""
    options = {name: tuple(value) if name == "window" else value for name, value in case.options.items()}
    arrays = case.inputs(dtype).items()
    return {name: array if name in host else to_library(array, library) for name, array in arrays} | options


def parted(arguments: Mapping[str, Any]) -> tuple[Arguments, Arguments]:
    """What a framework traces, its arrays alone or in a cache, and all else."""
    libraries = {name: library_of(one) for name, one in arguments.items()}
    traced = {name for name, one in arguments.items() if isinstance(one, KVCache) or libraries[name] not in HOST}
    arrays = {name: one for name, one in arguments.items() if name in traced}
    return arrays, {name: one for name, one in arguments.items() if name not in traced}


def compiled(compiler: Callable[[Callable[..., Any]], Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """A program for each set of plain options, to which all else is an argument."""
    programs: dict[str, Callable[..., Any]] = {}

    def asked(*operands: Any, **keywords: Any) -> Any:
        arrays, rest = parted(keywords)
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
) -> list[str]:
    """What is wrong with the answers to some cases, whose arguments are the keywords."""
    return _failures(library, some, dtypes, host, lambda _, arguments: [ask(**arguments)])


def layer_failures(
    library: str,
    some: Sequence[Case],
    *dtypes: str,
    wrapped: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
    host: Iterable[str] = (),
) -> list[str]:
    """What is wrong with the answers of a backend's layer to some cases, each of its functions wrapped."""
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
) -> list[str]:
    asked = [(case, dtype) for case in some for dtype in dtypes if dtype in case.dtypes]
    assert asked
    found: list[str] = []
    for case, dtype in asked:
        arguments = arguments_of(case, dtype, library, host)
        wrong = _wrong(case, dtype, library, arguments, ask(case.function, arguments))
        found += [] if wrong is None else [f"{case.id} {dtype}: {wrong}"]
    return found


def _wrong(
    case: Case, dtype: str, library: str, arguments: Arguments, parts: Sequence[Mapping[str, Array]]
) -> str | None:
    """What is wrong with an answer, if anything is: library, device and dtype of each output first, then its values."""
    ask = Ask(case, dtype, ())
    first = next(one for one in arguments.values() if library_of(one) == library)
    for name, output in (item for part in parts for item in part.items()):
        given = (library, device_of(first)), (library_of(arguments.get(name)), device_of(arguments.get(name)))
        if (library_of(output), device_of(output)) not in given:
            return f"`{name}` is an array of {library_of(output)} on {device_of(output)}"
        if dtype_name(output) not in expected_dtypes(ask, name):
            return dtype_fault(ask, name, {name: output})
    outputs = joined([{name: to_numpy(one) for name, one in part.items()} for part in parts])
    wanted = {name: expected for name, expected in case.expected.items() if name in outputs or name != "lse"}
    judgement = judge(case, wanted, outputs, _allowed(case, dtype), precision(dtype))
    return None if judgement.passed else str(judgement.reason)


_ALLOWED: dict[tuple[str, str], Mapping[str, numpy.ndarray]] = {}


def _allowed(case: Case, dtype: str) -> Mapping[str, numpy.ndarray]:
    """How far the outputs of a case may be off, worked out once for all worlds."""
    if (case.id, dtype) not in _ALLOWED:
        _ALLOWED[case.id, dtype] = allowances(case.function, case.inputs(dtype), case.options, precision(dtype))
    return _ALLOWED[case.id, dtype]

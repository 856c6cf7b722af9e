"""Write a script that reproduces a fault: the imports, the arrays, the call, and an assertion on the worst element."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.selection import backend_names, backend_origin
from mha_spec_conformance.asking.calls import BLOCK_TABLE, CACHE, WINDOW_CACHE, is_parameter
from mha_spec_conformance.judging.compare import EXACT, FINITE, NAN
from mha_spec_conformance.suite.functions import FUNCTIONS

if TYPE_CHECKING:
    from .call import Call
    from .search import Finding

__all__ = ["script_of"]

LAYOUTS = {
    "strided": "numpy.repeat({x}, 2, axis=-1)[..., ::2]",
    "transposed": "{x}.swapaxes({axes}).copy().swapaxes({axes})",
    "tokens_first": "{x}.swapaxes({axes}).copy().swapaxes({axes})",
    "fortran": "{x}.copy(order='F')",
    "reversed": "numpy.flip(numpy.flip({x}).copy())",
    "expanded": "expanded({x})",
}
"""NumPy expressions of the same array in another memory layout."""

EXPANDED = """\
def expanded(x):
    small = x
    for axis in range(x.ndim):
        first = small[(slice(None),) * axis + (slice(0, 1),)]
        small = first if first.size and (first == small).all() else small
    small = small.copy()
    return numpy.lib.stride_tricks.as_strided(small, x.shape, numpy.broadcast_to(small, x.shape).strides)"""

TO_LIBRARY = {
    "torch": """\
def array(x):
    return torch.from_numpy(x.view("int16")).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)""",
    "jax": "array = jax.numpy.asarray",
    "tensorflow": "array = tensorflow.convert_to_tensor",
}
TO_NUMPY = {"torch": "{x}.detach().double().numpy()"}


def script_of(finding: Finding, target: str, arrays: str, world: str | None = None) -> str:
    """Return the script of a finding, for a target whose arrays are of the library `arrays`."""
    call = finding.call
    lines = ["import ml_dtypes  # for bfloat16"] if _has_bfloat16(call) else []
    lines += ["import numpy"]
    if arrays == "jax":
        lines += ["import jax", 'jax.config.update("jax_enable_x64", True)']
    elif arrays != "numpy":
        lines += [f"import {arrays}"]
    lines += _import(target, call.function, world)
    lines += [f"from mha_spec import {_kind_of_cache(call)}"] * (CACHE[0] in call.recipes)
    lines += [EXPANDED] * ("expanded" in call.layouts.values())
    lines += [TO_LIBRARY[arrays]] if arrays in TO_LIBRARY else []
    lines += [line for name in call.recipes for line in _array(call, name, arrays)]
    lines += _call(finding, arrays)
    return "\n".join(lines)


def _has_bfloat16(call: Call) -> bool:
    return any(recipe.dtype == "bfloat16" for recipe in call.recipes.values())


def _import(target: str, function: str, world: str | None) -> list[str]:
    if world is not None:
        return [
            "from mha_spec_conformance.fuzzing.worlds import load_in_world",
            f'{function} = load_in_world("{target}", "{world}").functions["{function}"]',
        ]
    if target in backend_names():
        return [f"from {backend_origin(target)[0]} import {function}"]
    place, _, name = target.rpartition(":") if ":" in target else (target, "", function)
    if not place.endswith(".py"):
        return [f"from {place} import {name} as {function}"]
    folder = str(Path(place).resolve().parent)
    return ["import sys", f"sys.path.append({folder!r})", f"from {Path(place).stem} import {name} as {function}"]


def _array(call: Call, name: str, arrays: str) -> list[str]:
    """Write the lines that make an array and convert it to the form in which the call passes it."""
    recipe, host = call.passed[name], call.host.get(name)
    layout, ndim = call.layouts.get(name), call.arrays[name].ndim
    axes = {"transposed": "-1, -2", "tokens_first": "1, 2"}.get(layout or "", "") if ndim == 4 else "0, -1"
    changes = [f"{name}[{', '.join(map(str, place))}] = float({value!r})" for place, value in recipe.marks]
    changes += [f"{name} = {LAYOUTS[layout].format(x=name, axes=axes)}"] if layout in LAYOUTS and ndim else []
    changes += [f"{name}.flags.writeable = False"] if layout == "read_only" else []
    to_library = "{}" if arrays == "numpy" or host == "numpy" else "array({})"
    to_library = "{}.tolist()" if host == "list" else to_library
    if not changes:
        return [f"{name} = {to_library.format(recipe.source)}"]
    last = [] if to_library == "{}" else [f"{name} = {to_library.format(name)}"]
    return [f"{name} = {recipe.source}", *changes, *last]


def _arguments(call: Call) -> str:
    """Write the arguments of the call."""
    words: dict[str, str] = {name: name for name in call.recipes} | {n: repr(v) for n, v in call.options.items()}
    words.pop("chunks", None)
    words.pop("drafts", None)
    if FUNCTIONS[call.function].of_layer:
        parameters = [name for name in call.recipes if is_parameter(name)]
        inner = ", ".join(f'"{name}": {words.pop(name)}' for name in parameters)
        words["params"] = f"{{{inner}}}"
        if CACHE[0] in words:
            arrays = ", ".join(words.pop(name) for name in (*CACHE, BLOCK_TABLE) if name in words)
            words["cache"] = f"{_kind_of_cache(call)}({arrays})"
            words.pop(WINDOW_CACHE, None)
    operands = [words.pop(name, "None") for name in FUNCTIONS[call.function].operands]
    words |= {"return_lse": "True"} if call.lse else {}
    return ", ".join([*operands, *(f"{name}={value}" for name, value in words.items())])


def _kind_of_cache(call: Call) -> str:
    """Name the class of the cache that the call takes."""
    if BLOCK_TABLE in call.recipes:
        return "PagedKVCache"
    return "WindowKVCache" if WINDOW_CACHE in call.options else "KVCache"


def _call(finding: Finding, arrays: str) -> list[str]:
    call, result = finding.call, finding.result
    lines = [f"# {chunk}" for chunk in _chunks(call)]
    lines += [f"results = {call.function}({_arguments(call)})"]
    worst = result.worst
    if worst is None or result.outcome not in ("fail", "deviation"):
        return [*lines, f"print(results)  # {' '.join((result.reason or '').split())[:90]}"]
    index = _index_of(call, worst.output)
    output = f"results[{index}]" if index is not None else "results"
    got = TO_NUMPY.get(arrays, 'numpy.asarray({x}).astype("float64")').format(x=output)
    lines += [f"got = {got}[{', '.join(map(str, worst.index)) or '()'}]"]
    kind, expected = finding.kind, worst.expected
    wanted = {NAN: "NaN", FINITE: f"{expected!r} within {worst.allowance:.3g}", EXACT: f"exactly {expected!r}"}
    lines += [
        f'print("{worst.output}{list(worst.index)} is", got, "and must be {wanted.get(kind, "NaN or infinite")}")'
    ]
    checks: dict[Any, str] = {
        NAN: "numpy.isnan(got)",
        FINITE: f"abs(got - {expected!r}) <= {worst.allowance!r}",
        EXACT: f"got == {_number(expected)}",
    }
    return [*lines, f"assert {checks.get(kind, 'not numpy.isfinite(got)')}"]


def _number(value: float) -> str:
    return repr(value) if numpy.isfinite(value) else f'float("{value}")'


def _chunks(call: Call) -> list[str]:
    chunks = call.options.get("chunks")
    if chunks is None:
        return []
    return [f"the suite makes consecutive calls over {chunks} tokens, each with the cache of the previous call"]


def _index_of(call: Call, output: str) -> int | None:
    """Return the index of an output in the returned tuple, or None if the function returns a single array."""
    outputs = FUNCTIONS[call.function].returned({"return_lse": call.lse, "cache": CACHE[0] in call.recipes})
    return outputs.index(output) if len(outputs) > 1 and output in outputs else None

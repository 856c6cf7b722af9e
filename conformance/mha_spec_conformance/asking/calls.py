"""Turn a question, which holds plain arrays by name, into calls, and name the results of the calls.

The layer takes `params`, a mapping of arrays, and a cache of three arrays, (key, value, lengths); in a question each of
these arrays is named. With `cache_block_table` the cache is a PagedKVCache, whose fourth array is the table, and with
`window_cache` a WindowKVCache. A question with `chunks` is a sequence of calls: each call takes the next tokens and
the cache that the previous call returned, and the outputs are joined. With `drafts`, each cache is also continued
with other tokens and the results are discarded, which must change nothing because a cache is a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.cache import KVCache, PagedKVCache, WindowKVCache
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps
from mha_spec.parameters import AXES
from mha_spec.reference import Reference
from mha_spec.steps import Steps
from mha_spec.varlen_reference import Varlen, VarlenSteps
from mha_spec_conformance.suite.changed import Changed
from mha_spec_conformance.suite.functions import FUNCTIONS, STACKED
from mha_spec_conformance.suite.joined import Joined
from mha_spec_conformance.targets.conversion import described

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from mha_spec.arrays import Array
    from mha_spec.cache import AnyCache

    Arguments = Mapping[str, Any]
    AnySteps = Steps | LayerSteps | VarlenSteps

__all__ = [
    "BLOCK_TABLE",
    "CACHE",
    "WINDOW_CACHE",
    "MalformedResult",
    "arranged",
    "function_over",
    "is_parameter",
    "joined",
    "keyword_of",
    "layer_answers",
    "layer_over",
    "named",
    "stacked_operand",
    "varlen_over",
    "with_contiguous_cache",
]

CACHE = ("cache_key", "cache_value", "cache_lengths")
"""The arrays of a cache, in its order."""

BLOCK_TABLE, WINDOW_CACHE = "cache_block_table", "window_cache"
"""The array of a paged cache, and the option of a cache whose slots wrap."""

TOKENS = ("query", "key", "value")
PER_QUERY = ("mask", "bias", "dropout_mask")
"""Options with an axis of queries, which is split with them."""

ARGUMENT_OF = {
    **dict.fromkeys((*CACHE, "chunks", "drafts"), "cache"),
    BLOCK_TABLE: "paged_cache",
    **dict.fromkeys(("q_norm", "k_norm"), "norm_epsilon"),
    **dict.fromkeys(("q_joint_norm", "k_joint_norm"), "joint_norm"),
}
"""The argument of the layer that contains an array or option of a question, if their names differ."""

QUERY_AXES = {"weights": 2}
"""The axis of queries in an output of the layer; it is 1 for an output that is not listed."""


class MalformedResult(Exception):
    """A call did not return the results of its function."""


def function_over(steps: AnySteps | Joined | Changed, name: str) -> Callable[..., Any]:
    """Return a function of the specification that is composed of these steps, of attention or of the layer."""
    if isinstance(steps, (Joined, Changed)):
        return steps.function(name, function_over)
    if hasattr(Reference, name):
        return getattr(Reference(steps if isinstance(steps, Steps) else Steps()), name)
    if hasattr(Varlen, name):
        return getattr(Varlen(varlen_over(steps)), name)
    return getattr(Layer(layer_over(steps)), name)


def varlen_over(steps: AnySteps) -> VarlenSteps:
    """Return the steps of packed attention over these steps of attention; those of a layer have none."""
    if isinstance(steps, VarlenSteps):
        return steps
    return VarlenSteps() if isinstance(steps, LayerSteps) else VarlenSteps(attention=steps)


def layer_over(steps: AnySteps) -> LayerSteps:
    """Return the steps of a layer whose attention is composed of these steps; steps of a layer are unchanged."""
    if isinstance(steps, LayerSteps):
        return steps
    if isinstance(steps, VarlenSteps):
        return LayerSteps()
    attention, packed = Reference(steps), Varlen(varlen_over(steps))
    return LayerSteps(attend=attention.attention, weigh=attention.attention_weights, varlen=packed.varlen_attention)


def keyword_of(function: str, name: str) -> str:
    """Name the argument of a function that an array or option of a question belongs to."""
    if not FUNCTIONS[function].of_layer:
        return name
    return ARGUMENT_OF.get(name, "params" if is_parameter(name) else name)


def is_parameter(name: str) -> bool:
    """Tell whether an array belongs to `params`; some cases use a name that no layer has."""
    return name in AXES or name.startswith(("w_", "b_"))


def stacked_operand(arguments: Iterable[str]) -> str | None:
    """Name the argument that holds several operands, or None."""
    return next((name for name in arguments if name in STACKED), None)


def arranged(function: str, arguments: Arguments) -> tuple[list[Any], dict[str, Any]]:
    """Return the operands and keywords of a call."""
    keywords = dict(arguments)
    if FUNCTIONS[function].of_layer:
        keywords["params"] = {name: keywords.pop(name) for name in list(keywords) if is_parameter(name)}
        cache = [keywords.pop(name) for name in (*CACHE, BLOCK_TABLE) if name in keywords]
        kind = WindowKVCache if keywords.pop(WINDOW_CACHE, False) else KVCache
        if cache:
            keywords["cache"] = PagedKVCache(*cache) if len(cache) == 4 else kind(*cache)
    names = FUNCTIONS[function].stacked(stacked_operand(arguments)).operands
    operands = [keywords.pop(name, None) for name in names]
    return operands, keywords


def with_contiguous_cache(arguments: Arguments) -> Arguments:
    """Return a question with the same output, whose cache has a slot for each token (MHA-CACHE-10, MHA-CACHE-13)."""
    if BLOCK_TABLE not in arguments and WINDOW_CACHE not in arguments:
        return arguments
    rest = {name: value for name, value in arguments.items() if name not in (BLOCK_TABLE, WINDOW_CACHE)}
    lengths, new = numpy.asarray(rest["cache_lengths"]), rest.get("key")
    capacity = int(lengths.max(initial=0)) + (0 if new is None else new.shape[1])
    return rest | {name: _in_order(rest[name], lengths, arguments.get(BLOCK_TABLE), capacity) for name in CACHE[:2]}


def _in_order(buffer: numpy.ndarray, lengths: numpy.ndarray, table: numpy.ndarray | None, capacity: int) -> Any:
    """Return the tokens of a buffer at their positions; those that it does not hold are 0."""
    heads = buffer.shape[1] if table is None else buffer.shape[2]
    ordered = numpy.zeros((len(lengths), heads, capacity, buffer.shape[3]), buffer.dtype)
    for entry, length in enumerate(lengths.tolist()):
        if table is not None:
            positions = numpy.arange(length)
            size = buffer.shape[1]
            ordered[entry][:, positions] = buffer[table[entry][positions // size], positions % size].swapaxes(0, 1)
        else:
            positions = numpy.arange(max(0, length - buffer.shape[2]), length)
            ordered[entry][:, positions] = buffer[entry][:, positions % buffer.shape[2]]
    return ordered


def named(
    function: str, keywords: Mapping[str, object], returned: object, stacked: str | None = None
) -> dict[str, Any]:
    """Return the results of a call by name; `stacked` is the argument that holds several operands.

    Raises:
        MalformedResult: The call did not return the outputs of the function.
    """
    called = FUNCTIONS[function].stacked(stacked)
    names = called.returned(keywords)
    if len(names) == 1:
        return {names[0]: returned}
    fewest = called.fewest or len(names)
    if isinstance(returned, (tuple, list)) and fewest <= len(returned) <= len(names):
        return dict(zip(names, returned, strict=False))
    raise MalformedResult(f"{function} must return ({', '.join(names)}), received {described(returned)}")


def layer_answers(call: Callable[..., Any], function: str, arguments: Arguments) -> Iterator[dict[str, Array]]:
    """Return the outputs of each call of a question, by name; only the last call has those of the cache."""
    drafts = arguments.get("drafts", False)
    parts = list(_parts({name: value for name, value in arguments.items() if name != "drafts"}))
    cache: AnyCache | None = None
    for number, part in enumerate(parts):
        operands, keywords = arranged(function, part)
        if cache is not None:
            keywords["cache"] = cache
        results = named(function, keywords, call(*operands, **keywords))
        if "cache" in results:
            cache = _unpacked(function, results.pop("cache"), keywords["cache"])
            if drafts:
                call(*_draft(function, operands), **keywords)
            if number == len(parts) - 1:
                results |= zip(CACHE, cache[:3], strict=True)
        yield results


def _draft(function: str, operands: list[Any]) -> list[Any]:
    """Return the operands with negated tokens."""
    names = FUNCTIONS[function].operands
    return [-array if name in TOKENS else array for name, array in zip(names, operands, strict=True)]


def _unpacked(function: str, cache: object, passed: AnyCache) -> AnyCache:
    """Return the cache that a call returned, which is of the kind that was passed to the call."""
    if isinstance(cache, (tuple, list)) and len(cache) == len(passed):
        return type(passed)(*cache)
    names = ", ".join(type(passed)._fields)
    raise MalformedResult(f"{function} must return its cache as ({names}), received {described(cache)}")


def _parts(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Return the arguments of each call of a question."""
    whole = dict(arguments)
    start = 0
    for length in whole.pop("chunks", None) or [None]:
        if length is None:
            yield whole
            return
        stop = start + length
        part = {name: array[:, start:stop] if name in TOKENS else array for name, array in whole.items()}
        if "positions" in part:
            part["positions"] = part["positions"][..., start:stop]
        for name in PER_QUERY:
            if name in part and part[name].shape[2] != 1:
                part[name] = part[name][:, :, start:stop]
        yield part
        start = stop


def joined(parts: list[dict[str, numpy.ndarray]]) -> dict[str, numpy.ndarray]:
    """Join the outputs of a sequence of calls by name, along the axis of queries.

    Raises:
        MalformedResult: The outputs of the calls have shapes that do not fit together.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _joined(name, [part[name] for part in parts if name in part]) for name in names}


def _joined(name: str, arrays: list[numpy.ndarray]) -> numpy.ndarray:
    if len(arrays) == 1:
        return numpy.asarray(arrays[0])
    try:
        return numpy.concatenate(arrays, axis=QUERY_AXES.get(name, 1))
    except (ValueError, TypeError, MemoryError) as error:
        shapes = ", ".join(str(array.shape) for array in arrays[:4])
        raise MalformedResult(
            f"`{name}` of {len(arrays)} calls cannot be joined, received the shapes {shapes}"
        ) from error

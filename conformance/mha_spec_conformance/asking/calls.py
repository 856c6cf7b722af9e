"""How a question of plain arrays becomes a call: parameters in a mapping, a cache as one value, a sequence in chunks.

The layer takes `params`, a mapping of arrays, and a cache of three arrays, (key, value, lengths); in a question each
array has a name of its own. A question with `chunks` is a sequence of calls, each over the next tokens and the cache
of the call before; its answer is what they give together. With `drafts`, each cache is continued a
second time, with other tokens, and what that gives is thrown away: a cache is a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.cache import KVCache
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps
from mha_spec.parameters import AXES
from mha_spec.reference import Reference
from mha_spec.steps import Steps
from mha_spec_conformance.suite.functions import OPERANDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mha_spec.arrays import Array

    Arguments = Mapping[str, Any]

__all__ = [
    "CACHE",
    "LAYER",
    "MalformedCache",
    "arranged",
    "function_over",
    "is_parameter",
    "joined",
    "keyword_of",
    "layer_answers",
]

LAYER = "multi_head_attention"
CACHE = ("cache_key", "cache_value", "cache_lengths")
"""The arrays of a cache, in its order."""

TOKENS = ("query", "key", "value")
PER_QUERY = ("mask", "bias", "dropout_mask")
"""Options with an axis of queries, which is split with them."""

KEYWORDS: dict[str, str] = {
    **dict.fromkeys((*CACHE, "chunks", "drafts"), "cache"),
    **dict.fromkeys(("q_norm", "k_norm"), "norm_epsilon"),
}
"""The keyword by which a target claims an array or an option of a question."""


class MalformedCache(Exception):
    """A call with a cache did not return an output and a cache."""


def function_over(steps: Steps | LayerSteps, name: str) -> Callable[..., Any]:
    """A function of the specification over these steps; the steps of the other half are its own."""
    layer, core = (steps, Steps()) if isinstance(steps, LayerSteps) else (LayerSteps(), steps)
    return getattr(Reference(core) if hasattr(Reference, name) else Layer(layer), name)


def keyword_of(function: str, name: str) -> str:
    """Which argument of a function an array or option of a question belongs to."""
    if function == "rotary_embedding" or not function.startswith(LAYER):
        return name
    return KEYWORDS.get(name, "params" if is_parameter(name) else name)


def is_parameter(name: str) -> bool:
    """Whether an array is one of `params`; there are cases with a name that no layer has."""
    return name in AXES or name.startswith(("w_", "b_"))


def arranged(function: str, arguments: Arguments) -> tuple[list[Any], dict[str, Any]]:
    """The operands and keywords of one call."""
    left = dict(arguments)
    if function.startswith(LAYER):
        left["params"] = {name: left.pop(name) for name in list(left) if is_parameter(name)}
        given = [left.pop(name) for name in CACHE if name in left]
        if given:
            left["cache"] = KVCache(*given)
    operands = [left.pop(name, None) for name in OPERANDS[function]]
    return operands, left


def layer_answers(call: Callable[..., Any], function: str, arguments: Arguments) -> Iterator[dict[str, Array]]:
    """The outputs of each call of a question, by name; every one but the last is the output alone."""
    drafts = arguments.get("drafts", False)
    parts = list(_parts({name: value for name, value in arguments.items() if name != "drafts"}))
    cache: KVCache | None = None
    for number, part in enumerate(parts):
        operands, keywords = arranged(function, part)
        if cache is not None:
            keywords["cache"] = cache
        returned = call(*operands, **keywords)
        if "cache" not in keywords or function != LAYER:
            yield {"output" if function == LAYER else "weights": returned}
            continue
        output, new = _unpacked(returned)
        if drafts:
            call(*_draft(operands), **keywords)
        cache = new
        last = number == len(parts) - 1
        yield {"output": output} | (dict(zip(CACHE, cache, strict=True)) if last else {})


def _draft(operands: list[Any]) -> list[Any]:
    """The same operands with other tokens."""
    return [-array if name in TOKENS else array for name, array in zip(OPERANDS[LAYER], operands, strict=True)]


def _unpacked(returned: object) -> tuple[Array, KVCache]:
    """The output and the cache."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        output, cache = returned
        if isinstance(cache, (tuple, list)) and len(cache) == 3:
            return output, KVCache(*cache)
    received = type(returned).__name__
    raise MalformedCache(f"with a cache it must return (output, (key, value, lengths)), received {received}")


def _parts(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """The arguments of each call; those after the first have the cache of the one before."""
    whole = dict(arguments)
    start = 0
    for length in whole.pop("chunks", None) or [None]:
        if length is None:
            yield whole
            return
        stop = start + length
        part = {name: array[:, start:stop] if name in TOKENS else array for name, array in whole.items()}
        for name in PER_QUERY:
            if name in part and part[name].shape[2] != 1:
                part[name] = part[name][:, :, start:stop]
        yield part
        start = stop


def joined(parts: list[dict[str, numpy.ndarray]]) -> dict[str, numpy.ndarray]:
    """The outputs of a sequence of calls, those of one name behind each other along the queries."""
    outputs = {name: [part[name] for part in parts if name in part] for one in parts for name in one}
    return {
        name: numpy.asarray(arrays[0]) if len(arrays) == 1 else numpy.concatenate(arrays, axis=1)
        for name, arrays in outputs.items()
    }

"""Ask questions in the layout of a target, which the suite converts to and from that of the specification."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from mha_spec_conformance.suite.functions import FUNCTIONS, OF_ATTENTION, STACKED
from mha_spec_conformance.targets.layouts import PACKED

from .layout_conversion import Conversion, clipped, has_layout
from .question import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from typing import Any

    from mha_spec_conformance.targets.claims import Claims

    from .question import Question

    Pair = tuple[Question, Answer]
    Shapes = Mapping[str, tuple[int, ...]]
    Read = Callable[[str], Any]

__all__ = ["in_layout", "obstacle"]


def obstacle(claims: Claims, function: str, shapes: Shapes, names: Iterable[str], read: Read) -> str | None:
    """Return the reason why a call cannot be made in the layout of the target, or None.

    Args:
        claims: The claims of the target.
        function: The name of the function.
        shapes: The shapes of its arrays.
        names: The names of its arrays and options.
        read: Gives the array of a name.
    """
    names = set(names)
    if not claims.groups and FUNCTIONS[function].of_layer and any(name.startswith("cache") for name in names):
        return "the suite does not repeat the heads of a cache"
    if not has_layout(claims, function) or function not in OF_ATTENTION:
        return None
    if claims.layout in PACKED and function == "attention_weights":
        return f"the layout {claims.layout} has no weights"
    if claims.packs_queries and {"sinks", "grad_lse", "q_lengths"} <= names:
        return "the gradient of a sink has a part of every row, also of those that are not packed"
    return None if claims.stacked is None else _obstacle_to_stacking(claims, function, shapes, names, read)


def _obstacle_to_stacking(claims: Claims, function: str, shapes: Shapes, names: set[str], read: Read) -> str | None:
    stacked = str(claims.stacked)
    if not set(STACKED[stacked]) <= set(shapes):
        return f"{function} has no {stacked}"
    if shapes["key"][3] != shapes["value"][3]:
        return f"{stacked} needs v_dim = qk_dim"
    if stacked == "kv":
        return None
    (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = shapes["query"], shapes["key"]
    if q_len != kv_len or (claims.groups and heads != kv_heads):
        return "qkv needs as many keys as queries, and no groups"
    q_lengths, kv_lengths = (read(name) if name in names else None for name in ("q_lengths", "kv_lengths"))
    unequal = clipped(q_lengths, batch, q_len) != clipped(kv_lengths, batch, q_len)
    return "packed qkv needs equal lengths" if claims.packs_queries and unequal else None


def in_layout(
    claims: Claims, answers: Callable[..., Generator[Pair, None, None]], groups: Iterable[Iterable[Question]]
) -> Iterator[Pair]:
    """Ask questions in the layout of the target, and return each with its answer in that of the specification."""
    asked: dict[int, Conversion] = {}
    refused: list[Pair] = []

    def converted(group: Iterable[Question]) -> Iterator[Question]:
        for question in group:
            names, read = (*question.arrays, *question.options), question.arrays.__getitem__
            reason = obstacle(claims, question.function, question.shapes, names, read)
            if reason is not None:
                refused.append((question, Answer("unsupported", reason=reason)))
            else:
                conversion = Conversion(question, claims)
                # The conversion keeps the question alive, so that no other object gets its id.
                asked[id(conversion.question)] = conversion
                yield conversion.question

    with closing(answers(*map(converted, groups))) as arriving:
        for question, answer in arriving:
            conversion = asked.pop(id(question))
            yield conversion.plain, conversion.restored(answer)
    yield from refused

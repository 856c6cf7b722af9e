"""Attentions in NumPy that take packed and paged arrays, right and wrong, each sequence by the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import reference
from mha_spec_conformance.asking.layouts import in_layout
from mha_spec_conformance.asking.worker import answer
from mha_spec_conformance.targets.claims import Claims
from mha_spec_conformance.targets.loading import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

    from mha_spec_conformance.asking.question import Answer, Question
    from mha_spec_conformance.suite.cases import Case, Suite

    Array = numpy.ndarray

__all__ = ["OPTIONS", "Inside", "Kernel", "claims", "small_cases"]

MOST_ELEMENTS = 2**14

OPTIONS = ("causal", "window", "scale", "softcap", "sinks", "return_lse")
PACKED_OPTIONS = {
    "thd": ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q"),
    "paged": ("block_table", "kv_lengths", "cu_seqlens_q", "max_seqlen_kv"),
}


def claims(layout: str, *words: str, dtypes: tuple[str, ...] = ("float32",), **declared: Any) -> Claims:
    """Claim attention and its gradients in a layout, with the options that all of these kernels have."""
    taken = (*OPTIONS, *PACKED_OPTIONS.get(layout, ()), *words)
    vjp = (*(word for word in taken if word != "return_lse"), "grad_lse")
    conventions = {"causal_alignment": "lower_right_of_lengths"} if layout in PACKED_OPTIONS else {}
    keywords = {"attention": taken, "attention_vjp": vjp}
    declared = {"conventions": conventions, **declared}
    return Claims(f"kernel-{layout}", keywords, dtypes, layout=layout, **declared)


def small_cases(suite: Suite) -> Suite:
    """Return the cases of few numbers, because these kernels are slow."""

    def elements(case: Case) -> int:
        return sum(math.prod(case.shape_of(name)) for name in case.input_names)

    return replace(suite, cases=tuple(case for case in suite.cases if elements(case) <= MOST_ELEMENTS))


class Inside:
    """A source of answers whose target runs in this process."""

    def __init__(self, functions: Mapping[str, Callable[..., object]], claims: Claims) -> None:
        self.claims = claims
        self.target = Target(functions, claims)
        self.asked: list[Question] = []

    def answers(self, *groups: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
        yield from in_layout(self.claims, self._answers, groups)

    def _answers(self, *groups: Iterable[Question]) -> Generator[tuple[Question, Answer], None, None]:
        for question in (question for group in groups for question in group):
            self.asked.append(question)
            yield question, answer(self.target, question)


def bounds_of(cu_seqlens: Array, _: int) -> list[slice]:
    """Return the tokens of each sequence; a wrong kernel also looks at their number."""
    return [slice(int(start), int(stop)) for start, stop in pairwise(cu_seqlens)]


def keys_of(length: int, table: Array, block_size: int) -> list[tuple[int, slice]]:
    """Return the block of each page of a sequence, and the slots that hold its keys."""
    starts = range(0, length, block_size)
    return [(int(table[n]), slice(0, min(block_size, length - start))) for n, start in enumerate(starts)]


def position_of(q_tokens: slice, kv_length: int) -> int:
    """Return the position of the first query of a sequence: lower right of its lengths."""
    return kv_length - (q_tokens.stop - q_tokens.start)


@dataclass(frozen=True)
class Kernel:
    """Attention over packed tokens or pages; each step may be replaced by a wrong step."""

    bounds: Callable[[Array, int], list[slice]] = bounds_of
    key_bounds: Callable[[Array, int], list[slice]] = bounds_of
    pages: Callable[[int, Array, int], list[tuple[int, slice]]] = keys_of
    position: Callable[[slice, int], int] = position_of
    attend: Callable[..., Any] = reference.attention
    differentiate: Callable[..., Any] = reference.attention_vjp

    def with_steps(self, **steps: Callable[..., Any]) -> Kernel:
        """Replace steps."""
        return replace(self, **steps)

    @property
    def functions(self) -> dict[str, Callable[..., object]]:
        """The functions of a target."""
        return {"attention": self.attention, "attention_vjp": self.attention_vjp}

    def _sequences(self, query: Array, key: Array, options: dict[str, Any]) -> Iterator[tuple[slice, list[Any], int]]:
        """Return for each sequence its queries, the places of its keys, and their number."""
        table, lengths = options.pop("block_table", None), options.pop("kv_lengths", None)
        for name in ("max_seqlen_q", "max_seqlen_kv"):
            options.pop(name, None)
        queries = self.bounds(options.pop("cu_seqlens_q"), len(query))
        if table is None:
            keys = self.key_bounds(options.pop("cu_seqlens_kv"), len(key))
            yield from ((q, [(tokens,)], tokens.stop - tokens.start) for q, tokens in zip(queries, keys, strict=True))
            return
        for q, row, length in zip(queries, table, lengths, strict=True):
            yield q, self.pages(int(length), row, key.shape[1]), int(length)

    def _dense(self, array: Array, places: list[Any]) -> Array:
        """Return the keys or values of a sequence as dense arrays."""
        parts = [array[place] for place in places]
        joined = numpy.concatenate(parts) if parts else numpy.zeros((0, *array.shape[-2:]), array.dtype)
        return joined.swapaxes(0, 1)[None]

    def _of_sequence(self, q: slice, length: int, options: dict[str, Any]) -> dict[str, Any]:
        positional = options.get("causal") or options.get("window")
        return {**options, **({"q_offset": self.position(q, length)} if positional else {})}

    def attention(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        """Attend; without tokens of a sequence, results are NaN."""
        output = numpy.full((*query.shape[:2], value.shape[-1]), numpy.nan, query.dtype)
        lse = numpy.full(query.shape[:2], numpy.nan, numpy.result_type(query.dtype, numpy.float32))
        returned = options.pop("return_lse", False)
        for q, places, length in self._sequences(query, key, options):
            k, v = (self._dense(array, places) for array in (key, value))
            dense = query[q].swapaxes(0, 1)[None]
            result = self.attend(dense, k, v, **self._of_sequence(q, length, options), return_lse=True)
            output[q], lse[q] = result[0][0].swapaxes(0, 1), result[1][0].swapaxes(0, 1)
        return (output, lse) if returned else output

    def attention_vjp(self, grad_output: Array, query: Array, key: Array, value: Array, **options: Any) -> Any:
        """Return the gradients; elsewhere they are NaN."""
        gradients = [numpy.full_like(array, numpy.nan) for array in (query, key, value)]
        grad_sinks, grad_lse = 0, options.pop("grad_lse", None)
        for q, places, length in self._sequences(query, key, options):
            k, v = (self._dense(array, places) for array in (key, value))
            dense_q, dense_o = (array[q].swapaxes(0, 1)[None] for array in (query, grad_output))
            of_sequence = self._of_sequence(q, length, options)
            of_sequence |= {} if grad_lse is None else {"grad_lse": grad_lse[q].swapaxes(0, 1)[None]}
            result = self.differentiate(dense_o, dense_q, k, v, **of_sequence)
            gradients[0][q] = result[0][0].swapaxes(0, 1)
            for gradient, part in zip(gradients[1:], result[1:3], strict=True):
                rows, start = part[0].swapaxes(0, 1), 0
                for place in places:
                    size = len(gradient[place])
                    gradient[place] = rows[start : start + size]
                    start += size
            grad_sinks = grad_sinks + result[4].astype(float) if options.get("sinks") is not None else 0
        sinks = options.get("sinks")
        return (
            *gradients,
            None,
            None if sinks is None else numpy.broadcast_to(grad_sinks, sinks.shape).astype(sinks.dtype),
        )

"""Packed and paged attention: the attention of this backend for each sequence."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import varlen_reference
from mha_spec.arguments import Arguments, expand_options
from mha_spec.arrays import dtype_name, softmax_dtype_name
from mha_spec.varlen_reference import Varlen, VarlenSteps, tokens_of
from mha_spec.varlen_sequences import sequences_of

from .backward import gradients
from .forward import attend
from .operations import Scratch, dense
from .paged import Batch, batches, tiles_of
from .pages import gathered, memory_of
from .parallel import each
from .plan import Plan
from .problem import Problem
from .tiling import Assembly

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from mha_spec.arrays import Array
    from mha_spec.varlen_arguments import VarlenArguments, VarlenOptions
    from mha_spec.varlen_reference import Call, VarlenGradients
    from mha_spec.varlen_sequences import PackedSequence

    from .tiling import Tile

__all__ = ["varlen_attention", "varlen_attention_vjp"]


class SequenceAttention:
    """The attention of each sequence of a call, one after the other; few queries of sequences in blocks are a batch.

    The blocks of a sequence are gathered into memory that the sequences of the call share.
    """

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._output: numpy.ndarray | None = None

    def sequences(self, a: VarlenArguments) -> Sequence[Any]:
        """Read the sequences of a call; those in blocks with a few queries are joined for the output."""
        sequences = sequences_of(a)
        suits = a.is_paged and a.function == "varlen_attention" and isinstance(a.key, numpy.ndarray)
        return list(batches(a, sequences)) if suits else sequences

    def keys_of(self, x: Array, sequence: PackedSequence | Batch, a: VarlenArguments, steps: VarlenSteps) -> Array:
        """Return the keys in use of a sequence, or its values, until its attention is computed (MHA-VARLEN-6)."""
        dtype = numpy.dtype(softmax_dtype_name(dtype_name(a.query)))
        if isinstance(sequence, Batch):
            return sequence.pages_of(x, dtype)
        if sequence.blocks is None or not isinstance(x, numpy.ndarray):
            return varlen_reference.keys_of(x, sequence, a, steps)
        blocks = numpy.asarray(sequence.blocks, numpy.intp)
        tokens = gathered(x, blocks, memory_of(x, len(blocks), dtype, self._scratch.take))
        return tokens[: len(sequence.keys)].swapaxes(0, 1)[None]

    def attend(self, call: Call, _: VarlenSteps, *, return_lse: bool) -> tuple[Array, Any]:
        """Compute the output of a sequence or of a batch and, if needed, its lse."""
        if isinstance(call.sequence, Batch):
            return self._attend_batch(call, call.sequence, return_lse=return_lse)
        problem = _problem_of(call)
        return self._results_of(problem, problem.plan.tiles, self._memory_of(call, problem), return_lse=return_lse)

    def _attend_batch(self, call: Call, batch: Batch, *, return_lse: bool) -> tuple[Array, Any]:
        problem = batch.problem_of(call)
        output: Any = self._memory_of(call, problem)
        memory = batch.entries_of(output[0].swapaxes(0, 1))
        _, lse = self._results_of(problem, tiles_of(problem.plan), memory, return_lse=return_lse)
        return output, None if lse is None else lse.swapaxes(0, 1).reshape(1, call.a.heads, -1)

    def _results_of(
        self, problem: Problem, tiles: Sequence[Tile], memory: numpy.ndarray | None, *, return_lse: bool
    ) -> tuple[Array, Any]:
        """Compute the tiles of a problem; the output is `memory` unless that is None."""
        plan, rows = problem.plan, problem.query.shape[:3]
        output = Assembly((*rows, problem.value.shape[3]), problem.query, memory)
        lse = Assembly(rows, problem.query) if return_lse else None
        each(partial(attend, problem, output, lse), tiles, plan.a, tiny=plan.is_tiny)
        self._scratch.clear()
        return output.whole(), None if lse is None else lse.whole()

    def _memory_of(self, call: Call, problem: Problem) -> numpy.ndarray | None:
        """Return the rows of a sequence in the output of all sequences."""
        if not isinstance(problem.query, numpy.ndarray):
            return None
        if self._output is None:
            self._output = numpy.empty((*call.a.query.shape[:2], call.value.shape[3]), problem.query.dtype)
        return tokens_of(self._output, call.sequence.queries)

    def pack(
        self,
        parts: Sequence[tuple[range, Array]],
        shape: tuple[int, ...],
        like: Array,
        number: float,
        steps: VarlenSteps,
    ) -> Array:
        """Put the rows of each sequence at its tokens; those of an output are there (MHA-VARLEN-1, MHA-VARLEN-3)."""
        output = self._output
        if output is None or not all(rows.base is output for _, rows in parts):
            return varlen_reference.pack(parts, shape, like, number, steps)
        output[: parts[0][0].start] = number
        output[parts[-1][0].stop :] = number
        return output

    def differentiate(self, call: Call, grad_output: Array, grad_lse: Array | None, _: VarlenSteps) -> VarlenGradients:
        """Compute the gradients of a sequence."""
        query, key, value, _bias, sinks = gradients(_problem_of(call), grad_output, grad_lse)
        self._scratch.clear()
        return query, key, value, sinks

    def functions(self) -> Varlen:
        """Return the functions over these steps."""
        steps = VarlenSteps(
            sequences=self.sequences,
            keys_of=self.keys_of,
            attend=self.attend,
            differentiate=self.differentiate,
            pack=self.pack,
        )
        return Varlen(steps)


def _problem_of(call: Call) -> Problem:
    """Plan the attention of a sequence, whose arguments are checked and whose operands are in the softmax's type."""
    plan = Plan(Arguments(*call[:3], sinks=call.sinks, **call.options))
    query, key, value = (_dense_tokens(x) for x in call[:3])
    sinks = None if call.sinks is None else dense(call.sinks, plan.dtype)
    return Problem(plan, plan.a, plan.xp, query, key, value, sinks, slopes=call.slopes)


def _dense_tokens(x: Array) -> Array:
    """Copy (1, heads, length, size) unless it is contiguous, or a view of contiguous tokens.

    The BLAS reads the rows of a head among those of all heads faster than they are copied. No other strides reach it,
    so that equal numbers give the same bits.
    """
    if not isinstance(x, numpy.ndarray) or x.flags.c_contiguous:
        return x
    return numpy.ascontiguousarray(x[0].swapaxes(0, 1)).swapaxes(0, 1)[None]


@expand_options
def varlen_attention(
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_kv: Array | Sequence[int] | None,
    *,
    return_lse: bool = False,
    **options: Unpack[VarlenOptions],
) -> Array | tuple[Array, Array]:
    """Compute packed or paged attention; see `mha_spec.reference.varlen_attention`."""
    function = SequenceAttention().functions().varlen_attention
    return function(query, key, value, cu_seqlens_q, cu_seqlens_kv, return_lse=return_lse, **options)


@expand_options
def varlen_attention_vjp(
    grad_output: Array,
    query: Array,
    key: Array,
    value: Array,
    cu_seqlens_q: Array | Sequence[int],
    cu_seqlens_kv: Array | Sequence[int] | None,
    *,
    grad_lse: Array | None = None,
    **options: Unpack[VarlenOptions],
) -> VarlenGradients:
    """Compute the gradients; see `mha_spec.reference.varlen_attention_vjp`."""
    function = SequenceAttention().functions().varlen_attention_vjp
    return function(grad_output, query, key, value, cu_seqlens_q, cu_seqlens_kv, grad_lse=grad_lse, **options)

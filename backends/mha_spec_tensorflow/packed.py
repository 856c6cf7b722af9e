"""Packed and paged sequences as calls of attention: in Python in eager mode, in a loop of the graph when traced.

| call | lengths | path |
| --- | --- | --- |
| eager | any; tensors are read | a loop in Python; consecutive sequences of equal lengths are a batch |
| eager, the same few queries of each | any; tensors are read | batches of sequences of similar lengths: `decoding` |
| traced | any | a `tf.while_loop` over the sequences; a graph for all lengths |
| traced for XLA | on the host, and the table too | a loop in Python; other lengths compile again |
| traced for XLA | tensors | an error, because XLA has no arrays of unknown sizes |

The work and the memory are those of a call for each sequence, or of a batch. Gradients are in closed form, from the
operands alone.
"""

from __future__ import annotations

import math
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from mha_spec.arguments import offset_of_reading
from mha_spec.errors import ArgumentTypeError
from mha_spec.scalars import is_integer

from . import decoding, forward
from .backward import gradients
from .function import differentiable
from .plan import COST_OF_BLOCK, as_int64
from .problem import Operands, packed_problem, sizes_of, softmax_dtype
from .threads import results_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arrays import Array
    from mha_spec.varlen_arguments import VarlenArguments
    from mha_spec.varlen_reference import VarlenGradients

    from .loops import Tensors
    from .problem import Problem, Size

__all__ = ["attention", "in_xla", "vjp"]


class SequenceBounds(NamedTuple):
    """Where a sequence lies, or a run of equal sequences: numbers where they are read, else scalar tensors."""

    number: Size
    """Its place among the runs."""
    sequences: int
    """Their number."""
    q_first: Size
    q_length: Size
    kv_first: Size
    kv_length: Size
    """The number of keys in use."""
    kv_room: Size
    """The number of keys, in use or not."""
    offset: Size
    pages: Array | None
    """The numbers of the pages of the keys in use."""


class PackedSequences:
    """The sequences of a call; integers are clamped (MHA-VARLEN-2, MHA-VARLEN-4, MHA-VARLEN-6)."""

    def __init__(self, a: VarlenArguments) -> None:
        self.a, self.is_read = a, _is_read(a)
        self.page: Any = sizes_of(a.key)[1] if a.is_paged else None
        self.q_tokens, key_sizes = sizes_of(a.query)[0], sizes_of(a.key)
        self.table: Any = None if a.block_table is None else self._integers(a.block_table)
        self.q_ends = self._ends(a.cu_seqlens_q, self.q_tokens)
        self.count = len(self.q_ends) - 1 if self.is_read else tf.size(self.q_ends) - 1
        self.q_lengths = self.q_ends[1:] - self.q_ends[:-1]
        if self.page is None:
            self.kv_ends = self._ends(a.cu_seqlens_kv, key_sizes[0])
            self.kv_rooms = self.kv_ends[1:] - self.kv_ends[:-1]
        else:
            columns = self.table.shape[1] if self.is_read else tf.shape(self.table)[1]
            self.kv_ends = self.q_ends * 0
            self.kv_rooms = self._rooms_of_pages(self._minimum(key_sizes[0], 1) * columns * self.page)
        self.kv_lengths = self.kv_rooms if a.seqused_kv is None else self._clip(a.seqused_kv, self.kv_rooms)
        self.offsets = self._offsets()

    def _rooms_of_pages(self, capacity: Size) -> Array:
        if self.a.cu_seqlens_kv is None:
            return self.q_lengths * 0 + capacity
        # Blocks may be shared, so that the sum of the lengths has no bound that int32 holds (MHA-VARLEN-2).
        ends = self._increasing(self._integers(self.a.cu_seqlens_kv))
        return self._clip(ends[1:] - ends[:-1], capacity)

    def _minimum(self, a: Any, b: Any) -> Any:
        return numpy.minimum(a, b) if self.is_read else tf.minimum(a, b)

    def _integers(self, value: Any) -> Any:
        """Return integers as an array of NumPy where they are read, else as a tensor; both of int64."""
        if self.is_read:
            array = numpy.asarray(value)
            return (numpy.minimum(array, 2**62) if array.dtype == numpy.uint64 else array).astype(numpy.int64)
        return as_int64(value)

    def _clip(self, value: Any, largest: Any) -> Any:
        value = self._integers(value)
        if self.is_read:
            return numpy.clip(value, 0, largest)
        return tf.cast(tf.clip_by_value(value, 0, tf.cast(largest, tf.int64)), tf.int32)

    def _ends(self, value: Any, largest: Any) -> Any:
        """Return cumulative lengths within the tokens, none below an earlier one."""
        return self._increasing(self._clip(value, largest))

    def _increasing(self, ends: Any) -> Any:
        """Replace a number that is negative by 0, and one below an earlier one by that one."""
        if self.is_read:
            return numpy.maximum.accumulate(numpy.maximum(ends, 0))
        ends = tf.maximum(ends, 0)
        return tf.scan(tf.maximum, ends) if ends.shape[0] != 0 else ends

    def _offsets(self) -> Any:
        offset = self.a.q_offset
        if isinstance(offset, str):
            offset = offset_of_reading(offset, self.q_lengths, self.kv_lengths)
        elif offset is not None and not is_integer(offset):
            offset = self._integers(offset)
            offset = offset if self.is_read else tf.cast(offset, tf.int32)
        return self.q_lengths * 0 + (0 if offset is None else offset)

    @cached_property
    def runs(self) -> list[SequenceBounds]:
        """Consecutive sequences of equal lengths, if they are read; a sequence with unused keys, or pages, is alone."""
        if not self.is_read:
            return []
        shapes = numpy.stack([self.q_lengths, self.kv_lengths, self.kv_rooms, self.offsets])
        ends = (shapes[:, 1:] != shapes[:, :-1]).any(0) | (self.kv_lengths != self.kv_rooms)[:-1] | self.a.is_paged
        edges = [0, *(numpy.flatnonzero(ends) + 1).tolist(), self.count] if self.count else []
        return [self.run(number, first, stop - first) for number, (first, stop) in enumerate(pairwise(edges))]

    def run(self, number: Size, index: Size, sequences: int = 1) -> SequenceBounds:
        """Return the run that begins with the sequence of an index."""
        arrays = (self.q_ends, self.q_lengths, self.kv_ends, self.kv_lengths, self.kv_rooms, self.offsets)
        numbers: list[Any] = [int(array[index]) if self.is_read else array[index] for array in arrays]
        q_first, q_length, kv_first, kv_length, kv_room, offset = numbers
        pages = None if self.table is None else self._pages(index, kv_length)
        return SequenceBounds(number, sequences, q_first, q_length, kv_first, kv_length, kv_room, offset, pages)

    def _pages(self, index: Size, length: Size) -> Array:
        """Return the numbers of the pages that hold the keys in use of a sequence; no other entry is used."""
        pages = self.table[index, : -(-length // self.page)]
        last = sizes_of(self.a.key)[0] - 1
        return numpy.clip(pages, 0, last) if self.is_read else tf.clip_by_value(pages, 0, tf.cast(last, tf.int64))

    def slots(self, sequence: SequenceBounds) -> Array:
        """Return the index of the slot of each key in use of a sequence, among the slots of all pages."""
        page = tf.cast(self.page, tf.int64)
        pages: Any = sequence.pages
        slots = tf.convert_to_tensor(pages)[:, None] * page + tf.range(page)
        return tf.reshape(slots, (-1,))[: sequence.kv_length]


class _Tokens:
    """The tokens of each run in an array (tokens, ...).

    Where the sequences are read, a single operation splits the array; to slice it for each run takes longer.
    """

    def __init__(self, array: Array, places: list[tuple[Any, Any]]) -> None:
        """Take the first token and the number of tokens of each run, in order; no run if they are not read."""
        self.array, self.parts = array, None
        if places:
            edges = [0, *chain.from_iterable((first, first + tokens) for first, tokens in places)]
            sizes = [stop - start for start, stop in pairwise(edges)]
            self.parts = tf.split(array, [*sizes, -1])[1::2]

    def of(self, run: SequenceBounds, first: Size, length: Size) -> Array:
        """Return the tokens of a run, (sequences, length, ...)."""
        tokens = self.array[first : first + length] if self.parts is None else self.parts[run.number]
        if run.sequences == 1:
            return tf.expand_dims(tokens, 0)  # In eager mode, a reshape takes longer than to transpose few tokens.
        return tf.reshape(tokens, (run.sequences, -1, *tokens.shape[1:]))


def in_xla() -> bool:
    """Return True if XLA will compile the graph that is being traced."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _is_read(a: VarlenArguments) -> bool:
    """Return True if the loop over the sequences is one of Python."""
    if tf.executing_eagerly():
        return True
    if not in_xla():
        return False
    names = ("cu_seqlens_q", "cu_seqlens_kv", "seqused_kv", "q_offset", "block_table")
    values = {name: getattr(a, name) for name in names}
    for name, value in values.items():
        if tf.is_tensor(value):
            raise ArgumentTypeError(
                f"`{name}` must be host data where XLA compiles {a.function} of mha_spec_tensorflow, received a "
                "tensor. Pass a list or an array of NumPy, or leave out jit_compile=True. [MHA-ARG-4]"
            )
    return True


def attention(a: VarlenArguments, *, needs_lse: bool) -> tuple[Array, Array | None]:
    """Compute output (tokens, heads, v_dim) and, if needed, lse (heads, tokens), in the dtypes of query and softmax."""
    sequences = PackedSequences(a)
    attend = partial(_attend, a, sequences, needs_lse=needs_lse)
    output, *of_rows = differentiable(attend, partial(_gradients, a, sequences), _operands(a))
    return tf.cast(output, a.query.dtype), tf.transpose(of_rows[0]) if needs_lse else None


def vjp(a: VarlenArguments, grad_output: Array, grad_lse: Array | None) -> VarlenGradients:
    """Compute the gradients of query, key, value and sinks as a tape does, in their dtypes (MHA-VARLEN-11)."""
    x, dtype = _operands(a), softmax_dtype(a.query)
    grad_lse = None if grad_lse is None else tf.transpose(tf.cast(grad_lse, dtype))
    grads = _gradients(a, PackedSequences(a), x, tf.cast(grad_output, dtype), grad_lse)
    sinks: Any = grads.sinks
    sinks = None if a.sinks is None else tf.cast(sinks, a.sinks.dtype)
    return grads.query, grads.key, grads.value, sinks


def _operands(a: VarlenArguments) -> Operands:
    """Return the operands in the softmax's type; pages are converted after they are gathered."""
    dtype = softmax_dtype(a.query)
    sinks = None if a.sinks is None else tf.cast(a.sinks, dtype)
    return Operands(a.query, a.key, a.value, None, sinks)


def _attend(a: VarlenArguments, sequences: PackedSequences, x: Operands, *, needs_lse: bool) -> tuple[Array, ...]:
    """Compute output and, if needed, lse, (tokens, heads, ...), in the softmax's type."""
    attend = decoding.attend if decoding.suits(sequences) else _by_sequence
    output, *lse = attend(a, sequences, x, needs_lse=needs_lse)
    output = _for_all_tokens(output, sequences.q_ends, sequences.q_tokens)
    return output, *(_for_all_tokens(rows, sequences.q_ends, sequences.q_tokens, -math.inf) for rows in lse)


def _by_sequence(a: VarlenArguments, sequences: PackedSequences, x: Operands, *, needs_lse: bool) -> tuple[Array, ...]:
    calls = _Calls(a, sequences, x)

    def step(run: SequenceBounds) -> Tensors:
        results = forward.attend(*calls.of(run), needs_lse=needs_lse)
        parts = {"output": _tokens(results["output"])}
        return parts | {"lse": tf.squeeze(_tokens(results["lse"]), 2)} if needs_lse else parts

    specs = {"output": ((a.heads, x.value.shape[-1]), calls.dtype), "lse": ((a.heads,), calls.dtype)}
    return tuple(_joined(sequences, step, specs if needs_lse else {"output": specs["output"]}).values())


def _gradients(
    a: VarlenArguments, sequences: PackedSequences, x: Operands, grad_output: Array, grad_lse: Array | None = None
) -> Operands:
    """Compute the gradients, in the dtypes of `x` and the shapes of the operands."""
    calls, dtype = _Calls(a, sequences, x), softmax_dtype(a.query)
    cotangents = calls.of_rows(grad_output), None if grad_lse is None else calls.of_rows(grad_lse)

    def step(run: SequenceBounds) -> Tensors:
        of_output, of_lse = (None if rows is None else _swapped(calls.rows(rows, run)) for rows in cotangents)
        of_lse = None if of_lse is None else of_lse[..., None]
        grads = gradients(*calls.of(run), of_output, of_lse)
        parts = {"query": _tokens(grads.query), "key": _tokens(grads.key), "value": _tokens(grads.value)}
        if run.pages is not None:
            parts["slots"] = sequences.slots(run)
        else:
            unused = [[0, run.kv_room - run.kv_length], [0, 0], [0, 0]]  # A run with unused keys is a single sequence.
            parts |= {name: tf.pad(parts[name], unused) for name in ("key", "value")}
        if grads.sinks is not None:
            parts["sinks"] = tf.reshape(grads.sinks, (1, -1))
        return parts

    specs = {
        name: (tuple(array.shape[-2:]), dtype) for name, array in zip(("query", "key", "value"), x[:3], strict=True)
    }
    if sequences.page is not None:
        specs["slots"] = ((), tf.int64)
    if x.sinks is not None:
        specs["sinks"] = ((a.heads,), dtype)
    parts = _joined(sequences, step, specs)
    query = _for_all_tokens(parts["query"], sequences.q_ends, sequences.q_tokens)
    key, value = (_of_keys(sequences, parts, name, getattr(x, name)) for name in ("key", "value"))
    sinks = None if x.sinks is None else tf.reduce_sum(parts["sinks"], 0)
    return Operands(tf.cast(query, x.query.dtype), key, value, None, sinks)


def _of_keys(sequences: PackedSequences, parts: Tensors, name: str, like: Array) -> Array:
    """Put the gradient of each key at its token, or add it to its slot, which several keys may name."""
    sizes = sizes_of(like)
    if sequences.page is None:
        return tf.cast(_for_all_tokens(parts[name], sequences.kv_ends, sizes[0]), like.dtype)
    summed = tf.math.unsorted_segment_sum(parts[name], parts["slots"], sizes[0] * sizes[1])
    return tf.cast(tf.reshape(summed, sizes), like.dtype)


class _Calls:
    """The runs as calls of attention, with a batch entry for each sequence."""

    def __init__(self, a: VarlenArguments, sequences: PackedSequences, x: Operands) -> None:
        self.a, self.sequences, self.dtype = a, sequences, softmax_dtype(a.query)
        self.query = self.of_rows(x.query)
        self.key, self.value = (self._of_keys(array) for array in (x.key, x.value))
        self.sinks = None if x.sinks is None else tf.reshape(x.sinks, (1, -1, 1, 1))
        self._problems: dict[tuple[Size, ...], Problem] = {}

    def of(self, run: SequenceBounds) -> tuple[Problem, Operands]:
        """Return the call of a run."""
        query = _swapped(tf.cast(self.rows(self.query, run), self.dtype))
        key, value = (_swapped(tf.cast(self.keys(source, run), self.dtype)) for source in (self.key, self.value))
        x = Operands(query, key, value, None, self.sinks)
        if not self.sequences.is_read:
            return packed_problem(self.a, x, tf.reshape(run.offset, (1,))), x
        # Runs of equal lengths are calls of the same options.
        shape = run.sequences, run.q_length, run.kv_length, run.offset
        if shape not in self._problems:
            self._problems[shape] = packed_problem(self.a, x, run.offset)
        return self._problems[shape], x

    def of_rows(self, array: Array) -> _Tokens:
        """Cut an array of the tokens of all queries."""
        return _Tokens(array, [(run.q_first, run.sequences * run.q_length) for run in self.sequences.runs])

    def _of_keys(self, array: Array) -> _Tokens | Array:
        if self.sequences.page is not None:
            return array
        return _Tokens(array, [(run.kv_first, run.sequences * run.kv_length) for run in self.sequences.runs])

    def rows(self, tokens: _Tokens, run: SequenceBounds) -> Array:
        """Return the rows of a run, (sequences, q_length, heads, ...)."""
        return tokens.of(run, run.q_first, run.q_length)

    def keys(self, source: _Tokens | Array, run: SequenceBounds) -> Array:
        """Return the keys in use of a run or their values, (sequences, kv_length, kv_heads, size)."""
        if isinstance(source, _Tokens):
            return source.of(run, run.kv_first, run.kv_length)
        pages = tf.reshape(tf.gather(source, run.pages), (1, -1, *source.shape[2:]))
        return pages if pages.shape[1] == run.kv_length else pages[:, : run.kv_length]


def _tokens(rows: Array) -> Array:
    """Transpose a batch, (sequences, heads, length, size), to the tokens of a run."""
    tokens = _swapped(rows)
    return tf.squeeze(tokens, 0) if rows.shape[0] == 1 else tf.reshape(tokens, (-1, *tokens.shape[2:]))


def _swapped(array: Array) -> Array:
    """Exchange the axes 1 and 2: `Einsum` with every axis named takes half of the time of `tf.transpose`."""
    rest = "d"[: len(array.shape) - 3]
    return tf.raw_ops.Einsum(inputs=[array], equation=f"abc{rest}->acb{rest}")


def _for_all_tokens(rows: Array, ends: Any, tokens: Size, fill: float = 0.0) -> Array:
    """Append rows for the tokens before the first sequence and behind the last (MHA-VARLEN-3)."""
    before, after = ends[0], tokens - ends[0] - sizes_of(rows)[0]
    if isinstance(after, int | numpy.integer) and before == after == 0:
        return rows
    paddings = [[before, after], *[[0, 0]] * (len(rows.shape) - 1)]
    return tf.pad(rows, paddings, constant_values=tf.constant(fill, rows.dtype))


def _joined(
    sequences: PackedSequences,
    step: Callable[[SequenceBounds], Tensors],
    specs: dict[str, tuple[tuple[int, ...], tf.DType]],
) -> Tensors:
    """Take a step for each run, and concatenate the results, whose other axes and dtypes `specs` describes."""
    if not sequences.is_read:
        return _looped(sequences, step, specs)
    calls = [partial(step, run) for run in sequences.runs]
    if not calls:
        return {name: tf.zeros((0, *sizes), dtype) for name, (sizes, dtype) in specs.items()}
    parts = results_of(calls) if _are_for_threads(sequences) else [call() for call in calls]
    return {name: tf.concat([part[name] for part in parts], 0) for name in specs}


def _are_for_threads(sequences: PackedSequences) -> bool:
    """Return True if the runs of an eager call are large enough for threads, and none takes most of the time.

    TensorFlow transposes tokens on a single thread, so that runs in turn would leave the other threads idle. A large
    run in turn can use all threads itself.
    """
    if not tf.executing_eagerly():
        return False
    scores: list[Any] = [run.sequences * run.q_length * run.kv_length for run in sequences.runs]
    total = sum(scores)
    return sequences.a.heads * total >= len(scores) * COST_OF_BLOCK and 2 * max(scores) <= total


def _looped(
    sequences: PackedSequences,
    step: Callable[[SequenceBounds], Tensors],
    specs: dict[str, tuple[tuple[int, ...], tf.DType]],
) -> Tensors:
    arrays = {
        name: tf.TensorArray(dtype, sequences.count, element_shape=(None, *sizes), infer_shape=False)
        for name, (sizes, dtype) in specs.items()
    }

    def body(index: Array, arrays: dict[str, tf.TensorArray]) -> tuple:
        parts = step(sequences.run(index, index))
        return index + 1, {name: array.write(index, parts[name]) for name, array in arrays.items()}

    start = (tf.constant(0), arrays)
    _, arrays = tf.while_loop(lambda index, _: index < sequences.count, body, start, parallel_iterations=1)
    joined = {name: array.concat() for name, array in arrays.items()}
    for name, (sizes, _) in specs.items():
        joined[name].set_shape((None, *sizes))
    return joined

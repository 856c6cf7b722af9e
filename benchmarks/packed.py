"""Compare packed and paged calls of each backend with the calls that they replace.

Run `python benchmarks/packed.py numpy|torch|jax|tensorflow`; a row past its limit fails the run. Every call is in
float32 and has 8 heads of 64. Calls alternate with their peer's, and the times are medians in milliseconds; with
`--least` they are minima, and with `--processor` they are of processor time, for a machine that other processes use.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy
from measure import ratio, report
from numpy_backend import plain

import mha_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Row = tuple[str, float | None, Callable[[], object], Callable[[], object]]

HEADS, SIZE, PAGE = 8, 64, 16
PRIMES = [127, 389, 139, 367, 151, 349, 173, 331, 191, 311, 211, 293, 229, 277, 241, 257]
"""Different lengths, of about the same sum as 16 of 256."""
SKEWED = [1024, *[16] * 15]
"""The lengths of sequences of which padding makes 16 times the longest."""


def arrays(library: str) -> Callable[[numpy.ndarray], Any]:
    """Return the function that makes an array of a library."""
    if library == "numpy":
        return lambda array: array
    if library == "torch":
        import torch

        return torch.from_numpy
    if library == "jax":
        import jax.numpy

        return jax.numpy.asarray
    import tensorflow

    return tensorflow.constant


def drawn(*shape: int) -> numpy.ndarray:
    """Draw standard normal numbers."""
    return numpy.random.default_rng(7).standard_normal(shape, dtype=numpy.float32)


def bounds(lengths: list[int]) -> numpy.ndarray:
    """Return the cumulative lengths."""
    return numpy.cumsum([0, *lengths]).astype("int32")


def call(function: Callable[..., Any], *operands: Any, **options: Any) -> Callable[[], object]:
    """Return a call that waits for its result, which JAX computes later."""

    def run() -> object:
        result = function(*operands, **options)
        return result.block_until_ready() if hasattr(result, "block_until_ready") else result

    return run


def packed_rows(array: Callable[[numpy.ndarray], Any], masked: Callable[..., Any]) -> Iterator[Row]:
    """Compare sequences with separate calls, and sequences of skewed lengths with the padded call of `masked`."""
    for name, lengths in (("16 x 256", [256] * 16), ("16 primes", PRIMES)):
        for causal in (False, True):
            yield from separate_rows(array, f"{name}{', causal' if causal else ''}", lengths, causal=causal)
    ends, longest = array(bounds(SKEWED)), max(SKEWED)
    tokens = [array(drawn(sum(SKEWED), HEADS, SIZE))] * 3
    dense = array(drawn(len(SKEWED), HEADS, longest, SIZE))
    visible = numpy.arange(longest) < numpy.array(SKEWED)[:, None]
    mask = array(visible[:, None, None, :] & numpy.tri(longest, dtype=bool))
    ours = call(mha_spec.varlen_attention, *tokens, ends, ends, causal=True)
    yield "1024 and 15 x 16, causal: padded", 0.1, ours, call(masked, dense, dense, dense, mask=mask)


def separate_rows(
    array: Callable[[numpy.ndarray], Any], name: str, lengths: list[int], *, causal: bool
) -> Iterator[Row]:
    """Compare sequences with a call for each, on arrays of its own, and on its tokens among those of all sequences."""
    ends = array(bounds(lengths))
    tokens = array(drawn(sum(lengths), HEADS, SIZE))
    ours = call(mha_spec.varlen_attention, tokens, tokens, tokens, ends, ends, causal=causal)
    # Each call has another array, as each sequence has other tokens, so that both read the same amount of memory.
    separate = [array(drawn(1, HEADS, length, SIZE)) for length in lengths]
    calls = [call(mha_spec.attention, dense, dense, dense, causal=causal) for dense in separate]
    yield f"{name}: separate arrays", 1.1, ours, lambda: [run() for run in calls]

    def cut() -> list[object]:
        denses = (dense(tokens[first:stop]) for first, stop in pairwise(bounds(lengths).tolist()))
        return [call(mha_spec.attention, x, x, x, causal=causal)() for x in denses]

    yield f"{name}: tokens cut and transposed", 1.1, ours, cut


def dense(tokens: Any) -> Any:
    """Return the tokens of a sequence as a batch, (1, heads, length, size)."""
    if hasattr(tokens, "swapaxes"):
        return tokens.swapaxes(0, 1)[None]
    import tensorflow

    return tensorflow.transpose(tokens, (1, 0, 2))[None]


def decoding_rows(array: Callable[[numpy.ndarray], Any]) -> Iterator[Row]:
    """Compare a step of 16 sequences of 1024 keys in pages with the same step in packed tokens and in a batch.

    All layers of a model have the same table in a step, and the first layer has another one in each step.
    """
    count, length = 16, 1024
    random = numpy.random.default_rng(1)
    tables = [random.permutation(count * length // PAGE).reshape(count, -1).astype("int32") for _ in range(3)]
    pages = array(drawn(tables[0].size, PAGE, HEADS, SIZE))
    query, lengths = array(drawn(count, HEADS, SIZE)), array(numpy.full(count, length, "int32"))
    steps, ends = array(bounds([1] * count)), array(bounds([length] * count))
    layers = [
        call(mha_spec.varlen_attention, query, pages, pages, steps, None, block_table=array(table), seqused_kv=lengths)
        for table in tables
    ]
    following = cycle(layers)

    def first_layer() -> object:
        return next(following)()

    tokens = array(drawn(count * length, HEADS, SIZE))
    theirs = call(mha_spec.varlen_attention, query, tokens, tokens, steps, ends)
    yield "decoding, 16 x 1024, paged: packed", 1.3, layers[0], theirs
    yield "decoding, first layer, paged: packed", None, first_layer, theirs
    dense, single = array(drawn(count, HEADS, length, SIZE)), array(drawn(count, HEADS, 1, SIZE))
    theirs = call(mha_spec.attention, single, dense, dense, kv_lengths=lengths)
    yield "decoding, 16 x 1024, paged: batch", None, layers[0], theirs


def main() -> None:
    """Print the rows of the backend that the command line names."""
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    if len(names) != 1 or names[0] not in ("numpy", "torch", "jax", "tensorflow"):
        sys.exit("packed.py: name one backend, numpy, torch, jax or tensorflow")
    array = arrays(names[0])
    middle = min if "--least" in sys.argv else statistics.median
    measured = partial(ratio, middle=middle)
    clock = time.process_time if "--processor" in sys.argv else time.perf_counter
    # A masked call of mha_spec_numpy leaves out the blocks that the mask hides; the plain formula computes all of them.
    masked = plain if names[0] == "numpy" else mha_spec.attention
    rows = [*packed_rows(array, masked), *decoding_rows(array)]
    good = [report(name, limit, measured(ours, theirs, 2.0, clock)) for name, limit, ours, theirs in rows]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()

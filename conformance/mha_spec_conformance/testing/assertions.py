"""The assertions: read the arguments, choose the rows, compare them, and describe the wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.errors import ArgumentValueError
from mha_spec_conformance.judging.bounds import precision

from .columns import gradients_of_keys
from .fault import describe
from .part import Part
from .problem import Problem, read_problem, read_result
from .results import compared, forward, gradient_of_query
from .sampling import Sampler, checked_rows, marks_of
from .sums import whole_sums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mha_spec.arrays import Array
    from mha_spec_conformance.judging.bounds import Precision

    from .results import Compared, Values

__all__ = ["allowance", "assert_attention", "assert_attention_vjp"]

OPERANDS = ("query", "key", "value", "bias", "sinks")
"""The operands in the order of their gradients."""

PAIRS = 2**23
"""The number of pairs (query, key) of a forward call that are evaluated in float64."""

GRADIENT_PAIRS = 2**22
"""The number of pairs of a backward call that are evaluated for the gradient of the query."""

COLUMN_PAIRS = 2**24
"""The number of pairs that are evaluated for the gradients of key and value; at least one head is compared."""

MOST_KEYS = 64
"""The number of keys of a head whose gradients are compared in a large problem."""

MOST_SUSPECTS = 32
"""The number of suspicious rows that are compared."""


def assert_attention(
    output: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    lse: Array | None = None,
    layout: str = "bhsd",
    profile: str = "standard",
    rows: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> float:
    """Require that `output`, and `lse` if it is passed, are those of the specification, within their allowances.

    Args:
        output: (batch, heads, q_len, v_dim), of the dtype of the query.
        query: (batch, heads, q_len, qk_dim).
        key: (batch, kv_heads, kv_len, qk_dim).
        value: (batch, kv_heads, kv_len, v_dim).
        lse: (batch, heads, q_len), for packed queries (tokens, heads); natural, float32, for float64 inputs float64.
        layout: "bhsd", "bshd", "thd" or "paged". In "bshd" output, query, key and value have the axes (batch, length,
            heads, size). "thd" has (tokens, heads, size), with the further options `cu_seqlens_q` and `cu_seqlens_kv`.
            In "paged", key and value are (blocks, block_size, kv_heads, size), with the options `block_table` and
            `kv_lengths`; query and output are packed if `cu_seqlens_q` is passed, and else as in "bshd".
        profile: The profile of precision; see docs/targets.md.
        rows: The rows to compare in each head of each sequence. None compares all rows of a small problem; of a large
            problem, rows at the edges of tiles and constraints, rows drawn at random, and rows that look suspicious.
        seed: Another seed draws other rows.
        **options: The options of `mha_spec.attention`.

    Returns:
        The largest share of its allowance that an element uses.

    Raises:
        AssertionError: An element is wrong; the message says where, by how much, and what it looks like.
        ArgumentValueError, ArgumentTypeError: An argument is wrong, or a result has a wrong shape or dtype.
    """
    problem = read_problem({"query": query, "key": key, "value": value}, options, layout)
    a = problem.arguments
    shape = (*a.query.shape[:3], a.value.shape[3])
    rows_storage = problem.sides.queries
    results = {"output": read_result("output", output, a.query, shape, rows_storage)}
    if lse is not None:
        results["lse"] = read_result("lse", lse, a.query, shape[:3], rows_storage)
    run = precision(problem.dtype, profile)
    parts = [(part, forward(part, problem, run)) for part in _parts(problem, rows, seed, PAIRS, results)]
    return _conclude(_compared(results, parts, run), problem, run)


def assert_attention_vjp(
    gradients: Sequence[Array | None],
    grad_output: Array,
    query: Array,
    key: Array,
    value: Array,
    *,
    grad_lse: Array | None = None,
    layout: str = "bhsd",
    profile: str = "standard",
    rows: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> float:
    """Require that the gradients are those of the specification, within their allowances.

    The gradient of the query is compared as in `assert_attention`. Those of key and value sum over all rows, so that
    in a large problem some keys of a few key/value heads are compared.

    Args:
        gradients: The gradients of query, key, value and, if the call has them, bias and sinks, as
            `mha_spec.attention_vjp` returns them; None is not compared.
        grad_output: (batch, heads, q_len, v_dim), in the layout `layout`, as are query, key, value and their gradients.
        query: As in `assert_attention`, and so are key, value, layout, profile, rows, seed and options.
        key: See `query`.
        value: See `query`.
        grad_lse: The cotangent of lse, of its shape; None is 0.
        layout: See `query`.
        profile: See `query`.
        rows: See `query`; they choose rows of the query's gradient.
        seed: See `query`.
        **options: The options of `mha_spec.attention_vjp`.

    Returns:
        The largest share of its allowance that an element uses.

    Raises:
        AssertionError: An element is wrong; the message says where, by how much, and what it looks like.
        ArgumentValueError, ArgumentTypeError: An argument is wrong, or a result has a wrong shape or dtype, or the
            gradient of bias or sinks is passed in a problem that is too large for it.
    """
    operands = {"grad_output": grad_output, "query": query, "key": key, "value": value}
    problem = read_problem(operands, {**options, "grad_lse": grad_lse}, layout, "attention_vjp")
    results, run = _gradients(gradients, problem), precision(problem.dtype, profile)
    comparisons = [
        *_over_rows(results, problem, run, rows, seed),
        *_over_keys(results, problem, run, seed),
        *whole_sums(problem, results, run),
    ]
    return _conclude(comparisons, problem, run)


def _over_rows(
    results: Mapping[str, Array], problem: Problem, run: Precision, rows: Sequence[int] | None, seed: int
) -> list[Compared]:
    """Compare the gradient of the query at some rows."""
    result = results.get("grad_query")
    if result is None:
        return []
    parts = _parts(problem, rows, seed, GRADIENT_PAIRS, {"grad_query": result})
    evaluated = [(part, gradient_of_query(part, problem, run)) for part in parts]
    return [compared("grad_query", result, evaluated, run)] if evaluated else []


def _over_keys(results: Mapping[str, Array], problem: Problem, run: Precision, seed: int) -> list[Compared]:
    """Compare the gradients of key and value at some keys."""
    of_keys = {name: results[name] for name in ("grad_key", "grad_value") if name in results}
    chosen = _columns(problem, seed) if of_keys else []
    return _compared(of_keys, [gradients_of_keys(problem, *place, run) for place in chosen], run)


def _compared(
    results: Mapping[str, Array], parts: Sequence[tuple[Part, Mapping[str, Values]]], run: Precision
) -> list[Compared]:
    """Compare each result with its expected values in the parts, if there are any."""
    return [
        compared(name, result, [(part, values[name]) for part, values in parts], run)
        for name, result in results.items()
        if parts
    ]


def _gradients(gradients: Sequence[Array | None], problem: Problem) -> dict[str, numpy.ndarray]:
    """Convert and check the gradients that are compared, by name."""
    a = problem.arguments
    if not 3 <= len(gradients) <= len(OPERANDS):
        raise ArgumentValueError(
            f"`gradients` must hold the gradients of query, key, value and, where given, bias and sinks, "
            f"received {len(gradients)}."
        )
    results: dict[str, numpy.ndarray] = {}
    for name, gradient in zip(OPERANDS, gradients, strict=False):
        operand = getattr(a, name)
        if gradient is not None:
            if operand is None:
                raise ArgumentValueError(f"`gradients` must be None for {name}, which the call does not have.")
            storage = problem.sides.of(name) if name in ("query", "key", "value") else None
            results[f"grad_{name}"] = read_result(f"grad_{name}", gradient, operand, operand.shape, storage)
    return results


def _columns(problem: Problem, seed: int) -> list[tuple[int, int, numpy.ndarray]]:
    """Choose batch entries, key/value heads and keys whose gradients are compared."""
    a = problem.arguments
    pairs = a.heads // a.kv_heads * a.q_len * a.kv_len
    places = list(numpy.ndindex(a.batch, a.kv_heads))
    if not places or not pairs:
        return []
    heads = min(len(places), max(1, COLUMN_PAIRS // pairs))
    keys = max(MOST_KEYS, a.kv_len) if a.kv_len * pairs <= COLUMN_PAIRS * MOST_KEYS else MOST_KEYS
    sampler = Sampler(a.kv_len, keys * heads, seed)
    chosen = sorted(sampler.random.permutation(len(places))[:heads].tolist())
    columns = [
        (*places[i], sampler.rows(heads, turn, (), problem.keys_of(places[i][0]))) for turn, i in enumerate(chosen)
    ]
    return [(entry, head, keys) for entry, head, keys in columns if len(keys)]


def allowance(
    query: Array,
    key: Array,
    value: Array,
    *,
    layout: str = "bhsd",
    profile: str = "standard",
    rows: Sequence[int] | None = None,
    return_lse: bool = False,
    **options: Any,
) -> numpy.ndarray | tuple[numpy.ndarray, numpy.ndarray]:
    """Compute the allowance of each element of the output: the largest error that the accuracy rule allows.

    Args:
        query: As in `assert_attention`, and so are key, value, layout, profile and options.
        key: See `query`.
        value: See `query`.
        layout: See `query`.
        profile: See `query`.
        rows: The rows of each head whose allowances are computed, None for packed queries; None computes all, however
            many they are.
        return_lse: True also returns the allowances of lse.
        **options: The options of `mha_spec.attention`.

    Returns:
        The allowances in float64, (batch, heads, rows, v_dim) in the layout `layout`; with `return_lse` also those of
        lse, in its layout. The allowance of a result that must be exact is 0.
    """
    problem = read_problem({"query": query, "key": key, "value": value}, options, layout)
    a, run = problem.arguments, precision(problem.dtype, profile)
    if rows is not None and problem.sides.packs_queries:
        raise ArgumentValueError(f"`rows` must be None with packed queries, received rows={rows!r}.")
    chosen = checked_rows(rows, a.q_len)
    chosen = numpy.arange(a.q_len) if chosen is None else chosen
    output = numpy.zeros((a.batch, a.heads, len(chosen), a.value.shape[3]))
    lse = numpy.zeros(output.shape[:3])
    step = max(1, PAIRS // 8 // max(a.kv_len, 1))
    for entry, head in numpy.ndindex(a.batch, a.heads):
        for start in range(0, len(chosen), step):
            block = slice(start, start + step)
            values = forward(Part(a, entry, (head,), chosen[block]), problem, run)
            output[entry, head, block] = values["output"].allowance
            lse[entry, head, block] = values["lse"].allowance
    storage = problem.sides.queries
    output, lse = (storage.stored(array) for array in (output, lse))
    return (output, lse) if return_lse else output


def _parts(
    problem: Problem, rows: Sequence[int] | None, seed: int, pairs: int, results: Mapping[str, numpy.ndarray]
) -> list[Part]:
    """Choose the rows of each head that are compared."""
    a = problem.arguments
    chosen = checked_rows(rows, a.q_len)
    if chosen is not None:
        existing = {entry: chosen[chosen < problem.rows_of(entry)] for entry in range(a.batch)}
        places = numpy.ndindex(a.batch, a.heads)
        return [Part(a, entry, (head,), existing[entry]) for entry, head in places if len(existing[entry])]
    sampler = Sampler(a.q_len, pairs // max(a.kv_len, 1), seed)
    heads = sampler.heads(a.batch, a.heads)
    marks = {entry: marks_of(problem, entry) for entry in {entry for entry, _ in heads}}
    drawn = {
        (entry, head): sampler.rows(len(heads), turn, marks[entry], problem.rows_of(entry))
        for turn, (entry, head) in enumerate(heads)
    }
    for entry, head, row in _suspects(results, problem, sampler.random):
        drawn[entry, head] = numpy.union1d(drawn.get((entry, head), numpy.empty(0, numpy.int64)), [row])
    return [Part(a, entry, (head,), taken) for (entry, head), taken in sorted(drawn.items()) if len(taken)]


def _suspects(
    results: Mapping[str, numpy.ndarray], problem: Problem, random: numpy.random.Generator
) -> list[tuple[int, int, int]]:
    """Choose rows that look wrong: they are not finite, or 0, or larger than every value."""
    name, result = next(iter(results.items()))
    largest = numpy.zeros(result.shape[:3])
    numpy.amax(abs(result), axis=-1, out=largest, initial=0.0)
    limit = abs(problem.arguments.value).max(initial=0.0) if name == "output" else numpy.inf
    suspicious = ~numpy.isfinite(largest) | (largest == 0) | (largest > limit)
    for entry in range(len(suspicious)):
        suspicious[entry, :, problem.rows_of(entry) :] = False
    places = numpy.argwhere(suspicious)
    places = random.permutation(places)[:MOST_SUSPECTS]
    return [(int(entry), int(head), int(row)) for entry, head, row in places]


def _conclude(comparisons: Sequence[Compared], problem: Problem, run: Precision) -> float:
    """Return the largest share of an allowance that is used, or raise if an element is wrong."""
    comparisons = [comparison for comparison in comparisons if comparison.shares.size]
    if any(comparison.wrong.any() for comparison in comparisons):
        raise AssertionError(describe(comparisons, problem, run))
    return max((float(comparison.shares.max()) for comparison in comparisons), default=0.0)

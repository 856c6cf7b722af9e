"""Ring attention: keys and values travel around the ranks, and each rank merges what its queries see.

The backward pass sends keys and values around once more, together with the sums of their gradients, which arrive at the
rank that holds the keys. Both need memory of O(length / ranks).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import backward
from .function import program
from .merging import Halves, merge
from .mesh import varying
from .problem import Constraints, Operands, Problem, anchor_of, fold, folded, softmax_dtype, unfold
from .reverse import reverse_only
from .shards import Form, Keys, Numbers, Queries, cut, rotate, visit

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

    from .shards import Call

__all__ = ["Constants", "attention"]


class Constants(NamedTuple):
    """The arrays without a gradient: options of the whole sequence, and the digits of the rank's segment ids."""

    numbers: Numbers
    q_ids: tuple[Array, ...]
    kv_ids: tuple[Array, ...]


class _Rows(NamedTuple):
    """The results and cotangents of the rows of a shard or a piece, over all keys of the sequence."""

    output: Array
    lse: Array
    grad_output: Array
    grad_lse: Array


def _attend(form: Form, x: Operands, constants: Constants) -> tuple[Array, Array]:
    """Compute output and lse of the rank's queries, in the softmax's type (MHA-SHARD-3, MHA-SHARD-5).

    The first half of the merge holds the sinks alone, so that they enter once (MHA-MERGE-1).
    """
    queries, keys = _sides(x, constants)

    def body(of_query: Any, of_key: Any, _: int, call: Callable[[], Call]) -> tuple[Any, Any]:
        return merge(Halves(*of_query, *program(*call()))), of_key

    def step(ranks: tuple[Array, Array], keys: Keys, _: Any, state: Any) -> tuple[Any, Any]:
        nothing = ((),) * form.pieces
        return (), visit(form, constants.numbers, queries, keys, ranks, body, state, nothing)[0]

    state = tuple(_without_keys(form, cut(form, queries.query, a), x) for a in range(form.pieces))
    _, state = _around(form, step, keys, (), state)
    outputs, lses = zip(*state, strict=True)
    return jnp.concatenate(outputs, 2), jnp.concatenate(lses, 2)


def _without_keys(form: Form, query: Array, x: Operands) -> tuple[Array, Array]:
    """Return the results of queries that see nothing but the sink (MHA-EMPTY-1, MHA-SINK-1)."""
    rows = query.shape[:3]
    sinks = jnp.full(rows[1], -jnp.inf, query.dtype) if x.sinks is None else x.sinks.astype(query.dtype)
    output, lse = jnp.zeros((*rows, x.value.shape[3]), query.dtype), jnp.broadcast_to(sinks[:, None], rows)
    return varying(form.axes, (output, lse))


def _sides(x: Operands, constants: Constants) -> tuple[Queries, Keys]:
    """Return the shards of both sides; queries are converted here, keys and values after they were sent."""
    return Queries(x.query.astype(softmax_dtype(x.query)), constants.q_ids), Keys(x.key, x.value, constants.kv_ids)


def _around(form: Form, step: Callable[..., tuple[Any, Any]], keys: Any, sums: Any, state: Any) -> tuple[Any, Any]:
    """Run `step(ranks, keys, sums, state)` on the keys of every rank, beginning with those of this rank.

    Keys are sent before the step, so that the transfer and the computation can overlap, and the sums for these keys
    after it. The last step sends the sums back to the rank that holds the keys.
    """
    rank = lax.axis_index(form.axis)

    def body(carry: tuple[Any, Any, Any], distance: Array) -> tuple[tuple[Any, Any, Any], None]:
        keys, sums, state = carry
        received = rotate(form, keys)
        sums, state = step((rank, (rank - distance) % form.ranks), keys, sums, state)
        return (received, rotate(form, sums), state), None

    if form.ranks > 1:
        distances = jnp.arange(form.ranks - 1, dtype=jnp.int32)
        (keys, sums, state), _ = lax.scan(body, (keys, sums, state), distances)
    sums, state = step((rank, (rank + 1) % form.ranks), keys, sums, state)
    return rotate(form, sums), state


_attention = jax.custom_vjp(_attend, nondiff_argnums=(0,))
_in_reverse = reverse_only("ring_attention", "A Hessian is jax.jacrev(jax.jacrev(...)).")


def _forward(form: Form, x: Operands, constants: Constants) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    """Call `_attention`, not `_attend`, so that gradients can be taken of the residuals again."""
    output, lse = _attention(form, x, constants)
    return (output, lse), (x, constants, output, lse)


def _backward(form: Form, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]) -> tuple[Operands, None]:
    """Add the gradients of all pairs, from output and lse over all keys (MHA-SHARD-4)."""
    x, constants, output, lse = residuals
    queries, keys = _sides(x, constants)
    rows = _Rows(output, lse, *cotangents)

    def body(of_query: Any, of_key: Any, a: int, call: Callable[[], Call]) -> tuple[Any, Any]:
        added = _gradients(*call(), cut(form, rows, a))
        return jax.tree.map(jnp.add, (of_query, of_key), (added[0], added[1:]))

    def step(ranks: tuple[Array, Array], keys: Keys, sums: Any, state: Any) -> tuple[Any, Any]:
        state, sums = visit(form, constants.numbers, queries, keys, ranks, body, state, sums)
        return sums, state

    def zeros(*arrays: Array) -> tuple[tuple[Array, ...], ...]:
        parts = (cut(form, arrays, index) for index in range(form.pieces))
        return tuple(tuple(jnp.zeros(part.shape, lse.dtype) for part in piece) for piece in parts)

    start = tuple(part for (part,) in zeros(x.query))
    of_keys, of_queries = _around(form, step, keys, *varying(form.axes, (zeros(x.key, x.value), start)))
    of_key, of_value = (jnp.concatenate(parts, 2) for parts in zip(*of_keys, strict=True))
    gradients = Operands(jnp.concatenate(of_queries, 2), of_key, of_value, None, _sink_gradient(x, rows))
    return jax.tree.map(lambda gradient, operand: gradient.astype(operand.dtype), gradients, x), None


_attention.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=0)
def _gradients(problem: Problem, x: Operands, constraints: Constraints, rows: _Rows) -> tuple[Array, Array, Array]:
    """Return what the pairs of two pieces add to the gradients of query, key and value."""
    kv_heads = x.key.shape[1]
    gradients = backward.gradients(problem, *folded(x, constraints), *(fold(array, kv_heads) for array in rows))
    return unfold(gradients.query), gradients.key, gradients.value


def _sink_gradient(x: Operands, rows: _Rows) -> Array | None:
    """Return what the rows of this rank add to the gradient of the sinks (MHA-VJP-6)."""
    if x.sinks is None:
        return None
    output, lse, grad_output, grad_lse = (fold(array, x.key.shape[1]) for array in rows)
    sinks = x.sinks.astype(lse.dtype).reshape(1, x.key.shape[1], -1, 1)
    row_dot = backward.dot_of_rows(output, grad_output, grad_lse)
    return backward.sink_gradient(sinks, anchor_of(lse), row_dot).reshape(-1)


def attention(form: Form, x: Operands, constants: Constants) -> tuple[Array, Array]:
    """Compute output in the query's dtype, and lse in the softmax's, of the queries of this rank."""
    x = jax.tree.map(_in_reverse, varying(form.axes, x))
    output, lse = _attention(form, x, varying(form.axes, constants))
    return output.astype(x.query.dtype), lse

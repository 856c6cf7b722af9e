"""Checks that need JAX: arrays must be on the same devices, and sizes may be symbolic, as in jax.export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jax.core import Tracer
from jax.export import is_symbolic_dim

from mha_spec import layer_checks
from mha_spec.array_checks import check_library, check_same_device
from mha_spec.position_checks import refuse_ambiguity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jax import Array
    from jax.sharding import Sharding

    from mha_spec.cache import AnyCache
    from mha_spec.layer_checks import LayerArguments

    Integers = Array | Sequence[int]

__all__ = ["check_alibi", "check_append", "check_devices", "check_layer"]


def check_devices(arguments: Mapping[str, object]) -> None:
    """Raise where two arrays are committed to different devices, or to the same devices in another order (MHA-ARG-4).

    The shared checks compare each array with the query alone, and JAX may be free to move the query.
    """
    committed: dict[Sharding, tuple[str, Array]] = {}
    for label, value in arguments.items():
        if isinstance(value, jax.Array) and not isinstance(value, Tracer) and value.committed:
            committed.setdefault(value.sharding, (label, value))
    if len(committed) < 2:
        return
    first, *others = committed.values()
    for label, array in others:
        check_same_device(label, array, *first)


def check_layer(a: LayerArguments) -> LayerArguments:
    """Check the arguments of a layer, and the devices of all its arrays (MHA-ARG-4)."""
    check_library("jax", a.query)
    layer_checks.check(a)
    arrays: dict[str, object] = {"query": a.query, "key": a.key, "value": a.value, "positions": a.positions}
    arrays |= {} if a.rotation is None else {"rotary['frequencies']": a.rotation.frequencies}
    arrays |= {f"params[{name!r}]": array for name, array in a.params.items()}
    check_devices(arrays | _cache_arrays(a.cache) | a.options)
    return a


def check_append(cache: AnyCache, key: Array, value: Array, lengths: Integers | None) -> None:
    """Check the arguments of append_cache, and the devices of all its arrays (MHA-ARG-4)."""
    layer_checks.check_append(cache, key, value, lengths)
    check_devices({"key": key, "value": value, "lengths": lengths} | _cache_arrays(cache))


def check_alibi(slopes: Array | int, q_len: Any, kv_len: Any, q_offset: Integers | int | str | None) -> None:
    """Check the arguments of alibi_bias; a symbolic size is an integer >= 0 (MHA-ARG-4, MHA-ALIBI-3, MHA-POS-2)."""
    symbolic = [bool(is_symbolic_dim(size)) for size in (q_len, kv_len)]
    if q_offset is None and any(symbolic):
        refuse_ambiguity("alibi_bias", q_len, kv_len, None)
        q_offset = 0
    layer_checks.check_alibi(slopes, 0 if symbolic[0] else q_len, 0 if symbolic[1] else kv_len, q_offset)
    check_devices({"slopes": slopes, "q_offset": q_offset})


def _cache_arrays(cache: AnyCache | None) -> dict[str, object]:
    return {} if cache is None else {f"cache.{name}": array for name, array in cache._asdict().items()}

"""The validation that the layer of every backend shares; what it hands to attention is checked there, once.

As in `mha_spec.checks`, each check cites its clause, looks at Python values, shapes and dtypes, and reads contents of
host data alone. Sizes that a traced shape does not know (None) fit everything.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy

from .arguments import WEIGHT_FUNCTIONS
from .array_checks import check_floating, is_sequence, require_array
from .arrays import FLOATING, Array, dtype_name, host_integers, library_of, placement_of, storage_of
from .cache import KVCache
from .checks import check_entries, check_offset, refuse_ambiguity, refuse_unknown
from .errors import ArgumentTypeError, ArgumentValueError, refuse_type, refuse_value
from .parameters import AXES, REQUIRED
from .scalars import check_flag, check_integer, check_number, is_integer, plain, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "LayerArguments",
    "Rotary",
    "check",
    "check_alibi",
    "check_append",
    "check_epsilon",
    "check_heads",
    "check_like",
    "check_positions",
    "check_rotary",
    "check_slope_dtype",
    "empty_shapes",
]


class Rotary(NamedTuple):
    """The options of rotary_embedding."""

    base: float = 10000.0
    interleaved: bool = False
    rotary_dim: int | None = None
    """Components that turn, from the first on; None is all of them."""

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        return {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}


@dataclass(slots=True)
class LayerArguments:
    """One call of the layer, as the caller gave it."""

    function: str
    query: Array
    key: Array | None
    value: Array | None
    params: Mapping[str, Array]
    rotary: Mapping[str, Any] | None
    norm_epsilon: float
    cache: KVCache | None
    options: dict[str, Any]
    """The options of attention that were given."""
    rotation: Rotary | None = None
    """What `check` makes of `rotary`."""

    @property
    def weighs(self) -> bool:
        """Whether the weights are asked for, which need no values."""
        return self.function in WEIGHT_FUNCTIONS


def check(a: LayerArguments) -> LayerArguments:
    """Raise ArgumentValueError or ArgumentTypeError for the first thing wrong with `a`, else give it back."""
    refuse_unknown(a.options, a.function)
    _check_operands(a)
    _check_params(a)
    a.norm_epsilon = check_epsilon(a.norm_epsilon)
    if a.rotary is not None:
        a.rotation = check_rotary(a.rotary, a.params["w_q"].shape[2])
    if a.cache is not None:
        _check_cache(a, a.cache)
    elif a.key is None:
        raise ArgumentValueError(
            "`key` must be given where there is no cache, received key=None. "
            "Self-attention takes the query as its key and value. [MHA-LAYER-3]"
        )
    _check_alignment(a)
    return a


def _check_operands(a: LayerArguments) -> None:
    """Query, key and value are rank-3 arrays of one library, dtype, device and batch (MHA-LAYER-2)."""
    _check_array("query", a.query, "(batch, q_len, embed)")
    if dtype_name(a.query) not in FLOATING:
        raise ArgumentTypeError(
            f"`query` must have a dtype of {', '.join(FLOATING)}, received dtype={dtype_name(a.query)}. [MHA-LAYER-2]"
        )
    if not a.weighs and (a.key is None) != (a.value is None):
        missing, given = ("key", "value") if a.key is None else ("value", "key")
        raise ArgumentValueError(f"`{missing}` must be given with `{given}`, received {missing}=None. [MHA-LAYER-3]")
    for label, array in (("key", a.key), ("value", a.value)):
        if array is None or array is a.query:
            continue
        _check_array(label, array, f"(batch, kv_len, {label[0]}_embed)")
        _check_like(label, array, a.query, "MHA-LAYER-2")
        if _differ(array.shape[0], a.query.shape[0]):
            raise ArgumentValueError(
                f"`{label}` must have the batch of `query`, batch={a.query.shape[0]}, "
                f"received batch={array.shape[0]} in shape={tuple(array.shape)}. [MHA-LAYER-2]"
            )
    if a.key is not None and a.value is not None and _differ(a.value.shape[1], a.key.shape[1]):
        raise ArgumentValueError(
            f"`value` must have the kv_len of `key`, kv_len={a.key.shape[1]}, "
            f"received kv_len={a.value.shape[1]} in shape={tuple(a.value.shape)}. [MHA-LAYER-2]"
        )


def _check_array(label: str, array: Array, axes: str) -> None:
    require_array(label, array, "MHA-LAYER-2")
    if len(array.shape) != 3:
        raise ArgumentValueError(
            f"`{label}` must have rank 3, {axes}, received shape={tuple(array.shape)}. "
            "Heads are split by the projections. [MHA-LAYER-2]"
        )


def _check_like(label: str, array: Array, query: Array, clause: str) -> None:
    """An array is of the dtype of `query`, which a clause asks, and of its library and device (MHA-ARG-4)."""
    library = library_of(query)
    if require_array(label, array, "MHA-ARG-4", f"an array of {library}") != library:
        raise ArgumentTypeError(
            f"`{label}` must be an array of {library}, as `query` is, received an array of {library_of(array)}. "
            "Convert one of them first. [MHA-ARG-4]"
        )
    if array.dtype != query.dtype:
        raise ArgumentTypeError(
            f"`{label}` must have the dtype of `query`, dtype={dtype_name(query)}, "
            f"received dtype={dtype_name(array)}. Convert one of them first: the layer never promotes. [{clause}]"
        )
    expected, received = placement_of(query), placement_of(array)
    if received != expected and None not in (expected, received):
        raise ArgumentValueError(
            f"`{label}` must be on the device of `query`, device={expected}, received device={received}. [MHA-ARG-4]"
        )


def _differ(one: int | None, other: int | None) -> bool:
    return one != other and one is not None and other is not None


def _fit(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is as expected, where None is any size."""
    if shape == expected:
        return True
    return len(shape) == len(expected) and not any(map(_differ, shape, expected))


def _check_params(a: LayerArguments) -> None:
    """Every parameter has a known name, the shape that the others leave it, and the query's dtype (MHA-PROJ-4)."""
    if not _is_mapping(a.params):
        raise ArgumentTypeError(
            f"`params` must be a mapping of names to arrays, received {type(a.params).__name__}. [MHA-PROJ-4]"
        )
    required = REQUIRED[:2] if a.weighs else REQUIRED
    missing = [name for name in required if name not in a.params]
    unknown = [repr(name) for name in a.params if name not in AXES]
    if missing or unknown:
        optional = [name for name in AXES if name not in required]
        raise ArgumentValueError(
            f"`params` must hold {', '.join(required)}, and may hold {', '.join(optional)}, received "
            f"missing={', '.join(missing) or None}, unknown={', '.join(unknown) or None}. [MHA-PROJ-4]"
        )
    sizes = {"embed": a.query.shape[2]}
    if a.key is not None:
        sizes["k_embed"] = a.key.shape[2]
    if a.value is not None:
        sizes["v_embed"] = a.value.shape[2]
    for name in _one_of_each_kind(a.params):
        _check_like(f"params[{name!r}]", a.params[name], a.query, "MHA-PROJ-4")
    for name, axes in AXES.items():
        if name in a.params:
            _check_sizes(name, axes, a.params[name].shape, sizes)
    if sizes["heads"] % sizes["kv_heads"]:
        raise ArgumentValueError(
            f"`params` must have heads that are a multiple of kv_heads={sizes['kv_heads']}, "
            f"received heads={sizes['heads']} in w_q. [MHA-HEAD-2]"
        )


def _one_of_each_kind(params: Mapping[str, Array]) -> Iterable[str]:
    """The first name of each class, dtype and device that there is among parameters."""
    kinds: dict[Any, str] = {}
    for name, one in params.items():
        kind: Any = (type(one), getattr(one, "dtype", None), getattr(one, "device", None), storage_of(one))
        kinds.setdefault(kind, name)
    return kinds.values()


def _check_sizes(name: str, axes: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """A parameter has the sizes that are known of its axes, and tells the others."""
    fits = len(shape) == len(axes)
    learned: dict[str, int] = {}
    for axis, size in zip(axes, shape, strict=True) if fits else ():
        known = sizes.get(axis)
        if known is None and size:
            learned[axis] = size
        elif size == 0 or (size != known and _differ(size, known)):
            fits = False
    if not fits:
        expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        raise ArgumentValueError(
            f"`params[{name!r}]` must have shape ({', '.join(axes)})=({expected}), each size>=1, "
            f"received shape={tuple(shape)}. [MHA-PROJ-4]"
        )
    sizes.update(learned)


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, (dict, Mapping))


LARGEST = sys.float_info.max


def check_epsilon(epsilon: object) -> float:
    """Give the Python number that epsilon is, finite and >= 0 (MHA-NORM-1)."""
    number = check_number("norm_epsilon", epsilon, "MHA-NORM-1")
    if not 0 <= number <= LARGEST:
        refuse_value(
            "MHA-NORM-1",
            f"`norm_epsilon` must be finite and norm_epsilon>=0, received norm_epsilon={shown(number)}.",
        )
    return number


def check_rotary(rotary: Mapping[str, Any], size: int) -> Rotary:
    """Give the options of rotary_embedding with their defaults, for vectors of `size` components (MHA-ROTARY-6)."""
    if not _is_mapping(rotary):
        raise ArgumentTypeError(
            "`rotary` must be a mapping of the options of rotary_embedding, {} for the defaults, "
            f"received {shown(rotary)} of type {type(rotary).__name__}. None is no rotation. [MHA-ROTARY-6]"
        )
    for name in rotary:
        if name not in Rotary._fields:
            raise ArgumentTypeError(
                f"`rotary` must hold options of rotary_embedding, {', '.join(Rotary._fields)}, "
                f"received {name!r}. [MHA-ROTARY-6]"
            )
    base, interleaved, rotary_dim = (rotary.get(name, Rotary._field_defaults[name]) for name in Rotary._fields)
    base = check_number("base", base, "MHA-ROTARY-6")
    interleaved = check_flag("interleaved", interleaved, "MHA-ROTARY-6")
    if not 0 < base <= LARGEST:
        refuse_value("MHA-ROTARY-6", f"`base` must be finite and base>0, received base={shown(base)}.")
    return Rotary(base, interleaved, _rotary_dim(plain(rotary_dim), size))


def _rotary_dim(rotary_dim: object, size: int) -> int | None:
    if rotary_dim is None:
        if size % 2:
            raise ArgumentValueError(
                f"`rotary_dim` must be given for vectors of an odd size, received size={size}, rotary_dim=None: "
                f"components turn in pairs. rotary_dim={size - 1} leaves the last one as it is. [MHA-ROTARY-6]"
            )
        return None
    if not is_integer(rotary_dim):
        refuse_type(
            "MHA-ROTARY-6", f"`rotary_dim` must be an integer or None, received rotary_dim={shown(rotary_dim)}."
        )
    if rotary_dim % 2 or not 2 <= rotary_dim <= size:
        refuse_value(
            "MHA-ROTARY-6",
            f"`rotary_dim` must be even and 2<=rotary_dim<=size={size}, received rotary_dim={shown(rotary_dim)}.",
        )
    return rotary_dim


def check_positions(x: Array, positions: Array) -> None:
    """x is a floating array of rank 4, and positions are numbers, one for each token (MHA-ROTARY-4, MHA-ROTARY-6)."""
    library = require_array("x", x, "MHA-ROTARY-6")
    check_floating("x", x, "MHA-ROTARY-6")
    if len(x.shape) != 4:
        raise ArgumentValueError(
            f"`x` must have rank 4, (batch, heads, length, size), received shape={tuple(x.shape)}. [MHA-ROTARY-6]"
        )
    array = _of_numbers(positions) if library_of(positions) is None else positions
    if require_array("positions", array, "MHA-ROTARY-6") not in ("numpy", library):
        raise ArgumentTypeError(
            f"`positions` must be numbers on the host or an array of {library}, as `x` is, "
            f"received an array of {library_of(positions)}. [MHA-ARG-4]"
        )
    kind = dtype_name(array)
    if kind not in FLOATING and not kind.startswith(("int", "uint")):
        raise ArgumentTypeError(f"`positions` must be integers or floats, received dtype={kind}. [MHA-ROTARY-6]")
    batch, _, length, _ = x.shape
    shape = tuple(array.shape)
    if len(shape) not in (1, 2) or any(_differ(*pair) for pair in zip(shape[::-1], (length, batch), strict=False)):
        raise ArgumentValueError(
            f"`positions` must have shape (length,)={(length,)} or (batch, length)={(batch, length)}, "
            f"received shape={shape}. [MHA-ROTARY-6]"
        )


def _of_numbers(positions: object) -> numpy.ndarray:
    """Positions in a sequence, in a sequence of sequences of one length, or one alone, whose shape is wrong."""
    rows = list(positions) if _is_series(positions) else [positions]
    rows = [list(row) for row in rows if _is_series(row)] or [rows]
    even = {len(row) for row in rows} == {len(rows[0])}
    if not even or not all(map(_is_position, (number for row in rows for number in row))):
        refuse_type(
            "MHA-ROTARY-6", f"`positions` must be an array or a sequence of numbers, received {shown(positions)}."
        )
    return numpy.asarray(positions, dtype=numpy.float64)


def _is_position(number: object) -> bool:
    held = plain(number)
    return isinstance(held, float) or (is_integer(held) and abs(held) <= LARGEST)


def _is_series(value: object) -> TypeGuard[Sequence[object]]:
    return is_sequence(value) or isinstance(value, range)


def _check_cache(a: LayerArguments, cache: KVCache) -> None:
    """A cache is of the query's library, dtype, device and batch, and of the sizes of the parameters (MHA-CACHE-7)."""
    _, kv_heads, qk_dim = a.params["w_k"].shape
    v_dim = None if a.weighs else a.params["w_v"].shape[2]
    _check_buffers(cache, a.query, (a.query.shape[0], kv_heads, None, qk_dim), v_dim)
    kv_lengths = a.options.get("kv_lengths")
    if a.key is not None:
        check_entries("kv_lengths", kv_lengths, a.query, 0, a.key.shape[1], "kv_len")
        _check_room(cache, a.key.shape[1], kv_lengths)
    elif kv_lengths is not None:
        raise ArgumentValueError(
            "`kv_lengths` must be None where key=None: with a cache it counts the new keys, and its own lengths say "
            f"how many it holds; received kv_lengths={kv_lengths!r}. [MHA-CACHE-8]"
        )


def check_append(
    cache: KVCache, key: Array, value: Array, counts: Array | Sequence[int] | None, label: str = "lengths"
) -> None:
    """New tokens fit their cache, which has room for them (MHA-CACHE-4, MHA-CACHE-7)."""
    for name, array in (("key", key), ("value", value)):
        require_array(name, array, "MHA-CACHE-7")
        if len(array.shape) != 4:
            raise ArgumentValueError(
                f"`{name}` must have rank 4, (batch, kv_heads, length, size), received shape={tuple(array.shape)}. "
                "[MHA-CACHE-7]"
            )
    _check_like("value", value, key, "MHA-CACHE-7")
    batch, kv_heads, length, qk_dim = key.shape
    if not _fit(tuple(value.shape[:3]), tuple(key.shape[:3])):
        raise ArgumentValueError(
            f"`value` must agree with `key` in (batch, kv_heads, length)={tuple(key.shape[:3])}, "
            f"received shape={tuple(value.shape)}. [MHA-CACHE-7]"
        )
    _check_buffers(cache, key, (batch, kv_heads, None, qk_dim), value.shape[3])
    check_entries(label, counts, key, 0, length, "length")
    _check_room(cache, length, counts)


def _check_buffers(cache: object, like: Array, shape: tuple[int | None, ...], v_dim: int | None) -> None:
    if not isinstance(cache, KVCache):
        raise ArgumentTypeError(
            f"`cache` must be a KVCache, received {type(cache).__name__}. KVCache.empty makes one. [MHA-CACHE-7]"
        )
    capacity = None
    for name, buffer, size in (("key", cache.key, shape[3]), ("value", cache.value, v_dim)):
        _check_like(f"cache.{name}", buffer, like, "MHA-CACHE-7")
        received, expected = tuple(buffer.shape), (*shape[:2], capacity, size)
        if not _fit(received, expected):
            axes = ("batch", "kv_heads", "capacity", "qk_dim" if name == "key" else "v_dim")
            fitting = ", ".join(str(axis if one is None else one) for axis, one in zip(axes, expected, strict=True))
            raise ArgumentValueError(
                f"`cache.{name}` must have shape ({', '.join(axes)})=({fitting}), received shape={received}. "
                "[MHA-CACHE-7]"
            )
        capacity = received[2]
    if cache.lengths is None:
        refuse_type("MHA-CACHE-7", "`cache.lengths` must hold an integer for each batch entry, received None.")
    check_entries("cache.lengths", cache.lengths, like, 0, cache.capacity, "capacity")


def _check_room(cache: KVCache, length: int | None, counts: Array | Sequence[int] | None) -> None:
    """Where lengths are host data, new tokens that do not fit are an error, and nothing is stored (MHA-CACHE-4)."""
    before = host_integers(cache.lengths)
    lengths = None if length is None else [length] * len(before or ())
    more = lengths if counts is None else host_integers(counts)
    if before is None or more is None:
        return
    if max([one + other for one, other in zip(before, more, strict=True)], default=0) > cache.capacity:
        raise ArgumentValueError(
            f"`cache` must have room for the new tokens, capacity={cache.capacity}, received lengths={before} and "
            f"{more} more. Nothing was stored; a cache that is made larger holds them. [MHA-CACHE-4]"
        )


def _check_alignment(a: LayerArguments) -> None:
    """Rotation needs to know where queries and keys are, as causal and windows do (MHA-LAYER-6)."""
    offset, kv_lengths = a.options.get("q_offset"), a.options.get("kv_lengths")
    if isinstance(check_offset(offset, a.query), str):  # Rotation reads the lengths before attention checks them.
        check_entries("q_lengths", a.options.get("q_lengths"), a.query, 0, a.query.shape[1], "q_len")
        if a.cache is None and a.key is not None:
            check_entries("kv_lengths", kv_lengths, a.query, 0, a.key.shape[1], "kv_len")
    if a.rotary is not None and a.cache is None and a.key is not None and offset is None:
        refuse_ambiguity(f"rotary={dict(a.rotary)}", a.query.shape[1], a.key.shape[1], kv_lengths)


def check_heads(heads: object, label: str = "heads") -> None:
    """A number of heads is an integer >= 1 (MHA-ALIBI-3)."""
    check_integer(label, heads, 1, "MHA-ALIBI-3")


def check_slope_dtype(dtype: object) -> None:
    """Slopes are float32 or float64, by name (MHA-ALIBI-3)."""
    if not isinstance(dtype, str):
        refuse_type(
            "MHA-ALIBI-3",
            f"`dtype` must be 'float32' or 'float64', received {shown(dtype)} of type {type(dtype).__name__}.",
        )
    if dtype not in SLOPE_DTYPES:
        refuse_value("MHA-ALIBI-3", f"`dtype` must be 'float32' or 'float64', received dtype={shown(dtype)}.")


SLOPE_DTYPES = ("float32", "float64")


def check_alibi(slopes: Any, q_len: int, kv_len: int, offset: Array | Sequence[int] | int | str | None) -> None:
    """Slopes are a number of heads or an array (heads,), and positions are known (MHA-ALIBI-3, MHA-POS-2)."""
    library = library_of(slopes)
    if library is None:
        check_heads(slopes, "slopes")
    elif require_array("slopes", slopes, "MHA-ALIBI-3") and (
        len(slopes.shape) != 1 or dtype_name(slopes) not in FLOATING
    ):
        raise ArgumentValueError(
            f"`slopes` must be a number of heads or a floating array of shape (heads,), "
            f"received dtype={dtype_name(slopes)}, shape={tuple(slopes.shape)}. [MHA-ALIBI-3]"
        )
    check_integer("q_len", q_len, 0, "MHA-ALIBI-3")
    check_integer("kv_len", kv_len, 0, "MHA-ALIBI-3")
    if offset is None:
        refuse_ambiguity("alibi_bias", q_len, kv_len, None)
    elif library is not None and library_of(offset) not in (None, "numpy", library):
        raise ArgumentTypeError(
            f"`q_offset` must be integers on the host or an array of {library}, as `slopes` is, "
            f"received an array of {library_of(offset)}. [MHA-ARG-4]"
        )
    else:
        check_offset(offset, _of_as_many_entries(offset))


def _of_as_many_entries(offset: Any) -> Array:
    """An array with a batch entry for each offset, which alone says how many there are."""
    if library_of(offset) is None:
        return numpy.empty(len(offset) if is_sequence(offset) else 1)
    require_array("q_offset", offset, "MHA-LEN-3")
    if len(offset.shape) != 1:
        refuse_value("MHA-LEN-3", f"`q_offset` must have shape (batch,), received shape={tuple(offset.shape)}.")
    return offset


def empty_shapes(
    batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the shapes of the buffers of a cache, whose sizes are integers (MHA-CACHE-7)."""
    sizes = {"batch": (batch, 0), "kv_heads": (kv_heads, 1), "capacity": (capacity, 0), "qk_dim": (qk_dim, 1)}
    first = [check_integer(name, size, least, "MHA-CACHE-7") for name, (size, least) in sizes.items()]
    last = first[3] if v_dim is None else check_integer("v_dim", v_dim, 1, "MHA-CACHE-7")
    return tuple(first), (*first[:3], last)


def check_like(like: object) -> None:
    """The array that a cache resembles is a floating one (MHA-CACHE-7)."""
    require_array("like", like, "MHA-CACHE-7")
    check_floating("like", like, "MHA-CACHE-7")

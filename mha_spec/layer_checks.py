"""The checks of the layer that every backend shares; `mha_spec.checks` then checks the arguments of its attention.

As in `mha_spec.checks`, each check cites its clause, looks at Python values, shapes and dtypes, and reads the contents
of host data only. A size that is unknown in a trace, None, fits every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import numpy

from .arguments import WEIGHT_FUNCTIONS
from .array_checks import check_floating, check_same_dtype, differ, fits, is_mapping, is_sequence, require_array
from .arrays import FLOATING, Array, dtype_name, library_of, storage_of
from .cache import WindowKVCache
from .cache_checks import check_buffers, check_options_of_cache, check_room, check_span
from .checks import refuse_unknown
from .errors import refuse_type, refuse_value
from .parameters import AXES, JOINT_NORMS, REQUIRED
from .position_checks import check_entries, check_offset, refuse_ambiguity
from .rotary_checks import check_rotary
from .scalars import LARGEST_FLOAT, as_float, check_count, check_number, check_size, is_integer, plain, short_repr

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .cache import AnyCache
    from .rotary_checks import Rotary

__all__ = [
    "LayerArguments",
    "check",
    "check_alibi",
    "check_append",
    "check_epsilon",
    "check_heads",
    "check_like",
    "check_positions",
    "check_slope_dtype",
    "check_vectors",
    "empty_shapes",
]


@dataclass(slots=True)
class LayerArguments:
    """The arguments of a call of the layer."""

    function: str
    query: Array
    key: Array | None
    value: Array | None
    params: Mapping[str, Array]
    rotary: Mapping[str, Any] | None
    norm_epsilon: float
    cache: AnyCache | None
    options: dict[str, Any]
    """The options of attention that the call has."""
    positions: Array | Sequence[Any] | None = None
    """The positions by which queries and new keys turn; None counts them."""
    rotation: Rotary | None = None
    """`rotary` with its defaults, which `check` sets."""

    @property
    def weighs(self) -> bool:
        """True for the functions of weights only, which need no values."""
        return self.function in WEIGHT_FUNCTIONS


def check(a: LayerArguments) -> LayerArguments:
    """Raise for the first error in `a`, else return it."""
    refuse_unknown(a.options, a.function)
    _check_operands(a)
    _check_params(a)
    a.norm_epsilon = check_epsilon(a.norm_epsilon)
    if a.rotary is not None:
        a.rotation = check_rotary(a.rotary, a.params["w_q"].shape[2], a.query)
    if a.positions is not None:
        _check_positions_of_layer(a)
    if a.cache is not None:
        _check_cache(a, a.cache)
    elif a.key is None:
        refuse_value(
            "MHA-LAYER-3",
            "`key` must be given where there is no cache, received key=None. "
            "Self-attention takes the query as its key and value.",
        )
    _check_alignment(a)
    return a


def _check_operands(a: LayerArguments) -> None:
    """Require rank-3 arrays of the same library, dtype, device and batch (MHA-LAYER-2)."""
    _check_array("query", a.query, "(batch, q_len, embed)")
    if dtype_name(a.query) not in FLOATING:
        refuse_type(
            "MHA-LAYER-2", f"`query` must have a dtype of {', '.join(FLOATING)}, received dtype={dtype_name(a.query)}."
        )
    if not a.weighs and (a.key is None) != (a.value is None):
        missing, present = ("key", "value") if a.key is None else ("value", "key")
        refuse_value("MHA-LAYER-3", f"`{missing}` must be given with `{present}`, received {missing}=None.")
    for label, array in (("key", a.key), ("value", a.value)):
        if array is None or array is a.query:
            continue
        _check_array(label, array, f"(batch, kv_len, {label[0]}_embed)")
        check_same_dtype(label, array, a.query, "query", "MHA-LAYER-2")
        if differ(array.shape[0], a.query.shape[0]):
            refuse_value(
                "MHA-LAYER-2",
                f"`{label}` must have the batch of `query`, batch={a.query.shape[0]}, "
                f"received batch={array.shape[0]} in shape={tuple(array.shape)}.",
            )
    if a.key is not None and a.value is not None and differ(a.value.shape[1], a.key.shape[1]):
        refuse_value(
            "MHA-LAYER-2",
            f"`value` must have the kv_len of `key`, kv_len={a.key.shape[1]}, "
            f"received kv_len={a.value.shape[1]} in shape={tuple(a.value.shape)}.",
        )


def _check_array(label: str, array: Array, axes: str) -> None:
    require_array(label, array, "MHA-LAYER-2")
    if len(array.shape) != 3:
        refuse_value(
            "MHA-LAYER-2",
            f"`{label}` must have rank 3, {axes}, received shape={tuple(array.shape)}. "
            "Heads are split by the projections.",
        )


def _check_params(a: LayerArguments) -> None:
    """Require known names, shapes that agree with each other, and the query's dtype (MHA-PROJ-4)."""
    if not is_mapping(a.params):
        refuse_type("MHA-PROJ-4", f"`params` must be a mapping of names to arrays, received {type(a.params).__name__}.")
    _check_names(a)
    for name in _distinct(a.params):
        check_same_dtype(f"params[{name!r}]", a.params[name], a.query, "query", "MHA-PROJ-4")
    sizes = {"embed": a.query.shape[2]}
    if a.key is not None:
        sizes["k_embed"] = a.key.shape[2]
    if a.value is not None:
        sizes["v_embed"] = a.value.shape[2]
    for name, axes in AXES.items():
        if name in a.params:
            _check_sizes(name, axes, a.params[name].shape, sizes)
    if sizes["heads"] % sizes["kv_heads"]:
        refuse_value(
            "MHA-HEAD-2",
            f"`params` must have heads that are a multiple of kv_heads={sizes['kv_heads']}, "
            f"received heads={sizes['heads']} in w_q.",
        )


def _check_names(a: LayerArguments) -> None:
    """Require all names that the function needs, none that is unknown, and a single norm of each kind."""
    required = REQUIRED[:2] if a.weighs else REQUIRED
    missing = [name for name in required if name not in a.params]
    unknown = [repr(name) for name in a.params if name not in AXES]
    if missing or unknown:
        optional = [name for name in AXES if name not in required]
        refuse_value(
            "MHA-PROJ-4",
            f"`params` must hold {', '.join(required)}, and may hold {', '.join(optional)}, received "
            f"missing={', '.join(missing) or None}, unknown={', '.join(unknown) or None}.",
        )
    for single, joint in JOINT_NORMS.items():
        if single in a.params and joint in a.params:
            refuse_value(
                "MHA-NORM-3",
                f"`params` must hold {single}, whose mean is over a head, or {joint}, whose mean is over all heads, "
                "received both.",
            )


def _distinct(params: Mapping[str, Array]) -> Iterable[str]:
    """Name the first parameter of each class, dtype, device and storage; its check serves all parameters like it."""
    kinds: dict[Any, str] = {}
    for name, array in params.items():
        kind: Any = (type(array), getattr(array, "dtype", None), getattr(array, "device", None), storage_of(array))
        kinds.setdefault(kind, name)
    return kinds.values()


def _check_sizes(name: str, axes: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Require the known sizes of a parameter's axes, and learn the unknown ones from it."""
    fits = len(shape) == len(axes)
    learned: dict[str, int] = {}
    for axis, size in zip(axes, shape, strict=True) if fits else ():
        known = sizes.get(axis)
        if known is None and size:
            learned[axis] = size
        elif size == 0 or (size != known and differ(size, known)):
            fits = False
    if not fits:
        expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        refuse_value(
            "MHA-PROJ-4",
            f"`params[{name!r}]` must have shape ({', '.join(axes)})=({expected}), each size>=1, "
            f"received shape={tuple(shape)}.",
        )
    sizes.update(learned)


def check_epsilon(epsilon: object) -> float:
    """Return epsilon as a float; it is finite and >= 0 (MHA-NORM-1)."""
    number = check_number("norm_epsilon", epsilon, "MHA-NORM-1")
    if not 0 <= number <= LARGEST_FLOAT:
        refuse_value(
            "MHA-NORM-1",
            f"`norm_epsilon` must be finite and norm_epsilon>=0, received norm_epsilon={short_repr(number)}.",
        )
    return as_float(number)


def check_vectors(x: Array) -> None:
    """Require a floating x of rank 4 (MHA-ROTARY-6)."""
    require_array("x", x, "MHA-ROTARY-6")
    check_floating("x", x, "MHA-ROTARY-6")
    if len(x.shape) != 4:
        refuse_value(
            "MHA-ROTARY-6", f"`x` must have rank 4, (batch, heads, length, size), received shape={tuple(x.shape)}."
        )


def check_positions(x: Array, positions: Array | Sequence[Any], sections: tuple[int, ...] | None = None) -> None:
    """Require a number for each token of x, or for each axis and token (MHA-ROTARY-4, MHA-ROTARY-6, MHA-ROTARY-17)."""
    batch, _, length, _ = x.shape
    _check_numbers(positions, x, "x", (batch, length), "length", sections)


def _check_positions_of_layer(a: LayerArguments) -> None:
    """Require positions that turn something, for as many queries as new keys (MHA-LAYER-7)."""
    if a.rotation is None:
        refuse_value(
            "MHA-LAYER-7",
            "`positions` must be None without rotary, because they only turn queries and keys. "
            "Causal and window count from q_offset.",
        )
    batch, length, _ = a.query.shape
    if a.key is not None and differ(length, a.key.shape[1]):
        refuse_value(
            "MHA-LAYER-7",
            f"`positions` must be None where q_len={length} and kv_len={a.key.shape[1]} differ, "
            "because they turn query i and new key i alike.",
        )
    _check_numbers(a.positions, a.query, "query", (batch, length), "q_len", a.rotation.sections)


def _check_numbers(
    positions: Any, like: Array, other: str, sizes: tuple[int, int], length: str, sections: tuple[int, ...] | None
) -> None:
    """Require integers or floats of the library of `like`, of shape (length,), (batch, length) or with all axes."""
    library = library_of(like)
    array = _of_numbers(positions) if library_of(positions) is None else positions
    if require_array("positions", array, "MHA-ROTARY-6") not in ("numpy", library):
        refuse_type(
            "MHA-ARG-4",
            f"`positions` must be numbers on the host or an array of {library}, as `{other}` is, "
            f"received an array of {library_of(positions)}.",
        )
    kind = dtype_name(array)
    if kind not in FLOATING and not kind.startswith(("int", "uint")):
        refuse_type("MHA-ROTARY-6", f"`positions` must be integers or floats, received dtype={kind}.")
    shape = None if getattr(array.shape, "rank", 1) is None else tuple(array.shape)
    axes = () if sections is None else (len(sections),)
    expected = (*axes, *sizes)
    if shape is None or not 1 <= len(shape) <= len(expected) or not fits(shape, expected[-len(shape) :]):
        labels = (f"({length},)", f"(batch, {length})", f"(len(sections), batch, {length})")[: len(expected)]
        shapes = [f"{label}={expected[-rank:]}" for rank, label in enumerate(labels, start=1)]
        refuse_value(
            "MHA-ROTARY-6" if sections is None else "MHA-ROTARY-17",
            f"`positions` must have shape {' or '.join(shapes)}, "
            f"received shape={'<unknown>' if shape is None else shape}.",
        )


def _of_numbers(positions: object) -> numpy.ndarray:
    """Convert a sequence of positions, or of sequences of equal length; a later check refuses a single number."""
    if not all(map(_is_position, _leaves(positions))):
        _refuse_sequence(positions)
    try:
        return numpy.asarray(positions, dtype=numpy.float64)
    except ValueError:  # Sequences of different lengths.
        _refuse_sequence(positions)


def _leaves(positions: object, axes: int = 3) -> Iterable[object]:
    """Return the numbers of sequences inside each other, of at most so many axes; a deeper sequence is no number."""
    if axes == 0 or not _is_series(positions):
        return [positions]
    return (leaf for part in positions for leaf in _leaves(part, axes - 1))


def _refuse_sequence(positions: object) -> NoReturn:
    refuse_type(
        "MHA-ROTARY-6", f"`positions` must be an array or a sequence of numbers, received {short_repr(positions)}."
    )


def _is_position(number: object) -> bool:
    held = plain(number)
    return isinstance(held, float) or (is_integer(held) and abs(held) <= LARGEST_FLOAT)


def _is_series(value: object) -> TypeGuard[Sequence[object]]:
    return is_sequence(value) or isinstance(value, range)


def _check_cache(a: LayerArguments, cache: AnyCache) -> None:
    """Require the query's library, dtype, device and batch, and the sizes of the parameters (MHA-CACHE-7)."""
    check_options_of_cache(cache, a.function, a.options, weighs=a.weighs)
    _, kv_heads, qk_dim = a.params["w_k"].shape
    v_dim = None if a.weighs else a.params["w_v"].shape[2]
    check_buffers(cache, a.query, "query", (a.query.shape[0], kv_heads), (qk_dim, v_dim))
    if isinstance(cache, WindowKVCache):
        check_span(cache, a.options, a.query)
    kv_lengths = a.options.get("kv_lengths")
    if a.key is not None:
        check_entries("kv_lengths", kv_lengths, a.query, 0, a.key.shape[1], "kv_len")
        check_room(cache, a.key.shape[1], kv_lengths)
    elif kv_lengths is not None:
        refuse_value(
            "MHA-CACHE-8",
            "`kv_lengths` must be None where key=None: with a cache it counts the new keys, "
            f"received kv_lengths={short_repr(kv_lengths)}. The lengths of the cache count those that it holds.",
        )


def check_append(
    cache: AnyCache,
    key: Array,
    value: Array,
    counts: Array | Sequence[int] | None,
    label: str = "lengths",
) -> None:
    """Require new tokens that fit the shapes and the capacity of their cache (MHA-CACHE-4, MHA-CACHE-7)."""
    for name, array in (("key", key), ("value", value)):
        require_array(name, array, "MHA-CACHE-7")
        if len(array.shape) != 4:
            refuse_value(
                "MHA-CACHE-7",
                f"`{name}` must have rank 4, (batch, kv_heads, length, size), received shape={tuple(array.shape)}.",
            )
    check_same_dtype("value", value, key, "key", "MHA-CACHE-7")
    batch, kv_heads, length, qk_dim = key.shape
    if not fits(tuple(value.shape[:3]), tuple(key.shape[:3])):
        refuse_value(
            "MHA-CACHE-7",
            f"`value` must agree with `key` in (batch, kv_heads, length)={tuple(key.shape[:3])}, "
            f"received shape={tuple(value.shape)}.",
        )
    check_buffers(cache, key, "key", (batch, kv_heads), (qk_dim, value.shape[3]))
    check_entries(label, counts, key, 0, length, "length")
    check_room(cache, length, counts)


def _check_alignment(a: LayerArguments) -> None:
    """Require known positions of queries and keys for a rotation (MHA-LAYER-6)."""
    offset, kv_lengths = a.options.get("q_offset"), a.options.get("kv_lengths")
    if offset is not None:
        offset = a.options["q_offset"] = check_offset(offset, a.query)
    if isinstance(offset, str):  # Rotation reads the lengths before attention checks them.
        check_entries("q_lengths", a.options.get("q_lengths"), a.query, 0, a.query.shape[1], "q_len")
        if a.cache is None and a.key is not None:
            check_entries("kv_lengths", kv_lengths, a.query, 0, a.key.shape[1], "kv_len")
    counts = a.positions is None and a.cache is None and offset is None
    if counts and a.rotary is not None and a.key is not None:
        refuse_ambiguity(f"rotary={short_repr(dict(a.rotary))}", a.query.shape[1], a.key.shape[1], kv_lengths)


def check_heads(heads: object, label: str = "heads") -> None:
    """Require an integer number of heads, at least 1 (MHA-ALIBI-3)."""
    check_size(label, heads, 1, "MHA-ALIBI-3")


def check_slope_dtype(dtype: object) -> None:
    """Require "float32" or "float64" (MHA-ALIBI-3)."""
    if not isinstance(dtype, str):
        refuse_type(
            "MHA-ALIBI-3",
            f"`dtype` must be 'float32' or 'float64', received {short_repr(dtype)} of type {type(dtype).__name__}.",
        )
    if dtype not in SLOPE_DTYPES:
        refuse_value("MHA-ALIBI-3", f"`dtype` must be 'float32' or 'float64', received dtype={short_repr(dtype)}.")


SLOPE_DTYPES = ("float32", "float64")


def check_alibi(slopes: Any, q_len: int, kv_len: int, offset: Array | Sequence[int] | int | str | None) -> None:
    """Require a number of heads or slopes (heads,), and known positions (MHA-ALIBI-3, MHA-POS-2)."""
    library = library_of(slopes)
    if library is None:
        check_heads(slopes, "slopes")
    elif require_array("slopes", slopes, "MHA-ALIBI-3") and (
        len(slopes.shape) != 1 or slopes.shape[0] == 0 or dtype_name(slopes) not in FLOATING
    ):
        refuse_value(
            "MHA-ALIBI-3",
            f"`slopes` must be a number of heads or a floating array of shape (heads,), heads>=1, "
            f"received dtype={dtype_name(slopes)}, shape={tuple(slopes.shape)}.",
        )
    sizes = {name: check_size(name, size, 0, "MHA-ALIBI-3") for name, size in (("q_len", q_len), ("kv_len", kv_len))}
    check_count(sizes | {"heads": slopes if library is None else slopes.shape[0]}, "MHA-ALIBI-3")
    if offset is None:
        refuse_ambiguity("alibi_bias", q_len, kv_len, None)
    elif library is not None and library_of(offset) not in (None, "numpy", library):
        refuse_type(
            "MHA-ARG-4",
            f"`q_offset` must be integers on the host or an array of {library}, as `slopes` is, "
            f"received an array of {library_of(offset)}.",
        )
    else:
        check_offset(offset, _of_as_many_entries(offset))


def _of_as_many_entries(offset: Any) -> Array:
    """Return an array with a batch entry for each offset, with which `check_offset` compares them."""
    if library_of(offset) is None:
        return numpy.empty(len(offset) if is_sequence(offset) else 1)
    require_array("q_offset", offset, "MHA-LEN-3")
    if len(offset.shape) != 1:
        refuse_value("MHA-LEN-3", f"`q_offset` must have shape (batch,), received shape={tuple(offset.shape)}.")
    return offset


def empty_shapes(
    batch: int, kv_heads: int, capacity: int, qk_dim: int, v_dim: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the buffers of a cache; its sizes are integers (MHA-CACHE-7)."""
    sizes = {"batch": (batch, 0), "kv_heads": (kv_heads, 1), "capacity": (capacity, 0), "qk_dim": (qk_dim, 1)}
    key = {name: check_size(name, size, least, "MHA-CACHE-7") for name, (size, least) in sizes.items()}
    value = key if v_dim is None else key | {"qk_dim": check_size("v_dim", v_dim, 1, "MHA-CACHE-7")}
    check_count(key, "MHA-CACHE-7")
    check_count(value, "MHA-CACHE-7")
    return tuple(key.values()), tuple(value.values())


def check_like(like: object) -> None:
    """Require a floating array, whose library, dtype and device a cache takes (MHA-CACHE-7)."""
    require_array("like", like, "MHA-CACHE-7")
    check_floating("like", like, "MHA-CACHE-7")

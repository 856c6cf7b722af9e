"""Shapes that are not fully known when a call is traced.

The layouts name the size of each axis of each argument. A size that is known from any argument holds for all of them;
unknown sizes are compared when the graph runs, by assertions on which every result depends: with each other, and with
the integers on the host that they limit. They raise `tf.errors.InvalidArgumentError` with the message of the check and
its clause. XLA drops assertions: under `jit_compile=True` only what is known when the call is traced is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import tensorflow as tf

from mha_spec.array_checks import python_values
from mha_spec.arrays import library_of
from mha_spec.cache import WindowKVCache
from mha_spec.cache_checks import ROOM, bounds_of, span_of
from mha_spec.errors import refuse_value
from mha_spec.scalars import is_integer, short_repr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from mha_spec.arrays import Array

    from .layouts import Layout

__all__ = [
    "Limit",
    "Size",
    "assertion",
    "equality_of_lengths",
    "limits_of_append",
    "limits_of_span",
    "rank_of",
    "sizes_of",
    "with_known_shapes",
]

Size: TypeAlias = "int | Array"
"""A known size, or a scalar tensor that holds it."""


class Limit(NamedTuple):
    """An integer on the host that a size limits, and the parts of the error."""

    limit: str
    """The size, or a product of sizes."""
    number: int
    added: str | None
    """A size that is added to the number; None if none is."""
    message: str
    received: str
    """What was received; the added size follows."""
    fix: str
    clause: str


def limits_of_append(cache: Any, length: str, counts: object) -> list[Limit]:
    """Return the limit of the tokens that a cache must hold where they are counted on the host (MHA-CACHE-4).

    Args:
        cache: The cache, or anything that is none.
        length: The name of the number of new tokens.
        counts: The numbers of new tokens of each batch entry that are real, or None for all.
    """
    held, real = (_host_numbers(numbers) for numbers in (getattr(cache, "lengths", None), counts))
    if type(cache) not in ROOM or held is None or (counts is not None and real is None):
        return []
    limit, fix = ROOM[type(cache)]
    added, more = (length, "") if real is None else (None, f" {short_repr(real)}")
    after = [old + new for old, new in zip(held, real or [0] * len(held), strict=False)]
    message = f"`cache` must have room for the new tokens, {limit}="
    received = f"received lengths={short_repr(held)} and{more}"
    fix = f"more. Nothing was stored. {fix}"
    return [Limit(limit, max(after, default=0), added, message, received, fix, "MHA-CACHE-4")]


def limits_of_span(cache: Any, options: Mapping[str, Any]) -> list[Limit]:
    """Return the limit of the chunk or window of a cache of the last tokens (MHA-CACHE-14)."""
    if not isinstance(cache, WindowKVCache):
        return []
    name, formula, size = span_of(*bounds_of(options))
    if size is None:
        return []
    message = f"`{name}` must fit a WindowKVCache, which holds the last tokens, {formula}<=capacity="
    received = f"received {name}={short_repr(options[name])}."
    return [Limit("capacity", size, None, message, received, "A KVCache holds all tokens.", "MHA-CACHE-14")]


def _host_numbers(value: object) -> list[int] | None:
    """Return integers on the host, or None for anything else, right or wrong."""
    numbers = python_values(value)
    return numbers if numbers is not None and all(map(is_integer, numbers)) else None


def rank_of(value: Any) -> int | None:
    """Return the number of axes of an array or of nested sequences; None if it is unknown."""
    if tf.is_tensor(value):
        return value.shape.rank
    shape = _host_shape(value)
    return None if shape is None else len(shape)


def sizes_of(array: Array) -> list[Size]:
    """Return the size of each axis: a number where it is known, else a scalar tensor."""
    known = array.shape.as_list()
    if None not in known:
        return known
    shape = tf.shape(array)
    return [shape[axis] if size is None else size for axis, size in enumerate(known)]


def _tensor_of(value: Any) -> Any:
    """Convert a variable of TensorFlow or Keras to a tensor; return other values, such as Keras' symbols, unchanged."""
    if isinstance(value, tf.Tensor) or library_of(value) != "tensorflow":
        return value
    is_variable = isinstance(value, tf.Variable) or hasattr(value, "__tf_tensor__")
    return tf.convert_to_tensor(value) if is_variable else value


def _with_offsets(layouts: Mapping[str, Layout], values: dict[str, Any]) -> dict[str, Any]:
    """Repeat an offset in a tensor without axes for each entry (MHA-POS-1); one of unknown rank may have none."""
    offset: Any = values.get("q_offset")
    if not isinstance(offset, tf.Tensor) or offset.shape.rank not in (0, None) or not offset.dtype.is_integer:
        return values
    entries = _entries_of(layouts, values)
    if offset.shape.rank == 0:
        return values | {"q_offset": tf.fill([entries], offset)}
    missing = tf.fill([tf.maximum(1 - tf.rank(offset), 0)], entries)
    return values | {"q_offset": tf.broadcast_to(offset, tf.concat([missing, tf.shape(offset)], 0))}


def _entries_of(layouts: Mapping[str, Layout], values: Mapping[str, Any]) -> Size:
    """Return the number of entries of a call, of which each has an offset; 1 where offsets alone have entries."""
    entries = layouts["q_offset"].sizes[0]
    for name, value in values.items():
        layout = layouts.get(name)
        if name == "q_offset" or layout is None or layout.broadcasts[0] or layout.sizes[0] != entries:
            continue
        shape = _shape(layout, value)
        if shape is not None:
            return (_first_size(value) if shape[0] is None else shape[0]) - layout.more[0]
    return 1


def _first_size(tensor: Array) -> Array:
    """Return the size of the first axis; 0 for a tensor of unknown rank that has no axis."""
    return tf.concat([tf.shape(tensor), [0]], 0)[0]


def with_known_shapes(
    layouts: Mapping[str, Layout],
    arguments: Mapping[str, Any],
    known: Iterable[str] = (),
    *,
    aligned: bool = False,
    limits: Iterable[Limit] = (),
) -> dict[str, Any]:
    """Return the arguments, with variables as tensors, and with the known sizes set in the shape of each tensor.

    Args:
        layouts: The axes of the arguments; an argument without a layout is returned unchanged.
        arguments: Values of any kind by name; where sizes differ, the later argument is refused.
        known: The sizes that must be known when a call is traced.
        aligned: True if q_len and kv_len must be equal (MHA-POS-2).
        limits: Limits of integers on the host, besides those of the layouts.

    Raises:
        ArgumentValueError: A size that must be known is unknown.
    """
    values = _with_offsets(layouts, {name: _tensor_of(value) for name, value in arguments.items()})
    if tf.executing_eagerly() or not any(map(_is_open, values.values())):
        return values
    shapes = {name: _shape(layouts[name], value) for name, value in values.items() if name in layouts}
    shapes = {name: shape for name, shape in shapes.items() if shape is not None}
    sizes = _known_sizes(layouts, shapes)
    if aligned:
        sizes = _with_equal_lengths(sizes)
    for name, shape in shapes.items():
        _refuse_unknown_sizes(name, layouts[name], shape, sizes, known)
    return values | _Assertions(layouts, values, shapes, sizes).checked(limits, aligned=aligned)


def _is_open(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and not value.shape.is_fully_defined()


def _shape(layout: Layout, value: Any) -> list[int | None] | None:
    """Return what is known of a shape; None for another rank than the layout's or another kind of value."""
    shape: list[int | None] | None = _host_shape(value)
    if isinstance(value, tf.Tensor):
        shape = [None for _ in layout.sizes] if value.shape.rank is None else value.shape.as_list()
    return shape if shape is not None and len(shape) == len(layout.sizes) else None


def _host_shape(value: Any) -> list[Any] | None:
    """Return the shape of nested sequences or of an array of NumPy; None for anything else."""
    if library_of(value) == "numpy":
        return [*value.shape]
    shape: list[int] = []
    while isinstance(value, (list, tuple, range)):
        shape.append(len(value))
        value = value[0] if value else None
    return shape or None


def _known_sizes(layouts: Mapping[str, Layout], shapes: Mapping[str, list[int | None]]) -> dict[str, int]:
    """Return the first known number of each size; a 1 on an axis that may broadcast does not count."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        layout = layouts[name]
        for size, more, broadcasts, number in zip(layout.sizes, layout.more, layout.broadcasts, shape, strict=True):
            if number is not None and not (broadcasts and number == 1):
                sizes.setdefault(size, max(number - more, 0))
    return sizes


def _with_equal_lengths(sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes with the same q_len and kv_len, if either is known."""
    length = sizes.get("q_len", sizes.get("kv_len"))
    return sizes if length is None else {"q_len": length, "kv_len": length} | sizes


def _refuse_unknown_sizes(
    name: str, layout: Layout, shape: list[int | None], sizes: Mapping[str, int], known: Iterable[str]
) -> None:
    for size in layout.sizes:
        if size in known and size not in sizes:
            refuse_value(
                layout.clause,
                f"`{name}` must have a known {size} when it is traced, received shape={tuple(shape)}. "
                "Set it with tf.ensure_shape.",
            )


class _Assertions:
    """The assertions that compare the sizes of a call when its graph runs."""

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        values: Mapping[str, Any],
        shapes: Mapping[str, list[int | None]],
        known: Mapping[str, int],
    ) -> None:
        self.layouts, self.shapes, self.known = layouts, shapes, known
        self.values = {name: values[name] for name in shapes}
        self.tensors = {name: value for name, value in self.values.items() if isinstance(value, tf.Tensor)}
        self.received = {name: self._received(name) for name in shapes}
        self.sizes: dict[str, Size] = {**known} | self._first_sizes()

    def checked(self, limits: Iterable[Limit], *, aligned: bool) -> dict[str, Array]:
        """Return the tensors, each computed after all assertions and with what is known of its shape."""
        with tf.control_dependencies([self._check_lengths()] if aligned else []):
            checks = [self._check_shape(name) for name in self.shapes if self._is_open(name)]
        with tf.control_dependencies(checks):
            checks += [check for limit in (*self._limits(), *limits) for check in self._check_limit(limit)]
        with tf.control_dependencies(checks):
            # A tensor that is passed twice stays a single tensor, so that the layer computes a single product.
            unique = {id(tensor): _after_checks(tensor, self.received[name]) for name, tensor in self.tensors.items()}
        checked = {name: unique[id(tensor)] for name, tensor in self.tensors.items()}
        for name, tensor in checked.items():
            static = self._static(name)
            if tensor.shape.is_compatible_with(static):  # Else an argument does not fit, which a later check refuses.
                tensor.set_shape(static)
        return checked

    def _is_open(self, name: str) -> bool:
        """Return False for an array of the host that the shared checks compare, because the trace knows its sizes."""
        return name in self.tensors or any(tf.is_tensor(self.sizes.get(size)) for size in self.layouts[name].sizes)

    def _received(self, name: str) -> Any:
        """Return the sizes of as many axes as the layout has; 0 for an axis that a tensor of unknown rank lacks."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return self.shapes[name]
        if tensor.shape.rank is not None:
            return tf.shape(tensor)
        rank = len(self.layouts[name].sizes)
        return tf.concat([tf.shape(tensor), tf.zeros(rank, tf.int32)], 0)[:rank]

    def _first_sizes(self) -> dict[str, Size]:
        """Return each size of the first argument that has it on an axis that does not broadcast."""
        sizes: dict[str, Size] = {}
        for name, shape in self.shapes.items():
            layout, received = self.layouts[name], self.received[name]
            axes = zip(layout.sizes, layout.more, layout.broadcasts, shape, strict=True)
            for axis, (size, more, broadcasts, number) in enumerate(axes):
                if broadcasts or size in sizes:
                    continue
                if number is not None:
                    sizes[size] = max(number - more, 0)
                else:
                    sizes[size] = tf.maximum(received[axis] - more, 0) if more else received[axis]
        return sizes

    def _check_lengths(self) -> Any:
        lengths = tf.stack([self.sizes.get(size, 0) for size in ("q_len", "kv_len")])
        return equality_of_lengths(lengths)

    def _check_shape(self, name: str) -> Any:
        layout, shape = self.layouts[name], self.received[name]
        expected = tf.stack([self.sizes.get(size, 1) for size in layout.sizes]) + tf.constant(layout.more)
        fits = tf.equal(shape, expected) | (tf.constant(layout.broadcasts) & tf.equal(shape, 1))
        condition, tensor = tf.reduce_all(fits), self.tensors.get(name)
        if tensor is not None:
            condition, shape = condition & tf.equal(tf.rank(tensor), len(layout.sizes)), tf.shape(tensor)
        verb = "broadcast to" if any(layout.broadcasts) else "have shape"
        message = f"`{name}` must {verb} ({', '.join(layout.labels)})="
        return assertion(condition, message, expected, "received shape=", shape, layout.clause)

    def _limits(self) -> Iterator[Limit]:
        """Yield the limits of the layouts (MHA-LEN-3)."""
        for name, value in self.values.items():
            layout = self.layouts[name]
            numbers = _host_numbers(value) if layout.limit else None
            if numbers:
                message, largest = f"`{name}` must be in 0<={name}<={layout.limit}=", max(numbers)
                yield Limit(layout.limit, largest, None, message, f"received {short_repr(largest)}.", "", layout.clause)

    def _check_limit(self, limit: Limit) -> Iterator[Any]:
        """Compare an integer with its limit, unless the trace knows both, which the shared checks compare."""
        size, added = self._product(limit.limit), 0 if limit.added is None else self._product(limit.added)
        if size is None or added is None or not (tf.is_tensor(size) or tf.is_tensor(added)):
            return
        # The integer may have any number of digits.
        fits = tf.constant(min(limit.number, tf.int64.max), tf.int64) <= size - added
        received = [limit.received, *([] if limit.added is None else [added]), *([limit.fix] if limit.fix else [])]
        yield assertion(fits, limit.message, size, *received, limit.clause)

    def _product(self, limit: str) -> Size | None:
        """Return a size or a product of sizes, as an integer or a tensor of 64 bits; None if there is no such size."""
        names = limit.split(" * ")
        if not self.sizes.keys() >= {*names}:
            return None
        product: Size = 1
        for name in names:
            size = self.sizes[name]
            product *= tf.cast(size, tf.int64) if isinstance(size, tf.Tensor) else size
        return product

    def _static(self, name: str) -> list[int | None]:
        layout = self.layouts[name]
        axes = zip(layout.sizes, layout.more, layout.broadcasts, self.shapes[name], strict=True)
        return [
            self.known[size] + more if number is None and not broadcasts and size in self.known else number
            for size, more, broadcasts, number in axes
        ]


def _after_checks(tensor: Array, shape: Array) -> Array:
    """The tensor, computed after the assertions that are control dependencies here.

    Grappler infers a rank from every consumer of a tensor, through tf.identity too, and replaces tf.rank by it. So a
    comparison of the rank would always hold without the reshape, which separates a tensor of unknown rank from them.
    """
    return tf.reshape(tensor, shape) if tensor.shape.rank is None else tf.identity(tensor)


def equality_of_lengths(lengths: Array) -> Any:
    """Make the assertion that q_len and kv_len, a tensor of both, are equal (MHA-POS-2)."""
    message = "`q_offset` must be given where q_len and kv_len differ: the diagonal is ambiguous. Received "
    return assertion(tf.equal(lengths[0], lengths[1]), f"{message}(q_len, kv_len)=", lengths, "MHA-POS-2")


def assertion(condition: Array, *data: Any) -> Any:
    """Make an assertion with the parts of its message, the last of which is a clause."""
    *message, clause = data
    return tf.raw_ops.Assert(
        condition=condition, data=[*map(tf.convert_to_tensor, message), f"[{clause}]"], summarize=8
    )

"""Shapes that are not fully known when a call is traced.

The tables name the size of each axis of each argument. A size that is known from any argument holds for all of them;
unknown sizes are compared when the graph runs, by assertions on which every result depends. They raise
`tf.errors.InvalidArgumentError` with the message of the check and its clause. XLA drops assertions: under
`jit_compile=True` a shape is refused only where it is known when the call is traced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import tensorflow as tf

from mha_spec.arrays import library_of
from mha_spec.errors import refuse_value
from mha_spec.parameters import AXES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mha_spec.arrays import Array

__all__ = [
    "ALIBI",
    "APPENDED",
    "ATTENTION",
    "HALVES",
    "KNOWN",
    "LAYER",
    "PACKED",
    "PAGED",
    "PAGED_CACHE",
    "POSITIONS",
    "POSITIONS_OF_LAYER",
    "ROTATED",
    "Layout",
    "Size",
    "sizes_of",
    "with_known_shapes",
]

Size: TypeAlias = "int | Array"
"""A known size, or a scalar tensor that holds it."""


class Layout(NamedTuple):
    """The axes of an argument, and the clause that defines them.

    An axis marked `*` may have size 1 and broadcast; an axis marked `+1` has an entry more than the size that it names.
    """

    axes: str
    clause: str

    @property
    def labels(self) -> list[str]:
        """The label of each axis in an error."""
        return self.axes.replace("*", "").split()

    @property
    def sizes(self) -> list[str]:
        """The name of the size of each axis."""
        return [label.removesuffix("+1") for label in self.labels]

    @property
    def more(self) -> list[int]:
        """The entries of each axis beyond the size that it names."""
        return [int(label.endswith("+1")) for label in self.labels]

    @property
    def broadcasts(self) -> list[bool]:
        """Return a flag for each axis, True if it may broadcast."""
        return [axis.endswith("*") for axis in self.axes.split()]


KNOWN = ("heads", "kv_heads", "qk_dim", "v_dim")
"""The sizes that a trace must know."""

_PAIRS, _ROWS = "batch* heads* q_len* kv_len*", "batch heads q_len"
_PER_ENTRY = {
    **dict.fromkeys(("q_offset", "q_lengths", "kv_lengths"), Layout("batch", "MHA-LEN-3")),
    **dict.fromkeys(("prefix_lengths", "kv_starts"), Layout("batch", "MHA-LEN-5")),
}

ATTENTION = {
    "query": Layout("batch heads q_len qk_dim", "MHA-SHAPE-1"),
    "key": Layout("batch kv_heads kv_len qk_dim", "MHA-SHAPE-3"),
    "value": Layout("batch kv_heads kv_len v_dim", "MHA-SHAPE-3"),
    "mask": Layout(_PAIRS, "MHA-MASK-2"),
    "bias": Layout(_PAIRS, "MHA-BIAS-1"),
    "dropout_mask": Layout(_PAIRS, "MHA-MASK-2"),
    **_PER_ENTRY,
    "q_segment_ids": Layout("batch q_len", "MHA-SEG-1"),
    "kv_segment_ids": Layout("batch kv_len", "MHA-SEG-1"),
    "sinks": Layout("heads", "MHA-SINK-1"),
    "grad_output": Layout(f"{_ROWS} v_dim", "MHA-VJP-7"),
    "grad_lse": Layout(_ROWS, "MHA-VJP-7"),
}
"""The arguments of attention, its weights and its gradients."""

_ROWS_OF_TOKENS = {
    "query": Layout("q_tokens heads qk_dim", "MHA-VARLEN-1"),
    "cu_seqlens_q": Layout("sequences+1", "MHA-VARLEN-2"),
    "cu_seqlens_kv": Layout("sequences+1", "MHA-VARLEN-2"),
    "seqused_kv": Layout("sequences", "MHA-VARLEN-4"),
    "q_offset": Layout("sequences", "MHA-VARLEN-5"),
    "sinks": Layout("heads", "MHA-SINK-1"),
    "alibi_slopes": Layout("heads", "MHA-VARLEN-8"),
    "grad_output": Layout("q_tokens heads v_dim", "MHA-VARLEN-11"),
    "grad_lse": Layout("heads q_tokens", "MHA-VARLEN-11"),
}

PACKED = _ROWS_OF_TOKENS | {
    "key": Layout("kv_tokens kv_heads qk_dim", "MHA-VARLEN-1"),
    "value": Layout("kv_tokens kv_heads v_dim", "MHA-VARLEN-1"),
}
"""The arguments of varlen_attention and of its gradients."""

PAGED = _ROWS_OF_TOKENS | {
    "key": Layout("blocks block_size kv_heads qk_dim", "MHA-VARLEN-6"),
    "value": Layout("blocks block_size kv_heads v_dim", "MHA-VARLEN-6"),
    "block_table": Layout("sequences max_blocks", "MHA-VARLEN-6"),
}
"""The same with a block table."""

HALVES = {
    f"{kind}_{half}": Layout(axes, "MHA-MERGE-4")
    for half in "ab"
    for kind, axes in {"output": f"{_ROWS} v_dim", "lse": _ROWS}.items()
} | {"grad_output": Layout(f"{_ROWS} v_dim", "MHA-MERGE-7"), "grad_lse": Layout(_ROWS, "MHA-MERGE-7")}
"""The arguments of merging and of its gradients."""

_CACHE = {
    "cache.key": Layout("batch kv_heads capacity qk_dim", "MHA-CACHE-7"),
    "cache.value": Layout("batch kv_heads capacity v_dim", "MHA-CACHE-7"),
    "cache.lengths": Layout("batch", "MHA-CACHE-7"),
}

PAGED_CACHE = {
    "cache.key": Layout("blocks block_size kv_heads qk_dim", "MHA-CACHE-9"),
    "cache.value": Layout("blocks block_size kv_heads v_dim", "MHA-CACHE-9"),
    "cache.lengths": Layout("batch", "MHA-CACHE-9"),
    "cache.block_table": Layout("batch max_blocks", "MHA-CACHE-9"),
}
"""A paged cache, whose layouts replace those of a cache."""

LAYER = {
    "query": Layout("batch q_len embed", "MHA-LAYER-2"),
    "key": Layout("batch kv_len k_embed", "MHA-LAYER-2"),
    "value": Layout("batch kv_len v_embed", "MHA-LAYER-2"),
    **_PER_ENTRY,
    **{f"params[{name!r}]": Layout(" ".join(axes), "MHA-PROJ-4") for name, axes in AXES.items()},
    **_CACHE,
}
"""The arguments of the layer, without those that it passes on to attention unchanged."""

APPENDED = {
    "key": Layout("batch kv_heads length qk_dim", "MHA-CACHE-7"),
    "value": Layout("batch kv_heads length v_dim", "MHA-CACHE-7"),
    "lengths": Layout("batch", "MHA-LEN-3"),
    **_CACHE,
}
"""The arguments of append_cache."""

ALIBI = {"slopes": Layout("heads", "MHA-ALIBI-3"), "q_offset": Layout("batch", "MHA-LEN-3")}

ROTATED = Layout("batch heads length size", "MHA-ROTARY-6")
POSITIONS = tuple(Layout(axes, "MHA-ROTARY-6") for axes in ("length", "batch length", "axes batch length"))
"""The positions of rotary_embedding, of rank 1 to 3."""
POSITIONS_OF_LAYER = tuple(Layout(axes, "MHA-LAYER-7") for axes in ("q_len", "batch q_len", "axes batch q_len"))
"""The positions of the layer, of rank 1 to 3."""


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
    layouts: Mapping[str, Layout], arguments: Mapping[str, Any], known: Iterable[str] = (), *, aligned: bool = False
) -> dict[str, Any]:
    """Return the arguments, with variables as tensors, and with the known sizes set in the shape of each tensor.

    Args:
        layouts: The axes of the arguments; an argument without a layout is returned unchanged.
        arguments: Values of any kind by name.
        known: The sizes that must be known when a call is traced.
        aligned: True if q_len and kv_len must be equal (MHA-POS-2).

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
    return values | _Assertions(layouts, values, shapes, sizes).checked(aligned=aligned)


def _is_open(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and not value.shape.is_fully_defined()


def _shape(layout: Layout, value: Any) -> list[int | None] | None:
    """Return what is known of a shape; None for another rank than the layout's or another kind of value."""
    shape: list[int | None]
    if isinstance(value, tf.Tensor):
        shape = [None] * len(layout.sizes) if value.shape.rank is None else value.shape.as_list()
    elif isinstance(value, (list, tuple)):
        shape = [len(value)]
    elif library_of(value) == "numpy":
        shape = [*value.shape]
    else:
        return None
    return shape if len(shape) == len(layout.sizes) else None


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
    """The assertions that compare the shapes of a call when its graph runs."""

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        values: Mapping[str, Any],
        shapes: Mapping[str, list[int | None]],
        sizes: Mapping[str, int],
    ) -> None:
        self.layouts, self.shapes = layouts, shapes
        self.tensors = {name: values[name] for name in shapes if isinstance(values[name], tf.Tensor)}
        self.sizes: dict[str, Size] = {**sizes}

    def checked(self, *, aligned: bool) -> dict[str, Array]:
        """Return the tensors, each computed after all assertions and with what is known of its shape."""
        shapes = {name: self._shape(name) for name in self.tensors}
        self._complete(shapes)
        with tf.control_dependencies([self._check_lengths(shapes)] if aligned else []):
            checks = [self._check_shape(name, shape) for name, shape in shapes.items()]
        with tf.control_dependencies(checks):
            # A tensor that is passed twice stays a single tensor, so that the layer computes a single product.
            unique = {id(tensor): _after_checks(tensor, shapes[name]) for name, tensor in self.tensors.items()}
        checked = {name: unique[id(tensor)] for name, tensor in self.tensors.items()}
        for name, tensor in checked.items():
            tensor.set_shape(self._static(name))
        return checked

    def _shape(self, name: str) -> Array:
        """Return the sizes of as many axes as the layout has; 0 for an axis that a tensor of unknown rank lacks."""
        tensor, rank = self.tensors[name], len(self.layouts[name].sizes)
        if tensor.shape.rank is not None:
            return tf.shape(tensor)
        return tf.concat([tf.shape(tensor), tf.zeros(rank, tf.int32)], 0)[:rank]

    def _complete(self, shapes: Mapping[str, Array]) -> None:
        """Take an unknown size from the first tensor that has it on an axis that does not broadcast."""
        for name, shape in shapes.items():
            layout = self.layouts[name]
            axes = zip(layout.sizes, layout.more, layout.broadcasts, strict=True)
            for axis, (size, more, broadcasts) in enumerate(axes):
                if not broadcasts and size not in self.sizes:
                    self.sizes[size] = tf.maximum(shape[axis] - more, 0) if more else shape[axis]

    def _check_lengths(self, shapes: Mapping[str, Array]) -> Any:
        axes = {"query": "q_len", "key": "kv_len"}
        lengths = tf.stack([shapes[name][self.layouts[name].sizes.index(size)] for name, size in axes.items()])
        message = "`q_offset` must be given where q_len and kv_len differ: the diagonal is ambiguous. Received "
        return _assertion(tf.equal(lengths[0], lengths[1]), f"{message}(q_len, kv_len)=", lengths, "MHA-POS-2")

    def _check_shape(self, name: str, shape: Array) -> Any:
        layout = self.layouts[name]
        expected = tf.stack([self.sizes.get(size, 1) for size in layout.sizes]) + tf.constant(layout.more)
        fits = tf.equal(shape, expected) | (tf.constant(layout.broadcasts) & tf.equal(shape, 1))
        tensor = self.tensors[name]
        condition = tf.reduce_all(fits) & tf.equal(tf.rank(tensor), len(layout.sizes))
        verb = "broadcast to" if any(layout.broadcasts) else "have shape"
        message = f"`{name}` must {verb} ({', '.join(layout.labels)})="
        return _assertion(condition, message, expected, "received shape=", tf.shape(tensor), layout.clause)

    def _static(self, name: str) -> list[int | None]:
        layout = self.layouts[name]
        axes = zip(layout.sizes, layout.more, layout.broadcasts, self.shapes[name], strict=True)
        return [
            size + more if number is None and not broadcasts and isinstance(size := self.sizes[label], int) else number
            for label, more, broadcasts, number in axes
        ]


def _after_checks(tensor: Array, shape: Array) -> Array:
    """The tensor, computed after the assertions that are control dependencies here.

    Grappler infers a rank from every consumer of a tensor, through tf.identity too, and replaces tf.rank by it. So a
    comparison of the rank would always hold without the reshape, which separates a tensor of unknown rank from them.
    """
    return tf.reshape(tensor, shape) if tensor.shape.rank is None else tf.identity(tensor)


def _assertion(condition: Array, *data: Any) -> Any:
    *message, clause = data
    return tf.raw_ops.Assert(
        condition=condition, data=[*map(tf.convert_to_tensor, message), f"[{clause}]"], summarize=8
    )

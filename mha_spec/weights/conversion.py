"""`load_weights` and `save_weights`, which read the table of a layout."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, overload

from mha_spec.array_checks import is_mapping
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.parameters import AXES
from mha_spec.scalars import check_integer, short_repr

from .configs import mapping_of_config
from .families import AttentionConfig, read_config
from .loaded import LoadedLayer
from .names import Expected, beginning, layer_tensors, nested
from .operations import Operations, mapping_of, operations_of, shape_of
from .sizes import Sizes, axes_of, merged_axis
from .tables import LAYOUTS, Layout
from .validation import check_layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from mha_spec.arrays import Array

__all__ = ["layouts", "load_weights", "save_weights"]


def layouts() -> Mapping[str, Layout]:
    """Return every layout by its name; pass its `options` to multi_head_attention with the params."""
    return LAYOUTS


@overload
def load_weights(
    state: Mapping[str, Array] | Sequence[Array],
    layout: str | Layout,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    prefix: str = "",
) -> dict[str, Array]: ...
@overload
def load_weights(
    state: Mapping[str, Array] | Sequence[Array],
    layout: str | Layout | None = None,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    prefix: str = "",
    config: Mapping[str, Any] | str | PathLike[str],
    layer: int | None = None,
    seq_len: int | None = None,
) -> LoadedLayer: ...
def load_weights(
    state: Mapping[str, Array] | Sequence[Array],
    layout: str | Layout | None = None,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    prefix: str = "",
    config: Mapping[str, Any] | str | PathLike[str] | None = None,
    layer: int | None = None,
    seq_len: int | None = None,
) -> dict[str, Array] | LoadedLayer:
    """Return the `params` of multi_head_attention from the weights of another library's attention layer.

    Without a config, the result is a dictionary of the params; with a config, a LoadedLayer, which has the params, the
    options of the call, and the keys of the config that were ignored.

    Args:
        state: The arrays by name, flat or nested, of a layer or of a whole model; for Keras also `get_weights()`. An
            array of params shares memory with its array in `state` where the library reshapes without a copy.
        layout: A name in `layouts()`, or a Layout; with a config, None is the layout of its model_type.
        heads: Required where the layout merges heads and sizes in an axis; elsewhere it must agree with the shapes.
        kv_heads: Required where the shapes leave it open; elsewhere it must agree with the shapes.
        prefix: The beginning of the layer's names, such as "layers.0.self_attn"; names without it are ignored, and
            every name with it must be known.
        config: The configuration of a model of Hugging Face, the dictionary or the path of its config.json; it sets the
            sizes and the options. docs/weights.md lists its models and keys.
        layer: The index of the layer, where the layers of the config differ; None is the number in the prefix.
        seq_len: The number of tokens, on which the rotations "dynamic" and "longrope" depend; see rotary_frequencies.

    Returns:
        w_q (embed, heads, qk_dim), w_k (k_embed, kv_heads, qk_dim), w_v (v_embed, kv_heads, v_dim), w_o (heads, v_dim,
        out), and the biases and gains that the state has; dtypes, library and device are unchanged. With a config, they
        are `params` of the LoadedLayer.

    Raises:
        ArgumentValueError: A name is missing, unknown or without a place in params (all are listed); a shape does not
            fit (both are named); the layout or the model of the config is unknown; the config asks for a computation
            that the layer lacks, or contradicts heads, kv_heads, the shapes or the biases of the state; layer or
            seq_len has a value without a config.
        ArgumentTypeError: A value is not an array, or the arrays are of several libraries.
    """
    if config is None:
        for name, value in {"layer": layer, "seq_len": seq_len}.items():
            if value is not None:
                raise ArgumentValueError(
                    f"`{name}` must be None without a config, received {name}={short_repr(value)}."
                )
        return _params(state, _table(layout), {"heads": heads, "kv_heads": kv_heads}, prefix)
    read = read_config(mapping_of_config(config), _index(prefix, layer), seq_len)
    for name, value in {"heads": heads, "kv_heads": kv_heads}.items():
        if value is not None and check_integer(name, value, 1, "MHA-PROJ-4") != read.sizes[name]:
            raise ArgumentValueError(
                f"`{name}` must be that of config, {read.sizes[name]}, received {name}={short_repr(value)}."
            )
    return _configured(state, layout, read, prefix)


def _configured(
    state: Mapping[str, Array] | Sequence[Array], layout: str | Layout | None, read: AttentionConfig, prefix: str
) -> LoadedLayer:
    """Return the layer that a configuration describes, whose state must have its norms and biases."""
    table = _table(read.layout if layout is None else layout)
    if table.one_less != _table(read.layout).one_less:
        raise ArgumentValueError(
            f"`layout` must store the gains of norms as {read.layout} does, the layout of this config, "
            f"received layout={short_repr(layout)}."
        )
    params = _params(state, table, read.sizes, prefix)
    biases = tuple(name for name in params if name.startswith("b_"))
    if biases != read.biases:
        raise ArgumentValueError(
            f"`state` must hold the biases that config says, {', '.join(read.biases) or 'none'}, "
            f"received {', '.join(biases) or 'none'}."
        )
    return LoadedLayer(
        params, _of_table(read.options, table), read.ignored, alibi=read.alibi, dropout_rate=read.dropout_rate
    )


def _params(
    state: Mapping[str, Array] | Sequence[Array], table: Layout, known: Mapping[str, int | None], prefix: str
) -> dict[str, Array]:
    """Return the params of a layer, some sizes of which are known."""
    tensors = layer_tensors(state, table, prefix)
    operations = operations_of(tensors, "state")
    sizes = Sizes(table.equal_axes, **known)
    held = {name: parts for name, parts in table.tensors.items() if name in tensors}
    head = beginning(prefix, table)
    sizes.fit_all({head + name: (list(parts.values()), shape_of(tensors[name])) for name, parts in held.items()})
    sizes.check_groups()
    params: dict[str, Array] = {}
    for name, parts in held.items():
        params |= _taken_apart(tensors[name], parts, sizes, operations, by_kv_head=name in table.by_kv_head)
    return {name: params[name] + 1 if name in table.one_less else params[name] for name in AXES if name in params}


def _index(prefix: object, layer: int | None) -> int | None:
    """Return the index of the layer: `layer`, or else the single number of a prefix.

    The names of a part of a model count its layers from 0, so that an explicit `layer` may differ from the prefix.
    """
    if layer is not None:
        return check_integer("layer", layer, 0, "MHA-PROJ-4")
    numbers = re.findall(r"(?:^|[./])([0-9]+)(?=[./]|$)", prefix) if isinstance(prefix, str) else []
    return int(numbers[0]) if len(numbers) == 1 else None


def _of_table(options: Mapping[str, Any], table: Layout) -> dict[str, Any]:
    """Return the options with the order of the pairs of another layout, such as Meta's names of Llama."""
    rotary = table.options.get("rotary")
    if not options.get("rotary") or not is_mapping(rotary):
        return dict(options)
    return {**options, "rotary": {**options["rotary"], **rotary}}


def save_weights(params: Mapping[str, Array], layout: str | Layout, *, prefix: str = "") -> dict[str, Array]:
    """Convert `params` to the names and axes of another library's attention layer, the inverse of load_weights.

    Args:
        params: As load_weights gives them.
        layout: A name in `layouts()`, or a Layout.
        prefix: The beginning of every name.

    Returns:
        The arrays by name, in the library's order (`list(state.values())` is what Keras' set_weights takes), nested
        where the library nests.

    Raises:
        ArgumentValueError: The layout has no place for a param, or needs a missing param (all are listed), or has
            the same size for axes that differ here; a shape does not fit (both are named).
        ArgumentTypeError: A value is not an array, or the arrays are of several libraries.
    """
    table = _table(layout)
    _check_params(params, table)
    operations = operations_of(params, "params")
    sizes = Sizes(table.equal_axes)
    for name in AXES:
        if name in params:
            sizes.fit(name, [" ".join(AXES[name])], shape_of(params[name]))
    sizes.check_groups()
    params = {name: array - 1 if name in table.one_less else array for name, array in params.items()}
    head = beginning(prefix, table)
    state = {
        head + name: _put_together(params, parts, sizes, operations, by_kv_head=name in table.by_kv_head)
        for name, parts in table.tensors.items()
        if params.keys() >= parts.keys()
    }
    return nested(state, table.separator) if table.nested else state


def _table(layout: object) -> Layout:
    if isinstance(layout, Layout):
        check_layout(layout)
        return layout
    if not isinstance(layout, str):
        raise ArgumentTypeError(f"`layout` must be a name or a Layout, received {type(layout).__name__}.")
    if layout not in LAYOUTS:
        near = get_close_matches(layout, LAYOUTS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentValueError(
            f"`layout` must be one of {', '.join(LAYOUTS)}, received layout={short_repr(layout)}.{hint}"
        )
    return LAYOUTS[layout]


def _check_params(params: Mapping[str, Array], table: Layout) -> None:
    held = [param for parts in table.tensors.values() for param in parts]
    optional = [[param for name in group for param in table.tensors[name]] for group in table.optional]
    expected = Expected([name for name in AXES if name in held], optional)
    if not expected.fits(mapping_of(params, "params")):
        expected.refuse(params, f"`params` must hold the weights of {table.describes}.")


def _taken_apart(
    tensor: Array, parts: Mapping[str, str], sizes: Sizes, operations: Operations, *, by_kv_head: bool
) -> dict[str, Array]:
    """Split a tensor into its params: along the merged axis, or within each kv head of that axis."""
    joined, start = merged_axis(list(parts.values())), 0
    blocks = sizes["kv_heads"] if by_kv_head else 1
    shape = shape_of(tensor)
    blocked = operations.reshape(tensor, (*shape[:joined], blocks, shape[joined] // blocks, *shape[joined + 1 :]))
    params: dict[str, Array] = {}
    for param, pattern in parts.items():
        axes = axes_of(pattern)
        stop = start + sizes.product(axes[joined]) // blocks
        rest = (slice(None),) * (len(axes) - joined - 1)
        part = blocked[(slice(None),) * (joined + 1) + (slice(start, stop),) + rest]
        single = [axis for merged in axes for axis in merged]
        whole = operations.reshape(part, tuple(sizes[axis] for axis in single))
        params[param] = operations.transpose(whole, tuple(single.index(axis) for axis in AXES[param]))
        start = stop
    return params


def _put_together(
    params: Mapping[str, Array], parts: Mapping[str, str], sizes: Sizes, operations: Operations, *, by_kv_head: bool
) -> Array:
    """Join params in a tensor: along the merged axis, or within each kv head of that axis."""
    joined = merged_axis(list(parts.values()))
    blocks = sizes["kv_heads"] if by_kv_head else 1
    blocked: list[Array] = []
    for param, pattern in parts.items():
        axes = axes_of(pattern)
        order = tuple(AXES[param].index(axis) for merged in axes for axis in merged)
        shape = [sizes.product(axis) for axis in axes]
        shape[joined : joined + 1] = [blocks, shape[joined] // blocks]
        blocked.append(operations.reshape(operations.transpose(params[param], order), tuple(shape)))
    whole = blocked[0] if len(blocked) == 1 else operations.join(blocked, axis=joined + 1)
    shape = shape_of(whole)
    return operations.reshape(whole, (*shape[:joined], shape[joined] * shape[joined + 1], *shape[joined + 2 :]))

"""The layer as an object for NumPy: settings, parameters, and a call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.errors import refuse_type, refuse_value
from mha_spec.layer_object import (
    CallOptions,
    LayerObject,
    LayerOptions,
    LayerSettings,
    check_parameter_dtype,
    expand_layer_options,
)
from mha_spec.scalars import short_repr

from . import layer

if TYPE_CHECKING:
    from typing import Unpack

    from mha_spec.arrays import Array
    from mha_spec.cache import Cache

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(LayerObject):
    """Multi-head attention that holds its parameters; see `mha_spec.reference.multi_head_attention`.

    Weights start from Xavier's uniform distribution, biases at 0, gains at 1. `params` holds them by name. The
    `dropout_rate` applies only while `training` is True; a call may override it.
    """

    functions = layer

    @expand_layer_options
    def __init__(
        self,
        embed: int,
        heads: int,
        *,
        dtype: Any = "float32",
        rng: numpy.random.Generator | int | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        self.settings = LayerSettings.of(embed, heads, **options)
        self.training = False
        check_parameter_dtype(dtype, partial(numpy.empty, 0))
        draw = _generator(rng)
        self.params = {name: self._initial(name, shape, draw, dtype) for name, shape in self.settings.shapes().items()}

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        cache: Cache | None = None,
        **options: Unpack[CallOptions],
    ) -> Array | tuple[Array, Cache]:
        """Attend from the query to the key, by default the query; the value is by default the key."""
        return self.attend(query, key, value, cache=cache, **options)

    def _in_training(self, options: CallOptions) -> CallOptions:
        if self.training:
            options.setdefault("dropout_rate", self.settings.dropout_rate)
        return options

    def _initial(self, name: str, shape: tuple[int, ...], draw: numpy.random.Generator, dtype: Any) -> numpy.ndarray:
        bound = self.settings.initial_bound(name)
        if bound is None:
            return numpy.full(shape, float(name.endswith("_norm")), dtype=dtype)
        return draw.uniform(-bound, bound, shape).astype(dtype)


def _generator(rng: Any) -> numpy.random.Generator:
    try:
        return numpy.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        refuse = refuse_type if isinstance(error, TypeError) else refuse_value
        refuse(
            "MHA-PROJ-4",
            "`rng` must be a numpy.random.Generator or a seed, an integer rng>=0, "
            f"received rng={short_repr(rng)} of type {type(rng).__name__}. None draws a seed.",
        )

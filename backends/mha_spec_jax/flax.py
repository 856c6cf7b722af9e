"""The layer as a `flax.nnx` module, apart from `module` because flax is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax import nnx

from mha_spec.layer_object import CallOptions, LayerObject, LayerOptions, LayerSettings, expand_layer_options

from . import layer
from .module import initial

if TYPE_CHECKING:
    from typing import Unpack

    from jax import Array
    from jax.typing import DTypeLike

    from mha_spec.cache import Cache

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nnx.Module, LayerObject):
    """Multi-head attention with its parameters; see `mha_spec.reference.multi_head_attention`.

    The parameters are `nnx.Param`s under the names of `params`. `dropout_rate` applies between `train()` and `eval()`,
    with keys of the stream `dropout` of `rngs`; a new layer is in training, as the layers of flax are.
    """

    functions = layer

    @expand_layer_options
    def __init__(
        self,
        embed: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = "float32",
        **options: Unpack[LayerOptions],
    ) -> None:
        self.settings = LayerSettings.of(embed, heads, **options)
        self.deterministic = False
        self.rngs = rngs["dropout"].fork() if self.settings.dropout_rate else None
        for name, array in initial(self.settings, rngs.params(), param_dtype, "param_dtype").items():
            setattr(self, name, nnx.Param(array))

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        cache: Cache | None = None,
        **options: Unpack[CallOptions],
    ) -> Array | tuple[Array, Cache]:
        """Attend from the query to the key, by default the query itself; the value is by default the key."""
        return self.attend(query, key, value, cache=cache, **options)

    def _in_training(self, options: CallOptions) -> CallOptions:
        if self.rngs is not None and not self.deterministic and "dropout_rate" not in options:
            options["dropout_rate"] = self.settings.dropout_rate
            options.setdefault("dropout_key", self.rngs())
        return options

    @property
    def params(self) -> dict[str, Array]:
        """The arrays of the parameters by name, for `multi_head_attention`."""
        return {name: getattr(self, name)[...] for name in self.settings.shapes()}

    def __repr__(self) -> str:
        """Show the settings that differ from the defaults; `nnx.display` shows the parameters."""
        return LayerObject.__repr__(self)

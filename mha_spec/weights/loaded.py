"""A layer that was loaded with the configuration of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mha_spec.errors import ArgumentValueError
from mha_spec.layer_object import NORMS, LayerSettings
from mha_spec.parameters import REQUIRED

from .families import BIASES
from .operations import shape_of

if TYPE_CHECKING:
    from mha_spec.arrays import Array

__all__ = ["LoadedLayer"]

OF_SETTINGS = ("rotary", "norm_epsilon")
"""The options that a layer as an object holds."""


@dataclass(frozen=True)
class LoadedLayer:
    """The params of a layer, and all that the configuration of its model says about its attention."""

    params: dict[str, Array]
    options: dict[str, Any]
    """The options of multi_head_attention with which it computes the layer."""
    ignored: tuple[str, ...]
    """The keys of the configuration that have a value and were not read."""
    alibi: bool = False
    """True if every call needs `bias=alibi_bias(heads, q_len, kv_len)` of the backend, which depends on the lengths."""
    dropout_rate: float = 0.0
    """The rate in training, which `options` lack."""

    @property
    def settings(self) -> LayerSettings:
        """The settings of a MultiHeadAttention that holds these params: `MultiHeadAttention(**settings.arguments)`.

        Raises:
            ArgumentValueError: Some biases are missing; the object has all four or none.
        """
        missing = [name for name in BIASES if name not in self.params]
        if missing and len(missing) < len(BIASES):
            raise ArgumentValueError(
                f"`params` must hold all of {', '.join(BIASES)} or none for a MultiHeadAttention, received no "
                f"{', '.join(missing)}. Add zeros under these names, or call multi_head_attention."
            )
        w_q, w_k, w_v, w_o = (shape_of(self.params[name]) for name in REQUIRED)
        norm = next(kind for kind, names in NORMS.items() if set(names) == {n for n in self.params if "norm" in n})
        return LayerSettings.of(
            w_q[0],
            w_q[1],
            kv_heads=w_k[1],
            qk_dim=w_q[2],
            v_dim=w_v[2],
            k_embed=w_k[0],
            v_embed=w_v[0],
            out=w_o[2],
            bias=not missing,
            qk_norm=norm,
            dropout_rate=self.dropout_rate,
            **{name: self.options[name] for name in OF_SETTINGS if name in self.options},
        )

    @property
    def call_options(self) -> dict[str, Any]:
        """The options of each call of a MultiHeadAttention, which holds the others as its settings."""
        return {name: value for name, value in self.options.items() if name not in OF_SETTINGS}

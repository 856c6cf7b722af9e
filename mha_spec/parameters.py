"""The parameters of the layer: their names, their axes, and the sizes from which a layer class makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .errors import ArgumentTypeError, ArgumentValueError

__all__ = ["AXES", "REQUIRED", "LayerSizes"]

AXES = {
    "w_q": ("embed", "heads", "qk_dim"),
    "w_k": ("k_embed", "kv_heads", "qk_dim"),
    "w_v": ("v_embed", "kv_heads", "v_dim"),
    "w_o": ("heads", "v_dim", "out"),
    "b_q": ("heads", "qk_dim"),
    "b_k": ("kv_heads", "qk_dim"),
    "b_v": ("kv_heads", "v_dim"),
    "b_o": ("out",),
    "q_norm": ("qk_dim",),
    "k_norm": ("qk_dim",),
}
"""The axes of every parameter (MHA-PROJ-1, MHA-PROJ-2, MHA-PROJ-3, MHA-NORM-1)."""

REQUIRED = ("w_q", "w_k", "w_v", "w_o")
"""The parameters that a layer cannot be without."""


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """The sizes of one layer, and which of the optional parameters it has."""

    embed: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    k_embed: int
    v_embed: int
    out: int
    bias: bool = True
    qk_norm: bool = False

    @classmethod
    def of(
        cls,
        embed: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        k_embed: int | None = None,
        v_embed: int | None = None,
        out: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
    ) -> LayerSizes:
        """Fill in what was not given: qk_dim is embed // heads, v_dim is qk_dim, and every other size embed or heads.

        Raises:
            ArgumentValueError, ArgumentTypeError: A size is no integer >= 1, heads is no multiple of kv_heads, or does
                not divide embed where qk_dim is not given.
        """
        given = {"embed": embed, "heads": heads, "kv_heads": kv_heads, "qk_dim": qk_dim, "v_dim": v_dim}
        given |= {"k_embed": k_embed, "v_embed": v_embed, "out": out}
        for name, size in given.items():
            if size is not None or name in {"embed", "heads"}:
                _check_size(name, size)
        if qk_dim is None:
            if embed % heads:
                raise ArgumentValueError(
                    f"`embed` must be a multiple of heads={heads}, received embed={embed}. "
                    "Or give qk_dim, the size of one head. [MHA-PROJ-4]"
                )
            qk_dim = embed // heads
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ArgumentValueError(
                f"`heads` must be a multiple of kv_heads={kv_heads}, received heads={heads}. [MHA-HEAD-2]"
            )
        sizes = (v_dim or qk_dim, k_embed or embed, v_embed or embed, out or embed)
        return cls(embed, heads, kv_heads, qk_dim, *sizes, bias, qk_norm)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that the layer has, by name."""
        names = REQUIRED + (("b_q", "b_k", "b_v", "b_o") if self.bias else ())
        names += ("q_norm", "k_norm") if self.qk_norm else ()
        return {name: tuple(getattr(self, axis) for axis in AXES[name]) for name in names}

    def initial_bound(self, name: str) -> float | None:
        """The bound b of Xavier's uniform distribution on [-b, b] for a weight; None for a bias or a gain.

        b = sqrt(6 / (fan_in + fan_out)) over the matrix (in, heads * size) that the weight is, as in the paper's own
        code. Biases begin at 0, gains at 1.
        """
        if name not in REQUIRED:
            return None
        shape = self.shapes()[name]
        fans = (shape[0] * shape[1], shape[2]) if name == "w_o" else (shape[0], shape[1] * shape[2])
        return math.sqrt(6 / sum(fans))

    def __str__(self) -> str:
        """The arguments that make these sizes, less those that are the defaults: `embed=10, heads=5, kv_heads=1`."""
        default = {
            "kv_heads": self.heads,
            "qk_dim": self.embed // self.heads if self.embed % self.heads == 0 else None,
            "v_dim": self.qk_dim,
            "k_embed": self.embed,
            "v_embed": self.embed,
            "out": self.embed,
            "bias": True,
            "qk_norm": False,
        }
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = [f"{name}={value}" for name, value in values.items() if name not in default or value != default[name]]
        return ", ".join(shown)


def _check_size(name: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise ArgumentTypeError(f"`{name}` must be an integer, received {name}={size!r}. [MHA-PROJ-4]")
    if size < 1:
        raise ArgumentValueError(f"`{name}` must be {name}>=1, received {name}={size}. [MHA-PROJ-4]")

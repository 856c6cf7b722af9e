"""The layer as a `torch.nn.Module`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import init

from mha_spec.layer_checks import check_rotary
from mha_spec.parameters import AXES, LayerSizes

from .layer import empty_cache, multi_head_attention, multi_head_attention_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from torch import Tensor

    from mha_spec.arguments import Options, WeightOptions
    from mha_spec.cache import KVCache

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(torch.nn.Module):
    """Multi-head attention with parameters of its own; see `mha_spec.reference.multi_head_attention`.

    The parameters are called as there: w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, q_norm and k_norm. `dropout_rate` holds
    in training, unless a call says another. docs/judges.md lists how `torch.nn.MultiheadAttention` differs.
    """

    def __init__(
        self,
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
        rotary: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-6,
        dropout_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes = LayerSizes.of(
            embed,
            heads,
            kv_heads=kv_heads,
            qk_dim=qk_dim,
            v_dim=v_dim,
            k_embed=k_embed,
            v_embed=v_embed,
            out=out,
            bias=bias,
            qk_norm=qk_norm,
        )
        if rotary is not None:
            check_rotary(rotary, self.sizes.qk_dim)
        self.rotary = rotary
        self.norm_epsilon = norm_epsilon
        self.dropout_rate = dropout_rate
        shapes = self.sizes.shapes()
        self._names = tuple(shapes)
        for name in AXES:
            made = torch.empty(shapes[name], device=device, dtype=dtype) if name in shapes else None
            self.register_parameter(name, None if made is None else torch.nn.Parameter(made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin again: weights from Xavier's uniform distribution, biases 0, gains 1."""
        for name, parameter in self.params.items():
            bound = self.sizes.initial_bound(name)
            if bound is None:
                init.constant_(parameter, float(name.endswith("_norm")))
            else:
                init.uniform_(parameter, -bound, bound)

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, as `multi_head_attention` takes them."""
        return {name: getattr(self, name) for name in self._names}

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[Options],
    ) -> Tensor | tuple[Tensor, KVCache]:
        """Attend from the query to the key, which is the query unless given; the value is the key unless given."""
        key = query if key is None else key
        value = key if value is None else value
        if self.training and self.dropout_rate and "dropout_rate" not in options:
            options["dropout_rate"] = self.dropout_rate
        return multi_head_attention(query, key, value, self.params, cache=cache, **self._own(), **options)

    def weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        **options: Unpack[WeightOptions],
    ) -> Tensor:
        """The weights of every head, (batch, heads, q_len, kv_len), before dropout."""
        key = query if key is None else key
        return multi_head_attention_weights(query, key, self.params, cache=cache, **self._own(), **options)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of this layer's sizes without tokens."""
        sizes, like = self.sizes, self.params["w_k"].detach()
        return empty_cache(batch, sizes.kv_heads, capacity, sizes.qk_dim, sizes.v_dim, like=like)

    def extra_repr(self) -> str:
        """Sizes and options that differ from the defaults."""
        shown = [str(self.sizes)]
        defaults = {"rotary": None, "norm_epsilon": 1e-6, "dropout_rate": 0.0}
        shown += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(shown)

    def _own(self) -> dict[str, Any]:
        return {"rotary": self.rotary, "norm_epsilon": self.norm_epsilon}

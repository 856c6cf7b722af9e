"""The layer as a `torch.nn.Module`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import init

from mha_spec.errors import refuse_type, refuse_value
from mha_spec.layer_object import (
    CallOptions,
    LayerObject,
    LayerOptions,
    LayerSettings,
    check_parameter_dtype,
    expand_layer_options,
)
from mha_spec.parameters import AXES
from mha_spec.scalars import short_repr

from . import layer

if TYPE_CHECKING:
    from typing import Unpack

    from torch import Tensor

    from mha_spec.cache import Cache

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(torch.nn.Module, LayerObject):
    """Multi-head attention with its parameters; see `mha_spec.reference.multi_head_attention`.

    The parameters have the names of `mha_spec.parameters.AXES`. `dropout_rate` applies in training, unless a call has
    another rate. docs/judges.md lists how `torch.nn.MultiheadAttention` differs.
    """

    functions = layer

    @expand_layer_options
    def __init__(
        self,
        embed: int,
        heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        self.settings = LayerSettings.of(embed, heads, **options)
        check_device(device)
        check_parameter_dtype(dtype, lambda dtype: torch.empty(0, dtype=dtype))
        shapes = self.settings.shapes()
        self._names = tuple(shapes)
        for name in AXES:
            data = torch.empty(shapes[name], device=device, dtype=dtype) if name in shapes else None
            self.register_parameter(name, None if data is None else torch.nn.Parameter(data))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights from Xavier's uniform distribution, biases to 0, and gains to 1."""
        for name, parameter in self.params.items():
            bound = self.settings.initial_bound(name)
            if bound is None:
                init.constant_(parameter, float(name.endswith("_norm")))
            else:
                init.uniform_(parameter, -bound, bound)

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, as `multi_head_attention` takes them."""
        # The dictionary is faster than attributes; only a parameter with a parametrization is missing from it.
        parameters: dict[str, Any] = self._parameters
        return {name: parameters[name] if name in parameters else getattr(self, name) for name in self._names}

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        cache: Cache | None = None,
        **options: Unpack[CallOptions],
    ) -> Tensor | tuple[Tensor, Cache]:
        """Attend from the query to the key; the key defaults to the query, and the value to the key."""
        return self.attend(query, key, value, cache=cache, **options)

    def _in_training(self, options: CallOptions) -> CallOptions:
        if self.training and self.settings.dropout_rate:
            options.setdefault("dropout_rate", self.settings.dropout_rate)
        return options

    def extra_repr(self) -> str:
        """Return the settings that differ from the defaults."""
        return str(self.settings)

    @property
    def _like(self) -> Tensor:
        return self.params["w_k"].detach()


def check_device(device: object) -> None:
    """Require a device on which tensors can be made, or None for the default (MHA-ARG-4)."""
    wanted = f"`device` must be None or a device of torch, such as device='cpu', received device={short_repr(device)}"
    try:
        torch.empty(0, device=device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except TypeError:
        refuse_type("MHA-ARG-4", f"{wanted} of type {type(device).__name__}.")
    except (AssertionError, RuntimeError) as error:  # A build without CUDA raises an AssertionError.
        refuse_value("MHA-ARG-4", f"{wanted}, which torch refuses: {str(error).partition('. ')[0]}.")

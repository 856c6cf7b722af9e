"""A layer with random parameters and tokens, which every module computes in steps with a cache."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from support.libraries import MODULES, converted
from support.numbers import numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mha_spec.layer_object import LayerSettings

__all__ = ["CachedLayer"]


@dataclass(frozen=True)
class CachedLayer:
    """The settings of the layer, and the sizes of its tokens."""

    settings: LayerSettings
    batch: int
    length: int

    def operands(self, module: str, dtype: str) -> tuple[dict[str, Any], Any]:
        """Return the parameters and the tokens as arrays of the library of a module."""
        shapes = self.settings.shapes()
        params = {name: numbers(*shape, seed=seed) / 2 for seed, (name, shape) in enumerate(shapes.items())}
        tokens = numbers(self.batch, self.length, self.settings.embed)
        return converted(params, MODULES[module], dtype), converted(tokens, MODULES[module], dtype)

    def new(self, module: str, length: int, seed: int = 5) -> list[Any]:
        """Return keys and values of new tokens, to append to a cache."""
        sizes = self.settings.qk_dim, self.settings.v_dim
        arrays = [numbers(self.batch, self.settings.kv_heads, length, size, seed=seed) for size in sizes]
        return converted(arrays, MODULES[module], "float64")

    def decoded(
        self,
        module: str,
        cache: Any,
        steps: Sequence[int],
        dtype: str = "float64",
        *,
        layer: Any = None,
        counts: Sequence[Any] = (),
        **options: Any,
    ) -> tuple[list[Any], Any]:
        """Return the outputs of all steps, and the last cache; `counts` are the real tokens of each step."""
        params, x = self.operands(module, dtype)
        layer = layer or importlib.import_module(module).multi_head_attention
        options |= converted({"sinks": options["sinks"]}, MODULES[module], dtype) if "sinks" in options else {}
        outputs, first = [], 0
        for length, real in zip(steps, counts or [None] * len(steps), strict=True):
            part = x[:, first : first + length]
            output, cache = layer(part, part, part, params, cache=cache, kv_lengths=real, **options)
            outputs.append(output)
            first += length
        return outputs, cache

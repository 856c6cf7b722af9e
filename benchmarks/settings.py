"""The settings that benchmarks measure: sizes, options and visible pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy

__all__ = ["LENGTHS", "SETTINGS", "Setting"]

LENGTHS = (1.0, 0.875, 0.75, 0.625, 0.375, 0.25, 0.125, 0.0)
"""The lengths of a padded batch, as shares of the longest; half of it is padding."""


@dataclass(frozen=True)
class Setting:
    """The sizes and options of a call."""

    name: str
    query: tuple[int, int, int, int]
    kv: tuple[int, int]
    """kv_heads and kv_len."""
    causal: bool = False
    window: tuple[int, int] | None = None
    lengths: tuple[float, ...] | None = None
    """kv_lengths of the batch entries, as shares of kv_len."""
    packed: int | None = None
    """Number of sequences of one length that are packed into each batch entry."""
    step: bool = False
    """True for a decode step, which has no backward."""
    flex: bool = False
    """True if FlexAttention is measured, which takes seconds to compile."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of query, key and value."""
        keys = (self.query[0], *self.kv, self.query[3])
        return self.query, keys, keys

    def operands(self) -> list[numpy.ndarray]:
        """Draw query, key and value of standard normal numbers, in float32."""
        generator = numpy.random.default_rng(7)
        return [generator.standard_normal(shape, dtype=numpy.float32) for shape in self.shapes]

    @cached_property
    def kv_lengths(self) -> numpy.ndarray | None:
        """The kv_lengths (batch,), at least 1."""
        if self.lengths is None:
            return None
        return numpy.asarray([max(1, int(share * self.kv[1])) for share in self.lengths], numpy.int32)

    @cached_property
    def segment_ids(self) -> numpy.ndarray | None:
        """The segment ids (batch, q_len) of queries and keys."""
        if self.packed is None:
            return None
        ids = numpy.arange(self.kv[1], dtype=numpy.int32) * self.packed // self.kv[1]
        return numpy.tile(ids, (self.query[0], 1))

    @cached_property
    def visible(self) -> numpy.ndarray | None:
        """The equivalent mask (batch or 1, 1, q_len or 1, kv_len), True = may attend; None if all pairs are visible."""
        distance = numpy.arange(self.kv[1]) - numpy.arange(self.query[2])[:, None]
        constraints: list[numpy.ndarray] = []
        if self.causal:
            constraints.append((distance <= 0)[None])
        if self.window is not None:
            constraints.append(((distance >= -self.window[0]) & (distance <= self.window[1]))[None])
        if self.kv_lengths is not None:
            constraints.append(numpy.arange(self.kv[1]) < self.kv_lengths[:, None, None])
        if self.segment_ids is not None:
            constraints.append(self.segment_ids[:, :, None] == self.segment_ids[:, None, :])
        return reduce(numpy.logical_and, constraints)[:, None] if constraints else None

    @property
    def operations(self) -> float:
        """The floating-point operations of the forward: two products over the visible pairs."""
        batch, heads, q_len, size = self.query
        pairs = batch * q_len * self.kv[1]
        if self.visible is not None:
            shape = (batch, 1, q_len, self.kv[1])
            pairs = int(numpy.broadcast_to(self.visible, shape).sum())
        return 4.0 * heads * pairs * size

    def options(self, array: Any) -> dict[str, Any]:
        """Return the options of our call; `array` converts NumPy arrays to the library of the call."""
        options: dict[str, Any] = {}
        if self.causal:
            options["causal"] = True
        if self.window is not None:
            options["window"] = self.window
        if self.kv_lengths is not None:
            options["kv_lengths"] = array(self.kv_lengths)
        if self.segment_ids is not None:
            options |= dict.fromkeys(("q_segment_ids", "kv_segment_ids"), array(self.segment_ids))
        return options

    def small(self) -> Setting:
        """Return the setting with a sixteenth of the lengths and an eighth of the heads, for a trial run."""
        batch, heads, q_len, size = self.query
        heads, group = max(4, heads // 8), heads // self.kv[0]
        window = None if self.window is None else (self.window[0] // 16, self.window[1])
        packed = None if self.packed is None else 4
        sizes = (min(batch, 2), heads, max(1, q_len // 16), size)
        lengths = None if self.lengths is None else self.lengths[: sizes[0]]
        return replace(
            self,
            query=sizes,
            kv=(max(1, heads // group), self.kv[1] // 16),
            window=window,
            packed=packed,
            lengths=lengths,
        )


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("encoder", (2, 8, 512, 64), (8, 512)),
        Setting("long", (1, 8, 2048, 64), (8, 2048)),
        Setting("causal", (1, 8, 2048, 64), (8, 2048), causal=True),
        Setting("decode", (8, 32, 1, 128), (8, 2048), step=True),
        Setting("cross", (2, 8, 128, 64), (8, 1500)),
        Setting("window", (1, 8, 4096, 64), (8, 4096), window=(256, 0)),
        Setting("padded", (8, 8, 512, 64), (8, 512), lengths=LENGTHS),
        Setting("packed", (1, 8, 4096, 64), (8, 4096), packed=16),
        Setting("multi-query", (2, 8, 512, 64), (1, 512)),
    )
}
"""The settings that are measured on a CPU, in float32."""

"""The calls that are measured: sizes, options, and which pairs each of them sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy

__all__ = ["LENGTHS", "SETTINGS", "Setting"]

LENGTHS = (1.0, 0.875, 0.75, 0.625, 0.375, 0.25, 0.125, 0.0)
"""Of a padded batch, half of it real."""


@dataclass(frozen=True)
class Setting:
    """One kind of call."""

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
    """A decode step, which has no backward."""
    flex: bool = False
    """Whether FlexAttention is measured, which takes seconds to compile."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of query, key and value."""
        keys = (self.query[0], *self.kv, self.query[3])
        return self.query, keys, keys

    def operands(self) -> list[numpy.ndarray]:
        """Query, key and value of standard normal numbers, in float32."""
        generator = numpy.random.default_rng(7)
        return [generator.standard_normal(shape, dtype=numpy.float32) for shape in self.shapes]

    @cached_property
    def kv_lengths(self) -> numpy.ndarray | None:
        """(batch,), at least 1."""
        if self.lengths is None:
            return None
        return numpy.asarray([max(1, int(share * self.kv[1])) for share in self.lengths], numpy.int32)

    @cached_property
    def segment_ids(self) -> numpy.ndarray | None:
        """(batch, q_len), the same for queries and keys."""
        if self.packed is None:
            return None
        ids = numpy.arange(self.kv[1], dtype=numpy.int32) * self.packed // self.kv[1]
        return numpy.tile(ids, (self.query[0], 1))

    @cached_property
    def visible(self) -> numpy.ndarray | None:
        """The mask that says the same, (batch or 1, 1, q_len or 1, kv_len), True = may attend; None where all is."""
        distance = numpy.arange(self.kv[1]) - numpy.arange(self.query[2])[:, None]
        seen: list[numpy.ndarray] = []
        if self.causal:
            seen.append((distance <= 0)[None])
        if self.window is not None:
            seen.append(((distance >= -self.window[0]) & (distance <= self.window[1]))[None])
        if self.kv_lengths is not None:
            seen.append(numpy.arange(self.kv[1]) < self.kv_lengths[:, None, None])
        if self.segment_ids is not None:
            seen.append(self.segment_ids[:, :, None] == self.segment_ids[:, None, :])
        if not seen:
            return None
        whole = seen[0]
        for one in seen[1:]:
            whole = whole & one
        return whole[:, None]

    @property
    def operations(self) -> float:
        """Floating-point operations of the forward: two products over the visible pairs."""
        batch, heads, q_len, size = self.query
        pairs = batch * q_len * self.kv[1]
        if self.visible is not None:
            shape = (batch, 1, q_len, self.kv[1])
            pairs = int(numpy.broadcast_to(self.visible, shape).sum())
        return 4.0 * heads * pairs * size

    def options(self, array: Any) -> dict[str, Any]:
        """Our options; `array` puts NumPy arrays where they are needed."""
        found: dict[str, Any] = {}
        if self.causal:
            found["causal"] = True
        if self.window is not None:
            found["window"] = self.window
        if self.kv_lengths is not None:
            found["kv_lengths"] = array(self.kv_lengths)
        if self.segment_ids is not None:
            found |= dict.fromkeys(("q_segment_ids", "kv_segment_ids"), array(self.segment_ids))
        return found

    def small(self) -> Setting:
        """The same with a sixteenth of the length and an eighth of the heads, to see that it runs."""
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
    one.name: one
    for one in (
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
"""Those that are measured on a CPU, in float32."""

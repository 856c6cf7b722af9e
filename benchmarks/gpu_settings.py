"""The settings that gpu.py measures."""

from __future__ import annotations

from settings import LENGTHS, Setting

__all__ = ["Setting", "settings"]


def settings(*, quick: bool) -> list[Setting]:
    """Return every setting, with small sizes for a quick run."""
    everything = [
        Setting("long, causal", (4, 16, 4096, 128), (16, 4096), causal=True, flex=True),
        Setting("long", (4, 16, 4096, 128), (16, 4096)),
        Setting("long, causal, 4 heads to one", (4, 16, 4096, 128), (4, 4096), causal=True),
        Setting("encoder", (2, 8, 512, 64), (8, 512)),
        Setting("prefill, causal", (1, 8, 2048, 64), (8, 2048), causal=True),
        Setting("cross", (2, 8, 128, 64), (8, 1500)),
        Setting("window of 256", (1, 8, 4096, 64), (8, 4096), window=(256, 0), flex=True),
        Setting("padded, mean half", (8, 8, 512, 64), (8, 512), lengths=LENGTHS, flex=True),
        Setting("packed, 16 sequences", (1, 8, 4096, 64), (8, 4096), packed=16, flex=True),
        Setting("multi-query", (2, 8, 512, 64), (1, 512)),
        Setting("decode, 4 heads to one", (8, 32, 1, 128), (8, 2048), step=True),
        Setting("decode step", (1, 32, 1, 128), (8, 4096), step=True),
    ]
    return [setting.small() for setting in everything] if quick else everything

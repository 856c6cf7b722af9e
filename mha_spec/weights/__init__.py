"""The weights of others as `params`, and back: names, axes, fused and transposed tensors, rotary pairs, files.

Nothing is computed: arrays of any library are renamed, split, joined, reshaped and transposed, so that what is loaded
and saved again is the same, bit for bit. What the layer of each library looks like is data, one table in `layouts()`.
"""

from __future__ import annotations

from .conversion import layouts, load_weights, save_weights
from .files import read_safetensors, write_safetensors
from .rotary import half_split_pairs, interleaved_pairs
from .tables import Layout

__all__ = [
    "Layout",
    "half_split_pairs",
    "interleaved_pairs",
    "layouts",
    "load_weights",
    "read_safetensors",
    "save_weights",
    "write_safetensors",
]

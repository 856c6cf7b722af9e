"""Convert weights of other libraries to `params` and back: names, axes, fused tensors, rotary pairs and files.

Nothing is computed: arrays of any library are renamed, split, joined, reshaped and transposed, so that weights that
are loaded and saved again are the same to the bit. The layer of each library is described by a table in `layouts()`.
"""

from __future__ import annotations

from .conversion import layouts, load_weights, save_weights
from .files import read_safetensors, write_safetensors
from .loaded import LoadedLayer
from .rotary import half_split_pairs, interleaved_pairs
from .tables import Layout

__all__ = [
    "Layout",
    "LoadedLayer",
    "half_split_pairs",
    "interleaved_pairs",
    "layouts",
    "load_weights",
    "read_safetensors",
    "save_weights",
    "write_safetensors",
]

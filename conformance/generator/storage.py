"""Storage of arrays: in the smallest type that holds them exactly, each content once, named by its hash."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import ml_dtypes
import numpy
from safetensors.numpy import save

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["FORMAT", "Tensors", "holds", "smallest"]

FORMAT = "mha-spec-goldens/1"

NARROW_FIRST = (ml_dtypes.bfloat16, numpy.float16, numpy.float32, numpy.float64)


def holds(dtype: type, values: numpy.ndarray) -> bool:
    """Return True if a floating type holds every value exactly, including the sign of zero."""
    with numpy.errstate(over="ignore"):
        back = values.astype(dtype).astype(numpy.float64)
    equal = (back == values) & (numpy.signbit(back) == numpy.signbit(values))
    return bool((equal | (numpy.isnan(values) & numpy.isnan(back))).all())


def smallest(values: numpy.ndarray) -> numpy.ndarray:
    """Convert floats to the first of bfloat16, float16, float32, float64 that holds them, integers to int32, int64."""
    if values.dtype.kind == "f":
        return values.astype(next(dtype for dtype in NARROW_FIRST if holds(dtype, values)))
    if values.dtype.kind in "iu":
        fits = not values.size or (abs(int(values.min())) < 2**31 and abs(int(values.max())) < 2**31)
        return values.astype(numpy.int32 if fits else numpy.int64)
    return values


class Tensors:
    """The tensors of all cases by content: a tensor is named by the start of its sha256, its file by the first digit.

    Tensors of the layer are in a separate file, with shorter names.
    """

    def __init__(self) -> None:
        self._files: dict[str, dict[str, numpy.ndarray]] = {}

    def add(self, array: numpy.ndarray, *, layer: bool = False) -> dict[str, str]:
        """Keep an array and return the entry that refers to it."""
        array = numpy.require(array, requirements="C")
        label = f"{array.dtype.name}{list(array.shape)}".encode()
        name = hashlib.sha256(label + array.tobytes()).hexdigest()[: 8 if layer else 16]
        file = "layer-0.safetensors" if layer else f"tensors-{name[0]}.safetensors"
        self._files.setdefault(file, {})[name] = array
        return {"file": file, "tensor": name}

    def files(self) -> dict[str, bytes]:
        """Return the bytes of each file, which depend only on the tensors."""
        return {
            file: save(self._sorted(tensors.items()), {"format": FORMAT})
            for file, tensors in sorted(self._files.items())
        }

    @staticmethod
    def _sorted(tensors: Iterable[tuple[str, numpy.ndarray]]) -> dict[str, numpy.ndarray]:
        return dict(sorted(tensors, key=lambda item: item[0]))

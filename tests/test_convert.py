"""Arrays are converted to the library of the target and back, bit for bit."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import ml_dtypes
import numpy
import pytest

from mha_spec.arrays import dtype_name, library_of
from mha_spec_conformance.targets.conversion import (
    ConversionError,
    lay_out,
    layouts_of,
    same_bits,
    to_library,
    to_numpy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = ("float64", "float32", "float16", "bfloat16", "bool", "int32", "int64")
SHAPES = ((2, 3, 5, 7), (0, 3, 5, 7), (11,))


def sample(dtype: str, shape: tuple[int, ...]) -> numpy.ndarray:
    values = numpy.random.default_rng(7).integers(-9, 9, shape)
    array = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if array.size and dtype not in ("bool", "int32", "int64"):
        array.reshape(-1)[:3] = (numpy.nan, -numpy.inf, -0.0)
    return array


@pytest.fixture
def wide_jax() -> Iterator[None]:
    """Enable the 64-bit types of JAX for the test."""
    if find_spec("jax") is None:
        yield
        return
    import jax

    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("wide_jax")
@pytest.mark.parametrize("arrays", ["numpy", "torch", "jax", "tensorflow"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_every_bit(arrays: str, dtype: str) -> None:
    for shape in SHAPES:
        array = sample(dtype, shape)
        converted = to_library(array, arrays)
        assert library_of(converted) == arrays
        assert dtype_name(converted) == dtype
        assert tuple(converted.shape) == shape
        returned = to_numpy(converted)
        assert returned.dtype == array.dtype
        assert same_bits(returned, array)


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_hold_the_same_values(arrays: str, dtype: str) -> None:
    array = sample(dtype, (2, 3, 5, 7))
    for layout in layouts_of(arrays):
        assert same_bits(to_numpy(to_library(array, arrays, layout=layout)), array)


def test_layouts_have_the_strides_of_their_names() -> None:
    array = sample("float32", (2, 3, 5, 7))
    assert all(stride < 0 for stride in lay_out(array, "reversed").strides)
    assert lay_out(array, "strided").strides[-1] == 2 * array.itemsize
    assert numpy.isnan(lay_out(array, "strided").base[..., 1]).all()
    assert not lay_out(array, "read_only").flags.writeable
    plain = lay_out(array, "plain")
    assert plain.flags.writeable
    assert not numpy.shares_memory(plain, array)


def test_sign_of_zero_and_dtype_make_bits_differ() -> None:
    zero = numpy.zeros(3, dtype=numpy.float32)
    assert same_bits(zero, zero.copy())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.astype(numpy.float64))
    assert not same_bits(zero, zero[:2])


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "return"), ([1.0], "a list of 1"), ((), "a tuple of 0"), ("x", "type str"), (1.0, "type float")],
)
def test_value_that_is_not_an_array_is_refused(value: object, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        to_numpy(value)


def test_arrays_of_objects_are_refused() -> None:
    with pytest.raises(ConversionError, match="dtype=object"):
        to_numpy(numpy.array([None, []], dtype=object))

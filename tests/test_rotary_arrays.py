"""Frequencies of rotary embedding in arrays of a framework, which are not read, also in compiled functions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.numbers import numbers

import mha_spec
from mha_spec import ArgumentTypeError, ArgumentValueError
from mha_spec.layer_object import LayerSettings
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.targets.conversion import to_library, to_numpy
from mha_spec_conformance.testing import assert_rotary

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

BATCH, HEADS, LENGTH, SIZE, TURNED = 2, 3, 5, 11, 6
FREQUENCIES = numpy.asarray([0.71828, 0.03125, 0.0], dtype="float32")
POSITIONS = numpy.asarray([[0, 1, 2, 3, 4], [7, 8, 1000, 131071, 3]], dtype="int32")
OPTIONS: dict[str, Any] = {"rotary_dim": TURNED, "attention_factor": 1.25}
LIBRARIES = ("torch", "jax", "tensorflow")
PARAMS = {
    name: numbers(*shape, seed=seed).astype("float32")
    for seed, (name, shape) in enumerate(
        {"w_q": (7, 4, SIZE), "w_k": (7, 2, SIZE), "w_v": (7, 2, 5), "w_o": (4, 5, 13)}.items()
    )
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(f"mha_spec_{request.param}")
    return request.param


def backend(library: str) -> ModuleType:
    return sys.modules[f"mha_spec_{library}"]


def compiled(library: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as the library compiles or traces it as a whole."""
    if library == "torch":
        import torch

        return torch.compile(function, fullgraph=True, backend="eager")
    if library == "jax":
        import jax

        return jax.jit(function)
    import tensorflow

    return tensorflow.function(function)


@pytest.mark.parametrize("traced", [False, True], ids=["called", "compiled"])
@pytest.mark.parametrize("host", [False, True], ids=["positions-of-the-library", "positions-on-the-host"])
def test_frequencies_may_be_an_array_that_is_not_read(library: str, traced: bool, host: bool) -> None:
    def rotated(x: Any, positions: Any, frequencies: Any) -> Any:
        where = POSITIONS if host else positions
        return backend(library).rotary_embedding(x, where, frequencies=frequencies, **OPTIONS)

    function = compiled(library, rotated) if traced else rotated
    x = numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32")
    for change in (1, 0.5):
        arrays = [to_library(array, library) for array in (x, POSITIONS, (change * FREQUENCIES).astype("float32"))]
        output = to_numpy(function(*arrays))
        assert_rotary(output, x, POSITIONS, frequencies=change * FREQUENCIES, **OPTIONS)
        assert numpy.array_equal(output[..., TURNED:], x[..., TURNED:])


def test_frequencies_of_the_layer_may_be_an_argument_of_a_compiled_function(library: str) -> None:
    params = {name: to_library(array, library) for name, array in PARAMS.items()}

    def layer(x: Any, frequencies: Any) -> Any:
        rotary = {"frequencies": frequencies, **OPTIONS}
        return backend(library).multi_head_attention(x, x, x, params, rotary=rotary, causal=True)

    x = numbers(BATCH, LENGTH, 7, seed=11).astype("float32")
    turned = compiled(library, layer)(to_library(x, library), to_library(FREQUENCIES, library))
    on_the_host = {"rotary": {"frequencies": FREQUENCIES, **OPTIONS}, "causal": True}
    expected = bounds("multi_head_attention", {"query": x, "key": x, "value": x, **PARAMS}, on_the_host)
    errors = abs(to_numpy(turned).astype("float64") - expected.values["output"])
    assert (errors <= expected.allowances(precision("float32"))["output"]).all()


def test_a_compiled_function_may_hold_numpy_frequencies() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("mha_spec_torch")

    def rotated(x: Any) -> Any:
        return backend("torch").rotary_embedding(x, POSITIONS, frequencies=FREQUENCIES, **OPTIONS)

    x = numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32")
    output = compiled("torch", rotated)(torch.tensor(x))
    assert_rotary(to_numpy(output), x, POSITIONS, frequencies=FREQUENCIES, **OPTIONS)


BAD: dict[str, tuple[numpy.ndarray, type[Exception], str]] = {
    "too-few": (FREQUENCIES[:2], ArgumentValueError, r"\(3,\), received shape=\(2,\)"),
    "of-batch": (FREQUENCIES[None], ArgumentValueError, r"\(3,\), received shape=\(1, 3\)"),
    "integers": (numpy.asarray([1, 2, 3], dtype="int32"), ArgumentTypeError, r"dtype=int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_shape_and_dtype_of_unread_frequencies_are_checked(library: str, name: str) -> None:
    frequencies, error, message = BAD[name]
    x = to_library(numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32"), library)
    with pytest.raises(error, match=rf"`frequencies` must .*{message}.*\[MHA-ROTARY-7\]"):
        mha_spec.rotary_embedding(x, POSITIONS, frequencies=to_library(frequencies, library), **OPTIONS)


def test_frequencies_of_another_library_are_refused(library: str) -> None:
    x, frequencies = numbers(BATCH, HEADS, LENGTH, SIZE), to_library(FREQUENCIES, library)
    with pytest.raises(ArgumentTypeError, match=r"`frequencies` must be .*array of numpy.*\[MHA-ARG-4\]"):
        mha_spec.rotary_embedding(x, POSITIONS, frequencies=frequencies, **OPTIONS)


@pytest.mark.parametrize("name", ["frequencies", "sections"])
def test_masked_arrays_are_refused(name: str) -> None:
    """A mask hides numbers, which would be used as if they were there (MHA-ARG-4)."""
    numbers_of = {"frequencies": FREQUENCIES, "sections": [len(FREQUENCIES)]}
    x, masked = numbers(BATCH, HEADS, LENGTH, SIZE), numpy.ma.masked_array(numbers_of[name])
    with pytest.raises(ArgumentTypeError, match=f"`{name}` must be"):
        mha_spec.rotary_embedding(x, POSITIONS, **OPTIONS, **{name: masked})


def test_frequencies_of_an_unknown_shape_are_refused() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    x = to_library(numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32"), "tensorflow")
    for shape in (None, [None]):
        function = tensorflow.function(
            lambda frequencies: mha_spec.rotary_embedding(x, POSITIONS, frequencies=frequencies, **OPTIONS),
            input_signature=[tensorflow.TensorSpec(shape, "float32")],
            autograph=False,
        )
        with pytest.raises(ArgumentValueError, match=r"`frequencies` must have shape .*\(3,\)"):
            function(FREQUENCIES)


def test_settings_of_a_layer_hold_no_array(library: str) -> None:
    """Settings are compared and hashed, so their frequencies are numbers."""
    with pytest.raises(ArgumentTypeError, match=r"`frequencies` must be .*settings of a layer.*NumPy"):
        LayerSettings.of(22, 2, rotary={"frequencies": to_library(FREQUENCIES, library), "rotary_dim": TURNED})

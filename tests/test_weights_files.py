"""safetensors files: every dtype bit for bit, and errors of ours for impossible files, states and paths."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
import pytest
from support.numbers import numbers

from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec.weights import read_safetensors, write_safetensors
from mha_spec_conformance.targets.conversion import same_bits, to_library

if TYPE_CHECKING:
    from pathlib import Path


def test_files_keep_every_bit(tmp_path: Path) -> None:
    dtypes = (numpy.float64, numpy.float32, numpy.float16, ml_dtypes.bfloat16, numpy.int64, numpy.uint8, numpy.bool_)
    state = {numpy.dtype(dtype).name: numbers(3, 5).astype(dtype) for dtype in dtypes}
    state |= {"strided": numbers(7, 5).T[::2], "scalar": numpy.float32(3), "empty": numbers(0, 5)}
    write_safetensors(tmp_path / "state.safetensors", state, metadata={"format": "pt"})
    loaded = read_safetensors(tmp_path / "state.safetensors")
    assert set(loaded) == set(state)
    assert all(same_bits(loaded[name], numpy.asarray(state[name])) for name in state)
    assert set(read_safetensors(str(tmp_path / "state.safetensors"), prefix="float")) == {
        "float64",
        "float32",
        "float16",
    }


@pytest.mark.parametrize("library", ["torch", "jax", "tensorflow"])
def test_files_of_every_library(library: str, tmp_path: Path) -> None:
    arrays = {"a": numbers(3, 5, dtype=numpy.float32), "b": numbers(5, 7, dtype=ml_dtypes.bfloat16)}
    nested = {"layer": {name: to_library(array, library) for name, array in arrays.items()}}
    write_safetensors(tmp_path / "state.safetensors", nested)
    loaded = read_safetensors(tmp_path / "state.safetensors")
    assert all(same_bits(loaded[f"layer/{name}"], array) for name, array in arrays.items())


def test_files_of_another_format(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    write_safetensors(damaged, {"a": numbers(3, 5)})
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for path in (damaged, tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(ArgumentValueError, match="`path` must be a safetensors file"):
            read_safetensors(path)
    with pytest.raises(ArgumentValueError, match="`state` cannot be written"):
        write_safetensors(tmp_path / "absent" / "state.safetensors", {"a": numbers(3, 5)})
    with pytest.raises(ArgumentTypeError, match="received a=int"):
        write_safetensors(damaged, {"a": 3})
    with pytest.raises(ArgumentValueError, match="complex128"):
        write_safetensors(damaged, {"a": numbers(3, 5).astype(complex)})


def raw_file(path: Path, header: dict[str, Any], data: bytes = b"") -> Path:
    """Write a safetensors file with any header."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
)
def test_files_of_float8(name: str, tmp_path: Path) -> None:
    state = {"a": numbers(3, 5).astype(numpy.float16), "b": abs(numbers(5, 7)).astype(getattr(ml_dtypes, name))}
    write_safetensors(tmp_path / "state.safetensors", state)
    loaded = read_safetensors(tmp_path / "state.safetensors")
    assert list(loaded) == ["a", "b"]
    assert all(same_bits(loaded[key], state[key]) for key in state)
    assert set(read_safetensors(tmp_path / "state.safetensors", prefix="b")) == {"b"}


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_files_of_float8_tensors_of_torch(name: str, tmp_path: Path) -> None:
    import torch

    array = numbers(3, 5).astype(getattr(ml_dtypes, name))
    tensor = torch.from_numpy(array.view(numpy.uint8)).view(getattr(torch, name))
    write_safetensors(tmp_path / "state.safetensors", {"a": tensor})
    assert same_bits(read_safetensors(tmp_path / "state.safetensors")["a"], array)


def test_files_of_big_endian_arrays(tmp_path: Path) -> None:
    array = numbers(3, 5)
    write_safetensors(tmp_path / "state.safetensors", {"a": array.astype(">f8")})
    assert same_bits(read_safetensors(tmp_path / "state.safetensors")["a"], array.astype("<f8"))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F32", [1] * 100, 4), ("F32", [0, 2**62], 0), ("F32", [0, 2**63], 0), ("F8_E4M3", [0, 2**63], 0), ("F4", [4], 2)],
    ids=str,
)
def test_files_of_arrays_that_numpy_cannot_represent(dtype: str, shape: list[int], size: int, tmp_path: Path) -> None:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    path = raw_file(tmp_path / "state.safetensors", {"weight": entry}, bytes(size))
    with pytest.raises(ArgumentValueError, match="`path` holds 'weight'"):
        read_safetensors(path)


def test_a_file_whose_metadata_are_an_array(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(ArgumentValueError, match="`path` must be a safetensors file"):
        read_safetensors(raw_file(tmp_path / "state.safetensors", {"__metadata__": entry}, bytes(4)))


ARRAY = numbers(3, 5)
ITSELF: dict[str, Any] = {"other": ARRAY}
ITSELF["again"] = ITSELF


@pytest.mark.parametrize(
    ("state", "fragment"),
    [
        ({"__metadata__": ARRAY}, "must not hold an array of the name __metadata__"),
        ({"a": {"b": ARRAY}, "a/b": ARRAY + 1}, "two arrays of the name 'a/b'"),
        ({"1": ARRAY, 1: ARRAY + 1}, "two arrays of the name '1'"),
        (ITSELF, "nested deeper than 100 dictionaries"),
        ({"\ud800": ARRAY}, "cannot be written"),
    ],
)
def test_states_that_cannot_be_written(state: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match=fragment):
        write_safetensors(tmp_path / "state.safetensors", state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, [1], "text"], ids=str)
def test_metadata_that_are_not_text(metadata: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="`metadata` must"):
        write_safetensors(tmp_path / "state.safetensors", {"a": ARRAY}, metadata=metadata)


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    """safetensors renames a new file to the path, which would replace a device such as /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link", tmp_path):
        with pytest.raises(ArgumentValueError, match="`path` must be a regular file or a new name"):
            write_safetensors(path, {"a": ARRAY})
    assert pipe.is_fifo()


@pytest.mark.parametrize("path", [5, None, {}], ids=str)
def test_paths_of_another_type(path: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="`path` must be a path"):
        read_safetensors(path)
    with pytest.raises(ArgumentTypeError, match="`path` must be a path"):
        write_safetensors(path, {"a": ARRAY})


@pytest.mark.parametrize("package", ["safetensors", "ml_dtypes"])
def test_files_need_packages(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MhaSpecError, match=f"need {package}.*pip install"):
        read_safetensors(tmp_path / "state.safetensors")

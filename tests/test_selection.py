"""Which backend answers, and what is said where none can."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import pytest

import mha_spec
from mha_spec.selection import backend_for

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Python = Callable[..., subprocess.CompletedProcess[str]]

THIRD_PARTY = """
def attention(query, key, value, **options):
    return "third party"
"""
ASK_FOR_AN_ARRAY_OF_IT = """
import mha_spec

class Array:
    dtype = "float32"

Array.__module__ = "{library}.core"
print(mha_spec.attention(Array(), Array(), Array()))
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., str]:
    """Lay a distribution with one backend on a folder, as pip would, and give the folder."""

    def install(name: str, module: str, source: str = THIRD_PARTY, entry: str = "") -> str:
        (tmp_path / f"{module}.py").write_text(source)
        information = tmp_path / f"{module}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[mha_spec.backends]\n{name} = {entry or module}\n")
        return str(tmp_path)

    return install


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_numpy_arrays_are_answered_by_the_numpy_backend() -> None:
    assert backend_for(numpy.ones(1)) is mha_spec.backend("numpy")


def test_a_library_without_a_backend_of_its_own_is_answered_by_numpy() -> None:
    array_api_strict = pytest.importorskip("array_api_strict")
    assert backend_for(array_api_strict.ones(1)) is mha_spec.backend("numpy")


@pytest.mark.parametrize("value", [None, 1.5, [[1.0]], "query"], ids=lambda value: type(value).__name__)
def test_what_is_no_array_is_refused(value: object) -> None:
    with pytest.raises(mha_spec.ArgumentTypeError, match=f"`query` must be an array, received {type(value).__name__}"):
        mha_spec.attention(value, value, value)


def test_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(mha_spec.BackendError, match=r"no backend is called 'nunpy'; there are .*numpy"):
        mha_spec.backend("nunpy")


def test_third_party_is_found_and_answers_for_its_arrays(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    names = python("import mha_spec; print(*mha_spec.backend_names())", PYTHONPATH=folder)
    assert {"numpy", "tinygrad"} <= set(names.stdout.split())
    answer = python(ASK_FOR_AN_ARRAY_OF_IT.format(library="tinygrad"), PYTHONPATH=folder)
    assert answer.stdout.strip() == "third party", answer.stderr


def test_entry_point_may_name_an_object_of_a_module(python: Python, plugin: Callable[..., str]) -> None:
    source = f"class backend:\n    @staticmethod{THIRD_PARTY.replace(chr(10), chr(10) + '    ')}"
    folder = plugin("tinygrad", "mha_tinygrad", source, "mha_tinygrad:backend")
    answer = python(ASK_FOR_AN_ARRAY_OF_IT.format(library="tinygrad"), PYTHONPATH=folder)
    assert answer.stdout.strip() == "third party", answer.stderr


def test_two_backends_of_one_name_are_an_error(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("numpy", "mha_other")
    line = _last_line(python("import mha_spec; mha_spec.backend_names()", PYTHONPATH=folder))
    assert "two backends are called 'numpy'" in line
    assert "mha_other" in line
    assert "mha_spec_numpy" in line


def test_broken_backend_warns_with_its_name_and_leaves_the_others(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad", "raise RuntimeError('no driver')")
    done = python("import mha_spec; mha_spec.backend('numpy'); mha_spec.backend('tinygrad')", PYTHONPATH=folder)
    assert "RuntimeWarning: backend 'tinygrad' (mha_tinygrad) does not import: no driver" in done.stderr
    assert "mha_spec.errors.BackendError: backend 'tinygrad'" in _last_line(done)


def test_backend_without_its_framework_says_what_is_missing(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad", "import framework_that_is_not_there")
    line = _last_line(python("import mha_spec; mha_spec.backend('tinygrad')", PYTHONPATH=folder))
    assert "backend 'tinygrad' needs framework_that_is_not_there, which is not installed" in line


def test_the_environment_fixes_the_backend_at_import(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    code = "import mha_spec, numpy; x = numpy.ones((1, 1, 1, 1)); mha_spec.attention(x, x, x)"
    line = _last_line(python(code, PYTHONPATH=folder, MHA_SPEC_BACKEND="tinygrad"))
    assert "`query` must be an array of tinygrad, which MHA_SPEC_BACKEND fixes, received one of numpy" in line


def test_the_environment_may_fix_numpy_for_every_library(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    code = """
import mha_spec
from mha_spec.selection import backend_for
class Array:
    dtype = "float32"
Array.__module__ = "tinygrad.core"
print(backend_for(Array()) is mha_spec.backend("numpy"))
"""
    assert python(code, PYTHONPATH=folder, MHA_SPEC_BACKEND="numpy").stdout.strip() == "True"
    assert python(code, PYTHONPATH=folder).stdout.strip() == "False"


@pytest.mark.parametrize("name", ["", "nunpy", "NUMPY", "0"])
def test_the_environment_is_read_strictly(name: str, python: Python) -> None:
    line = _last_line(python("import mha_spec", MHA_SPEC_BACKEND=name))
    assert f"no backend is called {name!r}" in line

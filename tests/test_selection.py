"""The choice of the backend, and the errors where none can answer."""

from __future__ import annotations

import re
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

COMMAND = "import sys; from mha_spec_conformance.command import main; sys.argv = ['mha-spec', *{}]; main()"
FOURTH = """
from mha_spec_numpy import attention, attention_vjp, attention_weights, merge_attention

dtypes = ("float32",)
"""
BLIND = """
import mha_spec_numpy

dtypes = ("float32",)

def attention(query, key, value, *, mask=None):
    return mha_spec_numpy.attention(query, key, value)
"""
THIRD_PARTY = """
def attention(query, key, value, **options):
    return "third party"
"""
ASK_FOR_AN_ARRAY_OF_IT = """
import mha_spec

class Array:
    dtype = "float32"
    __mul__ = None

Array.__module__ = "{library}.core"
print(mha_spec.attention(Array(), Array(), Array()))
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., str]:
    """Install a distribution with a backend in a folder, and return the folder."""

    def install(name: str, module: str, source: str = THIRD_PARTY, entry: str = "", extra: str = "") -> str:
        (tmp_path / f"{module}.py").write_text(source)
        information = tmp_path / f"{module}-1.0.dist-info"
        information.mkdir()
        extras = f"Provides-Extra: {extra}\n" if extra else ""
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n{extras}")
        (information / "entry_points.txt").write_text(f"[mha_spec.backends]\n{name} = {entry or module}\n")
        return str(tmp_path)

    return install


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_numpy_arrays_are_answered_by_the_numpy_backend() -> None:
    assert backend_for(numpy.ones(1)) is mha_spec.backend("numpy")


def test_numpy_answers_for_a_library_without_a_backend() -> None:
    array_api_strict = pytest.importorskip("array_api_strict")
    assert backend_for(array_api_strict.ones(1)) is mha_spec.backend("numpy")


@pytest.mark.parametrize("value", [None, 1.5, [[1.0]], "query"], ids=lambda value: type(value).__name__)
def test_a_value_that_is_not_an_array_is_refused(value: object) -> None:
    with pytest.raises(mha_spec.ArgumentTypeError, match=f"`query` must be an array, received {type(value).__name__}"):
        mha_spec.attention(value, value, value)


def test_the_error_of_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(mha_spec.BackendError, match=r"no backend is called 'nunpy'; the backends are .*numpy"):
        mha_spec.backend("nunpy")


def test_a_backend_of_others_is_found_and_answers_for_its_arrays(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    names = python("import mha_spec; print(*mha_spec.backend_names())", PYTHONPATH=folder)
    assert {"numpy", "tinygrad"} <= set(names.stdout.split())
    answer = python(ASK_FOR_AN_ARRAY_OF_IT.format(library="tinygrad"), PYTHONPATH=folder)
    assert answer.stdout.strip() == "third party", answer.stderr


def test_a_function_that_a_third_party_lacks_is_named(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    ask = ASK_FOR_AN_ARRAY_OF_IT.format(library="tinygrad").replace("attention(", "attention_and_weights(Array(), ")
    line = _last_line(python(ask.replace("mha_spec.a", "mha_spec.multi_head_a"), PYTHONPATH=folder))
    expected = "backend mha_tinygrad has no function 'multi_head_attention_and_weights'"
    assert line == f"mha_spec.errors.BackendError: {expected}"


def test_entry_point_may_name_an_object_of_a_module(python: Python, plugin: Callable[..., str]) -> None:
    source = f"class backend:\n    @staticmethod{THIRD_PARTY.replace(chr(10), chr(10) + '    ')}"
    folder = plugin("tinygrad", "mha_tinygrad", source, "mha_tinygrad:backend")
    answer = python(ASK_FOR_AN_ARRAY_OF_IT.format(library="tinygrad"), PYTHONPATH=folder)
    assert answer.stdout.strip() == "third party", answer.stderr


def test_two_backends_of_the_same_name_are_an_error(python: Python, plugin: Callable[..., str]) -> None:
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


def test_the_error_of_a_backend_names_its_missing_framework(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad", "import framework_that_is_not_there")
    line = _last_line(python("import mha_spec; mha_spec.backend('tinygrad')", PYTHONPATH=folder))
    assert "backend 'tinygrad' needs framework_that_is_not_there, which is not installed" in line


def test_entry_point_to_nowhere_is_a_broken_backend(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad", entry="mha_elsewhere")
    done = python("import mha_spec; mha_spec.backend('tinygrad')", PYTHONPATH=folder)
    assert "RuntimeWarning: backend 'tinygrad' (mha_elsewhere) does not import: No module named" in done.stderr
    assert "mha_spec.errors.BackendError: backend 'tinygrad'" in _last_line(done)


def test_fourth_backend_is_judged(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad", FOURTH)
    done = python(COMMAND.format(["check", "tinygrad"]), PYTHONPATH=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^tinygrad: conformant on core, .*\((\d+) of \1 passed\)", done.stdout, re.MULTILINE), done.stdout


def test_a_wrong_backend_is_not_conformant(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad", BLIND)
    done = python(COMMAND.format(["check", "tinygrad"]), PYTHONPATH=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert ": mask-ignored, which " in done.stdout
    assert re.search(r"^tinygrad: not conformant", done.stdout, re.MULTILINE), done.stdout


def test_backends_are_listed_with_what_they_support(python: Python, plugin: Callable[..., str]) -> None:
    plugin("broken", "mha_broken", "raise RuntimeError('no driver')")
    plugin("lacking", "mha_lacking", "import framework_that_is_not_there", extra="lacking")
    done = python(COMMAND.format(["backends"]), PYTHONPATH=plugin("tinygrad", "mha_tinygrad", FOURTH))
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^(\S+) +(\S.*(?:\n .*)*)", done.stdout, re.MULTILINE))
    assert lines.keys() >= {"numpy", "broken", "lacking", "tinygrad"}
    assert lines["numpy"].startswith("mha_spec_numpy of mha-spec ")
    assert f"numpy {numpy.__version__}" in lines["numpy"]
    assert lines["tinygrad"].startswith("mha_tinygrad of mha_tinygrad 1.0\n")
    for fact in (
        r"functions +attention, .*attention_vjp",
        r"features +mask, .*window",
        r"dtypes +float32$",
        r"device +cpu$",
    ):
        assert re.search(fact, lines["tinygrad"], re.MULTILINE), fact
    assert "does not import: no driver" in lines["broken"]
    assert "not usable" in lines["broken"]
    assert "framework_that_is_not_there, which is not installed: pip install 'mha_lacking[lacking]'" in lines["lacking"]


def test_the_error_of_the_environment_lists_the_names_and_the_extra(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("lacking", "mha_lacking", "import framework_that_is_not_there", extra="lacking")
    offered = r"the backends are .*lacking \(not installed: pip install 'mha_lacking\[lacking\]'\).*numpy"
    line = _last_line(python("import mha_spec", PYTHONPATH=folder, MHA_SPEC_BACKEND="lacking"))
    assert "MHA_SPEC_BACKEND='lacking': backend 'lacking' needs framework_that_is_not_there" in line
    assert re.search(offered, line), line
    assert re.search(offered, _last_line(python("import mha_spec", PYTHONPATH=folder, MHA_SPEC_BACKEND="nunpy")))


def test_the_environment_is_read_once(python: Python) -> None:
    code = """
import os, mha_spec, numpy
os.environ["MHA_SPEC_BACKEND"] = "nunpy"
x = numpy.ones((1, 1, 1, 1))
print(mha_spec.attention(x, x, x).item())
"""
    done = python(code)
    assert done.stdout.strip() == "1.0", done.stderr


def test_a_backend_is_available_by_name_while_another_is_fixed(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    code = "import mha_spec; print(mha_spec.backend('numpy').__name__)"
    assert python(code, PYTHONPATH=folder, MHA_SPEC_BACKEND="tinygrad").stdout.strip() == "mha_spec_numpy"


def test_the_environment_fixes_the_backend_at_import(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    code = "import mha_spec, numpy; x = numpy.ones((1, 1, 1, 1)); mha_spec.attention(x, x, x)"
    line = _last_line(python(code, PYTHONPATH=folder, MHA_SPEC_BACKEND="tinygrad"))
    assert "`query` must be an array of tinygrad, which MHA_SPEC_BACKEND fixes, received an array of numpy" in line


def test_the_environment_may_fix_numpy_for_every_library(python: Python, plugin: Callable[..., str]) -> None:
    folder = plugin("tinygrad", "mha_tinygrad")
    code = """
import mha_spec
from mha_spec.selection import backend_for
class Array:
    dtype = "float32"
    __mul__ = None
Array.__module__ = "tinygrad.core"
print(backend_for(Array()) is mha_spec.backend("numpy"))
"""
    assert python(code, PYTHONPATH=folder, MHA_SPEC_BACKEND="numpy").stdout.strip() == "True"
    assert python(code, PYTHONPATH=folder).stdout.strip() == "False"


@pytest.mark.parametrize("name", ["", "nunpy", "NUMPY", "0"])
def test_the_environment_is_read_strictly(name: str, python: Python) -> None:
    line = _last_line(python("import mha_spec", MHA_SPEC_BACKEND=name))
    assert f"no backend is called {name!r}" in line


def test_the_first_call_may_be_compiled_by_torch(python: Python) -> None:
    code = """
import mha_spec, torch
x = torch.ones(1, 1, 2, 3)
print(torch.compile(mha_spec.attention, fullgraph=True, backend="eager")(x, x, x).sum().item())
"""
    done = python(code)
    assert done.stdout.strip() == "6.0", done.stderr

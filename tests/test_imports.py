"""What an import does not bring with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mha_spec

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Python = Callable[..., subprocess.CompletedProcess[str]]

FRAMEWORKS = {"jax", "keras", "onnxruntime", "tensorflow", "torch"}
SLOW = {"array_api_compat", "array_api_strict", "importlib.metadata", "jaxtyping", "ml_dtypes", "rich", "typer"}


def _loaded(python: Python, statement: str) -> set[str]:
    """Which of the watched modules are there after a statement, in a fresh interpreter."""
    watched = FRAMEWORKS | SLOW
    done = python(f"{statement}\nimport sys\nprint(*sorted({watched!r} & sys.modules.keys()))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_mha_spec_brings_numpy_and_nothing_else(python: Python) -> None:
    assert _loaded(python, "import mha_spec") == set()


def test_reference_brings_no_framework(python: Python) -> None:
    assert _loaded(python, "import mha_spec.reference") == set()


@pytest.mark.parametrize("name", mha_spec.backend_names())
def test_backend_brings_its_own_framework_alone(name: str, python: Python) -> None:
    found = _loaded(python, f"import mha_spec; mha_spec.backend({name!r})") & FRAMEWORKS
    assert found <= {name} | _loaded(python, f"import {name}")


def test_call_brings_no_framework(python: Python) -> None:
    call = "import mha_spec, numpy; x = numpy.ones((1, 2, 3, 5)); mha_spec.attention(x, x, x)"
    assert _loaded(python, call) & FRAMEWORKS == set()


@pytest.mark.parametrize("module", ["importlib.metadata", "array_api_compat.numpy", "jaxtyping"])
def test_the_tests_above_can_fail(module: str, python: Python) -> None:
    assert module.removesuffix(".numpy") in _loaded(python, f"import mha_spec, {module}")

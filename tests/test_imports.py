"""Importing a module imports no framework and no slow module without need."""

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
    """Return the watched modules that are loaded after a statement, in a fresh interpreter."""
    watched = FRAMEWORKS | SLOW
    done = python(f"{statement}\nimport sys\nprint(*sorted({watched!r} & sys.modules.keys()))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_mha_spec_imports_only_numpy(python: Python) -> None:
    assert _loaded(python, "import mha_spec") == set()


def test_the_reference_imports_no_framework(python: Python) -> None:
    assert _loaded(python, "import mha_spec.reference") == set()


@pytest.mark.parametrize("name", mha_spec.backend_names())
def test_a_backend_imports_only_its_framework(name: str, python: Python) -> None:
    loaded = _loaded(python, f"import mha_spec; mha_spec.backend({name!r})") & FRAMEWORKS
    assert loaded <= {name} | _loaded(python, f"import {name}")


def test_a_call_imports_no_framework(python: Python) -> None:
    call = "import mha_spec, numpy; x = numpy.ones((1, 2, 3, 5)); mha_spec.attention(x, x, x)"
    assert _loaded(python, call) & FRAMEWORKS == set()


@pytest.mark.parametrize("module", ["importlib.metadata", "array_api_compat.numpy", "jaxtyping"])
def test_the_tests_above_can_fail(module: str, python: Python) -> None:
    assert module.removesuffix(".numpy") in _loaded(python, f"import mha_spec, {module}")

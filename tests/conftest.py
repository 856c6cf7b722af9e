from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

    from oracle import Answer
    from playwright.sync_api import Browser

    from mha_spec_conformance.reporting.matrix import Matrix
    from mha_spec_conformance.suite.cases import Case, Suite

pytest.register_assert_rewrite("support")


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a new interpreter with further environment variables; the source tree is not on its path."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MHA_SPEC", "PYTHON"))}
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(
            command, env=clean | environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
def attention_module(request: pytest.FixtureRequest) -> ModuleType:
    """Return the functions of the specification: of the reference, of a backend, and of the public module."""
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Release the programs that JAX compiled for a module: all of them take 7 GiB at the end of a worker."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def quiet() -> Iterator[None]:
    """Ignore warnings; the compiler of torch raises some about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start headless Chromium."""
    from playwright.sync_api import sync_playwright
    from support.pages import CHROMIUM

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Read reports in which each state of the matrix occurs."""
    from support.matrix_reports import field_reports, read

    return read(tmp_path_factory.mktemp("reports"), *field_reports())


@pytest.fixture(scope="module")
def double() -> Iterator[None]:
    """Enable float64 in JAX."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """Disable most optimizations of XLA, because a program that runs once does not repay them."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def ask_oracle() -> Callable[..., dict[str, Answer]]:
    """Compute expected values as the goldens do, for a function, its arrays by name and its options."""
    from description import Description, Input
    from oracle import expect

    def ask(
        function: str, arrays: Mapping[str, numpy.ndarray], sampled_rows: int | None = None, **options: Any
    ) -> dict[str, Answer]:
        inputs = {name: Input(numpy.asarray(array)) for name, array in arrays.items()}
        return expect(Description("case", "", function, (), (), inputs, options, sampled_rows=sampled_rows))

    return ask


@pytest.fixture(scope="session")
def suite() -> Suite:
    """Load the suite."""
    from mha_spec_conformance.suite.cases import load

    return load()


@pytest.fixture(scope="session")
def smallest_first(suite: Suite) -> tuple[Case, ...]:
    """Return the cases of the suite in order of the size of their inputs."""
    return tuple(
        sorted(suite.cases, key=lambda case: sum(array.size for array in case.inputs(case.dtypes[0]).values()))
    )

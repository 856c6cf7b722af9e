from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from oracle import Answer

    from mha_spec_conformance.cases import Case, Suite


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a fresh interpreter, with further environment variables, away from the tree."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MHA_SPEC", "PYTHON"))}
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(
            command, env=clean | environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


@pytest.fixture(scope="session")
def ask_oracle() -> Callable[..., dict[str, Answer]]:
    """Give the goldens' expected values of a function, its arrays by name and its plain options."""
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
    """The cases of the suite."""
    from mha_spec_conformance.cases import load

    return load()


@pytest.fixture(scope="session")
def smallest_first(suite: Suite) -> tuple[Case, ...]:
    """The cases of the suite by the size of their inputs."""
    return tuple(
        sorted(suite.cases, key=lambda case: sum(array.size for array in case.inputs(case.dtypes[0]).values()))
    )

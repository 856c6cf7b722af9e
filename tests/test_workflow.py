"""The workflow runs every session of the noxfile, and judges every backend on every supported Python."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKFLOW = (ROOT / ".github/workflows/checks.yml").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def listed(name: str) -> list[str]:
    """Read a list of a matrix."""
    line = re.search(rf"^ +{name}: \[(.*)\]$", WORKFLOW, re.MULTILINE)
    assert line is not None
    return [entry.strip().strip('"') for entry in line.group(1).split(",")]


def sessions() -> list[str]:
    """Name the sessions that `nox` runs by default."""
    functions = [
        node for node in ast.parse((ROOT / "noxfile.py").read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    marked = {f.name: [ast.unparse(decorator) for decorator in f.decorator_list] for f in functions}
    return [
        name
        for name, decorators in marked.items()
        if any(d.startswith("nox.session") and "default=False" not in d for d in decorators)
    ]


def test_every_session_has_a_job() -> None:
    assert sorted([*listed("session"), "conformance"]) == sorted(sessions())


def test_every_backend_and_python_has_a_job() -> None:
    assert sorted(listed("backend")) == sorted([*PROJECT["entry-points"]["mha_spec.backends"], "mha_spec.reference"])
    versions = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.", text)]
    assert listed("python") == versions

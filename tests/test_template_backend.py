"""The template of a third party's backend: registered as its distribution would register it, found, used and judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
METADATA = "Metadata-Version: 2.1\nName: template\nVersion: 1.0\n"
ENTRY_POINTS = "[mha_spec.backends]\ntemplate = template_backend\n"


@pytest.fixture
def registered(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process in which the template's distribution is installed."""
    folder = tmp_path / "template-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(EXAMPLES)])}


def test_the_backend_is_found_and_answers(registered: dict[str, str]) -> None:
    code = (
        "import numpy, mha_spec; backend = mha_spec.backend('template'); x = numpy.ones((1, 2, 3, 5), 'float32');"
        "print(backend.__name__, backend.attention(x, x, x).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=registered, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "template_backend (1, 2, 3, 5)"


def test_it_passes_the_suite(registered: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-P", "-m", "mha_spec_conformance", "check", "template", "--json", str(report)]
    only = ["--only", "attention/*", "--dtypes", "float32,bfloat16"]
    done = subprocess.run([*command, *only], env=registered, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(report.read_text())["summary"]
    assert summary["pass"] > 500
    assert {name for name, count in summary.items() if count} == {"pass"}

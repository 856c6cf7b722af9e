"""Attention in tf.distribute: replicas that share a batch. The calls run in a process with two devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Run tensorflow_replicas.py."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", str(tests / "tensorflow_replicas.py")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["eager", "graph", "xla", "layer", "parameters"])
def test_two_replicas_give_the_result_of_a_single_device(name: str, answers: dict[str, Any]) -> None:
    assert answers[name] == []


def test_values_of_replicas_outside_of_a_replica_are_refused(answers: dict[str, Any]) -> None:
    assert answers["refusal"].startswith("`query` must be an array of tensorflow, received PerReplica")

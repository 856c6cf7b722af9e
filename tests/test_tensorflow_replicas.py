"""Attention in tf.distribute: replicas that share a batch. The calls run in a process with two devices."""

from __future__ import annotations

from typing import Any

import pytest
from support.programs import answers_of


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Run tensorflow_replicas.py."""
    return answers_of("tensorflow_replicas.py", timeout=600)


@pytest.mark.parametrize("name", ["eager", "graph", "xla", "layer", "parameters"])
def test_two_replicas_give_the_result_of_a_single_device(name: str, answers: dict[str, Any]) -> None:
    assert answers[name] == []


def test_values_of_replicas_outside_of_a_replica_are_refused(answers: dict[str, Any]) -> None:
    assert answers["refusal"].startswith("`query` must be an array of tensorflow, received PerReplica")

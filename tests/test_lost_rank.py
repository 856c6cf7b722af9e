"""A rank of a target that ends or does not answer: an outcome of the question, and the next question is answered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mha_spec_conformance.asking.selection import Selection
from mha_spec_conformance.running.runner import Settings, run

if TYPE_CHECKING:
    from mha_spec_conformance.suite.cases import Suite

DEVICES = Path(__file__).parents[1] / "conformance" / "targets" / "devices"
TARGET = f"""
import os, sys, time
from datetime import timedelta

sys.path.append({str(DEVICES)!r})
import processes
import torch.distributed as dist

processes.RANKS, processes.TIMEOUT = 2, timedelta(seconds=10)
import torch_ring

arrays, dtypes = "torch", ("float32",)
asked = None

def supports(question):
    global asked
    asked = question.id
    return True

def attention(query, key, value):
    return processes.everywhere(of_rank, dict(query=query, key=key, value=value), asked)

def of_rank(arguments, case):
    if case in LOST and dist.get_rank() == 1:
        LOST[case](600)
    return torch_ring.of_rank(arguments, None)[0]

LOST = {{"attention/one-head/coded-1": os._exit, "attention/one-query/coded-1": time.sleep}}
"""
CASES = tuple(
    f"attention/{name}" for name in ("smoke/plain", "one-head/coded-1", "one-query/coded-1", "one-key/coded-1")
)


def test_lost_rank_is_an_outcome_and_the_next_call_has_all_ranks(tmp_path: Path, suite: Suite) -> None:
    target = tmp_path / "target.py"
    target.write_text(TARGET)
    done = run(str(target), suite, Settings(Selection(CASES, ("float32",)), limit=120.0))
    outcomes = {result.ask.case.id: result.outcome for result in done.results}
    assert outcomes == dict(zip(CASES, ("pass", "error", "error", "pass"), strict=True))
    reasons = {result.ask.case.id: result.reason for result in done.results}
    assert ["Timed out" in str(reasons[case]) for case in CASES] == [False, False, True, False]

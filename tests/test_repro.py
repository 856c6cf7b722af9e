"""`mha-spec repro` reduces a case that a target fails, and prints a script that needs NumPy and the target alone."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy
import pytest

from mha_spec.errors import MhaSpecError
from mha_spec_conformance.commands.repro import repro
from mha_spec_conformance.fuzzing.reduction import call_of, reduced

if TYPE_CHECKING:
    from pathlib import Path

    from mha_spec_conformance.fuzzing.call import Call

HIDES = """
import numpy

def attention(query, key, value, *, mask=None, bias=None, causal=False):
    scores = query.astype(float) @ numpy.repeat(key, query.shape[1] // key.shape[1], 1).astype(float).swapaxes(2, 3)
    scores = scores / query.shape[3] ** 0.5
    scores = scores + (0 if bias is None else bias)
    scores = numpy.where(False if mask is None else mask, -numpy.inf, scores)
    weights = numpy.exp(scores - scores.max(axis=-1, keepdims=True))
    value = numpy.repeat(value, query.shape[1] // value.shape[1], 1)
    return (weights / weights.sum(axis=-1, keepdims=True) @ value).astype(query.dtype)
"""


def test_the_script_shows_the_fault_without_the_suite(tmp_path: Path) -> None:
    target = tmp_path / "hides.py"
    target.write_text(HIDES)
    script = repro(str(target), "attention/smoke/mask-polarity")
    assert len(script.splitlines()) <= 40
    assert "mha_spec" not in script.replace("of mha-spec", "")
    assert "mask=mask" in script
    assert "MHA-MASK-1" in script
    shapes = re.findall(r"numpy.array\\((.*?)\\)", script)
    assert all(text.count(",") <= 3 for text in shapes)
    (tmp_path / "shown.py").write_text(script)
    done = subprocess.run([sys.executable, "-P", "shown.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "and must be" in done.stdout
    assert "AssertionError" in done.stderr


def test_the_reduced_call_has_the_mistake_of_the_case_and_fits_no_other(tmp_path: Path) -> None:
    """With a single hidden key, a low fill gives what inverted polarity gives."""
    fill = "numpy.where(True if mask is None else mask, scores, -1e9)"
    target = tmp_path / "fills.py"
    target.write_text(HIDES.replace("numpy.where(False if mask is None else mask, -numpy.inf, scores)", fill))
    script = repro(str(target), "attention/mask/size-128/coded-2")
    assert "MHA-EMPTY-1" in script
    assert "polarity" not in script
    (line,) = (line for line in script.splitlines() if line.startswith("mask = "))
    assert line.count("False") < 8
    assert "True" in line


def test_a_case_that_does_not_fail_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "hides.py"
    target.write_text(HIDES)
    with pytest.raises(MhaSpecError, match="does not fail"):
        repro(str(target), "attention/smoke/plain")
    with pytest.raises(MhaSpecError, match="is not asked"):
        repro(str(target), "attention/smoke/plain", "bfloat16")
    with pytest.raises(MhaSpecError, match="no case 'nothing-at-all'"):
        repro(str(target), "nothing-at-all")


def test_a_call_is_reduced_to_what_the_fault_needs() -> None:
    arrays = {
        "query": numpy.zeros((2, 6, 5, 4)),
        "key": numpy.zeros((2, 3, 7, 4)),
        "value": numpy.zeros((2, 3, 7, 3)),
        "mask": numpy.ones((2, 1, 5, 7), bool),
        "kv_lengths": numpy.asarray([7, 6]),
    }
    call = call_of("attention", "float64", arrays, {"scale": 0.5, "softcap": 2.0}, lse=True)

    def fails(candidate: Call) -> bool:
        shapes = {name: array.shape for name, array in candidate.arrays.items()}
        assert shapes["query"][1] % shapes["key"][1] == 0
        return "kv_lengths" in shapes and shapes["query"][1] > shapes["key"][1] and shapes["key"][2] >= 3

    smallest = reduced(call, fails, 20.0)
    assert {name: array.shape for name, array in smallest.arrays.items()} == {
        "query": (1, 2, 1, 1),
        "key": (1, 1, 3, 1),
        "value": (1, 1, 3, 1),
        "kv_lengths": (1,),
    }
    assert (smallest.options, smallest.lse) == ({}, False)


def test_a_call_of_equal_lengths_stays_one() -> None:
    """A target without q_offset may refuse causal for other lengths."""
    arrays = {name: numpy.zeros((1, 1, 9, 1)) for name in ("query", "key", "value")}

    def fails(candidate: Call) -> bool:
        rows, keys = (candidate.arrays[name].shape[2] for name in ("query", "key"))
        return rows == keys >= 2

    smallest = reduced(call_of("attention", "float64", arrays, {"causal": True}, lse=False), fails, 20.0)
    assert {array.shape for array in smallest.arrays.values()} == {(1, 1, 2, 1)}

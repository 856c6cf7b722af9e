"""The program of a target in Python gives the target a process that looks like an ordinary program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy
import pytest

from mha_spec_conformance.asking.pool import Pool
from mha_spec_conformance.asking.protocol import hello_message, line_of
from mha_spec_conformance.asking.question import Question
from mha_spec_conformance.targets.loading import TargetError

if TYPE_CHECKING:
    from pathlib import Path

TARGET = """
import sys
dtypes = {dtypes}

def attention(query, key, value):
    return query

{last}
"""


@pytest.mark.parametrize("loading", [(), ("mha_spec_conformance.targets.loading:load",)])
def test_arguments_of_the_runner_are_not_those_of_the_target(tmp_path: Path, loading: tuple[str, ...]) -> None:
    path = tmp_path / "target.py"
    path.write_text(TARGET.format(dtypes=("float32",), last="raise ValueError(repr(sys.argv))"))
    with pytest.raises(TargetError) as caught, Pool(str(path), **({"loading": loading} if loading else {})):
        pass
    assert repr([str(path)]) in str(caught.value)


def serve(*arguments: str, lines: tuple[bytes, ...] = ()) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-m", "mha_spec_conformance.asking.serving", *arguments]
    return subprocess.run(command, input=b"".join(lines), capture_output=True, env=environment, timeout=60, check=False)


def test_hello_of_another_protocol_is_refused() -> None:
    served = serve("mha_spec.reference", lines=(line_of(hello_message() | {"protocol": "mha-spec-protocol/2"}),))
    (reply,) = map(json.loads, served.stdout.splitlines())
    assert reply == {
        "message": "refusal",
        "reason": "the program speaks mha-spec-protocol/1, received mha-spec-protocol/2",
    }


def test_program_without_a_target_or_without_a_runner_ends() -> None:
    assert b"usage:" in serve().stderr
    silent = serve("mha_spec.reference")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, b"", b"")


@pytest.mark.parametrize(("dtypes", "expected"), [(("float32",), "float32"), (("float64", "float32"), "float64")])
def test_jax_has_64_bits_only_for_a_target_that_claims_float64(
    tmp_path: Path, dtypes: tuple[str, ...], expected: str
) -> None:
    pytest.importorskip("jax")
    path = tmp_path / "target.py"
    last = (
        "arrays = 'jax'\ndef supports(question):\n    import jax.numpy\n    return str(jax.numpy.zeros(1, float).dtype)"
    )
    path.write_text(TARGET.format(dtypes=dtypes, last=last))
    with Pool(str(path)) as pool:
        ((_, answer),) = pool.answers([_plain_question()])
    assert (answer.kind, answer.reason) == ("unsupported", expected)


def _plain_question() -> Question:
    operands = {name: numpy.zeros((1, 1, 2, 3), numpy.float32) for name in ("query", "key", "value")}
    return Question("x", "attention", "float32", operands, {}, ("output",))

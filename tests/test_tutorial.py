"""docs/validate.md and README.md: files are written, commands are run, and every output is compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.pages_of_docs import Block, assert_printed, blocks_of, commands_of

if TYPE_CHECKING:
    from pathlib import Path


def run(command: str, folder: Path, status: int) -> tuple[str, int]:
    """Run a command of the page with the suite of this interpreter; `$?` is the exit status of the last command.

    A run on a busy machine also prints its progress, which is left out.
    """
    program = f'mha-spec() {{ "{sys.executable}" -P -m mha_spec_conformance "$@"; }}; (exit {status}); {command}'
    done = subprocess.run(
        ["bash", "-c", program], cwd=folder, capture_output=True, text=True, timeout=280, env=os.environ, check=False
    )
    assert done.stderr == ""
    return re.sub(r"^\d+ of \d+ questions, \d+ failed\n", "", done.stdout, flags=re.MULTILINE), done.returncode


def test_the_tutorial(tmp_path: Path) -> None:
    status = 0
    for block in blocks_of("validate.md", "python", "console"):
        if block.language == "python":
            name = re.match(r"# (\w+\.py)\n", block.text)
            (tmp_path / name[1]).write_text(block.text)
            continue
        for command, shown in commands_of(block):
            printed, status = run(command, tmp_path, status)
            assert_printed(shown, printed)


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(blocks_of("../README.md", "python")[0].text)
    printed, status = run("mha-spec check mine.py", tmp_path, 0)
    assert status == 1
    beginning, verdict = (
        block.text for block in blocks_of("../README.md", "") if "failures" in block.text or "mine.py: " in block.text
    )
    assert_printed(f"{beginning}...\n{verdict}", printed)


def test_a_block_has_commands_and_outputs() -> None:
    block = Block("console", "$ a b\nx\n$ c\n", 1)
    assert commands_of(block) == [("a b", "x\n"), ("c", "")]


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("a\nb c\n", "a b\n  c\n", True),
        ("a\n...\nc", "a b c", True),
        ("a ...", "a b", True),
        ("...\nc\n", "a b c", True),
        ("a\n", "a b", False),
        ("b\n...\n", "a b", False),
        ("a\n...\nb\n", "a c", False),
        ("...\na\n", "a b", False),
        ("b\n...\na\n", "a b", False),
    ],
)
def test_outputs_are_compared(shown: str, printed: str, equal: bool) -> None:
    if equal:
        assert_printed(shown, printed)
    else:
        with pytest.raises(AssertionError, match="expected"):
            assert_printed(shown, printed)

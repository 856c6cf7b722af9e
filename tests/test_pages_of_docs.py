"""The programs in the guides of docs/: the blocks of a page are run one after the other, and assert what they show."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from support.pages_of_docs import DOCS, assert_printed, blocks_of, commands_of

if TYPE_CHECKING:
    from pathlib import Path

PAGES = (
    *("backends.md", "caching.md", "gradients.md", "jax.md", "kernels.md", "numpy.md", "poison.md", "pytorch.md"),
    *("tensorflow.md", "masks.md", "packed.md", "accuracy.md"),
)


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page(page: str) -> None:
    names: dict[str, Any] = {"__name__": page}
    blocks = blocks_of(page, "python")
    assert blocks
    for block in blocks:
        code = compile("\n" * (block.line - 1) + block.text, str(DOCS / page), "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(code, names)


def test_a_backend_is_fixed_at_import(tmp_path: Path) -> None:
    for block in blocks_of("backends.md", "console"):
        for command, shown in commands_of(block):
            program = f'python() {{ "{sys.executable}" -P "$@"; }}; {command}'
            done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.stderr == ""
            assert_printed(shown, done.stdout)

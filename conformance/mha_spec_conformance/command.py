"""The `mha-spec` script; if a package of the `conformance` extra is missing, it names the package."""

from __future__ import annotations

import sys
from importlib.util import find_spec

REQUIRED = ("ml_dtypes", "rich", "safetensors", "typer")
REQUIRED_TO_FUZZ = ("hypothesis",)


def main() -> None:
    """Run the command line, or exit with the packages to install."""
    required = REQUIRED + REQUIRED_TO_FUZZ if sys.argv[1:2] == ["fuzz"] else REQUIRED
    missing = [name for name in required if find_spec(name) is None]
    if missing:
        sys.exit(f"mha-spec: the command line needs {', '.join(missing)}: pip install 'mha-spec[conformance]'")
    from mha_spec_conformance.commands.cli import main as run

    run()

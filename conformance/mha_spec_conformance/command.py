"""The `mha-spec` script; if a package of the `conformance` extra is missing, it names the package."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

REQUIRED = ("ml_dtypes", "rich", "safetensors", "typer")
REQUIRED_TO_FUZZ = ("hypothesis",)

FIXED_BACKEND = "MHA_SPEC_BACKEND"


def main() -> None:
    """Run the command line, or exit with the packages to install."""
    required = REQUIRED + REQUIRED_TO_FUZZ if sys.argv[1:2] == ["fuzz"] else REQUIRED
    missing = [name for name in required if find_spec(name) is None]
    if missing:
        sys.exit(f"mha-spec: the command line needs {', '.join(missing)}: pip install 'mha-spec[conformance]'")
    # The backend that the environment fixes is not used by the command line, only by its targets.
    fixed = os.environ.pop(FIXED_BACKEND, None)
    from mha_spec_conformance.commands.cli import main as run

    if fixed is not None:
        os.environ[FIXED_BACKEND] = fixed
    run()

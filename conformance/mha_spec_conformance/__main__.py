"""`python -m mha_spec_conformance` does what the script `mha-spec` does."""

from .command import main

main()

"""The conformance suite of mha-spec."""

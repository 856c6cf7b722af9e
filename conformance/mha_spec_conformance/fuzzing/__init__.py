"""Fuzzing: random calls over the whole option space, each judged by the reference in float64 within its allowance."""

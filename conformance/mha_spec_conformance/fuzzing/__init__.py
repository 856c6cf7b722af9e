"""Random calls over the whole option space, each judged by the reference in float64 under its own allowance."""

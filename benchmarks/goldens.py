"""Measure the processor time of reading the goldens: the least of several runs, at most 300 ms.

Run it with `python -P benchmarks/goldens.py`.
"""

from __future__ import annotations

import sys
import time

from mha_spec_conformance.suite.cases import load

LIMIT = 0.3
RUNS = 5


def seconds() -> float:
    """Read the index and the arrays, and verify the digest of each file."""
    start = time.process_time()
    load()
    return time.process_time() - start


def main() -> None:
    """Print the least time, and fail above the limit."""
    least = min(seconds() for _ in range(RUNS))
    print(f"reading the goldens: {least * 1000:.0f} ms (least of {RUNS}, limit {LIMIT * 1000:.0f} ms)")
    sys.exit(least > LIMIT)


if __name__ == "__main__":
    main()

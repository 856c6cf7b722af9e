"""A run: ask a target everything that it claims, judge the answers, and count the results."""

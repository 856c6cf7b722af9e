"""Run the suite: ask a target all that it claims, judge the answers, and count the results."""

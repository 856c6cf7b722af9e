"""The contents of the suite: functions, cases with their expected values, clauses and conventions."""

"""What the suite asks: functions, cases with their expected values, clauses and conventions."""

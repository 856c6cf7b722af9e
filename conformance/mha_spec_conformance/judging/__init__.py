"""Judge an answer: compare it with the expected values, give it an outcome, and find the mistakes that explain it."""

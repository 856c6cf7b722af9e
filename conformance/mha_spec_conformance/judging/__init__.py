"""What an answer is worth: comparison with the expected values, its outcome, and the mistakes that explain it."""

"""What several test files need: numbers, comparisons, the goldens as questions, and the worlds of the frameworks."""

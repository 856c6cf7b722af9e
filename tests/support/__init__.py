"""Code that several test files share: numbers, comparisons, the goldens as calls, and the worlds of the frameworks."""

"""Ask a target: choose the questions, turn each into calls, and make the calls in other processes."""

"""Report a run, on the terminal and as a JSON file."""

"""How the results of a run are shown: on the terminal and as a JSON file."""

"""The commands of `mha-spec`: each takes options and gives text and an exit status."""

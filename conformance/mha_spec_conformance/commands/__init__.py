"""The commands of `mha-spec`: options in, text and an exit status out."""

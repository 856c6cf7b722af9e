"""Targets: how an implementation is loaded, what it claims, and how arrays are converted for it."""

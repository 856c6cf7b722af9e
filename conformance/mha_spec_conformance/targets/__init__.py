"""Targets: load an implementation, read its claims, and convert arrays to its library and back."""
